"""Memory and time of a training step and of evaluation, against the textbook form of tests/textbook.py.

    python -m benchmarks.training_step [--arch ViT-B/16 ...] [--clips 1 2] [--rounds 7] [--eager]

All forms share one tower with seeded weights, and one batch, and run in turns in one process: in float32, and in
bfloat16 (the tower in bfloat16, the side network under autocast). Medians of seconds, and of the ratios of each round,
of elapsed and of processor time; the latter says more on a machine that others use. Writes
benchmarks/results/training_step_<tower>.txt for each tower.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.allocations import OperatorCount, measure_memory
from benchmarks.machine import describe_machine
from benchmarks.shipped_models import EVA_E, SIDE_WIDTHS
from benchmarks.timing import processor_seconds, rounds_in_turns
from modules.backbones import ARCHITECTURES, FrozenTower
from modules.side_network import SideNetwork

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from textbook import textbook_of  # noqa: E402

RESULTS = "benchmarks/results/training_step_{}.txt"
FRAMES, SIZE, CROPS_AND_CLIPS = 8, 224, 3 * 4
EVA_BLOCKS = 4  # of 64, so that it fits into the memory of a small machine
MIB = 2**20


class Model(nn.Module):
    """A tower and a side network, ours or the textbook's."""

    def __init__(self, tower: FrozenTower, side: nn.Module):
        super().__init__()
        self.tower, self.side = tower, side

    def forward(self, clips: Tensor) -> Tensor:
        """Clips (B, T, 3, H, W) -> features (B, S), under autocast if the tower is in bfloat16."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.tower.dtype == torch.bfloat16):
            return self.side(clips, self.tower.layer_tokens(clips))

    def step(self, clips: Tensor) -> None:
        """Forward and backward."""
        self(clips).float().sum().backward()
        self.side.zero_grad(set_to_none=True)

    @torch.no_grad()
    def views(self, clips: Tensor, times: int = 1) -> None:
        """Evaluate the clips `times` times."""
        self.side.eval()
        for _ in range(times):
            self(clips)
        self.side.train()


def build(arch: str, eager: bool) -> dict[str, Model]:
    """The forms to compare, by name; `eager` leaves out the compiled ones. The others of ours share their weights."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[arch]
    kwargs = {"depth": EVA_BLOCKS} if arch == EVA_E else {}
    layers = "every2" if architecture.side_variant == "post" else "all"
    tower = FrozenTower(architecture.timm_name, SIZE, kwargs, layers)
    sizes = dict(
        backbone_width=tower.width,
        side_width=SIDE_WIDTHS[arch],
        num_layers=len(tower.layers),
        patch_size=tower.patch_size,
        num_patches=tower.num_patches,
        norm_placement=architecture.side_variant,
    )
    side = SideNetwork(**sizes).train()
    plain = SideNetwork(**sizes, recompute=False).train()
    plain.load_state_dict(side.state_dict(), assign=True)
    forms = {
        "textbook": Model(tower, textbook_of(side, **sizes)),
        "recompute": Model(tower, side),
        "no recompute": Model(tower, plain),
    }
    if not eager:
        compiled = copy.deepcopy({name: forms[name] for name in list(forms)[1:]})
        for model in compiled.values():
            model.tower.compile_blocks()
            model.side.compile_blocks()
        forms |= {f"{name}, compiled": model for name, model in compiled.items()}
    return forms


class Timing(NamedTuple):
    """Medians: seconds, and the ratios of elapsed and of processor time to the first form of the same round."""

    seconds: float
    ratio: float
    processor_ratio: float


def time_in_turns(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, Timing]:
    """Time every run `rounds` times, one after the other in each round."""
    rows = rounds_in_turns(runs.values(), rounds, both_seconds)
    return {
        name: Timing(
            statistics.median(row[i][0] for row in rows),
            *(statistics.median(row[i][clock] / row[0][clock] for row in rows) for clock in (0, 1)),
        )
        for i, name in enumerate(runs)
    }


def both_seconds(run: Callable[[], None]) -> tuple[float, float]:
    """Elapsed seconds and processor seconds of one call."""
    started = time.perf_counter()
    processor = processor_seconds(run)
    return time.perf_counter() - started, processor


def timing_lines(timings: dict[str, Timing], clips: int = 1) -> list[str]:
    """A line for each form."""
    return [
        f"    {name:34} {timing.seconds / clips:8.3f}   {timing.ratio:.2f}   {timing.processor_ratio:.2f}"
        for name, timing in timings.items()
    ]


def floor_bytes(tower: FrozenTower, side_width: int, num_clips: int) -> int:
    """Bytes of the tower's tokens that the layers read and of each block's input, which any form must keep."""
    frames = num_clips * FRAMES
    numbers = (1 + tower.num_patches) * tower.width + tower.num_patches * side_width
    return frames * len(tower.layers) * numbers * tower.dtype.itemsize


