"""Exact accuracy over the whole list."""

import numpy as np


def topk_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of videos, in percent, whose label is among the k highest scores.

    Args:
        scores: float (videos, K).
        labels: int (videos,).
        k: how many classes may be named; at most K are.
    """
    # stable, so that equal scores give the same answer on every machine: the lower class index wins
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return 100.0 * float((ranked == labels[:, None]).any(axis=1).mean())
