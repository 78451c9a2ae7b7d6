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


def validation_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """`top1`, `top5` (None with five classes or fewer), `mean_class` in percent, and `loss`, the mean cross entropy.

    Arguments as of `topk_accuracy`; scores are probabilities. The loss leaves out videos with a NaN.
    """
    of_label = scores[np.arange(len(labels)), labels].astype(np.float64)
    of_classes = list(class_accuracy(scores, labels).values())
    return {
        "top1": topk_accuracy(scores, labels, 1),
        "top5": topk_accuracy(scores, labels, 5) if scores.shape[1] > 5 else None,
        "mean_class": sum(of_classes) / len(of_classes),
        "loss": float(-np.log(np.maximum(of_label[~np.isnan(of_label)], np.finfo(np.float32).tiny)).mean()),
    }
