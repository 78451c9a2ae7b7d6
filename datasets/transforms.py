"""From decoded frames to the pixels of a clip (docs/protocol.md, section 5).

Frames are uint8 arrays (H, W, 3) of one video. Clips are uint8 tensors (T, 3, H, W) with H = W = `input_size`. One
random draw holds for all frames of a clip. Normalisation happens later, on the device.

B clips (repeats counted), T frames of a clip, H, W pixels.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from datasets.rand_augment import Operation, draw_operations, grayscale, rand_augment
from datasets.resample import Resample, Table, bicubic, bilinear, resized_twice

# Protocol -> probability that a training clip is converted to grayscale.
GRAY_SHARE = {"kinetics": 0.2, "something": 0.0}
# Number of test crops -> place of the centre crop among them, in the order of `crop_corners`.
CENTRE_CROP = {1: 0, 3: 2, 5: 4, 10: 4}


@dataclass(frozen=True)
class ClipDraws:
    """What was drawn for a training clip.

    operations: of RandAugment, each timm's name and its arguments; applied before the resize
    size: (width, height) of the resized frame
    crop: tables of the crop from the resized frame, for rows and columns
    flip, gray: whether the clip is mirrored, or grey
    """

    operations: tuple[Operation, ...]
    size: tuple[int, int]
    crop: tuple[Table, Table]
    flip: bool
    gray: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The crop as (left, upper, right, lower) in pixels of the resized frame."""
        (left, right), (upper, lower) = (
            (int(table.first[0]), int(table.first[-1] + np.count_nonzero(table.weights[-1]))) for table in self.crop
        )
        return left, upper, right, lower


@dataclass(frozen=True)
class TrainTransform:
    """Augmentation of training clips: RandAugment, resize, random-resized crop, flip, grayscale.

    protocol: gives the probability of grayscale
    input_size: height and width of the clips
    resize: size of the frames before the crop, as in `resize_size`
    flip_labels: {label: label after a flip}, see `flip_pairs`; None: clips are never flipped
    rand_aug: whether RandAugment is applied
    """

    protocol: str
    input_size: int
    resize: int | Sequence[int]
    flip_labels: Mapping[int, int] | None
    rand_aug: bool = False

    def __call__(self, frames: Sequence[np.ndarray], label: int, rng: np.random.Generator, clip: torch.Tensor) -> int:
        """Write the augmented frames to `clip`, uint8 (T, 3, H, W), and return its label."""
        draws = self.draw(*_size(frames[0]), rng)

        @functools.cache  # the frames of a video rarely differ in size
        def resample_from(width: int, height: int) -> Resample:
            across, down = (
                resized_twice(bicubic(old, new), cropped)
                for old, new, cropped in zip((width, height), draws.size, draws.crop, strict=True)
            )
            return Resample(across.mirrored() if draws.flip else across, down)

        for frame, pixels in zip(frames, clip.numpy(), strict=True):
            frame, levels = rand_augment(frame, draws.operations)
            resample_from(*_size(frame))(frame, pixels, levels)
        if draws.gray:
            grayscale(clip.numpy())
        return self.flip_labels.get(label, label) if draws.flip and self.flip_labels else label

    def draw(self, width: int, height: int, rng: np.random.Generator) -> ClipDraws:
        """Make all draws for a clip whose first frame has this size."""
        operations = draw_operations(int(rng.integers(2**32))) if self.rand_aug else ()
        size = resize_size(width, height, self.resize)
        crop = draw_crop(*size, self.input_size, rng)
        flip = rng.random() < 0.5  # drawn in any case, so that later draws are the same
        gray = rng.random() < GRAY_SHARE[self.protocol]
        return ClipDraws(operations, size, crop, flip and self.flip_labels is not None, gray)


