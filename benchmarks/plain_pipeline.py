"""A data pipeline in the usual style: the baseline of benchmarks/data_engine.py and a reference for the tests.

It follows docs/protocol.md, section 5, in the simplest way. Each frame is processed on its own with Pillow: decode,
RandAugment of the whole frame, resize of the whole frame, crop, resize. Then the frames are stacked, converted to
float32 and normalised. Do not optimise it: the ratios of earlier benchmark results refer to it as it is.

Letters: R repeats, V views, T frames of a clip, H, W pixels (both `size`).
"""

import math
import os
import random
from collections.abc import Mapping, Sequence

import decord
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MEAN, STD = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
GRAY_SHARE = {"kinetics": 0.2, "something": 0.0}
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
RAND_AUGMENT = rand_augment_transform(
    "rand-m7-n4-mstd0.5-inc1", {"translate_const": 115, "img_mean": (128, 128, 128), "interpolation": BICUBIC}
)


def read_folder(folder: str, image_tmpl: str, indices: Sequence[int]) -> list[Image.Image]:
    """Read frames from a folder of images that are numbered from 1."""
    frames = []
    for index in indices:
        with Image.open(os.path.join(folder, image_tmpl.format(index + 1))) as image:
            frames.append(image.convert("RGB"))
    return frames


def open_video(path: str) -> decord.VideoReader:
    return decord.VideoReader(path, num_threads=1)


def read_video(video: decord.VideoReader, indices: Sequence[int]) -> list[Image.Image]:
    return [Image.fromarray(video[int(index)].asnumpy()) for index in indices]


def train_clips(
    frames: Sequence[Image.Image],
    label: int,
    rngs: Sequence[np.random.Generator],
    protocol: str,
    size: int = 224,
    flip_labels: Mapping[int, int] | None = None,
    rand_aug: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment the same frames once for each generator.

    Returns:
        clips: float32 (R, T, 3, H, W), normalised.
        labels: int64 (R,).
    """
    samples = [train_clip(frames, label, rng, protocol, size, flip_labels or {}, rand_aug) for rng in rngs]
    return torch.stack([normalise(images) for images, _ in samples]), torch.tensor([label for _, label in samples])


def train_clip(
    frames: Sequence[Image.Image],
    label: int,
    rng: np.random.Generator,
    protocol: str,
    size: int,
    flip_labels: Mapping[int, int],
    rand_aug: bool,
) -> tuple[list[Image.Image], int]:
    """Return one augmented clip as images of `size` x `size`, and its label."""
    if rand_aug:
        frames = rand_augment(frames, int(rng.integers(2**32)))
    width, height = resized_size(*frames[0].size, protocol, size)
    box = draw_box(width, height, rng)
    if box is None:
        scaled = shorter_side_to(size, width, height)
        square = place(*scaled, size, size, rng)
    flip = rng.random() < 0.5
    gray = rng.random() < GRAY_SHARE[protocol]
    images = []
    for frame in frames:
        image = frame.resize((width, height), BICUBIC)
        if box is not None:
            image = image.crop(box).resize((size, size), BILINEAR)
        else:
            image = image.resize(scaled, BILINEAR).crop(square)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if gray:
            image = image.convert("L").convert("RGB")
        images.append(image)
    return images, flip_labels.get(label, label) if flip else label


def rand_augment(frames: Sequence[Image.Image], seed: int) -> list[Image.Image]:
    """Apply timm's RandAugment to every frame, with the draws that `seeded_globals(seed)` gives."""
    word = int(np.random.SeedSequence(seed).generate_state(1)[0])
    augmented = []
    for frame in frames:
        random.seed(word)
        np.random.seed(word)
        augmented.append(RAND_AUGMENT(frame))
    return augmented


def eval_views(
    frames: Sequence[Image.Image], num_clips: int, num_crops: int, protocol: str, size: int = 224
) -> torch.Tensor:
    """Return the views of a video, float32 (V, T, 3, H, W), normalised, crop by crop.

    `frames` are those of all clips, one clip after the other.
    """
    width, height = resized_size(*frames[0].size, protocol, size)
    resized = [frame.resize((width, height), BICUBIC) for frame in frames]
    views = []
    for x, y in corners(width, height, size, num_crops):
        crops = [frame.crop((x, y, x + size, y + size)) for frame in resized]
        views.append(normalise(crops).unflatten(0, (num_clips, -1)))
    return torch.cat(views)


def normalise(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return a normalised clip, float32 (T, 3, H, W)."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels.float().div_(255).sub_(MEAN).div_(STD)


def resized_size(width: int, height: int, protocol: str, size: int) -> tuple[int, int]:
    if protocol == "something":
        base = size if size > 256 else 224
        return 320 * base // 224, 256 * base // 224
    return shorter_side_to(256 if size == 224 else size, width, height)


def shorter_side_to(target: int, width: int, height: int) -> tuple[int, int]:
    return (target, int(target * height / width)) if width < height else (int(target * width / height), target)


def draw_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = rng.uniform(3 / 4, 4 / 3)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rng.random() < 0.5:
            w, h = h, w
        if w <= width and h <= height:
            return place(width, height, w, h, rng)
    return None


def place(width: int, height: int, w: int, h: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    x = int(rng.integers(width - w, endpoint=True))
    y = int(rng.integers(height - h, endpoint=True))
    return x, y, x + w, y + h


def corners(width: int, height: int, size: int, num_crops: int) -> list[tuple[int, int]]:
    if num_crops == 1:
        return [(round((width - size) / 2), round((height - size) / 2))]
    w, h = (width - size) // 4, (height - size) // 4
    return [(0, 2 * h), (4 * w, 2 * h), (2 * w, 2 * h)]
