"""Resizing and cropping in one step, as compiled loops that compute only the wanted pixels.

Pillow resizes in two passes: across (along rows), then down (along columns). In each pass, all lines use the same
weights, which a `Table` holds. Tables follow Pillow's arithmetic bit by bit, including the rounding after each pass, so
one resize gives Pillow's pixels exactly. A table of `resized_twice` does two resizes in one and rounds once where
Pillow rounds twice.

Frames are uint8 (H, W, 3), results uint8 (3, h, w): H, W pixels of the frame, h, w pixels of the result. Weights are
applied as integers in fixed point, where 2**22 is 1.
"""

import functools
from typing import NamedTuple

import numpy as np
from numba import njit

_BITS = 22
_HALF, _BLACK, _WHITE = np.int32(1 << (_BITS - 1)), np.int32(0), np.int32(255)  # all int32, which is faster
_GROUP = 2  # pixels that are summed in one step; weights are padded with zeros to a multiple of it
_ROWS = 64  # rows that are resized together: one byte of each fills the widest vector registers
_READ = 32  # rows that are read together: more do not stay in the first-level cache


class Table(NamedTuple):
    """The resize of a line: new pixel i is the sum over k of weights[i, k] * old pixel number first[i] + k.

    first: int64 (new pixels,)
    weights: float64 (new pixels, taps)
    """

    first: np.ndarray
    weights: np.ndarray

    def part(self, start: int, stop: int) -> "Table":
        """Return the table of the new pixels `start` to `stop`."""
        return Table(self.first[start:stop], self.weights[start:stop])

    def moved(self, by: int) -> "Table":
        """Return the table for old pixels that are `by` further to the right."""
        return Table(self.first + by, self.weights)

    def mirrored(self) -> "Table":
        """Return the table with the new pixels in reverse order."""
        return Table(self.first[::-1], self.weights[::-1])


@functools.lru_cache(maxsize=64)  # a data set has few frame sizes
def bicubic(old: int, new: int) -> Table:
    """Return the table of Pillow's antialiased bicubic resize from `old` to `new` pixels."""
    return unchanged(old) if old == new else Table(*_bicubic(old, new))


def bilinear(old: int, new: int) -> Table:
    """Return the table of Pillow's antialiased bilinear resize from `old` to `new` pixels."""
    return unchanged(old) if old == new else Table(*_bilinear(old, new))


def unchanged(size: int) -> Table:
    """Return the table that copies a line of `size` pixels."""
    return Table(np.arange(size), np.ones((size, 1)))


def resized_twice(inner: Table, outer: Table) -> Table:
    """Return the table that applies `inner` and then `outer`."""
    if inner.weights.shape[1] == 1:
        return Table(inner.first[outer.first], outer.weights)
    return Table(*_compose(*inner, *outer))


class Resample:
    """Applies one table across and one down, to any number of frames of the same size."""

    def __init__(self, across: Table, down: Table):
        self._across, self._down = _fixed(across), _fixed(down)
        self._first_row = int(down.first.min())
        self._rows = int(down.first.max()) + self._down[1].shape[1] - self._first_row
        self._down_is_copy = _is_copy(down)
        # If neither table resizes, the result is a slice of the frame.
        self._slice = None
        if self._down_is_copy and _is_copy(across):
            self._slice = tuple(slice(int(table.first[0]), int(table.first[-1]) + 1) for table in (down, across))

    def __call__(self, frame: np.ndarray, out: np.ndarray, levels: np.ndarray | None = None) -> None:
        """Write the result for `frame`, uint8 (H, W, 3), to `out`, uint8 (3, h, w).

        `levels`, uint8 (3, 256), replaces the values of the frame before the resize.
        """
        height = len(frame)
        if self._slice and levels is None:
            out[...] = frame[self._slice].transpose(2, 0, 1)
            return
        levels = _NO_LEVELS if levels is None else levels
        if len(frame) < _ROWS:
            frame = np.concatenate([frame, np.empty((_ROWS - len(frame), *frame.shape[1:]), np.uint8)])
        if self._down_is_copy:
            _pass_across(frame, levels, *self._across, self._first_row, out.shape[1], out)
            return
        rows = min(self._rows, height - self._first_row)
        lines = np.empty((3, self._rows, out.shape[2]), np.uint8)
        _pass_across(frame, levels, *self._across, self._first_row, rows, lines)
        _pass_down(lines, self._down[0] - self._first_row, self._down[1], out)


_NO_LEVELS = np.empty((0, 0), np.uint8)


def _is_copy(table: Table) -> bool:
    return table.weights.shape[1] == 1 and bool((np.diff(table.first) == 1).all())


