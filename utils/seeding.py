"""Random streams: every draw of the data pipeline is a function of (seed, epoch, index, repeat), of nothing else."""

import random

import numpy as np
import torch


def sample_rng(seed: int, epoch: int, index: int, repeat: int | None = None) -> np.random.Generator:
    """The stream that draws a sample's frames, or, with `repeat`, the one that augments this repeat of it."""
    stream = 0 if repeat is None else repeat + 1
    return _generator(seed, epoch, index, stream)


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    """The stream that orders the videos of one epoch, the same on every process."""
    return _generator(seed, epoch)


def seed_everything(seed: int, *key: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (every device), differently for every key."""
    value = int(_sequence(seed, key).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(_sequence(seed, key))


def _sequence(seed: int, key: tuple[int, ...]) -> np.random.SeedSequence:
    # The key goes into spawn_key: as plain entropy, NumPy pads with zeros and [1, 2, 3] would equal [1, 2, 3, 0].
    return np.random.SeedSequence(seed, spawn_key=key)
