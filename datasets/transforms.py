"""From decoded frames to the pixels of a clip: docs/protocol.md section 5.

Frames are uint8 arrays (H, W, 3) of one video, clips uint8 tensors (T, 3, S, S) with S = `input_size`. What is drawn at
random holds for all frames of a clip. Normalisation happens later, on the device.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from datasets.rand_augment import draw_operations, grayscale, rand_augment
from datasets.resample import Resample, Table, bicubic, bilinear, resized_twice

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Share of the training clips that lose their colour.
GRAY_SHARE = {"kinetics": 0.2, "something": 0.0}


@dataclass(frozen=True)
class TrainTransform:
    """RandAugment when `rand_aug`, resize, random-resized crop, flip, grayscale.

    A flip changes the label by `flip_labels` (see `flip_pairs`); None: no clip is flipped. `resize`: of `resize_size`.
    """

    protocol: str
    input_size: int
    resize: int | Sequence[int]
    flip_labels: Mapping[int, int] | None
    rand_aug: bool = False

    def __call__(self, frames: Sequence[np.ndarray], label: int, rng: np.random.Generator, clip: torch.Tensor) -> int:
        """Fill `clip`, uint8 (T, 3, S, S), and return its label."""
        operations = draw_operations(int(rng.integers(2**32))) if self.rand_aug else ()
        size = resize_size(*_size(frames[0]), self.resize)
        crop = draw_crop(*size, self.input_size, rng)
        flip = rng.random() < 0.5 and self.flip_labels is not None
        gray = rng.random() < GRAY_SHARE[self.protocol]

        @functools.cache  # the frames of a video seldom differ in size
        def resample_from(width: int, height: int) -> Resample:
            across, down = (
                resized_twice(bicubic(old, new), cropped)
                for old, new, cropped in zip((width, height), size, crop, strict=True)
            )
            return Resample(across.mirrored() if flip else across, down)

        for frame, pixels in zip(frames, clip.numpy(), strict=True):
            frame, levels = rand_augment(frame, operations)
            resample_from(*_size(frame))(frame, pixels, levels)
        if gray:
            grayscale(clip.numpy())
        return self.flip_labels.get(label, label) if flip else label


@dataclass(frozen=True)
class EvalTransform:
    """Resize, then 1, 3, 5 or 10 crops at fixed places; equal, bit for bit, to Pillow's on every frame alone."""

    input_size: int
    resize: int | Sequence[int]
    num_crops: int = 1

    def __call__(self, frames: Sequence[np.ndarray], places: np.ndarray | None = None) -> torch.Tensor:
        """uint8 (crops, T, 3, S, S): frames in their order, or frame `places[t]` at t."""
        places = np.arange(len(frames)) if places is None else places
        size = resize_size(*_size(frames[0]), self.resize)
        corners = crop_corners(*size, self.input_size, self.num_crops)
        upper_left, lower_right = np.min(corners, axis=0), np.max(corners, axis=0) + self.input_size

        @functools.cache
        def resample_from(width: int, height: int) -> Resample:
            return Resample(*map(_part, (width, height), size, upper_left, lower_right))

        views = torch.empty(self.num_crops, len(places), 3, self.input_size, self.input_size, dtype=torch.uint8)
        width, height = lower_right - upper_left
        window = np.empty((3, height, width), np.uint8)  # of a resized frame what the crops cover
        for number, frame in enumerate(frames):
            resample_from(*_size(frame))(frame, window)
            for view, (x, y) in zip(views.numpy(), corners - upper_left, strict=False):
                view[places == number] = window[:, y : y + self.input_size, x : x + self.input_size]
        if self.num_crops == 10:
            views[5:] = views[:5].flip(-1)
        return views


def _part(old: int, new: int, start: int, stop: int) -> Table:
    """The pixels `start` to `stop` of a line of `old` pixels after its resize to `new`."""
    return bicubic(old, new).part(start, stop)


def _size(frame: np.ndarray) -> tuple[int, int]:
    """(width, height)."""
    return frame.shape[1], frame.shape[0]


def protocol_resize(protocol: str, input_size: int) -> int | list[int]:
    """The protocol's `data.resize`: the shorter side, or [height, width], in pixels."""
    if protocol == "something":
        base = input_size if input_size > 256 else 224
        return [256 * base // 224, 320 * base // 224]
    return 256 if input_size == 224 else input_size


def resize_size(width: int, height: int, resize: int | Sequence[int]) -> tuple[int, int]:
    """(width, height) a frame is resized to before it is cropped.

    `resize` is the shorter side, or [height, width] whatever the frame's are.
    """
    if isinstance(resize, int):
        return _shorter_side_to(resize, width, height)
    return resize[1], resize[0]


def _shorter_side_to(target: int, width: int, height: int) -> tuple[int, int]:
    if width < height:
        return target, int(target * height / width)
    return int(target * width / height), target


def draw_crop(width: int, height: int, size: int, rng: np.random.Generator) -> tuple[Table, Table]:
    """A random-resized crop of frames of `width` x `height` to `size` x `size`: tables across and down.

    Without a box that fits, the shorter side is resized to `size` and a square cropped at random.
    """
    if (box := draw_box(width, height, rng)) is not None:
        left, upper, right, lower = box
        return bilinear(right - left, size).moved(left), bilinear(lower - upper, size).moved(upper)
    scaled = _shorter_side_to(size, width, height)
    left, upper, right, lower = _random_place(*scaled, size, size, rng)
    return bilinear(width, scaled[0]).part(left, right), bilinear(height, scaled[1]).part(upper, lower)


def draw_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """(left, upper, right, lower) with 0.08 to 1 of the area and an aspect of 3/4 to 4/3; None after ten misfits."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = rng.uniform(3 / 4, 4 / 3)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rng.random() < 0.5:
            w, h = h, w
        if w <= width and h <= height:
            return _random_place(width, height, w, h, rng)
    return None


def _random_place(width: int, height: int, w: int, h: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    x, y = (int(rng.integers(room, endpoint=True)) for room in (width - w, height - h))
    return x, y, x + w, y + h


def crop_corners(width: int, height: int, size: int, num_crops: int) -> list[tuple[int, int]]:
    """Upper left corners (x, y) of the test crops; ten crops are the five and their mirror images."""
    w, h = (width - size) // 4, (height - size) // 4
    centre = (2 * w, 2 * h)
    match num_crops:
        case 1:
            return [(round((width - size) / 2), round((height - size) / 2))]
        case 3:
            return [(0, 2 * h), (4 * w, 2 * h), centre]
        case 5 | 10:
            return [(0, 0), (4 * w, 0), (0, 4 * h), (4 * w, 4 * h), centre]
    raise ValueError(f"num_crops must be 1, 3, 5 or 10, got {num_crops}")


def normalize_clips(
    clips: torch.Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> torch.Tensor:
    """uint8 (B, T, 3, H, W) -> float32 of the same shape on the same device: (x / 255 - mean) / std per channel."""
    return clips.float().div_(255).sub_(_per_channel(mean, clips.device)).div_(_per_channel(std, clips.device))


@functools.cache  # moving the constants to a GPU anew would make it synchronise in every step
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
