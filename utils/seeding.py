"""Random streams. Each is a function of its key, so a resumed run draws the same as an unbroken one.

A training sample depends on (seed, epoch, index, repeat) only, whatever the number of loader workers. The augmentation
of a batch on the device depends on (seed, epoch, iteration, process).
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def sample_rng(seed: int, epoch: int, index: int, repeat: int | None = None) -> np.random.Generator:
    """Return the stream that draws the frames of a sample or, with `repeat`, the one that augments this repeat."""
    stream = 0 if repeat is None else repeat + 1
    return _generator(seed, epoch, index, stream)


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    """Return the stream that orders the videos of one epoch. It is the same on every process."""
    return _generator(seed, epoch)


def epoch_order(seed: int, epoch: int, num_videos: int) -> np.ndarray:
    """Return the video indices in the order of one epoch, int64 (num_videos,). Every process gets the same order."""
    return epoch_rng(seed, epoch).permutation(num_videos)


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
