"""Frame indices against values written out from the formulas of docs/protocol.md, section 4.

T = 8 frames of a clip unless a test gives another number.
"""

import numpy as np
import pytest

from datasets.sampling import protocol_of, sample_test, sample_train

PROTOCOLS = ("kinetics", "something")


def draws(num_frames, protocol, dense=False, num_segments=8, count=2000):
    rng = np.random.default_rng(0)
    return np.stack([sample_train(num_frames, num_segments, protocol, rng, dense) for _ in range(count)])


def test_protocol_follows_the_name_of_the_data_set():
    assert protocol_of("Something-Something-v2") == protocol_of("sth_somethingv1") == "something"
    assert protocol_of("kinetics400") == protocol_of("motion_demo") == "kinetics"


# Training: each index is uniform in a range of its own.


@pytest.mark.parametrize(
    ("num_frames", "low", "high"),
    [
        (1, [0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]),
        (5, [0, 0, 1, 2, 2, 2, 3, 4], [0, 1, 2, 2, 2, 3, 4, 4]),  # spacing 0.5: round(0.5) = 0, round(1.5) = 2
        (8, [0, 1, 2, 3, 4, 4, 5, 6], [1, 2, 3, 4, 4, 5, 6, 7]),  # spacing 0.875: round(3.5) = 4
        (9, [0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8]),
        (20, [0, 2, 5, 7, 10, 12, 14, 17], [2, 5, 7, 10, 12, 14, 17, 19]),  # spacing 2.375: round(9.5) = 10
    ],
)
def test_kinetics_training_draws_uniformly_from_intervals_that_include_both_ends(num_frames, low, high):
    samples = draws(num_frames, "kinetics")
    assert samples.min(axis=0).tolist() == low
    assert samples.max(axis=0).tolist() == high
    for column, first, last in zip(samples.T, low, high, strict=True):
        counts = np.bincount(column - first)
        assert counts.min() > 0.7 * len(samples) / (last - first + 1)


@pytest.mark.parametrize(
    ("num_frames", "low", "high"),
    [
        (9, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 8]),
        (20, [0, 2, 5, 7, 10, 12, 15, 17], [1, 4, 6, 9, 11, 14, 16, 19]),
    ],
)
def test_something_training_draws_from_disjoint_intervals(num_frames, low, high):
    samples = draws(num_frames, "something")
    assert samples.min(axis=0).tolist() == low
    assert samples.max(axis=0).tolist() == high


# (n - 1) / T * i and n / T * i round differently if the multiplication comes first: 15 would be 14, 57 would be 58, and
# the last frame of the four videos for "something" would be drawn.
@pytest.mark.parametrize(
    ("protocol", "num_frames", "edges"),
    [
        ("kinetics", 30, [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29]),
        ("kinetics", 116, [0, 8, 16, 25, 33, 41, 49, 57, 66, 74, 82, 90, 99, 107, 115]),
        ("something", 61, [0, 8, 17, 26, 34, 43, 52, 60]),
        ("something", 122, [0, 17, 34, 52, 69, 87, 104, 121]),
        ("something", 61, [0, 4, 8, 13, 17, 21, 26, 30, 34, 39, 43, 47, 52, 56, 60]),
        ("something", 122, [0, 8, 17, 26, 34, 43, 52, 60, 69, 78, 87, 95, 104, 113, 121]),
    ],
)
def test_training_divides_before_it_multiplies(protocol, num_frames, edges):
    samples = draws(num_frames, protocol, num_segments=len(edges) - 1)
    assert samples.min(axis=0).tolist() == edges[:-1]
    assert samples.max(axis=0).tolist() == [edge - (protocol == "something") for edge in edges[1:]]


