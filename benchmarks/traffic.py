"""Operators of a training step and the bytes that they move, counted without a GPU and without running them.

    python -m benchmarks.traffic [--arch ViT-B/16 ...] [--clips 32] [--by_operator] [--write]

Forward and backward pass of the whole model in a dry run (engine/dry_run.py): CUDA's autocast rules and kernels, bf16,
the tower in bf16. Each operator is taken to read its inputs once and to write its results once. Matrix products,
convolutions and attention are counted apart. The times of a roofline are arithmetic, from the makers' figures
(engine/plan.py): no kernel is faster, and few are as fast. `--write` also writes benchmarks/results/traffic.txt.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.allocations import NO_KERNEL, PRODUCTS
from benchmarks.machine import describe_machine
from benchmarks.shipped_models import SIDE_WIDTHS
from engine.configuration import default_config
from engine.dry_run import dry_run
from engine.plan import CARDS, OVERWRITING, Work, planned_precision, resolve_for_gpu
from modules import build_model
from utils.precision import Precision

RESULTS = Path("benchmarks/results/traffic.txt")
aten = torch.ops.aten
FACTORIES = {aten.new_zeros, aten.zeros_like, aten.ones_like, aten.new_full, aten.full_like}  # they read no tensor


class Traffic(TorchDispatchMode):
    """Counts the operators that run inside and the bytes that they read and write.

    Attributes:
        operators: those that launch a kernel; views and allocations do not.
        product_bytes: of matrix products, convolutions and attention.
        other_bytes, calls: of each other operator, and of each operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.product_bytes = 0
        self.other_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not (func.is_view or func.overloadpacket in NO_KERNEL):
            given = {name: value for name, value in (kwargs or {}).items() if name != "out"}
            read = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
            if func.overloadpacket in OVERWRITING:
                read = read[1:]
            if func.overloadpacket in FACTORIES:
                read = []
            if func.overloadpacket is aten.native_batch_norm_backward and not args[-1][0]:
                result = (None, *result[1:])  # a fake tensor stands for a gradient that is not computed
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            moved = sum(map(_bytes, (*read, *written)))
            self.operators += 1
            self.calls[func.name()] += 1
            if func.overloadpacket in PRODUCTS:
                self.product_bytes += moved
            else:
                self.other_bytes[func.name()] += moved
        return result


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded dimension count once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


def count_step(arch: str, clips: int, recompute: bool) -> tuple[Traffic, Work]:
    """Count the forward and the backward pass of a step of so many clips of 8 frames."""
    network = {"arch": arch, "init": False, "side_dim": SIDE_WIDTHS[arch], "backbone_kwargs": {}}
    data = {"input_size": 224, "num_segments": 8, "num_classes": 400}
    config = resolve_for_gpu(
        default_config(network=network, data=data, solver={"precision": "bf16", "recompute": recompute})
    )
    with torch.device("meta"):
        model = build_model(config, load_tower=False).train()
    traffic, work = Traffic(), Work()
    device = torch.device("cuda")
    with dry_run("cuda"):
        model.to_empty(device=device)
        model.backbone.convert(torch.bfloat16)
        pixels = torch.empty(clips, 8, 3, 224, 224, device=device)
        precision: Precision = planned_precision(config, device)
        with work, traffic:
            with precision.autocast():
                logits = model(pixels)
            logits.float().sum().backward()
    return traffic, work


def describe(arch: str, clips: int, by_operator: bool) -> list[str]:
    """The lines of one tower."""
    lines = [f"\n{arch}, {clips} clips"]
    for recompute in (True, False):
        traffic, work = count_step(arch, clips, recompute)
        rows = traffic.other_bytes.most_common()
        lines.append(
            f"  {'recompute' if recompute else 'no recompute':13} {traffic.operators:5} operators, "
            f"{sum(traffic.other_bytes.values()) / 1e9:6.1f} GB beside products, {traffic.product_bytes / 1e9:6.1f} GB "
            "of products and attention"
        )
        times = ", ".join(f"{name} {work.seconds(card, tf32=False):.3f}" for name, card in CARDS.items())
        lines.append(f"  {'':13} roofline (arithmetic), seconds: {times}")
        if by_operator:
            lines += [f"    {name:50} {traffic.calls[name]:5} {moved / 1e9:8.2f} GB" for name, moved in rows if moved]
            lines += [
                f"    {name:50} {n:5}" for name, n in traffic.calls.most_common() if name not in traffic.other_bytes
            ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=SIDE_WIDTHS, default=list(SIDE_WIDTHS), help="towers")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--by_operator", action="store_true", help="a line for each operator")
    parser.add_argument("--write", action="store_true", help=f"also write {RESULTS}")
    args = parser.parse_args()
    lines = [describe_machine(), "counts, nothing was run: bf16, tower in bf16, forward and backward pass"]
    for arch in args.arch:
        lines += describe(arch, args.clips, args.by_operator)
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if args.write:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
