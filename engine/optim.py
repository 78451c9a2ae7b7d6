"""The optimizer's groups, and the learning rate as a pure function of time (docs/protocol.md section 6)."""

import math
from bisect import bisect_right
from typing import Any

import torch
from dotmap import DotMap

from modules.side4video import Side4Video
from modules.token_norm import TokenBatchNorm
from utils.distributed import get_world_size


def build_optimizer(model: Side4Video, config: DotMap) -> torch.optim.AdamW:
    """AdamW, eps 1e-8, with weight decay on every trained tensor, in three groups that differ in their learning rate.

    Head: `lr`. Side network: `lr * clip_ratio`, except its BatchNorm parameters: `lr`, divided by
    `grad_accumulation_steps` unless `sync_bn`. Each group keeps its own peak as `base_lr`. The `lr` is that of
    `scaled_lr`. On a GPU, the fused form updates all tensors without asking the device for a number.
    """
    solver, lr = config.solver, scaled_lr(config, get_world_size())
    norm_lr = lr if solver.sync_bn else lr / solver.grad_accumulation_steps
    norm_names = {
        f"{name}.{own}"
        for name, module in model.trained.side.named_modules()
        if isinstance(module, TokenBatchNorm)
        for own, _ in module.named_parameters()
    }
    side = dict(model.trained.side.named_parameters())
    groups = {
        "head": (list(model.trained.head.parameters()), lr),
        "side": ([p for name, p in side.items() if name not in norm_names], lr * solver.clip_ratio),
        "side_batch_norm": ([p for name, p in side.items() if name in norm_names], norm_lr),
    }
    return torch.optim.AdamW(
        [{"params": p, "name": name, "lr": lr, "base_lr": lr} for name, (p, lr) in groups.items()],
        betas=tuple(solver.betas),
        eps=1e-8,
        weight_decay=solver.weight_decay,
        fused=next(model.trained.parameters()).device.type == "cuda" or None,
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take the averages and step counts of a saved optimizer, whatever its form; learning rates and options stay.

    Args:
        state: result of `state_dict()` of an optimizer with the same parameters, fused or not.
    """
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def scaled_lr(config: DotMap, world_size: int) -> float:
    """`solver.lr`; with `lr_scale: linear`, times the videos of an update on all processes over `lr_batch`."""
    solver = config.solver
    if solver.lr_scale == "none":
        return solver.lr
    return solver.lr * update_videos(config, world_size) / solver.lr_batch


def update_videos(config: DotMap, world_size: int) -> int:
    """Videos that an update of the weights sees on all processes."""
    return config.data.batch_size * config.solver.grad_accumulation_steps * world_size


def lr_factor(epoch: float, solver: DotMap) -> float:
    """The number that every group's `base_lr` is multiplied by at a moment of training.

    Args:
        epoch: e = epoch + iteration / iterations per epoch.
        solver: `type`, `epochs`, `lr_warmup_step` (epochs) and `lr_decay_step` are read. With `multistep`, an integer
            `lr_decay_step` means every so many epochs, and a list names the epochs, in any order.
    """
    if epoch < solver.lr_warmup_step:
        return epoch / solver.lr_warmup_step
    if solver.type == "multistep":
        steps = solver.lr_decay_step
        passed = bisect_right(sorted(steps), epoch) if isinstance(steps, list) else int(epoch // steps)
        return 0.1**passed
    progress = (epoch - solver.lr_warmup_step) / (solver.epochs - solver.lr_warmup_step)
    return (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `base_lr * factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
