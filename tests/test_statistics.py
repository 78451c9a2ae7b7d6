"""Intervals, paired tests, calibration and the order of classes, against slow or published ones."""

import math

import numpy as np
import pytest

from engine.statistics import (
    bootstrap_interval,
    calibration,
    confused_order,
    confusion_counts,
    mcnemar_p,
    mean_class_accuracy,
    paired_difference,
    wilson_interval,
)


def test_wilson_gives_the_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20).high == 1 and wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize("share", [0.5, 0.84])
def test_bootstrap_over_videos_agrees_with_wilson(share):
    n = 1000
    right = np.arange(n) < share * n
    drawn = bootstrap_interval(lambda counts: float((counts * right).sum() / n), n)
    assert drawn == pytest.approx(wilson_interval(int(right.sum()), n), abs=0.004)
    assert drawn == bootstrap_interval(lambda counts: float((counts * right).sum() / n), n)


def test_mean_class_accuracy_weighs_classes_alike_and_follows_the_counts():
    labels, right = np.array([0, 0, 0, 2]), np.array([True, False, False, True])
    assert mean_class_accuracy(right, labels) == pytest.approx((1 / 3 + 1) / 2)
    counts = np.array([2, 0, 1, 0])
    assert mean_class_accuracy(right, labels, counts) == pytest.approx(2 / 3)


def test_mcnemar_is_the_exact_binomial_test():
    for first, second in ((0, 0), (1, 1), (3, 9), (10, 2), (0, 6), (40, 71)):
        n = first + second
        tail = sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n
        assert mcnemar_p(first, second) == pytest.approx(min(1, 2 * tail))
    assert 0 < mcnemar_p(9000, 9400) < 0.01


def test_the_interval_of_a_difference_covers_the_truth_95_times_of_100():
    rng = np.random.default_rng(0)
    cells, n, covered = np.array([0.08, 0.12, 0.6, 0.2]), 300, 0
    for _ in range(2000):
        only_first, only_second, *_ = rng.multinomial(n, cells)
        low, high = paired_difference(only_first, only_second, n)
        covered += low <= 0.04 <= high
    assert 0.935 < covered / 2000 < 0.97
    # By hand: (9.5 - 3.5) / 62 and 1.95996 * sqrt(13 - 36 / 62) / 62
    assert paired_difference(3, 9, 60) == pytest.approx((-0.01463, 0.20818), abs=2e-5)


def test_calibration_error_is_the_mean_gap_of_the_bins():
    confidence, right = np.array([0.05, 0.1, 0.15, 0.95, 1.0]), np.array([False, True, False, True, False])
    bins = calibration(confidence, right, bins=10)
    assert bins.videos.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    gaps = 2 * abs(0.5 - 0.075) + 1 * 0.15 + 2 * abs(0.5 - 0.975)
    assert bins.error == pytest.approx(gaps / 5)
    assert math.isnan(bins.accuracy[4]) and bins.accuracy[9] == 0.5


def test_a_true_share_is_calibrated():
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    assert calibration(confidence, rng.random(200_000) < confidence).error < 0.01


def test_confused_classes_stand_side_by_side_in_the_order():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 6)[rng.permutation(60)]
    labels = np.repeat(np.arange(60), 40)
    predicted = labels.copy()
    for index in np.nonzero(rng.random(len(labels)) < 0.4)[0]:
        predicted[index] = rng.choice(np.nonzero(groups == groups[labels[index]])[0])
    strays = rng.choice(len(labels), 20, replace=False)  # so that the groups are linked
    predicted[strays] = rng.integers(60, size=20)
    counts = confusion_counts(labels, predicted, 60)
    assert counts.sum() == 2400 and counts[labels[0], predicted[0]] >= 1
    order = confused_order(counts)
    assert sorted(order) == list(range(60))
    changes = (np.diff(groups[order]) != 0).sum()
    assert changes <= 10 < (np.diff(groups) != 0).sum()  # 9 is the fewest


def test_a_chain_of_confusions_comes_out_in_its_order():
    hidden = np.random.default_rng(1).permutation(12)
    counts = np.diag(np.full(12, 9))
    for a, b in zip(hidden[:-1], hidden[1:], strict=True):
        counts[a, b] = 3
    assert confused_order(counts) in (hidden.tolist(), hidden[::-1].tolist())
