"""How sure a result is: intervals, paired tests, calibration, and the order of a confusion matrix.

Letters: n videos, K classes. A result is "right" or "wrong"; shares are between 0 and 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054  # of the normal distribution: 95 % lie within
RESAMPLES = 2000
BINS = 15


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def wilson_interval(right: float, n: int) -> Interval:
    """The 95 % interval of Wilson for a share of which `right` of n were seen; (0, 1) for n = 0."""
    if n == 0:
        return Interval(0.0, 1.0)
    share = right / n
    centre = share + Z * Z / (2 * n)
    spread = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + Z * Z / n) for sign in (-1, 1))
    # At 0 and n the bounds are exact; floating point would leave them beside it.
    return Interval(0.0 if right == 0 else low, 1.0 if right == n else high)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], n: int, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The 95 % percentile interval of a statistic over videos that are drawn with replacement.

    Args:
        statistic: of the number of times that each video was drawn, int64 (n,).
        seed: of the draws, so that the same scores give the same interval.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(np.bincount(rng.integers(n, size=n), minlength=n)) for _ in range(resamples)]
    return Interval(*np.quantile(values, (0.025, 0.975)).tolist())


def mean_class_accuracy(right: np.ndarray, labels: np.ndarray, counts: np.ndarray | None = None) -> float:
    """Mean over classes of the share of right videos; classes without a video are left out.

    Args:
        right: bool (n,).
        labels: int (n,).
        counts: int (n,), how often each video counts; None: once.
    """
    counts = np.ones(len(labels)) if counts is None else counts
    videos = np.bincount(labels, counts)
    hits = np.bincount(labels, counts * right)
    return float((hits[videos > 0] / videos[videos > 0]).mean())


def mcnemar_p(only_first: int, only_second: int) -> float:
    """The exact two-sided p of McNemar's test.

    Args:
        only_first: videos that only the first model gets right.
        only_second: videos that only the second model gets right.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    whole = math.lgamma(n + 1) - n * math.log(2)
    terms = (math.exp(whole - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(terms))


def paired_difference(only_first: int, only_second: int, n: int) -> Interval:
    """The 95 % interval of (share of the second model) - (share of the first) over the same n videos.

    Wald's interval after adding half a video to each of the four cells, as Agresti and Min (2005) propose.
    """
    first, second, total = only_first + 0.5, only_second + 0.5, n + 2
    difference = (second - first) / total
    spread = Z * math.sqrt(max(0.0, first + second - (second - first) ** 2 / total)) / total
    return Interval(max(-1.0, difference - spread), min(1.0, difference + spread))


class Calibration(NamedTuple):
    """What the highest score of a video says about its being right, in BINS bins of equal width over (0, 1].

    videos: int (BINS,)
    confidence: mean highest score of each bin, float (BINS,), NaN in an empty one
    accuracy: share of right videos of each bin, float (BINS,), NaN in an empty one
    error: expected calibration error, the mean over videos of |accuracy - confidence| of their bin
    """

    videos: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Calibration:
    """Calibration of videos with these highest scores, float (n,); `right` is bool (n,).

    A bin includes its upper end.
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    videos = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(place, confidence, bins) / videos
        accuracy = np.bincount(place, right, bins) / videos
    gaps = np.abs(accuracy - mean_confidence)[videos > 0]
    error = float((gaps * videos[videos > 0]).sum() / max(1, len(confidence)))
    return Calibration(videos, mean_confidence, accuracy, error)


def confusion_counts(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Videos of each pair, int64 (K, K): a row for each true class, a column for each predicted one."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def confused_order(confusion: np.ndarray) -> list[int]:
    """An order of the K classes that puts classes which are confused with each other side by side.

    Groups are merged step by step, always the two with the largest mean confusion between their classes. Of a group,
    the end that is confused most with an end of the other one is put next to it. Classes without an error come last.
    """
    totals = np.maximum(confusion.sum(axis=1), 1)[:, None]
    similar = confusion / totals + (confusion / totals).T
    np.fill_diagonal(similar, 0)
    between = similar.copy()  # sums over the pairs of classes of two groups
    sizes = np.ones(len(confusion))
    groups: dict[int, list[int]] = {label: [label] for label in range(len(confusion))}
    while len(groups) > 1:
        first, second = divmod(int((between / np.outer(sizes, sizes)).argmax()), len(confusion))
        if between[first, second] <= 0:
            break
        groups[first] = _joined(groups[first], groups.pop(second), similar)
        between[first] += between[second]
        between[:, first] = between[first]
        between[second] = between[:, second] = 0
        between[first, first] = 0
        sizes[first] += sizes[second]
    return [label for group in sorted(groups.values(), key=lambda group: (-len(group), group[0])) for label in group]


def _joined(a: list[int], b: list[int], similar: np.ndarray) -> list[int]:
    """Two ordered groups as one, each turned so that the ends that meet are the most similar ones."""
    ways = [(x, y) for x in (a, a[::-1]) for y in (b, b[::-1])]
    x, y = max(ways, key=lambda way: similar[way[0][-1], way[1][0]])
    return x + y
