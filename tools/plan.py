"""What a run of a configuration needs: memory, the batch that fits, steps and time. No GPU, no weights, no videos.

    python tools/plan.py CONFIG [--gpu 24GB] [--gpus 8] [--videos N] [key=value ...]

The memory is counted in a dry run of the real training step and test on tensors without values. It takes seconds and
allocates nothing. Lines that say "arithmetic" are published figures of cards divided out: no run is faster.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from dotmap import DotMap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import few_shot, read_annotations
from engine.optim import update_videos
from engine.plan import (
    CARDS,
    CONTEXT_BYTES,
    GAPS,
    Plan,
    choose_recompute,
    make_plan,
    planned_training_peak,
    resolve_for_gpu,
)
from engine.summary import PAPER_GPUS
from utils.config import load_config
from utils.errors import ConfigError, quoted, run_program
from utils.seeding import shot_rng

UNITS = {"GB": 10**9, "GIB": 2**30, "": 10**9}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="plan.py", description="What a run of a configuration needs.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see docs/configuration.md")
    parser.add_argument("--gpu", metavar="SIZE", help=f"memory of each GPU, as 24GB, or one of {', '.join(CARDS)}")
    parser.add_argument(
        "--gpus", type=int, default=PAPER_GPUS, metavar="N", help=f"number of GPUs (default {PAPER_GPUS}, the paper's)"
    )
    parser.add_argument("--videos", type=int, metavar="N", help="of the training list, if it is not on this machine")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    if args.gpus < 1:
        parser.error(f"--gpus: {args.gpus} is less than 1")
    if args.videos is not None and args.videos < 1:
        parser.error(f"--videos: {args.videos} is less than 1")
    memory = None if args.gpu is None else gpu_memory(args.gpu)
    recipe, config = planned_config(args.config), planned_config(args.config, args.overrides)
    # The recipe is the file's on the paper's GPUs, whatever batch is tried here.
    total = update_videos(recipe, PAPER_GPUS)
    plan = make_plan(config, args.gpus, memory, total, args.videos or count_videos(config))
    lines = describe(plan, args.config)
    if config.solver.recompute != plan.config.solver.recompute:
        lines.append(f"solver.recompute: {config.solver.recompute} becomes {plan.config.solver.recompute}")
    if config.runs:
        runs, _ = choose_recompute(list(config.runs.values()), args.gpus, plan.room)
        peak = planned_training_peak(runs, args.gpus)
        lines.append(
            f"runs: the lines above are of one training; {len(config.runs)} runs beside one tower: peak of a training "
            f"step {_gb(peak)}"
        )
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def gpu_memory(text: str) -> float:
    """Bytes of `24GB` (10^9 each), `24GiB`, `24`, or a card's name. Raises ConfigError."""
    if text.upper() in CARDS:
        return CARDS[text.upper()].memory
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GIB|)", text.upper())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"--gpu: {quoted(text)} is no size; write 24GB, or one of {', '.join(CARDS)}")
    return float(found[1]) * UNITS[found[2]]


def planned_config(path: str, overrides: list[str] | tuple[str, ...] = ()) -> DotMap:
    """The configuration as it is resolved on a GPU with bf16. No list, folder or weight file has to exist."""
    return resolve_for_gpu(load_config(path, overrides, "model"))


def count_videos(config: DotMap) -> int | None:
    """Videos of an epoch, or None if the training list is not there."""
    data = config.data
    if not data.train_list or not os.path.isfile(data.train_list):
        return None
    records = read_annotations(data.train_list, data.num_classes, data.modality)
    if data.shot:
        names = [f"class {label}" for label in range(data.num_classes)]
        records = few_shot(records, data.shot, names, shot_rng(config.seed))
    return len(records)


def describe(plan: Plan, source: str) -> list[str]:
    """The report, line by line."""
    config, memory = plan.config, plan.memory
    data, solver = config.data, config.solver
    mean = "recomputed" if solver.recompute else "not recomputed"
    buckets = memory.gradients if plan.gpus > 1 else 0
    lines = [
        f"{source}: {config.network.arch}, {data.num_segments} frames of {data.input_size} pixels, "
        f"{data.batch_size} videos x {data.num_sample} clip(s) on each of {plan.gpus} GPU(s)",
        "memory of one process:",
        *(f"  parameters, {part}, {dtype}: {_gb(size)}" for (part, dtype), size in memory.parameters.items()),
        f"  optimizer: {_gb(memory.optimizer)}",
        f"  gradients: {_gb(memory.gradients)}" + (f", and {_gb(buckets)} to average them" if buckets else ""),
        f"  kept between forward and backward pass, {mean}: {_gb(memory.kept)}",
    ]
    if saved := memory.saved_by_sharding(config, plan.gpus):
        lines.append(f"  sharded tower: {_gb(saved)} less (arithmetic)")
    lines += [
        f"  peak of a training step: {_gb(plan.training)}",
        f"  peak of a test, {config.test.view_batch} views at once: {_gb(plan.test)}",
    ]
    lines += _describe_fit(plan)
    clips = plan.total * data.num_sample
    if plan.videos is None:
        lines.append(f"steps: {plan.total} videos ({clips} clips) an update; how many follows from --videos N")
    else:
        updates = plan.updates() or 0
        lines.append(
            f"steps: {plan.total} videos ({clips} clips) an update, {updates} updates an epoch, "
            f"{updates * solver.epochs} in {solver.epochs} epochs, {updates * clips * solver.epochs} clips in all"
        )
    for name, card in CARDS.items():
        hours = plan.gpu_hours(card)
        lines.append(
            f"{name} (arithmetic, roofline): at most {1 / plan.seconds_per_clip(card):.3g} clips/s in training"
            + (f", at least {hours:.1f} GPU hours" if hours is not None else "")
            + f"; {plan.loaders(card)} loader process(es) a GPU keep up ({plan.source})"
        )
    return lines


def _describe_fit(plan: Plan) -> list[str]:
    if plan.room is None or plan.largest is None:
        return ["fits or not: give --gpu, as --gpu 24GB"]
    held_back = f"{100 * GAPS:.0f} % and {_gb(CONTEXT_BYTES)} held back, an assumption"
    lines = [
        f"{'fits' if plan.fits else 'does not fit'}: {_gb(plan.room)} for tensors ({held_back})",
        f"largest batch: {plan.largest[True]} videos with solver.recompute=True, {plan.largest[False]} without; "
        f"largest test.view_batch: {plan.views}",
    ]
    if plan.choice is None:
        lines.append(f"no batch on {plan.gpus} GPU(s) keeps the recipe's {plan.total} videos an update")
    else:
        recompute, batch, accumulation = plan.choice
        lines.append(
            f"the recipe's {plan.total} videos an update: data.batch_size={batch} "
            f"solver.grad_accumulation_steps={accumulation} solver.recompute={recompute}"
        )
    return lines


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    run_program(main)
