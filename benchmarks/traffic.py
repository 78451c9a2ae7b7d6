"""Operators of a training step and the bytes that they move, counted without running them.

    python -m benchmarks.traffic [--arch ViT-B/16 ...] [--clips 32] [--by_operator]

Forward and backward pass of the whole model, under autocast in bfloat16 with the tower in bfloat16, on tensors without
values (engine/dry_run.py): CUDA's rules and kernels apply, and no GPU is needed. Each operator is taken to read its
inputs and to write its results once. Matrix products, convolutions and attention are counted apart. The times are
arithmetic: the makers' bandwidths and peak rates divided out. Writes benchmarks/results/traffic.txt.
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
from engine.configuration import default_config
from engine.dry_run import dry_run
from engine.plan import CARDS, Work, planned_precision, resolve_for_gpu
from modules import build_model

RESULTS = Path("benchmarks/results/traffic.txt")
SIDE_WIDTHS = {"ViT-B/16": 320, "ViT-L/14": 512, "EVA02-CLIP-L-14": 512}
aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_cudnn_attention_backward,
}


class Traffic(TorchDispatchMode):
    """Counts the operators that run inside and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.product_bytes = 0
        self.other_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "prim" and not (func.is_view or func.overloadpacket in NO_KERNEL):
            self.operators += 1
            moved = sum(_bytes(t) for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            self.calls[func.name()] += 1
            if func.overloadpacket in PRODUCTS | ATTENTION:
                self.product_bytes += moved
            else:
                self.other_bytes[func.name()] += moved
        return result


def _bytes(t: Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded dimension count once."""
    n = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        n *= size if stride else 1
    return n


def count_step(arch: str, num_clips: int, recompute: bool) -> tuple[Traffic, Work]:
    """Forward and backward pass of the model of a tower, on that many clips of 8 frames."""
    config = resolve_for_gpu(
        default_config(
            data={"input_size": 224, "num_segments": 8, "num_classes": 174},
            network={"arch": arch, "init": False, "side_dim": SIDE_WIDTHS[arch], "backbone_kwargs": {}},
            solver={"precision": "bf16", "recompute": recompute},
        )
    )
    config.network.backbone_dtype = "bfloat16"
    with torch.device("meta"):
        model = build_model(config, load_tower=False)
    with dry_run("cuda"):
        model.to_empty(device="cuda")
        clips = torch.empty(num_clips, 8, 3, 224, 224, device="cuda")
        with Traffic() as traffic, Work() as work:
            with planned_precision(config, torch.device("cuda")).autocast():
                logits = model.train()(clips)
            logits.float().sum().backward()
    return traffic, work


def describe(arch: str, num_clips: int, recompute: bool, by_operator: bool) -> list[str]:
    """The lines of one tower."""
    traffic, work = count_step(arch, num_clips, recompute)
    others = sum(traffic.other_bytes.values())
    times = ", ".join(
        f"{name} {1000 * work.seconds(card, tf32=False):.0f} ms ({1000 * others / card.bandwidth:.0f} beside products)"
        for name, card in CARDS.items()
    )
    lines = [
        f"{arch}, {num_clips} clips of 8 frames, solver.recompute={recompute}: {others / 1e9:.1f} GB beside products, "
        f"{traffic.product_bytes / 1e9:.1f} GB of products, {traffic.operators} operators",
        f"  roofline (arithmetic): {times}",
    ]
    if by_operator:
        lines += [
            f"  {name:48} {traffic.calls[name]:6} calls {size / 1e9:8.2f} GB"
            for name, size in traffic.other_bytes.most_common(25)
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=SIDE_WIDTHS, default=list(SIDE_WIDTHS), help="towers")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--by_operator", action="store_true", help="list the operators that move most; writes no file")
    args = parser.parse_args()
    lines = [describe_machine()]
    for arch in args.arch:
        for recompute in (True, False):
            lines += describe(arch, args.clips, recompute, args.by_operator)
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if not args.by_operator:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