def test_something_training_on_a_short_video_takes_every_frame_and_repeats_random_ones():
    assert (draws(1, "something") == 0).all()
    assert (draws(8, "something") == np.arange(8)).all()
    samples = draws(5, "something")
    assert (np.diff(samples) >= 0).all()
    counts = np.stack([np.bincount(sample, minlength=5) for sample in samples])
    assert (counts.min(axis=0) == 1).all()
    assert (counts.max(axis=0) == 4).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dense_training_starts_wherever_its_window_fits(protocol):
    assert (draws(1, protocol, dense=True) == 0).all()
    assert (draws(100, protocol, dense=True) == [0, 16, 32, 48, 64, 80, 96, 12]).all()
    assert (draws(129, protocol, dense=True) == [0, 16, 32, 48, 64, 80, 96, 112]).all()
    samples = draws(138, protocol, dense=True)
    assert set(samples[:, 0]) == set(range(10))
    assert (samples - samples[:, :1] == [0, 16, 32, 48, 64, 80, 96, 112]).all()


def test_training_indices_are_a_function_of_the_generator():
    for protocol in PROTOCOLS:
        first, second, third = (
            sample_train(100, 8, protocol, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2)
        )
        assert first == second != third


# Validation: the only clip of a one-clip test.


@pytest.mark.parametrize(
    ("protocol", "num_frames", "expected"),
    [
        ("kinetics", 1, [0, 0, 0, 0, 0, 0, 0, 0]),
        ("kinetics", 5, [0, 0, 1, 1, 2, 3, 3, 4]),
        ("kinetics", 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("kinetics", 9, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("kinetics", 100, [0, 12, 25, 37, 50, 62, 75, 87]),
        ("something", 1, [0, 0, 0, 0, 0, 0, 0, 0]),
        ("something", 5, [0, 0, 1, 2, 2, 2, 3, 4]),
        ("something", 8, [0, 1, 2, 3, 4, 4, 5, 6]),
        ("something", 9, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("something", 20, [1, 3, 6, 8, 11, 13, 15, 18]),
        ("something", 100, [6, 18, 31, 43, 56, 68, 80, 93]),
    ],
)
def test_validation(protocol, num_frames, expected):
    assert sample_test(num_frames, 8, protocol).tolist() == [expected]


def test_validation_divides_before_it_multiplies():
    # 7 * 122 / 14 is 61, 7 * (122 / 14) is 60.99...
    expected = [0, 8, 17, 26, 34, 43, 52, 60, 69, 78, 87, 95, 104, 113]
    assert sample_test(122, 14, "kinetics").tolist() == [expected]


# Test with several clips.


@pytest.mark.parametrize(
    ("num_frames", "num_clips", "expected"),
    [
        (1, 2, [[0, 0, 0, 0, 0, 0, 0, 0]] * 2),
        # n < T: starts 0 and -1; -1 + i * 5/8 = -1, -0.375, 0.25, 0.875, 1.5, 2.125, 2.75, 3.375
        (5, 1, [[0, 0, 1, 1, 2, 3, 3, 4]]),
        (5, 2, [[0, 0, 1, 1, 2, 3, 3, 4], [4, 0, 0, 0, 1, 2, 2, 3]]),
        (5, 3, [[0, 0, 1, 1, 2, 3, 3, 4], [4, 0, 0, 0, 1, 2, 2, 3], [4, 0, 0, 0, 1, 2, 2, 3]]),
        (8, 3, [[0, 1, 2, 3, 4, 5, 6, 7]] * 3),
        (9, 2, [[0, 1, 2, 3, 4, 5, 6, 7]] * 2),
        # spacing 12.5: starts floor(0, 3.83, 7.67, 11.5)
        (
            100,
            4,
            [
                [0, 12, 25, 37, 50, 62, 75, 87],
                [3, 15, 28, 40, 53, 65, 78, 90],
                [7, 19, 32, 44, 57, 69, 82, 94],
                [11, 23, 36, 48, 61, 73, 86, 98],
            ],
        ),
        (100, 2, [[0, 12, 25, 37, 50, 62, 75, 87], [11, 23, 36, 48, 61, 73, 86, 98]]),
        (
            100,
            3,
            [[0, 12, 25, 37, 50, 62, 75, 87], [5, 17, 30, 42, 55, 67, 80, 92], [11, 23, 36, 48, 61, 73, 86, 98]],
        ),
    ],
)
def test_kinetics_test_clips(num_frames, num_clips, expected):
    assert sample_test(num_frames, 8, "kinetics", num_clips).tolist() == expected


@pytest.mark.parametrize(
    ("num_frames", "num_clips", "expected"),
    [
        (1, 4, [[0, 0, 0, 0, 0, 0, 0, 0]] * 4),
        (5, 2, [[0, 0, 1, 2, 2, 2, 3, 4]] * 2),
        (8, 3, [[0, 1, 2, 3, 4, 4, 5, 6]] * 3),
        (9, 2, [[0, 1, 2, 3, 4, 5, 6, 7]] * 2),
        (20, 2, [[0, 2, 5, 7, 10, 12, 14, 17], [1, 3, 6, 8, 11, 13, 15, 18]]),  # shifts int(0.79), int(1.58)
        # spacing 12.375: shifts int(4.125), int(8.25)
        (100, 2, [[4, 16, 29, 41, 54, 66, 78, 91], [8, 20, 33, 45, 58, 70, 82, 95]]),
        (
            100,
            3,
            [[3, 15, 28, 40, 53, 65, 77, 90], [6, 18, 31, 43, 56, 68, 80, 93], [9, 21, 34, 46, 59, 71, 83, 96]],
        ),
        # shifts int(2.475), int(4.95), int(7.425), int(9.9)
        (
            100,
            4,
            [
                [2, 14, 27, 39, 52, 64, 76, 89],
                [4, 16, 29, 41, 54, 66, 78, 91],
                [7, 19, 32, 44, 57, 69, 81, 94],
                [9, 21, 34, 46, 59, 71, 83, 96],
            ],
        ),
    ],
)
def test_something_test_clips(num_frames, num_clips, expected):
    assert sample_test(num_frames, 8, "something", num_clips).tolist() == expected


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("num_frames", "num_clips", "expected"),
    [
        (1, 1, [[0, 0, 0, 0, 0, 0, 0, 0]]),
        (9, 1, [[0, 7, 5, 3, 1, 8, 6, 4]]),  # steps of 16 modulo 9
        (100, 2, [[0, 16, 32, 48, 64, 80, 96, 12]] * 2),
        (128, 3, [[0, 16, 32, 48, 64, 80, 96, 112]] * 3),
        (129, 2, [[0, 16, 32, 48, 64, 80, 96, 112], [1, 17, 33, 49, 65, 81, 97, 113]]),
        (300, 1, [[86, 102, 118, 134, 150, 166, 182, 198]]),  # the last start is 172, the start is half of it
        (
            300,
            3,
            [
                [0, 16, 32, 48, 64, 80, 96, 112],
                [86, 102, 118, 134, 150, 166, 182, 198],
                [172, 188, 204, 220, 236, 252, 268, 284],
            ],
        ),
    ],
)
def test_dense_test_clips(protocol, num_frames, num_clips, expected):
    assert sample_test(num_frames, 8, protocol, num_clips, dense=True).tolist() == expected


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dense", [False, True])
def test_indices_are_frames_of_the_video_for_every_length(protocol, dense):
    rng = np.random.default_rng(0)
    for num_segments in (1, 4, 7, 8, 16):
        for num_frames in range(1, 150):
            clips = [sample_train(num_frames, num_segments, protocol, rng, dense)[None]]
            clips += [sample_test(num_frames, num_segments, protocol, count, dense) for count in (1, 2, 3, 4, 10)]
            indices = np.concatenate(clips)
            assert indices.shape == (21, num_segments)
            assert indices.dtype == np.int64
            assert 0 <= indices.min() <= indices.max() < num_frames