def measure(arch: str, num_clips: int, rounds: int, eager: bool) -> list[str]:
    """The lines of one tower and batch size."""
    models = build(arch, eager)
    clips = torch.randn(num_clips, FRAMES, 3, SIZE, SIZE)
    cut = f" ({EVA_BLOCKS} of 64 blocks)" if arch == EVA_E else ""
    lines = [f"\n{arch}{cut}, {num_clips} clip(s) of {FRAMES} frames"]

    textbook, ours = models["textbook"], models["recompute"]
    half = Model(copy.deepcopy(ours.tower), ours.side)
    half.tower.convert(torch.bfloat16)
    kept = {
        name: measure_memory(lambda model=model: model(clips))[0]
        for name, model in {**models, "recompute, tower in bfloat16": half}.items()
    }
    floors = [floor_bytes(model.tower, SIDE_WIDTHS[arch], num_clips) / num_clips / MIB for model in (ours, half)]
    lines.append("  kept for the backward pass, MiB a clip (of textbook)")
    lines += [f"    {name:30} {n / num_clips / MIB:8.1f}   1/{kept['textbook'] / n:.1f}" for name, n in kept.items()]
    lines.append("    floor: {:.1f}, with the tower in bfloat16 {:.1f}".format(*floors))
    del half

    peaks = [measure_memory(lambda m=m: m.step(clips))[1] for m in (textbook, ours)]
    evaluation = measure_memory(lambda: ours.views(clips, CROPS_AND_CLIPS))[1]
    lines.append(
        f"  peak, MiB: step {peaks[1] / MIB:.0f} (textbook {peaks[0] / MIB:.0f}), 3x4 test at the same batch "
        f"{evaluation / MIB:.0f}: {evaluation / peaks[1]:.2f} of the step"
    )

    counts = {}
    for name in ("textbook", "recompute", "no recompute"):
        with OperatorCount() as counts[name]:
            models[name].step(clips)
    lines.append("  operators a step: " + ", ".join(f"{name} {count.operators}" for name, count in counts.items()))

    steps = time_in_turns({name: lambda m=m: m.step(clips) for name, m in models.items()}, rounds)
    lines += ["  seconds a step, ratio to textbook of elapsed and of processor time", *timing_lines(steps)]

    views = time_in_turns(
        {name: lambda m=m: m.views(clips) for name, m in models.items() if not name.startswith("no ")}, rounds
    )
    views = {name.replace("recompute", "ours"): timing for name, timing in views.items()}
    lines += ["  seconds a view in evaluation, ratios to textbook", *timing_lines(views, num_clips)]
    lines.append(products(models, clips, steps["textbook"], views["textbook"]))

    half = copy.deepcopy(ours.tower)
    half.convert(torch.bfloat16)
    models = {name: Model(half, models[name].side) for name in ("textbook", "recompute", "no recompute")}
    lines.append("  bfloat16: tower in bfloat16, side network under autocast; ratios to textbook")
    steps = time_in_turns({name: lambda m=m: m.step(clips) for name, m in models.items()}, rounds)
    evaluated = {f"{name}, evaluation": models[name] for name in ("textbook", "recompute")}
    views = time_in_turns({name: lambda m=m: m.views(clips) for name, m in evaluated.items()}, rounds)
    lines += timing_lines(steps)
    lines += timing_lines({name.replace("recompute", "ours"): timing for name, timing in views.items()}, num_clips)
    lines.append(products(models, clips, steps["textbook"], views["textbook, evaluation"]))
    return lines


def products(models: dict[str, Model], clips: Tensor, step: Timing, view: Timing) -> str:
    """A line with the time of each form's products and attention alone, the least that it can take.

    Args:
        step, view: of the textbook form.
    """
    parts = []
    for name in ("recompute", "no recompute"):
        seconds = []
        for _ in range(3):
            with OperatorCount() as count:
                models[name].step(clips)
            seconds.append(count.product_seconds)
        parts.append(f"{name} {statistics.median(seconds) / step.seconds:.2f}")
    seconds = []
    for _ in range(3):
        with OperatorCount() as count:
            models["recompute"].views(clips)
        seconds.append(count.product_seconds)
    parts.append(f"evaluation {statistics.median(seconds) / view.seconds:.2f}")
    return "  products and attention alone, of the textbook's time: " + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=SIDE_WIDTHS, default=list(SIDE_WIDTHS), help="towers")
    parser.add_argument("--clips", type=int, nargs="+", default=[1, 2], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="leave out the compiled forms")
    args = parser.parse_args()
    for arch in args.arch:
        lines = [
            describe_machine(),
            f"{torch.get_num_threads()} threads, {args.rounds} rounds in turns, medians",
        ]
        for num_clips in args.clips:
            lines += measure(arch, num_clips, args.rounds, args.eager)
            torch.compiler.reset()
        text = "\n".join(lines) + "\n"
        sys.stdout.write(text)
        Path(RESULTS.format(arch.replace("/", "-"))).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
