"""Several side networks beside one tower, against as many trainings one after the other.

    python -m benchmarks.many_runs [--rounds 5] [--threads 1]

ViT-B/16, two clips of 8 frames, float32, random weights, in turns in one process, seconds of the processor. The steps
are those of `train_one_epoch`, without the loader, whose work is shared too. Bytes and products are counted on tensors
without values (engine/dry_run.py). Writes benchmarks/results/many_runs.txt.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from dotmap import DotMap
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import describe_machine, keep_lines
from benchmarks.timing import processor_seconds, rounds_in_turns
from engine.configuration import default_config
from engine.dry_run import MemoryCount, dry_run
from engine.loops import train_one_epoch
from engine.plan import blank_batch, planned_precision, silent_run, start_optimizer
from engine.run import Run
from modules.build import build_model, build_trained
from modules.side4video import Side4Video

RESULTS = Path("benchmarks/results/many_runs.txt")
RUNS, CLIPS, SIZE = 4, 2, 224
MIB = 2**20


def make_config(arch: str, side_width: int, precision: str = "fp32") -> DotMap:
    """One training with the given tower and side width, 174 classes."""
    return default_config(
        data={"input_size": SIZE, "num_segments": 8, "batch_size": CLIPS, "num_classes": 174},
        network={"arch": arch, "init": False, "side_dim": side_width, "backbone_kwargs": {}},
        solver={"precision": precision},
    )


def build_models(config: DotMap, number: int) -> list[Side4Video]:
    """Models beside one tower."""
    first = build_model(config)
    return [first, *(Side4Video(first.backbone, build_trained(config, first.backbone)) for _ in range(number - 1))]


@contextmanager
def counted_runs(config: DotMap, number: int, device_type: str) -> Iterator[tuple[list[Run], MemoryCount]]:
    """Runs that share a tower, of tensors without values, after their first update."""
    with torch.device("meta"):
        models = build_models(config, number)
    with dry_run(device_type) as count:
        runs = []
        for model in models:
            model.to_empty(device=device_type)
            precision = planned_precision(config, torch.device(device_type))
            runs.append(silent_run(config, model, precision, start_optimizer(model, config)))
        yield runs, count


def step(runs: Sequence[Run]) -> None:
    """One update of all runs."""
    train_one_epoch(runs, [blank_batch(runs[0].config)], 0)  # type: ignore[arg-type]  # a loader is iterated


def measure_time(side_width: int, rounds: int) -> str:
    """One line: the step of several runs against the sum of its parts, and against as many steps of one run."""
    config, cpu = make_config("ViT-B/16", side_width), torch.device("cpu")
    runs = [silent_run(config, model, planned_precision(config, cpu)) for model in build_models(config, RUNS)]
    clips = torch.zeros(CLIPS, 8, 3, SIZE, SIZE)

    def tower() -> None:
        for _ in runs[0].model.backbone.layer_tokens(clips):
            pass

    rows = rounds_in_turns([tower, lambda: step(runs[:1]), lambda: step(runs)], rounds, processor_seconds)
    middle = dict(zip(("tower", "one", "all"), map(statistics.median, zip(*rows, strict=True)), strict=True))
    of_parts = statistics.median(all_ / (tower_ + RUNS * (one - tower_)) for tower_, one, all_ in rows)
    of_separate = statistics.median(all_ / (RUNS * one) for _, one, all_ in rows)
    return (
        f"ViT-B/16, {RUNS} runs of width {side_width}: tower {middle['tower']:.2f} s, a step of one run "
        f"{middle['one']:.2f} s, of all {middle['all']:.2f} s: {of_parts:.3f} of tower + {RUNS} x side, "
        f"{of_separate:.3f} of {RUNS} trainings"
    )


def count_bytes(side_width: int) -> str:
    """One line: bytes kept for the backward passes at their most, of one run and of several."""
    config = make_config("ViT-B/16", side_width)
    kept = {}
    for number in (1, RUNS):
        with counted_runs(config, number, "cpu") as (runs, count):
            after_forward: list[int] = []
            for run in runs:
                run.model.register_forward_hook(lambda *_, c=count, seen=after_forward: seen.append(c.live))
            before = count.live
            step(runs)
            kept[number] = max(after_forward) - before
    tower, blocks = runs[0].model.backbone, len(runs[0].model.layers)
    tokens = CLIPS * 8 * blocks * (1 + tower.num_patches) * tower.width * 4
    inputs = CLIPS * 8 * blocks * tower.num_patches * side_width * 4
    return (
        f"ViT-B/16, width {side_width}, bytes kept a clip (counted): one run {kept[1] / CLIPS / MIB:.1f} MiB, {RUNS} "
        f"runs {kept[RUNS] / CLIPS / MIB:.1f} MiB; tokens {tokens / CLIPS / MIB:.1f} + {RUNS} x block inputs "
        f"{inputs / CLIPS / MIB:.1f} = {(tokens + RUNS * inputs) / CLIPS / MIB:.1f} MiB"
    )


def count_products(arch: str, side_width: int) -> str:
    """One line: what the time of several runs would be by the number of products alone."""
    config = make_config(arch, side_width, "bf16")
    with counted_runs(config, 1, "cuda") as (runs, _):
        with FlopCounterMode(display=False) as of_step:
            step(runs)
        clips = torch.zeros(CLIPS, 8, 3, SIZE, SIZE, device="cuda")
        with FlopCounterMode(display=False) as of_tower:
            for _ in runs[0].model.backbone.layer_tokens(clips):
                pass
    tower, one = of_tower.get_total_flops(), of_step.get_total_flops()
    share = (tower + RUNS * (one - tower)) / (RUNS * one)
    return f"{arch}, {RUNS} runs of width {side_width}, arithmetic: {share:.2f} of the products of {RUNS} trainings"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_lines(results(args.threads, args.rounds), RESULTS)


def results(threads: int, rounds: int) -> Iterator[str]:
    """The lines of the result."""
    yield f"{describe_machine()}\n{threads} thread(s), {rounds} rounds in turns, medians of processor time"
    yield count_bytes(320)
    yield count_products("EVA02-CLIP-bigE-14", 576)
    yield count_products("ViT-B/16", 320)
    yield measure_time(320, rounds)
    yield measure_time(128, rounds)


if __name__ == "__main__":
    main()
