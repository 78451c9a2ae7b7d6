"""Random streams: a training sample is a function of (seed, epoch, index, repeat), of nothing else.

What happens to a batch on the device is one of (seed, epoch, iteration, process).
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def sample_rng(seed: int, epoch: int, index: int, repeat: int | None = None) -> np.random.Generator:
    """The stream that draws a sample's frames, or, with `repeat`, the one that augments this repeat of it."""
    stream = 0 if repeat is None else repeat + 1
    return _generator(seed, epoch, index, stream)


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    """The stream that orders the videos of one epoch, the same on every process."""
    return _generator(seed, epoch)


def epoch_order(seed: int, epoch: int, num_videos: int) -> np.ndarray:
    """The videos in the order of one epoch, the same on every process and in every loader worker."""
    return epoch_rng(seed, epoch).permutation(num_videos)


def shot_rng(seed: int) -> np.random.Generator:
    """The stream that chooses the videos of a few-shot run, the same on every process."""
    return _generator(seed)


def seed_everything(seed: int, *key: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (every device), differently for every key."""
    value = _word(seed, key)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextmanager
def seeded_globals(seed: int, *key: int) -> Iterator[None]:
    """Inside, Python's and NumPy's global generators draw what the arguments say; afterwards they go on as before."""
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
    # The key goes into spawn_key: as plain entropy, NumPy pads with zeros and [1, 2, 3] would equal [1, 2, 3, 0].
    return np.random.SeedSequence(seed, spawn_key=key)
