"""What a run consists of, in lines for the start of its log."""

import platform
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from dotmap import DotMap

from datasets.decoders import describe_decoder
from datasets.flips import describe_flips
from datasets.loaders import VideoLoader
from datasets.video_dataset import TrainVideoDataset
from engine.class_weights import describe_balance
from engine.optim import scaled_lr
from engine.run import Run
from engine.software import git_commit
from modules.backbones import FrozenTower
from modules.cpu_attention import runs_in_rounds
from modules.side4video import Side4Video
from modules.side_network import HEAD_WIDTH, SideNetwork
from utils.distributed import get_world_size
from utils.precision import Precision, attention_kernel, describe_switches
from utils.version import VERSION

PAPER_GPUS = 8


def describe_runs(runs: Sequence[Run], train_loader: VideoLoader, val_loader: VideoLoader) -> Iterator[tuple[str, str]]:
    """The plans of the runs of a training, as (name of the run, line); lines that all have in common have no name."""
    plans = {run.name: describe_run(run, train_loader, val_loader) for run in runs}
    first = next(iter(plans.values()))
    common = [line for line in first if all(line in plan for plan in plans.values())]
    yield from (("", line) for line in common)
    for name, plan in plans.items():
        yield from ((name, line) for line in plan if line not in common)


def describe_run(run: Run, train_loader: VideoLoader, val_loader: VideoLoader) -> list[str]:
    """The plan of a training in under 30 lines: versions, seed, model, data, batch, steps, evaluations, files."""
    config, model, precision, folder = run.config, run.model, run.precision, run.folder
    data, solver, world = config.data, config.solver, get_world_size()
    accumulated = solver.grad_accumulation_steps
    dataset = train_loader.dataset
    assert isinstance(dataset, TrainVideoDataset)
    steps, batch = len(train_loader) // accumulated, data.batch_size * accumulated
    device = torch.cuda.get_device_name() if precision.device.type == "cuda" else "CPU"
    return [
        f"Side4Video {VERSION}, Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
        f"commit {git_commit()}, seed {config.seed}, {world} process(es) on {device}, precision {precision.name}",
        *describe_model(config, model),
        f"data: {data.dataset}, protocol {data.protocol}, {len(train_loader.dataset)} training and "
        f"{len(val_loader.dataset)} validation videos, {data.num_classes} classes, {data.num_segments} frames "
        f"of {data.input_size} pixels{', dense' if data.dense else ''}",
        describe_flips(dataset.transform.flip_labels, dataset.class_names),
        *describe_balance(config, dataset),
        f"effective batch: {data.batch_size} videos x {world} process(es) x {accumulated} accumulated = "
        f"{batch * world}, {data.num_sample} clip(s) of each; on the paper's {PAPER_GPUS} GPUs {batch * PAPER_GPUS}, "
        f"and solver.lr {solver.lr:g} {_scaling(config, world)}",
        *_traffic(model, accumulated, solver.sync_bn),
        f"steps: {steps} updates an epoch, {steps * solver.epochs} in {solver.epochs} epochs, "
        f"{solver.type} after {solver.lr_warmup_step} epochs of warm-up",
        *_checks(config, steps),
        f"files: {folder}: checkpoints each epoch"
        f"{f' and every {config.logging.save_minutes:g} minutes' if config.logging.save_minutes else ''}, the newest "
        f"{config.logging.keep} and the best stay; numbers in metrics.jsonl; curves: tensorboard --logdir {folder}",
        describe_products(model, precision, solver.compile),
    ]


