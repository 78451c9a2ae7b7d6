"""Resizing and cropping in one step: every wanted pixel of a frame, and no other, in compiled loops.

A table says which pixels of a line make each pixel of the new line, and how much of each: the same for all lines, since
Pillow's resize is one pass across and one down. Tables follow Pillow's arithmetic to the last bit, rounding after each
pass included, so one that resizes once gives Pillow's pixels. One that resizes twice (`resized_twice`) rounds and clips
once where Pillow does so twice.

Frames are uint8 (H, W, 3), results uint8 (3, h, w). A pixel's share is an integer, 2**22 for the whole.
"""

import functools
from typing import NamedTuple

import numpy as np
from numba import njit

_BITS = 22
_HALF, _BLACK, _WHITE = np.int32(1 << (_BITS - 1)), np.int32(0), np.int32(255)  # of one type, for speed
_GROUP = 2  # pixels that are summed in one go: a table's rows are filled up with zeros to a multiple of it
_ROWS = 64  # rows of a frame that pass side by side: as many bytes as the widest registers have
_READ = 32  # rows that are read side by side: more would not stay in the nearest cache


class Table(NamedTuple):
    """New pixel i is the sum of weights[i, k] * old pixel first[i] + k: int64 (n,) and float64 (n, taps)."""

    first: np.ndarray
    weights: np.ndarray

    def part(self, start: int, stop: int) -> "Table":
        return Table(self.first[start:stop], self.weights[start:stop])

    def moved(self, by: int) -> "Table":
        """The same for pixels that lie `by` further on."""
        return Table(self.first + by, self.weights)

    def mirrored(self) -> "Table":
        return Table(self.first[::-1], self.weights[::-1])


@functools.lru_cache(maxsize=64)  # data sets have few frame sizes
def bicubic(old: int, new: int) -> Table:
    """Pillow's antialiased bicubic resize of a line of `old` pixels to `new`."""
    return unchanged(old) if old == new else Table(*_bicubic(old, new))


def bilinear(old: int, new: int) -> Table:
    """Pillow's antialiased bilinear resize of a line of `old` pixels to `new`."""
    return unchanged(old) if old == new else Table(*_bilinear(old, new))


def unchanged(size: int) -> Table:
    return Table(np.arange(size), np.ones((size, 1)))


def resized_twice(inner: Table, outer: Table) -> Table:
    """What `outer` makes of the line that `inner` makes."""
    if inner.weights.shape[1] == 1:
        return Table(inner.first[outer.first], outer.weights)
    return Table(*_compose(*inner, *outer))


class Resample:
    """One table across and one down, for any number of frames of a size."""

    def __init__(self, across: Table, down: Table):
        self._across, self._down = _fixed(across), _fixed(down)
        self._first_row = int(down.first.min())
        self._rows = int(down.first.max()) + self._down[1].shape[1] - self._first_row
        self._down_is_copy = _is_copy(down)
        # Where Pillow would leave the frame as it is, a slice of it is all there is to do.
        self._slice = None
        if self._down_is_copy and _is_copy(across):
            self._slice = tuple(slice(int(table.first[0]), int(table.first[-1]) + 1) for table in (down, across))

    def __call__(self, frame: np.ndarray, out: np.ndarray, levels: np.ndarray | None = None) -> None:
        """Frame (H, W, 3) -> out (3, h, w), both uint8; `levels` uint8 (3, 256) first replaces the frame's values."""
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
    """Contiguous int64 (n,) and int32 (n, taps)."""
    return np.ascontiguousarray(table.first), _shares(table.weights)


@njit(cache=True)
def _shares(weights):
    """Rounded as Pillow does, halves away from zero; without what is zero for all pixels at the end."""
    new, used = weights.shape
    while used > 1 and not weights[:, used - 1].any():
        used -= 1
    shares = np.zeros((new, -(-used // _GROUP) * _GROUP), np.int32)
    for i in range(new):
        for k in range(used):
            shares[i, k] = int(weights[i, k] * (1 << _BITS) + (0.5 if weights[i, k] >= 0 else -0.5))
    return shares


@njit(cache=True)
def _bicubic(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
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
def _pass_across(frame, levels, first, shares, first_row, rows, out):
    """`rows` rows of a frame (H, W, 3) from `first_row` on -> out (3, rows or more, w). H is at least _ROWS."""
    width, taps = shares.shape
    left = first.min()
    stop = min(first.max() + taps, frame.shape[1])
    columns = np.empty((first.max() + taps - left, _ROWS), np.uint8)
    passed = np.empty((width, _ROWS), np.uint8)
    sums = np.empty(_ROWS, np.int32)
    for block in range(first_row, first_row + rows, _ROWS):
        top = min(block, len(frame) - _ROWS)
        for c in range(3):
            for part in range(0, _ROWS, _READ):
                if len(levels):
                    for x in range(left, stop):
                        for r in range(_READ):
                            columns[x - left, part + r] = levels[c, frame[top + part + r, x, c]]
                else:
                    for x in range(left, stop):
                        for r in range(_READ):
                            columns[x - left, part + r] = frame[top + part + r, x, c]
            for x in range(width):
                place = first[x] - left
                s0, s1 = shares[x, 0], shares[x, 1]
                for r in range(_ROWS):
                    sums[r] = _HALF + s0 * np.int32(columns[place, r]) + s1 * np.int32(columns[place + 1, r])
                for k in range(_GROUP, taps, _GROUP):
                    s0, s1 = shares[x, k], shares[x, k + 1]
                    for r in range(_ROWS):
                        sums[r] += s0 * np.int32(columns[place + k, r]) + s1 * np.int32(columns[place + k + 1, r])
                for r in range(_ROWS):
                    passed[x, r] = min(max(np.int32(sums[r] >> _BITS), _BLACK), _WHITE)
            for r in range(block - top, min(_ROWS, first_row + rows - top)):
                for x in range(width):
                    out[c, top + r - first_row, x] = passed[x, r]


@njit(cache=True)
def _pass_down(lines, first, shares, out):
    """(3, H, w) -> (3, h, w)."""
    _, height, width = out.shape
    sums = np.empty(width, np.int32)
    for c in range(3):
        for y in range(height):
            row = first[y]
            s0, s1 = shares[y, 0], shares[y, 1]
            for x in range(width):
                sums[x] = _HALF + s0 * np.int32(lines[c, row, x]) + s1 * np.int32(lines[c, row + 1, x])
            for k in range(_GROUP, shares.shape[1], _GROUP):
                s0, s1 = shares[y, k], shares[y, k + 1]
                for x in range(width):
                    sums[x] += s0 * np.int32(lines[c, row + k, x]) + s1 * np.int32(lines[c, row + k + 1, x])
            for x in range(width):
                out[c, y, x] = min(max(np.int32(sums[x] >> _BITS), _BLACK), _WHITE)
