"""timm's RandAugment for the frames of a clip, and grayscale, as compiled loops.

timm draws the operations and their arguments. The loops here apply them to frames, uint8 (H, W, 3), with Pillow's
arithmetic. There are three kinds of operations:

- value operations (Invert, Posterize, ...) replace each value by another that depends on the value and channel only;
- measuring operations (Equalize, ...) do the same, but the replacement depends on the histogram of the frame;
- mixing operations (Rotate, Sharpness, ...) combine several pixels or channels.

The first two kinds do not touch the frame. They are collected in `levels`, uint8 (3, 256): the current value of a pixel
is levels[channel, value in the frame]. The next mixing operation, or the resize, applies them.

T frames of a clip, H, W pixels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import njit
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from utils.seeding import seeded_globals

FILL = 128  # value of pixels from outside the frame
_TILE = 32  # rows that are transposed together
_EPSILON = np.float32(1e-4)  # added before truncation, so that rounding errors do not turn 7.0 into 6
_IDENTITY = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
_RAMP = Image.fromarray(np.ascontiguousarray(_IDENTITY.T[None]))  # an image with one pixel of each value

Operation = tuple[Any, ...]  # timm's name of an operation, and its arguments


def _recorder() -> tuple[Callable[[tuple[Operation, ...]], tuple[Operation, ...]], dict[str, Callable]]:
    """Return timm's RandAugment, changed to record operations, and timm's functions by name of the operation.

    Each operation appends (name, *arguments) to a tuple instead of changing an image. Called with an empty tuple, the
    recorder returns the operations that timm would apply.
    """
    augment: Any = rand_augment_transform("rand-m7-n4-mstd0.5-inc1", {"translate_const": 115, "img_mean": (FILL,) * 3})
    functions = {}
    for op in augment.ops:
        functions[op.name] = op.aug_fn
        op.aug_fn = lambda drawn, *arguments, name=op.name, **_: (*drawn, (name, *arguments))
    return augment, functions


RAND_AUGMENT, _FUNCTIONS = _recorder()


def draw_operations(seed: int) -> tuple[Operation, ...]:
    """Draw the operations of a clip. The same `seed` gives the same operations."""
    with seeded_globals(seed):
        return RAND_AUGMENT(())


def rand_augment(frame: np.ndarray, operations: Sequence[Operation]) -> tuple[np.ndarray, np.ndarray | None]:
    """Apply the operations to one frame.

    Returns:
        frame: uint8 (H, W, 3); the argument itself if no operation mixes.
        levels: uint8 (3, 256), still to be applied, or None.
    """
    levels = None
    for name, *arguments in operations:
        if name in _MIXING:
            pixels = frame if levels is None else _replaced(frame, levels)
            frame, levels = _MIXING[name](pixels, *arguments), None
        elif name in _MEASURING:
            levels = _composed(levels, _MEASURING[name](frame, levels, *arguments))
        else:
            levels = _composed(levels, _value_table(name, *arguments))
    return frame, levels


def _composed(levels: np.ndarray | None, table: np.ndarray) -> np.ndarray:
    """Return the levels after `table`, uint8 (3, 256), has replaced the values that `levels` gives."""
    return table if levels is None else np.stack([new[old] for new, old in zip(table, levels, strict=True)])


@functools.lru_cache(maxsize=64)  # all frames of a clip need the same table
def _value_table(name: str, *arguments: float) -> np.ndarray:
    """Return what timm's operation turns each value into, uint8 (3, 256)."""
    return _table_of(_FUNCTIONS[name](_RAMP, *arguments))


def _table_of(ramp: Image.Image) -> np.ndarray:
    """Return the table, uint8 (3, 256), of an operation that turned _RAMP into `ramp`."""
    return np.ascontiguousarray(np.asarray(ramp)[0].T)


# Measuring operations: (frame, levels, arguments) -> table, uint8 (3, 256)


