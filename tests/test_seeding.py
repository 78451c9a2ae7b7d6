import random

import numpy as np
import pytest
import torch

from utils.seeding import epoch_rng, sample_rng, seed_everything, seeded_globals


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


def test_seeded_globals_decide_what_is_drawn_inside_and_nothing_outside():
    def draw():
        return random.gauss(0, 1), np.random.normal()  # both keep a second value for the next call

    def draw_inside(*key):
        with seeded_globals(*key):
            return draw()

    seed_everything(3)
    expected = [draw() for _ in range(4)]
    seed_everything(3)
    keys = [(5,), (2**32 + 5,), (5, 0), (5, 1, 2)]
    assert draw() == expected[0]
    inside = [draw_inside(*key) for key in keys]
    assert draw() == expected[1]
    assert inside == [draw_inside(*key) for key in keys] and len(set(inside)) == len(keys)
    assert draw() == expected[2]
    with pytest.raises(ZeroDivisionError), seeded_globals(5):
        draw(), 1 / 0
    assert draw() == expected[3]
