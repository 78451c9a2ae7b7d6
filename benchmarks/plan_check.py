"""The plan's peaks against those of real steps on the CPU, for eight configurations.

    python -m benchmarks.plan_check

Each real step runs in a process of its own, with random weights. The plan is compared with the model and the peak of
PyTorch's allocator beyond it: every tensor, by the memory events of torch.profiler. Two more processes ask the kernel
how far the resident set grows from before the model is built. In the first, the C library gives freed tensors back at
once. By default, glibc keeps those below a size that rises to 32 MiB in its heap, which the second one shows for one
configuration. Writes benchmarks/results/plan_check.txt.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from dotmap import DotMap

from benchmarks.allocations import measure_memory
from benchmarks.machine import describe_machine
from benchmarks.shipped_models import untrained_config
from engine.plan import (
    planned_precision,
    rehearsing,
    score_once,
    start_optimizer,
    test_batch,
    training_batches,
    update_once,
)
from modules import build_model
from modules.side4video import Side4Video

RESULT = Path("benchmarks/results/plan_check.txt")
TOLERANCE = 0.1
# Of the environment: glibc maps blocks of at least so many bytes one by one, and unmaps them when they are freed.
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
CPU = torch.device("cpu")
# Towers of E and L are cut to a few blocks, so that a step takes seconds and fits into a small machine.
CASES = {
    "B/16": ("vitb16", "data.batch_size=2"),
    "B/16, not recomputed": ("vitb16", "data.batch_size=2", "solver.recompute=False"),
    "B/16 light, bf16": ("vitb16_light", "data.batch_size=4", "solver.precision=bf16"),
    "B/32, accumulated": ("vitb32", "data.batch_size=4", "solver.grad_accumulation_steps=2"),
    "L/14, 6 blocks": ("vitl14", "data.batch_size=2", "network.backbone_kwargs.depth=6"),
    "EVA L/14, 6 blocks, bf16 tower": (
        *("eva_l14", "data.batch_size=2", "network.backbone_kwargs.depth=6"),
        *("network.backbone_dtype=bfloat16", "solver.precision=bf16"),
    ),
    "EVA E/14, 2 blocks": ("eva_e14", "data.batch_size=2", "network.backbone_kwargs.depth=2"),
    "SigLIP 2 B/16, mixup, clip_grad": (
        *("siglip2_b16", "data.batch_size=2", "solver.mixup=True", "solver.clip_grad=1.0"),
        "data.rand_erase=True",
    ),
}

HEAP_CASE = "B/16"  # whose resident set is also taken by default


def configuration(name: str) -> DotMap:
    """The resolved configuration of a case, on a CPU, with a random tower."""
    file, *overrides = CASES[name]
    return untrained_config(file, [*overrides, "test.view_batch=4"], CPU)


def training(config: DotMap, model: Side4Video) -> None:
    """An update of a new model, as the plan rehearses it."""
    optimizer = start_optimizer(model, config)
    update_once(model, optimizer, training_batches(config), config, planned_precision(config, CPU))


def scoring(config: DotMap, model: Side4Video) -> None:
    """A test of one video."""
    score_once(model, test_batch(config), config, planned_precision(config, CPU))


STEPS: dict[str, Callable[[DotMap, Side4Video], None]] = {"training": training, "test": scoring}


def peak_of(step: Callable[[DotMap, Side4Video], None], config: DotMap) -> int:
    """Bytes of a new model, and of the peak of a step beyond it. What drawing its weights took has been freed."""
    model = build_model(config)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return held + measure_memory(lambda: step(config, model), CPU)[1]


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM, the resident set now or at its largest (Linux)."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure(name: str, step: str, instrument: str) -> int:
    """Bytes at the peak of a step; run it in a process that has done nothing else."""
    config = configuration(name)
    if instrument == "allocator":
        return peak_of(STEPS[step], config)
    before = resident("VmRSS")
    STEPS[step](config, build_model(config))
    return resident("VmHWM") - before


def in_child(name: str, step: str, instrument: str, **environment: str) -> int:
    command = [sys.executable, "-m", "benchmarks.plan_check", "--child", name, step, instrument]
    given = {**os.environ, **environment}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, env=given)
    return int(json.loads(done.stdout.splitlines()[-1]))


def planned(config: DotMap) -> dict[str, int]:
    """What the plan says for each of STEPS."""
    with rehearsing(config, "cpu") as rehearsal:
        batch, recompute = config.data.batch_size, config.solver.recompute
        return {"training": rehearsal.train(batch, recompute).peak, "test": rehearsal.test(config.test.view_batch)}


def main() -> None:
    parser = argparse.ArgumentParser(description="The plan's peaks against measured ones.")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sys.stdout.write(f"{json.dumps(measure(*args.child))}\n")
        return
    lines = [
        describe_machine(),
        "MiB at the peak: planned; then, each with planned / measured, the allocator, growth of the resident set with "
        f"freed tensors given back at once, and for {HEAP_CASE} its growth by default",
    ]
    worst = 0.0
    for name in CASES:
        for step, plan in planned(configuration(name)).items():
            peaks = [
                in_child(name, step, "allocator"),
                in_child(name, step, "resident", **GIVING_BACK),
                *([in_child(name, step, "resident")] if name == HEAP_CASE else []),
            ]
            worst = max(worst, abs(plan / peaks[0] - 1))
            measured = "; ".join(f"{peak / 2**20:.1f} ({plan / peak:.3f})" for peak in peaks)
            lines.append(f"{name}, {step}: {plan / 2**20:.1f}; {measured}")
            RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")  # a run takes minutes
    lines.append(f"largest deviation from the allocator {100 * worst:.2f} %, allowed {100 * TOLERANCE:.0f} %")
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines) + "\n")
    if worst > TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
