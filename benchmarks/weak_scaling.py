"""Weak scaling on a CPU: two gloo processes of one thread each against one process of one thread, same batch for each.

    python -m benchmarks.weak_scaling [--rounds 7]

ViT-B/16, 8 frames, float32, one clip a process, whole training steps with AdamW. The two ways take turns, and a process
that waits for its turn sleeps. Writes benchmarks/results/weak_scaling.txt.
"""

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import multiprocessing

from benchmarks.machine import describe_machine
from modules.backbones import FrozenTower
from modules.side4video import Side4Video, SideClassifier
from modules.side_network import SideNetwork
from utils.distributed import barrier, close_distributed, init_distributed

RESULTS = Path("benchmarks/results/weak_scaling.txt")
PROCESSES, THREADS, CLASSES, FRAMES, SIZE = 2, 1, 174, 8, 224


def build() -> Side4Video:
    """ViT-B/16 with random weights and a side network of width 320."""
    torch.manual_seed(0)
    tower = FrozenTower("vit_base_patch16_clip_quickgelu_224", SIZE)
    side = SideNetwork(tower.width, 320, len(tower.layers), tower.patch_size, tower.num_patches)
    return Side4Video(tower, SideClassifier(side, CLASSES)).train()


def step(forward: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    """Seconds of forward, backward and update."""
    started = time.perf_counter()
    logits = forward()
    torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def run(rank: int, port: str, rounds: int) -> None:
    """One process; process 0 writes the results."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(THREADS)
    init_distributed()
    model, clips = build(), torch.randn(1, FRAMES, 3, SIZE, SIZE)
    optimizer = torch.optim.AdamW(model.trained.parameters())
    model.parallelize()

    def forward_alone() -> torch.Tensor:  # around the wrapper that exchanges gradients
        return model.trained(clips, model.backbone.layer_tokens(clips))

    alone, beside, together = [], [], []
    for _ in range(rounds + 1):
        if rank == 0:
            alone.append(step(forward_alone, optimizer))
        barrier()
        beside.append(step(forward_alone, optimizer))  # both at once, without communication
        barrier()
        together.append(step(lambda: model(clips), optimizer))
        barrier()
    if rank == 0:
        text = report(alone[1:], beside[1:], together[1:], model.reduced_bytes())  # the first round warms up
        RESULTS.write_text(text, encoding="utf-8")
        sys.stdout.write(text)
    close_distributed()


def report(alone: list[float], beside: list[float], together: list[float], sent: int) -> str:
    """The lines of the results file: medians of seconds, and of the ratios of each round."""
    ratios = [(a / t, a / b, b / t) for a, b, t in zip(alone, beside, together, strict=True)]
    efficiency, sharing, sending = (statistics.median(column) for column in zip(*ratios, strict=True))
    lines = [
        describe_machine(),
        f"ViT-B/16, 1 clip of {FRAMES} frames a process, {THREADS} thread(s) each, {len(alone)} rounds in turns, "
        "medians",
        f"one process alone            {statistics.median(alone):.3f} s a step",
        f"two at once, sending nothing {statistics.median(beside):.3f} s, efficiency {sharing:.2f}: what sharing the "
        "machine costs",
        f"two that train together      {statistics.median(together):.3f} s, efficiency {efficiency:.2f}; of that "
        f"{sending:.2f} is what sending {sent / 1e6:.1f} MB of gradients costs",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    multiprocessing.spawn(run, (port, args.rounds), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
