"""What runs, said once at the start."""

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from dotmap import DotMap
from torch.utils.data import DataLoader

from datasets.decoders import describe_decoder
from modules.side4video import Side4Video
from utils.distributed import get_world_size
from utils.precision import Precision

PAPER_GPUS = 8


def describe_run(
    config: DotMap, model: Side4Video, train_loader: DataLoader, val_loader: DataLoader, precision: Precision
) -> list[str]:
    """Lines for the start-up log: versions, model, data, batch, steps."""
    data, solver, world = config.data, config.solver, get_world_size()
    accumulated = solver.grad_accumulation_steps
    steps, batch = len(train_loader) // accumulated, data.batch_size * accumulated
    device = torch.cuda.get_device_name() if precision.device.type == "cuda" else "CPU"
    return [
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
        f"commit {git_commit()}, seed {config.seed}, {world} process(es) on {device}, precision {precision.name}",
        *describe_model(config, model),
        f"data: {data.dataset}, protocol {train_loader.dataset.protocol}, {len(train_loader.dataset)} training and "
        f"{len(val_loader.dataset)} validation videos, {data.num_classes} classes, {data.num_segments} frames "
        f"of {data.input_size} pixels{', dense' if data.dense else ''}",
        f"effective batch: {data.batch_size} videos x {world} process(es) x {accumulated} accumulated = "
        f"{batch * world}, {data.num_sample} clip(s) of each; on the paper's {PAPER_GPUS} GPUs {batch * PAPER_GPUS}, "
        f"and solver.lr {solver.lr:g} is not rescaled",
        f"steps: {steps} updates an epoch, {steps * solver.epochs} in {solver.epochs} epochs, "
        f"{solver.type} after {solver.lr_warmup_step} epochs of warm-up",
    ]


def describe_model(config: DotMap, model: Side4Video) -> list[str]:
    """Parameters of each part, frozen and trained, and what decodes video files."""
    tower, side, head = model.backbone, model.trained.side, model.trained.head
    frozen, trained = _count(tower), _count(model.trained)
    return [
        f"tower: {config.network.arch}, {tower.num_blocks} of {tower.depth} blocks of width {tower.width}, "
        f"{tower.num_patches} patches, {tower.weight_file or 'no weight file'}: {frozen / 1e6:.2f} M frozen",
        f"side network: variant {side.norm_placement}, {len(side.blocks)} blocks of width {side.pos.shape[1]} read the "
        f"tower after its blocks {', '.join(map(str, tower.layers))} (from 0): {_count(side) / 1e6:.2f} M; "
        f"head: {_count(head) / 1e6:.2f} M",
        f"pixels: {config.data.input_size} x {config.data.input_size}, timm states "
        f"{tower.timm_size} x {tower.timm_size}; mean {_join(config.data.mean)}, std {_join(config.data.std)}",
        f"in all: {trained / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen, {(trained + frozen) / 1e6:.2f} M total",
        *([f"video files: decoded by {decoder}"] if (decoder := describe_decoder(config.data)) else []),
    ]


def git_commit() -> str:
    """Short hash of the checked-out commit, `+` after it when tracked files were changed, `unknown` without git."""
    root = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _join(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