def _auto_contrast(frame: np.ndarray, levels: np.ndarray | None) -> np.ndarray:
    tables = []
    for counts in _histogram(frame, levels):
        present = np.flatnonzero(counts)
        low, high = present[0], present[-1]
        if low == high:
            tables.append(_IDENTITY[0])
            continue
        scale = 255.0 / (high - low)
        tables.append(np.clip(np.trunc(np.arange(256) * scale + -low * scale), 0, 255).astype(np.uint8))
    return np.stack(tables)


def _equalize(frame: np.ndarray, levels: np.ndarray | None) -> np.ndarray:
    tables = []
    for counts in _histogram(frame, levels):
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        below = np.cumsum(counts) - counts
        tables.append(np.minimum((step // 2 + below) // step, 255).astype(np.uint8) if step else _IDENTITY[0])
    return np.stack(tables)


def _contrast(frame: np.ndarray, levels: np.ndarray | None, factor: float) -> np.ndarray:
    total = _sum_luma(frame, _IDENTITY if levels is None else levels)
    mean = int(total / (frame.shape[0] * frame.shape[1]) + 0.5)
    return _table_of(Image.blend(Image.new("RGB", _RAMP.size, (mean, mean, mean)), _RAMP, factor))


def _histogram(frame: np.ndarray, levels: np.ndarray | None) -> np.ndarray:
    """Return how often each value occurs per channel, after `levels`, int64 (3, 256)."""
    counts = _count(frame)
    if levels is None:
        return counts
    return np.stack(
        [np.bincount(new, old, minlength=256).astype(np.int64) for new, old in zip(levels, counts, strict=True)]
    )


# Mixing operations: (frame, arguments) -> frame


def _rotate(frame: np.ndarray, degrees: float) -> np.ndarray:
    height, width, _ = frame.shape
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return _turn(frame, cos, sin, x - cos * x - sin * y, y + sin * x - cos * y)


def _shear_x(frame: np.ndarray, factor: float) -> np.ndarray:
    return _shift_rows(frame, factor * (np.arange(len(frame)) + 0.5))


def _shear_y(frame: np.ndarray, factor: float) -> np.ndarray:
    return _transposed(_shear_x(_transposed(frame), factor))


def _translate_x(frame: np.ndarray, share: float) -> np.ndarray:
    return _shift_rows(frame, np.full(len(frame), share * frame.shape[1]))


def _translate_y(frame: np.ndarray, share: float) -> np.ndarray:
    return _transposed(_translate_x(_transposed(frame), share))


def _color(frame: np.ndarray, factor: float) -> np.ndarray:
    return _blend_with_luma(frame, np.float32(factor))


def _sharpness(frame: np.ndarray, factor: float) -> np.ndarray:
    return _blend_with_smooth(frame, np.float32(factor))


_MEASURING: dict[str, Callable[..., np.ndarray]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "ContrastIncreasing": _contrast,
}
_MIXING: dict[str, Callable[..., np.ndarray]] = {
    "Rotate": _rotate,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
    "ColorIncreasing": _color,
    "SharpnessIncreasing": _sharpness,
}


@njit(cache=True)
def _count(frame):
    counts = np.zeros((3, 256), np.int64)
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            for channel in range(3):
                counts[channel, frame[y, x, channel]] += 1
    return counts


@njit(cache=True)
def _sum_luma(frame, levels):
    total = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            red, green, blue = levels[0, frame[y, x, 0]], levels[1, frame[y, x, 1]], levels[2, frame[y, x, 2]]
            total += _luma(red, green, blue)
    return total


@njit(cache=True)
def _luma(red, green, blue):
    """The luma of Pillow's `convert("L")`."""
    weighted = np.int32(19595) * np.int32(red) + np.int32(38470) * np.int32(green) + np.int32(7471) * np.int32(blue)
    return np.uint8(np.int32(weighted + 32768) >> 16)


@njit(cache=True)
def grayscale(clip: np.ndarray) -> None:
    """Replace all channels of a clip, uint8 (T, 3, H, W), by the luma of Pillow's `convert("L")`, in place."""
    gray = np.empty(clip.shape[3], np.uint8)
    for frame in clip:
        for y in range(clip.shape[2]):
            red, green, blue = frame[0, y], frame[1, y], frame[2, y]
            for x in range(len(gray)):
                gray[x] = _luma(red[x], green[x], blue[x])
            frame[:, y] = gray


@njit(cache=True)
def _blend(other, value, factor):
    """Pillow's blend: other + factor * (value - other), truncated to 0..255."""
    blended = np.float32(other) + factor * (np.float32(value) - np.float32(other))
    return np.uint8(np.int32(min(max(blended, np.float32(0)), np.float32(255))))


@njit(cache=True)
def _replaced(frame, levels):
    """Apply levels, uint8 (3, 256)."""
    out = np.empty_like(frame)
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            for channel in range(3):
                out[y, x, channel] = levels[channel, frame[y, x, channel]]
    return out


@njit(cache=True)
def _blend_with_luma(frame, factor):
    out = np.empty_like(frame)
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            red, green, blue = frame[y, x, 0], frame[y, x, 1], frame[y, x, 2]
            gray = _luma(red, green, blue)
            out[y, x, 0] = _blend(gray, red, factor)
            out[y, x, 1] = _blend(gray, green, factor)
            out[y, x, 2] = _blend(gray, blue, factor)
    return out


@njit(cache=True)
def _blend_with_smooth(frame, factor):
    """Blend with Pillow's SMOOTH filter: weight 5 for the pixel, 1 for its 8 neighbours. The border stays as it is."""
    height, width, _ = frame.shape
    out = frame.copy()
    old, new = frame.reshape(height, -1), out.reshape(height, -1)
    inner = (width - 2) * 3
    for y in range(1, height - 1):
        above, line, below = old[y - 1], old[y], old[y + 1]
        a, b, c = above[:inner], above[3:-3], above[6:]  # the neighbours, in reading order, are a to h
        d, pixel, e = line[:inner], line[3:-3], line[6:]
        f, g, h = below[:inner], below[3:-3], below[6:]
        blended = new[y, 3:-3]
        for i in range(inner):
            total = np.int32(a[i]) + np.int32(b[i]) + np.int32(c[i]) + np.int32(d[i]) + np.int32(e[i])
            total += np.int32(f[i]) + np.int32(g[i]) + np.int32(h[i]) + np.int32(5) * np.int32(pixel[i])
            smooth = np.int32(np.float32(total) * np.float32(1 / 13) + np.float32(0.5))
            blended[i] = _blend(smooth, pixel[i], factor)
    return out


@njit(cache=True)
def _cubic(a, b, c, d, part):
    """Pillow's cubic interpolation between b and c, at `part` of the way; a and d are the outer neighbours."""
    return b + part * ((c - a) + part * ((np.float32(2) * (a - b) + c - d) + part * (b - a + d - c)))


@njit(cache=True)
def _byte(value):
    """Clip to 0..255 and truncate, as Pillow's transforms do."""
    return np.uint8(np.int32(min(max(value, np.float32(0)), np.float32(255))))


@njit(cache=True)
def _shift_rows(frame, shifts):
    """Take pixel x of row y from position x + shifts[y] of that row."""
    height, width, _ = frame.shape
    out = np.full(frame.shape, FILL, np.uint8)
    old, new = frame.reshape(height, -1), out.reshape(height, -1)
    line = np.empty((width + 4) * 3, np.float32)  # a row with its first and its last pixel repeated twice
    for y in range(height):
        line[6:-6] = old[y]
        for x in range(2):
            line[3 * x : 3 * x + 3] = old[y, :3]
            line[3 * (width + 2 + x) : 3 * (width + 3 + x)] = old[y, -3:]
        whole = int(np.floor(shifts[y]))
        part = np.float32(shifts[y] - whole)
        start = min(max(int(np.ceil(-0.5 - shifts[y])), 0), width)
        stop = min(max(int(np.ceil(width - 0.5 - shifts[y])), start), width)
        if start == stop:
            continue
        neighbours = line[(start + whole + 1) * 3 : (stop + whole + 4) * 3]
        count = (stop - start) * 3
        a, b, c, d = neighbours[:count], neighbours[3:], neighbours[6:], neighbours[9:]
        shifted = new[y, start * 3 : stop * 3]
        for i in range(count):
            shifted[i] = _byte(_cubic(a[i], b[i], c[i], d[i], part))
    return out


@njit(cache=True)
def _transposed(frame):
    """Exchange rows and columns."""
    height, width, _ = frame.shape
    out = np.empty((width, height, 3), np.uint8)
    for top in range(0, height, _TILE):
        for x in range(width):
            for y in range(top, min(top + _TILE, height)):
                for channel in range(3):
                    out[x, y, channel] = frame[y, x, channel]
    return out


@njit(cache=True, fastmath={"contract"})
def _turn(frame, cos, sin, right, down):
    """Take pixel (x, y) from the position (cos * x + sin * y + right, cos * y - sin * x + down)."""
    height, width, _ = frame.shape
    out = np.full(frame.shape, FILL, np.uint8)
    old = _with_margin(frame)  # four values per pixel, which fill one vector register
    stride = np.uint64(4 * (width + 4))
    weights = np.empty((8, width), np.float32)
    places = np.empty(width, np.uint64)
    mixed = np.empty(16, np.float32)
    values = np.empty(width * 4, np.float32)
    for y in range(height):
        x0, y0 = sin * (y + 0.5) + right, cos * (y + 0.5) + down
        start, stop = 0, width
        while start < width and not _inside(cos * (start + 0.5) + x0, y0 - sin * (start + 0.5), width, height):
            start += 1
        while stop > start and not _inside(cos * (stop - 0.5) + x0, y0 - sin * (stop - 0.5), width, height):
            stop -= 1
        for x in range(start, stop):
            source_x, source_y = cos * (x + 0.5) + x0 - 0.5, y0 - sin * (x + 0.5) - 0.5
            column, row = np.floor(source_x), np.floor(source_y)
            for k, part in enumerate((np.float32(source_x - column), np.float32(source_y - row))):
                square, cube = part * part, part * part * part
                weights[4 * k, x] = np.float32(2) * square - part - cube
                weights[4 * k + 1, x] = np.float32(1) - np.float32(2) * square + cube
                weights[4 * k + 2, x] = part + square - cube
                weights[4 * k + 3, x] = cube - square
            places[x] = np.uint64(row + 1) * stride + np.uint64(column + 1) * np.uint64(4)
        for x in range(start, stop):
            a = places[x]
            b, c, d = a + stride, a + stride + stride, a + stride + stride + stride
            w0, w1, w2, w3 = weights[4, x], weights[5, x], weights[6, x], weights[7, x]
            for i in range(np.uint64(16)):
                mixed[i] = w0 * old[a + i] + w1 * old[b + i] + w2 * old[c + i] + w3 * old[d + i]
            w0, w1, w2, w3 = weights[0, x], weights[1, x], weights[2, x], weights[3, x]
            for i in range(np.uint64(4)):
                value = w0 * mixed[i] + w1 * mixed[4 + i] + w2 * mixed[8 + i] + w3 * mixed[12 + i]
                values[4 * x + i] = value + _EPSILON
        for x in range(start, stop):
            for channel in range(3):
                out[y, x, channel] = _byte(values[4 * x + channel])
    return out


@njit(cache=True)
def _inside(x, y, width, height):
    return 0 <= x < width and 0 <= y < height


@njit(cache=True)
def _with_margin(frame):
    """Return float32 (H + 4, W + 4, 4), flattened: each edge is repeated twice, and the fourth value is 0."""
    height, width, _ = frame.shape
    out = np.zeros((height + 4, width + 4, 4), np.float32)
    for y in range(height + 4):
        for x in range(width + 4):
            row, column = min(max(y - 2, 0), height - 1), min(max(x - 2, 0), width - 1)
            for channel in range(3):
                out[y, x, channel] = frame[row, column, channel]
    return out.reshape(-1)
