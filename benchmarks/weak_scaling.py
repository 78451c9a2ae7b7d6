"""Weak scaling on a CPU: two gloo processes of one thread each against one of one thread, same batch for each.

    python -m benchmarks.weak_scaling

ViT-B/16, 8 frames, float32, one clip a process, whole training steps with AdamW. The two ways take turns, and a process
that waits for its turn sleeps. Writes benchmarks/results/weak_scaling.txt.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import multiprocessing

from benchmarks.machine import describe_machine
from modules.backbones import FrozenTower
from modules.side4video import Side4Video, SideClassifier
from modules.side_network import SideNetwork
from utils.distributed import Traffic, barrier, close_distributed, init_distributed

RESULTS = Path("benchmarks/results/weak_scaling.txt")
PROCESSES, ROUNDS, CLASSES = 2, 7, 174
PORT = "29653"


def build() -> Side4Video:
    torch.manual_seed(0)
    tower = FrozenTower("vit_base_patch16_clip_quickgelu_224", 224)
    side = SideNetwork(tower.width, 320, len(tower.layers), tower.patch_size, tower.num_patches)
    return Side4Video(tower, SideClassifier(side, CLASSES)).train()


def step(model: Side4Video, optimizer: torch.optim.Optimizer, clips: torch.Tensor) -> float:
    """Seconds of forward, backward and update."""
    started = time.perf_counter()
    logits = model(clips)
    torch.nn.functional.cross_entropy(logits, torch.zeros(len(clips), dtype=torch.long)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def run(rank: int, threads: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT, "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(threads)
    init_distributed()
    model, clips = build(), torch.randn(1, 8, 3, 224, 224)
    optimizer = torch.optim.AdamW(model.trained.parameters())
    model.parallelize()
    replicas, alone, alone_beside, together = model._replicas, [], [], []
    for _ in range(ROUNDS + 1):
        model._replicas = []
        if rank == 0:
            alone.append(step(model, optimizer, clips))
        barrier()
        alone_beside.append(step(model, optimizer, clips))  # both at once, sending nothing
        barrier()
        model._replicas, before = replicas, Traffic.reduced
        together.append(step(model, optimizer, clips))
        sent = Traffic.reduced - before
        barrier()
    if rank == 0:
        alone, alone_beside, together = (times[1:] for times in (alone, alone_beside, together))
        pairs = zip(alone, alone_beside, together, strict=True)
        ratios = [(a / t, a / b, b / t) for a, b, t in pairs]
        efficiency, sharing, sending = (statistics.median(column) for column in zip(*ratios, strict=True))
        text = "\n".join(
            [
                describe_machine(),
                f"ViT-B/16, 1 clip of 8 frames a process, {threads} thread(s) each, {ROUNDS} rounds in turns, medians",
                f"one process alone          {statistics.median(alone):.3f} s a step",
                f"two at once, sending nothing {statistics.median(alone_beside):.3f} s, efficiency {sharing:.2f}: "
                "what sharing the machine costs",
                f"two that train together    {statistics.median(together):.3f} s, efficiency {efficiency:.2f}; of that "
                f"{sending:.2f} is what sending {sent / 1e6:.1f} MB of gradients costs",
            ]
        )
        RESULTS.write_text(text + "\n", encoding="utf-8")
        sys.stdout.write(text + "\n")
    close_distributed()


if __name__ == "__main__":
    multiprocessing.spawn(run, (1,), nprocs=PROCESSES)
