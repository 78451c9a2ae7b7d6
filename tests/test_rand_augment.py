"""RandAugment of arrays against timm's of Pillow images: equal draws, and pixels that are equal or nearly equal."""

import functools

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from tiny import random_frame

from benchmarks import plain_pipeline
from datasets import rand_augment as module
from datasets.rand_augment import draw_operations, rand_augment
from utils.seeding import seeded_globals

TIMM = rand_augment_transform(
    "rand-m7-n4-mstd0.5-inc1",
    {"translate_const": 115, "img_mean": (128, 128, 128), "interpolation": Image.Resampling.BICUBIC},
)
NAMES = [op.name for op in TIMM.ops]
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def make_frames():
    """Frames that are smooth, noisy, dark, of one colour, tiny."""
    noise = np.random.default_rng(0).integers(0, 256, (37, 52, 3), dtype=np.uint8)
    smooth = np.array(random_frame((1,), (80, 60)))
    return [smooth, noise, noise // 4 + 20, np.full((30, 40, 3), (0, 128, 255), np.uint8), noise[:3, :4].copy()]


@functools.cache
def drawn(draws=600):
    """Operation -> the arguments that are drawn for it."""
    arguments = {name: [] for name in NAMES}
    for seed in range(draws):
        for name, *values in draw_operations(seed):
            arguments[name].append(tuple(values))
    return arguments


def pixels(frame, operations):
    frame, levels = rand_augment(frame, operations)
    return frame if levels is None else np.stack([levels[c][frame[..., c]] for c in range(3)], -1)


def by_pillow(name, frame, arguments):
    op = TIMM.ops[NAMES.index(name)]
    return np.asarray(op.aug_fn(Image.fromarray(frame), *arguments, **op.kwargs))


def test_the_draws_equal_those_of_timm(monkeypatch):
    done = []
    for op in TIMM.ops:
        monkeypatch.setattr(op, "aug_fn", lambda image, *values, name=op.name, **_: done.append((name, *values)))
    for seed in range(200):
        done.clear()
        with seeded_globals(seed):
            TIMM(None)
        assert list(draw_operations(seed)) == done


def test_half_of_four_operations_are_applied_with_both_signs_and_varied_magnitudes():
    arguments = drawn()
    assert abs(sum(map(len, arguments.values())) / 600 - 2) < 0.15
    assert all(50 < len(values) < 115 for values in arguments.values())
    for name in (*WARPS, "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"):
        values = np.array(arguments[name])[:, 0] - (0 if name in WARPS else 1)
        assert 0.3 < (values > 0).mean() < 0.7 and np.abs(values).std() > 0.03 * np.abs(values).mean()


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_gives_the_pixels_of_pillow(name):
    for arguments in drawn()[name][:12]:
        for frame in make_frames():
            before = frame.copy()
            difference = np.abs(pixels(frame, [(name, *arguments)]) - by_pillow(name, frame, arguments).astype(int))
            assert np.array_equal(frame, before)
            # Warps use single precision and Pillow uses double, and both truncate.
            assert difference.max() <= (1 if name in WARPS else 0)
            assert (difference > 0).mean() < 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_over_many_draws_every_operation_has_the_moments_of_the_plain_pipeline(name):
    frame = make_frames()[0]
    ours, plain = (
        np.array([[p.mean(), p.std(), p.min(), p.max()] for p in results])
        for results in (
            [pixels(frame, [(name, *arguments)]) for arguments in drawn()[name]],
            [by_pillow(name, frame, arguments) for arguments in drawn()[name]],
        )
    )
    assert np.abs(ours - plain)[:, :2].max() < 0.01  # grey levels, of each draw
    assert np.abs(ours - plain)[:, 2:].max() <= (1 if name in WARPS else 0)
    assert np.abs(ours.mean(0) - plain.mean(0)).max() < 0.02


def test_chains_of_operations_give_the_frames_of_the_plain_pipeline():
    frame, changed, apart = np.array(random_frame((1,), (160, 120))), 0, []
    for seed in range(150):
        (expected,) = plain_pipeline.rand_augment([Image.fromarray(frame)], seed)
        augmented = pixels(frame, draw_operations(seed))
        difference = np.abs(np.asarray(expected).astype(int) - augmented)
        # Where a later operation has a threshold, a difference of one level becomes large, but in few pixels.
        assert (difference > 1).mean() < 0.02 and difference.mean() < 1
        apart.append(difference.mean())
        changed += not np.array_equal(augmented, frame)
    assert np.mean(apart) < 0.05
    assert changed > 130  # each of four operations is skipped with probability 1/2, so 1 of 16 frames stays the same


def test_value_operations_take_effect_in_their_order():
    frame = make_frames()[1]
    for operations in (
        [("Invert",), ("SolarizeAdd", 77), ("PosterizeIncreasing", 2), ("Equalize",)],
        [("BrightnessIncreasing", 1.6), ("ContrastIncreasing", 0.4), ("AutoContrast",), ("Invert",)],
        [("Equalize",), ("ColorIncreasing", 1.7), ("SolarizeIncreasing", 77), ("SharpnessIncreasing", 1.5)],
    ):
        expected = frame
        for name, *arguments in operations:
            expected = by_pillow(name, expected, arguments)
        assert np.array_equal(pixels(frame, operations), expected)


@pytest.mark.parametrize("operation", [("Rotate", 25.0), ("ShearX", 0.3), ("TranslateYRel", -0.3)])
def test_pixels_from_outside_the_frame_are_grey_for_later_operations_too(operation):
    white = np.full((40, 60, 3), 255, np.uint8)
    for rest, grey, left in ([], 128, 255), ([("Invert",)], 127, 0):
        corners = pixels(white, [operation, *rest]).reshape(-1, 3)
        assert {grey, left} == set(np.unique(corners))
        assert 0.05 < (corners == grey).mean() < 0.5


def test_operations_that_use_timms_own_function_depend_on_values_only():
    handled = {*module._MEASURING, *module._MIXING}
    assert handled <= set(NAMES)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for name in set(NAMES) - handled:  # so that a table of values can replace the function
        arguments = drawn()[name][0]
        shuffled = np.random.default_rng(0).permutation(ramp.reshape(-1, 3)).reshape(ramp.shape)
        table = by_pillow(name, ramp, arguments).reshape(-1, 3)[:, 0]
        assert np.array_equal(by_pillow(name, shuffled, arguments), table[shuffled])
