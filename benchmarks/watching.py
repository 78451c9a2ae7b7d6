"""What it costs to watch a training: the norm of the gradient in every update, and the average of `solver.ema`.

    python -m benchmarks.watching [--arch ViT-B/32 ViT-B/16] [--rounds 9]

Whole training steps with AdamW, one clip of 8 frames, float32, random weights. The ways take turns in one process; the
ratios are those of steps of the same round, and medians. The parts alone are timed too, because a step varies more than
they take. Seconds are those of the processor (time.process_time), with one thread, so that other programs count little.
Writes benchmarks/results/watching.txt.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import describe_machine
from benchmarks.timing import processor_seconds, rounds_in_turns
from engine.averaging import AveragedWeights
from engine.configuration import default_config
from engine.loops import clip_gradients
from engine.optim import build_optimizer
from modules import build_model

RESULTS = Path("benchmarks/results/watching.txt")
FRAMES, SIZE, CLASSES, SIDE_WIDTH = 8, 224, 174, 320


def measure(arch: str, rounds: int) -> list[str]:
    """The lines of one tower."""
    torch.manual_seed(0)
    network = {"arch": arch, "side_dim": SIDE_WIDTH, "backbone_kwargs": {}}
    config = default_config(network=network, data={"num_classes": CLASSES, "input_size": SIZE})
    with torch.random.fork_rng():
        model = build_model(config).train()
    optimizer, average = build_optimizer(model, config), AveragedWeights(model.trained, 0.9998)
    clips, labels = torch.randn(1, FRAMES, 3, SIZE, SIZE), torch.zeros(1, dtype=torch.long)

    def step(norm: bool, averaged: bool) -> None:
        nn.functional.cross_entropy(model(clips), labels).backward()
        if norm:
            clip_gradients(model.trained, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if averaged:
            average.update(model.trained)

    ways = {"neither": (False, False), "the norm": (True, False), "norm and average": (True, True)}
    rows = rounds_in_turns([partial(step, *way) for way in ways.values()], rounds, processor_seconds)
    nn.functional.cross_entropy(model(clips), labels).backward()
    norm, averaging = (
        statistics.median(processor_seconds(call) for _ in range(20))
        for call in (lambda: clip_gradients(model.trained, None), lambda: average.update(model.trained))
    )
    whole = statistics.median(row[0] for row in rows)
    trained = sum(parameter.numel() for parameter in model.trained.parameters()) / 1e6
    lines = [f"{arch}, {trained:.1f} M trained: a step {whole:.3f} s"]
    for number, name in enumerate(ways):
        lines.append(f"  a step with {name}: ratio {statistics.median(row[number] / row[0] for row in rows):.3f}")
    lines.append(f"  alone, of a step: the norm {norm / whole:.4f}, the average {averaging / whole:.4f}")
    return lines


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["ViT-B/32", "ViT-B/16"], help="towers")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = [describe_machine(), f"1 thread, {args.rounds} rounds in turns, processor seconds, medians"]
    for arch in args.arch:
        lines += measure(arch, args.rounds)
    text = "\n".join(lines) + "\n"
    RESULTS.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
