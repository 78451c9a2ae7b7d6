"""Transforms against Pillow and the plain pipeline: sizes, crops, pixels, flips and their labels, normalisation."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import eval_transform, make_frames, pillow_resize, plain_clip, train_clip, train_transform

from benchmarks import plain_pipeline
from benchmarks.plain_pipeline import CLIP_MEAN, CLIP_STD
from datasets.flips import flip_pairs
from datasets.resample import Resample, bicubic, resized_twice
from datasets.transforms import crop_corners, draw_box, draw_crop, normalize_clips, protocol_resize, resize_size
from utils.errors import ConfigError


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("protocol", "input_size", "frame", "expected"),
    [
        ("kinetics", 224, (340, 256), (340, 256)),
        ("kinetics", 224, (320, 240), (341, 256)),  # int(341.33)
        ("kinetics", 224, (240, 427), (256, 455)),  # int(455.47)
        ("kinetics", 224, (100, 100), (256, 256)),
        ("kinetics", 336, (340, 256), (446, 336)),  # int(446.25)
        ("kinetics", 64, (80, 64), (80, 64)),
        ("something", 224, (427, 240), (320, 256)),
        ("something", 224, (240, 427), (320, 256)),
        ("something", 256, (427, 240), (320, 256)),
        ("something", 336, (427, 240), (480, 384)),
    ],
)
def test_frames_are_resized_to_the_size_of_the_protocol(protocol, input_size, frame, expected):
    assert resize_size(*frame, protocol_resize(protocol, input_size)) == expected


@pytest.mark.parametrize("protocol", ["kinetics", "something"])
@pytest.mark.parametrize(
    ("resize", "frame", "expected"),
    [
        (240, (320, 240), (320, 240)),
        (240, (240, 427), (240, 427)),
        (300, (320, 256), (375, 300)),
        ([288, 512], (320, 240), (512, 288)),  # [height, width]
        ([288, 512], (240, 427), (512, 288)),
    ],
)
def test_a_resize_that_is_given_replaces_that_of_the_protocol_in_training_and_evaluation(
    protocol, resize, frame, expected
):
    assert resize_size(*frame, resize) == expected
    frames = make_frames(1, frame)
    resized = np.asarray(pillow_resize(Image.fromarray(frames[0]), expected, Image.Resampling.BICUBIC))
    (view,) = eval_transform(protocol, 16, resize=resize)(frames)
    ((x, y),) = crop_corners(*expected, 16, 1)
    assert np.array_equal(view[0].permute(1, 2, 0).numpy(), resized[y : y + 16, x : x + 16])
    clip, _ = train_clip(train_transform(protocol, 16, None, resize=resize), frames, 0, rng(5))
    height_and_width = list(reversed(expected))
    same, _ = train_clip(train_transform(protocol, 16, None, resize=height_and_width), [resized], 0, rng(5))
    assert (clip.int() - same.int()).abs().max() <= 2  # one resize rounds once, two round twice


@pytest.mark.parametrize(
    ("size", "num_crops", "expected"),
    [
        ((340, 256), 1, [(58, 16)]),
        ((341, 257), 1, [(58, 16)]),  # 58.5 and 16.5 round to the even number
        ((340, 256), 3, [(0, 16), (116, 16), (58, 16)]),
        ((341, 257), 3, [(0, 16), (116, 16), (58, 16)]),
        ((256, 455), 3, [(0, 114), (32, 114), (16, 114)]),
        ((340, 256), 5, [(0, 0), (116, 0), (0, 32), (116, 32), (58, 16)]),
        ((340, 256), 10, [(0, 0), (116, 0), (0, 32), (116, 32), (58, 16)]),
    ],
)
def test_corners_of_the_test_crops(size, num_crops, expected):
    assert crop_corners(*size, 224, num_crops) == expected


def test_another_number_of_crops_is_an_error():
    with pytest.raises(ValueError, match="1, 3, 5 or 10, got 2"):
        crop_corners(340, 256, 224, 2)


@pytest.mark.parametrize("frame_size", [(340, 256), (53, 38), (38, 53), (320, 240)])
@pytest.mark.parametrize("protocol", ["kinetics", "something"])
@pytest.mark.parametrize("num_crops", [1, 3, 5, 10])
def test_evaluation_pixels_equal_those_of_pillow_for_every_frame(protocol, num_crops, frame_size):
    frames = make_frames(3, frame_size)
    views = eval_transform(protocol, 224, num_crops)(frames)
    assert views.shape == (num_crops, 3, 3, 224, 224)
    assert views.dtype == torch.uint8
    assert views.is_contiguous()
    width, height = resize_size(*frame_size, protocol_resize(protocol, 224))
    corners = crop_corners(width, height, 224, num_crops)
    for t, frame in enumerate(frames):
        resized = pillow_resize(Image.fromarray(frame), (width, height), Image.Resampling.BICUBIC)
        crops = [resized.crop((x, y, x + 224, y + 224)) for x, y in corners]
        if num_crops == 10:
            crops += [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in crops]
        for view, crop in zip(views, crops, strict=True):
            assert np.array_equal(view[t].permute(1, 2, 0).numpy(), np.asarray(crop))


@pytest.mark.parametrize("num_crops", [1, 3, 10])
def test_places_give_the_frame_at_each_time(num_crops):
    frames, places = make_frames(3), np.array([2, 0, 0, 1, 2])
    transform = eval_transform("kinetics", 32, num_crops)
    assert torch.equal(transform(frames, places), transform(frames)[:, torch.from_numpy(places)])


@pytest.mark.parametrize("protocol", ["kinetics", "something"])
def test_evaluation_views_equal_those_of_the_plain_pipeline(protocol):
    frames = make_frames(4, (100, 70))
    plain = plain_pipeline.eval_views([Image.fromarray(frame) for frame in frames], 2, 3, protocol, 64)
    views = eval_transform(protocol, 64, 3)(frames).unflatten(1, (2, 2)).flatten(0, 1)
    assert torch.equal(normalize_clips(views, CLIP_MEAN, CLIP_STD), plain)


@pytest.mark.parametrize("protocol", ["kinetics", "something"])
@pytest.mark.parametrize("frame_size", [(53, 38), (38, 53), (427, 240)])
def test_training_pixels_and_labels_are_those_of_the_plain_pipeline_up_to_rounding(protocol, frame_size):
    frames, size = make_frames(2, frame_size), 224 if frame_size[0] > 224 else 32
    transform = train_transform(protocol, size, {3: 4})
    labels, means = set(), []
    for seed in range(12):
        clip, label = train_clip(transform, frames, 3, rng(seed))
        expected, expected_label = plain_clip(frames, 3, seed, protocol, size, {3: 4})
        difference = clip.permute(0, 2, 3, 1).numpy() - expected
        assert np.abs(difference).max() <= 3 and np.abs(difference).mean() < 0.5
        assert label == expected_label
        labels.add(label)
        means.append(difference.mean())
    assert labels == {3, 4}
    assert abs(np.mean(means)) < 0.1  # the plain pipeline rounds halves up twice, ours once


def test_training_pixels_equal_those_of_pillow_if_the_resize_changes_no_size():
    frames, boxes_and_flips = make_frames(2, (44, 32)), set()
    for seed in range(40):
        clip, label = train_clip(train_transform("kinetics", 32, {}), frames, 3, rng(seed))
        generator = rng(seed)
        box = draw_box(44, 32, generator)
        flip, gray = generator.random() < 0.5, generator.random() < 0.2
        boxes_and_flips.add((box, flip))
        for pixels, frame in zip(clip, frames, strict=True):
            crop = pillow_resize(Image.fromarray(frame).crop(box), (32, 32), Image.Resampling.BILINEAR)
            if flip:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if gray:
                crop = crop.convert("L").convert("RGB")
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(crop))
    assert len(boxes_and_flips) == 40


def test_frames_of_another_size_are_resized_to_the_size_of_the_first():
    frames = make_frames(1, (60, 40)) + make_frames(1, (40, 60))
    together = eval_transform("kinetics", 32)(frames)[0]
    assert torch.equal(together[0], eval_transform("kinetics", 32)(frames[:1])[0, 0])
    resized = pillow_resize(Image.fromarray(frames[1]), (48, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(together[1].permute(1, 2, 0), np.asarray(resized)[:, 8:40])
    clip, _ = train_clip(train_transform("kinetics", 32, {}), frames, 0, rng())
    resized = [Image.fromarray(frame).resize((48, 32), Image.Resampling.BICUBIC) for frame in frames]
    expected, _ = plain_clip([np.array(frame) for frame in resized], 0, 0, "kinetics", 32, {})
    assert np.abs(clip.permute(0, 2, 3, 1).numpy() - expected).max() <= 3


def test_boxes_stay_within_the_bounds_of_area_and_aspect_and_within_the_frame():
    generator = rng()
    boxes = np.array([draw_box(340, 256, generator) for _ in range(4000)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [340, 256]).all()
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    area, aspect = w * h / (340 * 256), w / h
    assert 0.079 < area.min() < 0.1
    assert 0.85 < area.max() <= 1.0
    assert 0.74 < aspect.min() < 0.77
    assert 1.30 < aspect.max() < 1.35
    # An aspect ratio a, uniform in 3/4..4/3, is above 1 with probability 4/7, and becomes 1/a half of the time. So wide
    # and high boxes are equally likely, except that large high boxes do not fit into the frame.
    assert abs((aspect[area < 0.3] > 1).mean() - 0.5) < 0.06
    # Boxes reach both edges of the frame.
    assert (boxes[:, 0] == 0).any()
    assert (boxes[:, 2] == 340).any()


def test_boxes_are_those_of_the_plain_pipeline():
    ours, plain = rng(), rng()
    for width, height in [(340, 256), (455, 256), (320, 256), (256, 455), (400, 30), (1000, 10)] * 300:
        assert draw_box(width, height, ours) == plain_pipeline.draw_box(width, height, plain)


def test_boxes_draw_area_aspect_swap_and_place_in_this_order():
    for seed in range(50):
        box, generator = draw_box(44, 32, rng(seed)), rng(seed)
        while True:
            area = 44 * 32 * generator.uniform(0.08, 1)
            aspect = generator.uniform(3 / 4, 4 / 3)
            sides = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            w, h = sides[::-1] if generator.random() < 0.5 else sides
            if w <= 44 and h <= 32:
                break
        x, y = generator.integers(0, 44 - w + 1), generator.integers(0, 32 - h + 1)
        assert box == (x, y, x + w, y + h)


def test_without_a_box_that_fits_a_square_is_cropped_from_the_frame_resized_to_its_shorter_side():
    # In 1000 x 10 pixels, 0.08 of the area is already a box of 28 x 28.
    assert draw_box(1000, 10, rng()) is None
    gradient = np.tile(np.linspace(0, 255, 1000).astype(np.uint8)[None, :, None], (10, 1, 3))
    resized = np.asarray(Image.fromarray(gradient).resize((800, 8), Image.Resampling.BILINEAR))
    starts = set()
    for seed in range(20):
        crop = cropped(gradient, draw_crop(1000, 10, 8, rng(seed)))
        (start,) = [x for x in range(793) if np.array_equal(resized[:, x : x + 8], crop)][:1]
        starts.add(start)
    assert len(starts) > 10


def cropped(frame, tables):
    """The crop, uint8 (H, W, 3)."""
    across, down = tables
    out = np.empty((3, len(down.first), len(across.first)), np.uint8)
    Resample(across, down)(frame, out)
    return out.transpose(1, 2, 0)


def test_the_label_follows_the_flip():
    (frame,) = make_frames(1)
    transform = train_transform("kinetics", 32, {5: 6, 6: 5})
    seen = set()
    for seed in range(20):
        crop = draw_crop(44, 32, 32, generator := rng(seed))
        resized = (bicubic(53, 44), bicubic(38, 32))
        kept = cropped(frame, [resized_twice(*both) for both in zip(resized, crop, strict=True)])
        flipped = bool(generator.random() < 0.5)
        if generator.random() < 0.2:
            kept = np.asarray(Image.fromarray(kept).convert("L").convert("RGB"))
        for label, mirrored in ((5, 6), (6, 5), (7, 7)):
            clip, out = train_clip(transform, [frame], label, rng(seed))
            assert out == (mirrored if flipped else label)
            assert np.array_equal(clip[0].permute(1, 2, 0), kept[:, ::-1] if flipped else kept)
        seen.add(flipped)
    assert seen == {False, True}


def test_half_of_the_clips_are_flipped():
    generator, transform, frames = rng(), train_transform("kinetics", 8, {0: 1}), make_frames(1, (10, 8))
    flips = sum(train_clip(transform, frames, 0, generator)[1] for _ in range(1000))
    assert 440 < flips < 560


def test_without_flips_no_clip_is_mirrored_and_every_other_draw_stays():
    frames, seen = make_frames(2), set()
    for seed in range(20):
        (mirrored, changed), (plain, label) = (
            train_clip(train_transform("kinetics", 32, flip_labels), frames, 5, rng(seed))
            for flip_labels in ({5: 6}, None)
        )
        assert label == 5 and torch.equal(plain, mirrored.flip(-1) if changed == 6 else mirrored)
        seen.add(changed)
    assert seen == {5, 6}


def test_flip_pairs_without_names():
    assert flip_pairs("something", 174, None) == {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}
    assert flip_pairs("kinetics", 400, None) == {}
    with pytest.raises(ConfigError, match="data.label_list.*not for 10; or set data.flip=False"):
        flip_pairs("something", 10, None)


@pytest.mark.parametrize("protocol", ["kinetics", "something"])
def test_flip_pairs_from_names(protocol):
    names = [
        "Pulling something from left to right",
        "Turning the camera LEFT",
        "Pulling something from right to left",
        "Left hand up",
        "Turning the camera RIGHT",
        "Right hand up",
        "leftover food",  # only part of a word
        "rightover food",
        "Looking left",  # "Looking right" is not a class
        "left and right and left",
        "move_left",
        "move_right",
        "Dropping something",
    ]
    expected = {0: 2, 2: 0, 1: 4, 4: 1, 3: 5, 5: 3, 10: 11, 11: 10}
    assert flip_pairs(protocol, len(names), names) == expected


def test_a_name_without_a_mirrored_class_is_no_pair():
    assert flip_pairs("something", 2, ["left", "up"]) == {}


def test_normalized_clips_are_pixels_over_255_minus_mean_over_std():
    clips = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(2, 3, 3, 16, 16)
    normalized = normalize_clips(clips, CLIP_MEAN, CLIP_STD)
    assert normalized.dtype == torch.float32
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(normalized.double(), (clips.double() / 255 - mean) / std, rtol=0, atol=1e-6)
    assert clips[0, 0, 0, 15, 15] == 255
