"""Exact accuracy over the whole list."""

import numpy as np


def topk_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of videos, in percent, whose label is among the k highest scores.

    Args:
        scores: float (videos, K); a video with a NaN counts as wrong.
        labels: int (videos,).
        k: number of classes that count as an answer, at most K.
    """
    # A stable sort gives the same answer on every machine: of equal scores, the lower class index wins.
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    right = (ranked == labels[:, None]).any(axis=1) & ~np.isnan(scores).any(axis=1)
    return 100.0 * float(right.mean())


def class_accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """Top-1 in percent of each class that has videos, the lowest first. Arguments as of `topk_accuracy`."""
    of_class = {label: labels == label for label in np.unique(labels).tolist()}
    accuracies = {label: topk_accuracy(scores[videos], labels[videos], 1) for label, videos in of_class.items()}
    return dict(sorted(accuracies.items(), key=lambda item: item[1]))
