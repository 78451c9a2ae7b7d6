"""The fast side network against the textbook form of tests/textbook.py: forward and backward, on this machine.

    python -m benchmarks.fast_form

Both forms run in turns in one process, in float32, and attention alone in bfloat16; medians. Writes
benchmarks/results/fast_form.txt.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.machine import describe_machine
from benchmarks.timing import rounds_in_turns
from modules.autograd import ThreeTaps
from modules.cpu_attention import attention
from modules.side_network import SideNetwork, TemporalConv

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from textbook import textbook_of  # noqa: E402

RESULTS = Path("benchmarks/results/fast_form.txt")
ROUNDS = 11
FRAMES, CLIPS = 8, 2
SIZES = {
    "ViT-B/32": dict(backbone_width=768, side_width=320, num_layers=12, patch_size=32, num_patches=49),
    "ViT-B/16": dict(backbone_width=768, side_width=320, num_layers=12, patch_size=16, num_patches=196),
}


def compare(name: str, fast: Callable[[], torch.Tensor], textbook: Callable[[], torch.Tensor]) -> str:
    """Median seconds of forward and backward of both, run in turns, and the median of the ratios of each round."""
    seconds = rounds_in_turns([fast, textbook], ROUNDS, step)
    ours, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratio = statistics.median(a / b for a, b in seconds)
    return f"{name}: fast {ours * 1e3:.1f} ms, textbook {theirs * 1e3:.1f} ms, ratio {ratio:.2f}"


def step(forward: Callable[[], torch.Tensor]) -> float:
    """Seconds of forward and backward."""
    started = time.perf_counter()
    forward().sum().backward()
    return time.perf_counter() - started


def main() -> None:
    torch.manual_seed(0)
    lines = [
        describe_machine(),
        f"{torch.get_num_threads()} threads, {CLIPS} clips of {FRAMES} frames, {ROUNDS} rounds",
    ]
    for name, sizes in SIZES.items():
        side = SideNetwork(**sizes, recompute=False).train()  # benchmarks/training_step.py measures recomputation
        textbook = textbook_of(side, **sizes)
        clips = torch.randn(CLIPS, FRAMES, 3, 224, 224)
        shape = (CLIPS, FRAMES, 1 + sizes["num_patches"], sizes["backbone_width"])
        tokens = [torch.randn(shape) for _ in range(sizes["num_layers"])]
        lines.append(compare(f"side network at {name}", lambda: side(clips, tokens), lambda: textbook(clips, tokens)))  # noqa: B023

    conv = TemporalConv(320)
    plain = nn.Conv3d(320, 320, (3, 1, 1), padding=(1, 0, 0), groups=320)
    rows = torch.randn(CLIPS, FRAMES, 196, 320, requires_grad=True)
    volume = rows.detach().permute(0, 3, 1, 2).unsqueeze(-1).contiguous().requires_grad_()
    lines.append(
        compare(
            "temporal convolution alone, each in its own layout",
            lambda: ThreeTaps.apply(rows, conv.taps(), conv.bias),
            lambda: plain(volume),
        )
    )

    shapes = [(FRAMES * CLIPS, 5, tokens, 64) for tokens in (196, 197, 197)]
    heads = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    lines.append(
        compare(
            "attention in bfloat16, against PyTorch's kernel",
            lambda: attention(*heads),
            lambda: F.scaled_dot_product_attention(*heads),
        )
    )
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
