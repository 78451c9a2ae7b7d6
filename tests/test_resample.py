"""The compiled resize against Pillow: bit-equal for one resize, equal up to one rounding for two in one."""

import numpy as np
import pytest
from PIL import Image
from tiny import pillow_resize, random_frame

from datasets.resample import Resample, bicubic, bilinear, resized_twice, unchanged

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resampled(frame, across, down, levels=None):
    out = np.empty((3, len(down.first), len(across.first)), np.uint8)
    Resample(across, down)(frame, out, levels)
    return out.transpose(1, 2, 0)


SIZES = [
    ((427, 240), (455, 256)),
    ((340, 256), (320, 256)),  # the width changes only
    ((320, 240), (320, 256)),  # the height changes only
    ((340, 256), (340, 256)),
    ((53, 38), (320, 256)),
    ((1280, 720), (455, 256)),
    ((70, 700), (256, 2560)),
    ((3, 2), (224, 256)),
    ((1, 1), (7, 5)),
    ((300, 65), (3, 2)),
]


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_a_bicubic_resize_and_its_parts_equal_those_of_pillow(old, new):
    frame = noise(*old)
    expected = np.asarray(pillow_resize(Image.fromarray(frame), new, BICUBIC))
    across, down = bicubic(old[0], new[0]), bicubic(old[1], new[1])
    assert np.array_equal(resampled(frame, across, down), expected)
    left, upper, right, lower = new[0] // 3, new[1] // 5, new[0] // 3 + new[0] // 2 + 1, new[1] - new[1] // 4
    part = resampled(frame, across.part(left, right), down.part(upper, lower))
    assert np.array_equal(part, expected[upper:lower, left:right])


@pytest.mark.parametrize(
    ("old", "new"), [((427, 240), (455, 256)), ((340, 256), (320, 256)), ((1280, 720), (455, 256))]
)
def test_every_pillow_resizes_across_first_if_the_width_shrinks_at_least_as_much_as_the_height(old, new):
    frame = Image.fromarray(noise(*old))
    assert np.array_equal(frame.resize(new, BICUBIC), pillow_resize(frame, new, BICUBIC))


def test_random_sizes_are_resized_as_pillow_does():
    rng = np.random.default_rng(0)
    for seed in range(150):
        (width, height), new = rng.integers(1, 130, 2).tolist(), tuple(rng.integers(1, 130, 2).tolist())
        frame = noise(width, height, seed)
        for filter, table in ((BICUBIC, bicubic), (BILINEAR, bilinear)):
            expected = np.asarray(pillow_resize(Image.fromarray(frame), new, filter))
            got = resampled(frame, table(width, new[0]), table(height, new[1]))
            assert np.array_equal(got, expected), (width, height, new, filter)


def test_a_resized_crop_equals_that_of_pillow():
    frame, rng = noise(90, 70), np.random.default_rng(1)
    for _ in range(50):
        (left, right), (upper, lower) = (sorted(rng.choice(n, 2, replace=False).tolist()) for n in (91, 71))
        expected = Image.fromarray(frame).crop((left, upper, right, lower))
        expected = np.asarray(pillow_resize(expected, (48, 40), BILINEAR))
        across, down = bilinear(right - left, 48).moved(left), bilinear(lower - upper, 40).moved(upper)
        assert np.array_equal(resampled(frame, across, down), expected)
        both = resampled(frame, *(resized_twice(unchanged(n), t) for n, t in ((90, across), (70, down))))
        assert np.array_equal(both, expected)


@pytest.mark.parametrize("old", [(427, 240), (120, 160), (640, 480)])
def test_two_resizes_in_one_equal_the_two_of_pillow_up_to_rounding(old):
    frame, size = random_frame((3,), old), (341, 256)
    for box in [(0, 0, 341, 256), (20, 30, 300, 250), (111, 57, 190, 130)]:
        left, upper, right, lower = box
        expected = np.asarray(frame.resize(size, BICUBIC).crop(box).resize((224, 224), BILINEAR)).astype(int)
        across = resized_twice(bicubic(old[0], size[0]), bilinear(right - left, 224).moved(left))
        down = resized_twice(bicubic(old[1], size[1]), bilinear(lower - upper, 224).moved(upper))
        difference = resampled(np.array(frame), across, down) - expected
        assert np.abs(difference).max() <= 2
        assert abs(difference.mean()) < 0.05 and np.abs(difference).mean() < 0.4


def test_the_weights_of_a_pixel_sum_to_1():
    for table in (bicubic(427, 455), bilinear(300, 224), resized_twice(bicubic(427, 455), bilinear(455, 224))):
        assert np.allclose(table.weights.sum(1), 1, rtol=0, atol=1e-12)


def test_a_mirrored_table_mirrors_the_pixels():
    frame = noise(90, 70)
    across, down = bilinear(60, 32).moved(20), bilinear(70, 32)
    assert np.array_equal(resampled(frame, across.mirrored(), down), resampled(frame, across, down)[:, ::-1])
    same = unchanged(90).part(5, 37)
    assert np.array_equal(resampled(frame, same.mirrored(), down), resampled(frame, same, down)[:, ::-1])
    assert np.array_equal(resampled(frame, same.mirrored(), unchanged(70)), frame[:, 5:37][:, ::-1])


def test_levels_replace_the_values_before_the_resize():
    frame, levels = noise(90, 70), np.random.default_rng(2).integers(0, 256, (3, 256), dtype=np.uint8)
    replaced = np.stack([levels[c][frame[..., c]] for c in range(3)], -1)
    for across, down in ((bicubic(90, 100), bicubic(70, 64)), (unchanged(90), unchanged(70))):
        assert np.array_equal(resampled(frame, across, down, levels), resampled(replaced, across, down))
