"""The optimizer's groups, and the learning rate as a pure function of time (docs/protocol.md section 6)."""

import math
from bisect import bisect_right

import torch
from dotmap import DotMap

from modules.side4video import Side4Video
from modules.token_norm import TokenBatchNorm


def build_optimizer(model: Side4Video, config: DotMap) -> torch.optim.AdamW:
    """AdamW, eps 1e-8, with weight decay on every trained tensor, in three groups that differ in their learning rate.

    Head: `lr`. Side network: `lr * clip_ratio`, except its BatchNorm parameters: `lr`, divided by
    `grad_accumulation_steps` unless `sync_bn`. Each group keeps its own peak as `base_lr`.
    """
    solver = config.solver
    norm_lr = solver.lr if solver.sync_bn else solver.lr / solver.grad_accumulation_steps
    norm_names = {
        f"{name}.{own}"
        for name, module in model.trained.side.named_modules()
        if isinstance(module, TokenBatchNorm)
        for own, _ in module.named_parameters()
    }
    side = dict(model.trained.side.named_parameters())
    groups = {
        "head": (list(model.trained.head.parameters()), solver.lr),
        "side": ([p for name, p in side.items() if name not in norm_names], solver.lr * solver.clip_ratio),
        "side_batch_norm": ([p for name, p in side.items() if name in norm_names], norm_lr),
    }
    return torch.optim.AdamW(
        [{"params": p, "name": name, "lr": lr, "base_lr": lr} for name, (p, lr) in groups.items()],
        betas=tuple(solver.betas),
        eps=1e-8,
        weight_decay=solver.weight_decay,
    )


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
