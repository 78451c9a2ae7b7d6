"""Random streams. Each is a function of its key, so a resumed run draws the same as an unbroken one.

A training sample depends on (seed, epoch, index, repeat) only, whatever the number of loader workers; with
`data.balance`, also on its place in the order of the epoch. The augmentation of a batch on the device depends on (seed,
epoch, iteration, process).
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def sample_rng(
    seed: int, epoch: int, index: int, repeat: int | None = None, place: int | None = None
) -> np.random.Generator:
    """Return the stream that draws the frames of a sample or, with `repeat`, the one that augments this repeat.

    `place` is given where an epoch may have a video several times, and makes every time another sample.
    """
    stream = 0 if repeat is None else repeat + 1
    return _generator(seed, epoch, index, stream, *([] if place is None else [place]))


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    """Return the stream that orders the videos of one epoch. It is the same on every process."""
    return _generator(seed, epoch)


def epoch_order(seed: int, epoch: int, num_videos: int) -> np.ndarray:
    """Return the video indices in the order of one epoch, int64 (num_videos,). Every process gets the same order."""
    return epoch_rng(seed, epoch).permutation(num_videos)


def balanced_order(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """Return the video indices of an epoch in which the classes are equally frequent, int64 (videos,).

    The order consists of rounds. Each has one video of every class that has any, in random order, so in every stretch
    of the order the numbers of two classes differ by at most two, and from its start by at most one. The last round may
    be cut off.

    In an epoch, no video of a class comes again before all others of the class came. A class with more videos than
    rounds gives other videos in the next epoch, until all of them came. Every process gets the same order.
    """
    shuffled = _generator(seed, 0, 0).permutation(len(labels))  # the same in all epochs
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.unique(labels[by_class], return_index=True)[1]
    rounds = -(-len(labels) // len(starts))
    rng = epoch_rng(seed, epoch)
    columns = []
    for own in np.split(by_class, starts[1:]):
        cycles, rest = divmod(rounds, len(own))
        first = epoch * rest % len(own)
        turns = [rng.permutation(own) for _ in range(cycles)]
        columns.append(np.concatenate([*turns, rng.permutation(np.roll(own, -first)[:rest])]))
    return rng.permuted(np.stack(columns, axis=1), axis=1).ravel()[: len(labels)]


def shot_rng(seed: int) -> np.random.Generator:
    """Return the stream that chooses the videos of a few-shot run. It is the same on every process."""
    return _generator(seed)


def seed_everything(seed: int, *key: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices). Each key gives another seed."""
    value = _word(seed, key)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextmanager
def seeded_globals(seed: int, *key: int) -> Iterator[None]:
    """Seed the global generators of Python and NumPy inside the context, and restore their states afterwards."""
    python, numpy, value = random.getstate(), np.random.get_state(), _word(seed, key)
    random.seed(value)
    np.random.seed(value)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(_sequence(seed, key))


def _word(seed: int, key: tuple[int, ...]) -> int:
    return int(_sequence(seed, key).generate_state(1)[0])


def _sequence(seed: int, key: tuple[int, ...]) -> np.random.SeedSequence:
    # The key is the spawn_key: NumPy pads entropy with zeros, so there (1, 2, 3) and (1, 2, 3, 0) would be the same.
    return np.random.SeedSequence(seed, spawn_key=key)
