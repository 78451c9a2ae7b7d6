"""Kernels of a training step with `solver.compile` and without it.

    python -m benchmarks.compiled_operators [--arch ViT-B/16]

One step of one clip runs on this CPU in bf16, the tower in bf16, and PyTorch's profiler lists what was started: the
operators that are no views and no allocations, of which products, attention and those on lists of tensors count as one
each, and the loops that the compiler has fused. For a GPU, the compiler fuses by the same rules, but its kernels may
differ in number. Writes benchmarks/results/compiled_operators.txt. Compiling takes about a minute.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.allocations import NO_KERNEL, PRODUCTS, measure_memory
from benchmarks.machine import describe_machine
from benchmarks.shipped_models import SIDE_WIDTHS
from engine.configuration import default_config
from modules import build_model, cpu_attention

RESULTS = Path("benchmarks/results/compiled_operators.txt")
ONE_KERNEL = {f"aten::{packet.__name__}" for packet in PRODUCTS}
ALLOCATIONS = {f"aten::{packet.__name__}" for packet in NO_KERNEL}
MIB = 2**20


def started_kernels(step: Callable[[], object]) -> tuple[int, int]:
    """(kernels that a call starts, how many of them the compiler has fused)."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.events() or []
    fused = sum("_cpp_fused_" in event.name for event in events)
    return fused + sum(_is_kernel(event) for event in events), fused


def _is_kernel(event: Any) -> bool:
    """An operator that computes and calls none that does, or one kernel of a GPU; not what such a one calls."""
    if _inside_kernel(event):
        return False
    calls_others = any(_computes(child) for child in event.cpu_children)
    return _is_one(event) or (_computes(event) and not calls_others)


def _is_one(event: Any) -> bool:
    """Whether a GPU has one kernel for what a CPU does in several."""
    return event.name in ONE_KERNEL or event.name.startswith("aten::_foreach_")


def _inside_kernel(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (_is_one(parent) or _inside_kernel(parent))


def _computes(event: Any) -> bool:
    """Whether the event, or one that it calls, is an operator that is neither a view nor an allocation."""
    if any(_computes(child) for child in event.cpu_children):
        return True
    if not event.name.startswith("aten::") or event.name in ALLOCATIONS:
        return False
    packet = getattr(torch.ops.aten, event.name.removeprefix("aten::"), None)
    if packet is None or event.cpu_children and all(not _computes(child) for child in event.cpu_children):
        return False  # it only calls views
    return not any(getattr(packet, overload).is_view for overload in packet.overloads())


def measure(arch: str, recompute: bool, compiled: bool) -> tuple[int, int, float]:
    """(kernels, fused ones, MiB kept between forward and backward pass) of a step."""
    network = {"arch": arch, "init": False, "side_dim": SIDE_WIDTHS[arch], "backbone_kwargs": {}}
    data = {"input_size": 224, "num_segments": 8, "num_classes": 400}
    solver = {"precision": "bf16", "recompute": recompute}
    model = build_model(default_config(network=network, data=data, solver=solver)).train()
    model.place(torch.device("cpu"), compiled=compiled)
    clips = torch.randn(1, 8, 3, 224, 224)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(clips)

    def step() -> None:
        forward().float().sum().backward()
        model.zero_grad(set_to_none=True)

    with mock.patch.object(cpu_attention, "_has_units", lambda: False):  # attention is one kernel, as on a GPU
        step()
        step()
        kept, _ = measure_memory(forward)
        return *started_kernels(step), kept / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=SIDE_WIDTHS, default="ViT-B/16", help="tower")
    args = parser.parse_args()
    torch._inductor.config.cpp.enable_kernel_profile = True  # so that the profiler sees the fused loops
    lines = [describe_machine(), f"{args.arch}, one clip of 8 frames, bf16"]
    for recompute in (True, False):
        for compiled in (False, True):
            kernels, fused, kept = measure(args.arch, recompute, compiled)
            torch.compiler.reset()
            lines.append(
                f"  {'recompute' if recompute else 'no recompute':13} {'compiled' if compiled else 'eager':8} "
                f"{kernels:5} kernels, {fused:3} of them fused; {kept:6.1f} MiB kept"
            )
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
