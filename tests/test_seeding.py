import random

import numpy as np
import torch

from utils.seeding import epoch_rng, sample_rng, seed_everything


def test_every_part_of_a_key_makes_another_stream():
    keys = [(s, e, i, r) for s in (0, 1, 1024) for e in (0, 1, 2) for i in (0, 1, 2) for r in (None, 0, 1)]
    streams = {tuple(sample_rng(*key).integers(2**62, size=4)) for key in keys}
    streams |= {tuple(epoch_rng(seed, epoch).integers(2**62, size=4)) for seed in (0, 1, 1024) for epoch in (0, 1, 2)}
    assert len(streams) == len(keys) + 9


def test_a_key_gives_the_same_stream_again():
    assert sample_rng(7, 2, 5, 1).random() == sample_rng(7, 2, 5, 1).random()
    assert epoch_rng(7, 2).random() == epoch_rng(7, 2).random()


def test_seed_everything_seeds_the_three_global_generators():
    def draw(*key):
        seed_everything(*key)
        return random.random(), np.random.random(), torch.rand(()).item()

    keys = [(5,), (2**32 + 5,), (5, 0), (5, 1), (5, 0, 0), (5, 1, 0), (5, 0, 1)]
    draws = [draw(*key) for key in keys]
    assert draws == [draw(*key) for key in keys]
    assert all(len(set(column)) == len(keys) for column in zip(*draws, strict=True))