def _fixed(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Return `first`, contiguous, and the weights in fixed point, int32 (new pixels, taps)."""
    return np.ascontiguousarray(table.first), _fixed_weights(table.weights)


@njit(cache=True)
def _fixed_weights(weights):
    """Convert weights to fixed point, rounded half away from zero as Pillow does.

    Taps at the end that are zero for all pixels are left out, and zeros are added up to a multiple of _GROUP.
    """
    new, used = weights.shape
    while used > 1 and not weights[:, used - 1].any():
        used -= 1
    fixed = np.zeros((new, -(-used // _GROUP) * _GROUP), np.int32)
    for i in range(new):
        for k in range(used):
            fixed[i, k] = int(weights[i, k] * (1 << _BITS) + (0.5 if weights[i, k] >= 0 else -0.5))
    return fixed


@njit(cache=True)
def _bicubic(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `first` and `weights` of a table, as Pillow computes them."""
    scale = old / new
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    first = np.zeros(new, np.int64)
    weights = np.zeros((new, int(np.ceil(support)) * 2 + 1))
    for i in range(new):
        centre = (i + 0.5) * scale
        start = max(int(centre - support + 0.5), 0)
        stop = min(int(centre + support + 0.5), old)
        total = 0.0
        for k in range(stop - start):
            x = abs((k + start - centre + 0.5) * (1.0 / stretch))
            weight = 0.0
            if x < 1.0:
                weight = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                weight = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            weights[i, k] = weight
            total += weight
        weights[i] /= total
        first[i] = start
    return first, weights


@njit(cache=True)
def _bilinear(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `first` and `weights` of a table, as Pillow computes them."""
    scale = old / new
    stretch = max(scale, 1.0)
    first = np.zeros(new, np.int64)
    weights = np.zeros((new, int(np.ceil(stretch)) * 2 + 1))
    for i in range(new):
        centre = (i + 0.5) * scale
        start = max(int(centre - stretch + 0.5), 0)
        stop = min(int(centre + stretch + 0.5), old)
        total = 0.0
        for k in range(stop - start):
            weights[i, k] = max(1.0 - abs((k + start - centre + 0.5) * (1.0 / stretch)), 0.0)
            total += weights[i, k]
        weights[i] /= total
        first[i] = start
    return first, weights


@njit(cache=True)
def _compose(inner_first, inner, outer_first, outer):
    """Return `first` and `weights` of the table that applies the inner table and then the outer one."""
    new, outer_taps = outer.shape
    taps = 1
    for i in range(new):
        last = min(outer_first[i] + outer_taps, len(inner_first)) - 1
        taps = max(taps, inner_first[last] + inner.shape[1] - inner_first[outer_first[i]])
    first = np.zeros(new, np.int64)
    weights = np.zeros((new, taps))
    for i in range(new):
        first[i] = inner_first[outer_first[i]]
        for j in range(min(outer_taps, len(inner_first) - outer_first[i])):
            shift = inner_first[outer_first[i] + j] - first[i]
            for k in range(inner.shape[1]):
                weights[i, shift + k] += outer[i, j] * inner[outer_first[i] + j, k]
    return first, weights


@njit(cache=True)
def _pass_across(frame, levels, first, weights, first_row, rows, out):
    """Resize `rows` rows of a frame (H, W, 3), from `first_row` on, to the first rows of `out` (3, rows or more, w).

    H must be at least _ROWS.
    """
    width, taps = weights.shape
    left = first.min()
    stop = min(first.max() + taps, frame.shape[1])
    columns = np.empty((first.max() + taps - left, _ROWS), np.uint8)
    passed = np.empty((width, _ROWS), np.uint8)
    sums = np.empty(_ROWS, np.int32)
    for block in range(first_row, first_row + rows, _ROWS):
        top = min(block, len(frame) - _ROWS)
        for channel in range(3):
            for part in range(0, _ROWS, _READ):
                if len(levels):
                    for x in range(left, stop):
                        for r in range(_READ):
                            columns[x - left, part + r] = levels[channel, frame[top + part + r, x, channel]]
                else:
                    for x in range(left, stop):
                        for r in range(_READ):
                            columns[x - left, part + r] = frame[top + part + r, x, channel]
            for x in range(width):
                place = first[x] - left
                w0, w1 = weights[x, 0], weights[x, 1]
                for r in range(_ROWS):
                    sums[r] = _HALF + w0 * np.int32(columns[place, r]) + w1 * np.int32(columns[place + 1, r])
                for k in range(_GROUP, taps, _GROUP):
                    w0, w1 = weights[x, k], weights[x, k + 1]
                    for r in range(_ROWS):
                        sums[r] += w0 * np.int32(columns[place + k, r]) + w1 * np.int32(columns[place + k + 1, r])
                for r in range(_ROWS):
                    passed[x, r] = min(max(np.int32(sums[r] >> _BITS), _BLACK), _WHITE)
            for r in range(block - top, min(_ROWS, first_row + rows - top)):
                for x in range(width):
                    out[channel, top + r - first_row, x] = passed[x, r]


@njit(cache=True)
def _pass_down(lines, first, weights, out):
    """Resize the columns of `lines` (3, H, w) to `out` (3, h, w)."""
    _, height, width = out.shape
    sums = np.empty(width, np.int32)
    for channel in range(3):
        for y in range(height):
            row = first[y]
            w0, w1 = weights[y, 0], weights[y, 1]
            for x in range(width):
                sums[x] = _HALF + w0 * np.int32(lines[channel, row, x]) + w1 * np.int32(lines[channel, row + 1, x])
            for k in range(_GROUP, weights.shape[1], _GROUP):
                w0, w1 = weights[y, k], weights[y, k + 1]
                for x in range(width):
                    sums[x] += w0 * np.int32(lines[channel, row + k, x]) + w1 * np.int32(lines[channel, row + k + 1, x])
            for x in range(width):
                out[channel, y, x] = min(max(np.int32(sums[x] >> _BITS), _BLACK), _WHITE)