@dataclass(frozen=True)
class EvalTransform:
    """Resize and 1, 3, 5 or 10 crops at fixed places. The pixels are bit-equal to Pillow's resize and crop."""

    input_size: int
    resize: int | Sequence[int]
    num_crops: int = 1

    def __call__(self, frames: Sequence[np.ndarray], places: np.ndarray | None = None) -> torch.Tensor:
        """Return the crops of a clip, uint8 (crops, T, 3, H, W). Its frame t is `frames[t]`, or `frames[places[t]]`."""
        places = np.arange(len(frames)) if places is None else places
        size = resize_size(*_size(frames[0]), self.resize)
        corners = crop_corners(*size, self.input_size, self.num_crops)
        upper_left, lower_right = np.min(corners, axis=0), np.max(corners, axis=0) + self.input_size

        @functools.cache
        def resample_from(width: int, height: int) -> Resample:
            return Resample(*map(_part, (width, height), size, upper_left, lower_right))

        views = torch.empty(self.num_crops, len(places), 3, self.input_size, self.input_size, dtype=torch.uint8)
        width, height = lower_right - upper_left
        window = np.empty((3, height, width), np.uint8)  # the part of a resized frame that the crops cover
        for number, frame in enumerate(frames):
            resample_from(*_size(frame))(frame, window)
            for view, (x, y) in zip(views.numpy(), corners - upper_left, strict=False):
                view[places == number] = window[:, y : y + self.input_size, x : x + self.input_size]
        if self.num_crops == 10:
            views[5:] = views[:5].flip(-1)
        return views


def _part(old: int, new: int, start: int, stop: int) -> Table:
    """Return the table of the pixels `start` to `stop` of a line that is resized from `old` to `new` pixels."""
    return bicubic(old, new).part(start, stop)


def _size(frame: np.ndarray) -> tuple[int, int]:
    """Return (width, height)."""
    return frame.shape[1], frame.shape[0]


def protocol_resize(protocol: str, input_size: int) -> int | list[int]:
    """Return the `data.resize` of a protocol, in pixels: the shorter side, or [height, width]."""
    if protocol == "something":
        base = input_size if input_size > 256 else 224
        return [256 * base // 224, 320 * base // 224]
    return 256 if input_size == 224 else input_size


def resize_size(width: int, height: int, resize: int | Sequence[int]) -> tuple[int, int]:
    """Return (width, height) of a frame after its resize and before the crop.

    `resize` is the new shorter side, which keeps the aspect ratio, or the new [height, width].
    """
    if isinstance(resize, int):
        return _shorter_side_to(resize, width, height)
    return resize[1], resize[0]


def _shorter_side_to(target: int, width: int, height: int) -> tuple[int, int]:
    if width < height:
        return target, int(target * height / width)
    return int(target * width / height), target


def draw_crop(width: int, height: int, size: int, rng: np.random.Generator) -> tuple[Table, Table]:
    """Draw a random-resized crop to `size` x `size` and return its tables for rows (across) and columns (down).

    If no drawn box fits, the shorter side is resized to `size` and a random square is cropped.
    """
    if (box := draw_box(width, height, rng)) is not None:
        left, upper, right, lower = box
        return bilinear(right - left, size).moved(left), bilinear(lower - upper, size).moved(upper)
    scaled = _shorter_side_to(size, width, height)
    left, upper, right, lower = _random_place(*scaled, size, size, rng)
    return bilinear(width, scaled[0]).part(left, right), bilinear(height, scaled[1]).part(upper, lower)


def draw_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """Draw a box (left, upper, right, lower) with 0.08 to 1 of the area and an aspect ratio of 3/4 to 4/3.

    Return None if none of ten drawn boxes fits into the frame.
    """
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
    """Return the upper left corners (x, y) of the test crops. Ten crops are five and their mirror images."""
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


def normalize_clips(clips: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Return (clips / 255 - mean) / std, with mean and std per channel.

    Args:
        clips: uint8 (B, T, 3, H, W).

    Returns:
        float32 (B, T, 3, H, W), on the device of `clips`.
    """
    return clips.float().div_(255).sub_(per_channel(mean, clips.device)).div_(per_channel(std, clips.device))


@functools.cache  # copying the constants to a GPU in every step would synchronise it
def per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Three values as float32 (3, 1, 1) on the device."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