def _checks(config: DotMap, steps: int) -> list[str]:
    """When the training is evaluated, what is called best, and what ends it."""
    solver, logging = config.solver, config.logging
    skipped = f", not epochs {', '.join(map(str, logging.skip_epoch))}" if logging.skip_epoch else ""
    ends = f"; {solver.patience} epochs without a better one end the training" if solver.patience else ""
    lines = [f"validation: every {logging.eval_freq} epoch(s){skipped}, one view; the best top-1 is kept{ends}"]
    if solver.ema is not None:
        reach = 1 / (1 - solver.ema)
        made = steps * solver.epochs
        late = f"; only {made} are made, so it stays near the start" if reach > made else ""
        lines.append(
            f"average: of about the last {reach:.0f} updates{late}; evaluated beside the weights, its best is "
            "model_best_ema.pt"
        )
    return lines


def _scaling(config: DotMap, world: int) -> str:
    if config.solver.lr_scale == "none":
        return "is not rescaled"
    return f"becomes {scaled_lr(config, world):g}, as it is meant for {config.solver.lr_batch} videos an update"


def describe_products(model: Side4Video, precision: Precision, compiled: bool) -> str:
    """How products and attention are computed; `model` is on its device, and compiled or not."""
    dtype = str(model.backbone.dtype).removeprefix("torch.")
    side = _attention(model.backbone, precision.dtype, HEAD_WIDTH)
    if not compiled and runs_in_rounds(precision.device, precision.dtype):
        side = "batched products"
    return (
        f"products: tower in {dtype}, side network in {precision.name}; {describe_switches()}; "
        f"attention: tower {_attention(model.backbone, model.backbone.dtype)}, "
        f"side network {side}"
    )


def _attention(tower: FrozenTower, dtype: torch.dtype, head_width: int | None = None) -> str:
    """The kernel that PyTorch chooses for attention in a frame, with the head width of the tower unless given."""
    attention: Any = tower.vit.blocks[0].attn
    device, width = next(tower.parameters()).device, head_width or tower.width // attention.num_heads
    return attention_kernel(device, dtype, width, 1 + tower.num_patches)


def _traffic(model: Side4Video, accumulated: int, sync_bn: bool) -> list[str]:
    """What each process hands to the others for one update; nothing in a single process."""
    if (sent := model.reduced_bytes(accumulated)) == 0:
        return []
    what = "the gradients of what is trained" + (" and the statistics of BatchNorm" if sync_bn else "")
    return [f"traffic: each process hands {sent / 1e6:.1f} MB to the others for an update: {what}"]


def describe_model(config: DotMap, model: Side4Video) -> list[str]:
    """Parameters of each part, frozen and trained, the pixels it takes, and what decodes video files."""
    tower, side, head = model.backbone, model.trained.side, model.trained.head
    frozen, trained = _count(tower), _count(model.trained)
    blocks = ", ".join(map(str, model.layers))
    if isinstance(side, SideNetwork):
        what = f"side network: variant {side.norm_placement}, {len(side.blocks)} blocks of width {side.width} read the "
        what += f"tower after its blocks {blocks} (from 0)"
    else:
        frames = "averages the frames" if side.average_frames else "sees the order of the frames"
        what = f"probe: {config.network.side}, reads the tower after its block {model.layers[-1]} (from 0), {frames}"
    lines = [
        f"tower: {config.network.arch}, {tower.num_blocks} of {tower.depth} blocks of width {tower.width}, "
        f"{tower.num_patches} patches, {tower.weight_file or 'no weight file'}: {_millions(frozen)} frozen",
        f"{what}: {_millions(_count(side))}; head: {_millions(_count(head))}",
        f"pixels: {config.data.input_size} x {config.data.input_size}, timm states "
        f"{tower.timm_size} x {tower.timm_size}; mean {_join(config.data.mean)}, std {_join(config.data.std)}",
        f"in all: {_millions(trained)} trained, {_millions(frozen)} frozen, {_millions(trained + frozen)} total",
    ]
    if decoder := describe_decoder(config.data):
        lines.append(f"video files: decoded by {decoder}")
    return lines


def _join(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _millions(parameters: int) -> str:
    """Millions with two digits; small numbers in full, so that none becomes 0.00 M."""
    return f"{parameters / 1e6:.2f} M" if parameters >= 100_000 else f"{parameters:,} parameters"
