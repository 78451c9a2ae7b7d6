"""Weights of the classes in the training loss (`solver.class_weights`).

B clips, K classes.
"""

from typing import cast

import numpy as np
import torch
from dotmap import DotMap
from torch import Tensor

from datasets.loaders import VideoLoader
from datasets.video_dataset import TrainVideoDataset


def class_weights(config: DotMap, loader: VideoLoader, device: torch.device) -> Tensor | None:
    """Return the weight of each class, float32 (K,); None without `solver.class_weights`.

    Args:
        loader: of `build_train_loader`; only `balanced` looks at its data set.
    """
    setting = config.solver.class_weights
    if setting is None:
        return None
    if setting == "balanced":
        setting = balanced_weights(expected_counts(cast(TrainVideoDataset, loader.dataset), config.data.num_classes))
    return torch.tensor(setting, dtype=torch.float32, device=device)


def expected_counts(dataset: TrainVideoDataset, num_classes: int) -> np.ndarray:
    """Return how many training videos an epoch has of each class on average, float64 (K,).

    A flip swaps the labels of left and right in half of the clips, so two such classes have the mean of their numbers.
    """
    counts = np.bincount(dataset.labels, minlength=num_classes).astype(np.float64)
    flipped = counts.copy()
    for label, other in (dataset.transform.flip_labels or {}).items():
        flipped[other] = counts[label]
    return (counts + flipped) / 2


def balanced_weights(counts: np.ndarray) -> list[float]:
    """Return the weight n / (c m) of each class of m videos, where n videos belong to c classes.

    Then every class has the same share of the loss, and the mean weight of a video is 1. A class without videos has the
    weight 0.

    Args:
        counts: videos of each class, (K,), not all 0.
    """
    present = counts > 0
    return (present * counts.sum() / (present.sum() * np.where(present, counts, 1))).tolist()


def weighted_targets(targets: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Weight the targets, so that their cross entropy is the weighted loss.

    Without mixing, the loss of a clip is its cross entropy, smoothing included, times the weight of its class. The
    share of the target that smoothing spreads over all classes has the weight of the clip's class too: with the weights
    of the classes that it falls on, rare classes of large weights would take over the targets of all clips. A clip that
    is mixed of two classes has the sum of their losses, each times its share and its weight.

    The mean over the clips of a batch is not divided by the sum of their weights, so the weight of a clip depends on no
    other clip: the gradient does not depend on how many processes or accumulated batches share the clips.

    Args:
        targets: float (B, K), class probabilities after mixing, smoothed by `smoothing`.
        weights: float (K,).

    Returns:
        float (B, K). A row sums to the weight of its clip.
    """
    spread = smoothing / targets.shape[1]
    parts = (targets - spread) * weights  # of each class, (1 - smoothing) times its share and its weight
    return parts + spread / (1 - smoothing) * parts.sum(dim=1, keepdim=True)


def describe_balance(config: DotMap, dataset: TrainVideoDataset) -> list[str]:
    """Lines for the log about `data.balance` and `solver.class_weights`; none if both are off."""
    lines = []
    if config.data.balance:
        counts = np.bincount(dataset.labels)
        classes = np.count_nonzero(counts)
        lines.append(
            f"balance: {classes} classes of {counts[counts > 0].min()} to {counts.max()} training videos, each drawn "
            f"{len(dataset) / classes:.1f} times an epoch"
        )
    setting = config.solver.class_weights
    if setting is not None:
        weights = setting
        if setting == "balanced":
            weights = balanced_weights(expected_counts(dataset, config.data.num_classes))
        lines.append(f"class weights: {'balanced, ' if setting == 'balanced' else ''}{_range(weights)}")
    return lines


def _range(weights: list[float]) -> str:
    zeros = sum(weight == 0 for weight in weights)
    positive = [weight for weight in weights if weight > 0]
    return f"from {min(positive):.4g} to {max(positive):.4g}" + (f"; 0 for {zeros} classes" if zeros else "")
