"""Where a training starts: the weights of `resume` or `pretrain`, and the state that a resumed run goes on with.

`modules.checkpoint` describes the file.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dotmap import DotMap

from engine.averaging import AveragedWeights
from engine.class_names import class_order, names_differ
from engine.configuration import AUTO, DERIVED_KEYS, OPEN_DTYPES
from modules.checkpoint import describe_checkpoint, is_released, load_model_state
from modules.side4video import Side4Video
from utils.config_schema import FIELDS
from utils.distributed import get_world_size
from utils.errors import CheckpointError, ConfigError

# Keys that may differ between a run and its resumption without changing a weight: where things lie, how fast they are
# read, what is reported. `solver.epochs` is among them because a longer training is what it is raised for.
NEUTRAL_KEYS = {
    *("resume", "pretrain", "solver.epochs", "solver.start_epoch", "solver.evaluate"),
    *("data.workers", "data.prefetch", "data.train_root", "data.train_list", "data.val_root", "data.val_list"),
    *("data.num_classes", "data.label_list"),  # the checkpoint's head and names are compared with these
    *("data.image_tmpl", "data.index_base", "data.on_error", "data.on_damage", "network.weights"),
    *("solver.timeout_minutes", "network.shard_backbone", "test.view_batch", "test.remap_labels"),
    *("solver.patience", "logging.wandb"),
    *("logging.print_freq", "logging.eval_freq", "logging.skip_epoch", "logging.save_minutes", "logging.keep"),
}

EMPTY_REPORT: dict[str, Any] = {
    "loss_sum": [0.0, 0.0],
    "first_bad": math.inf,
    "mean_loss": math.nan,
    "unreadable": [],
    "damaged": [],
}

log = logging.getLogger(__name__)


def load_start(
    model: Side4Video,
    checkpoint: dict[str, Any],
    source: str | Path,
    class_names: list[str] | None,
    *,
    new_head: bool,
    new_size: bool,
) -> None:
    """Fill the model from the checkpoint that a run starts from.

    Args:
        source: the checkpoint's file, for errors and the log.
        class_names: of this run, in label order.
        new_head: make a new head where the checkpoint has other classes; otherwise they are an error.
        new_size: resample position tables of another input size; otherwise they are an error.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    head_kept = load_model_state(model, checkpoint, source, new_head=new_head, new_size=new_size)
    log.info(describe_checkpoint(checkpoint, source))
    if head_kept and new_head and names_differ(class_names, checkpoint.get("class_names")):
        model.trained.head.reset_parameters()
        log.info("pretrain: %s was trained on other class names; the head is made anew", source)
    elif head_kept:
        class_order(class_names, checkpoint.get("class_names"), source)


@dataclass
class Progress:
    """How far a training has come.

    epoch: epochs finished
    step: iterations of the next epoch that are done too
    best: best validation top-1 in percent, None before the first
    best_ema: the same of the averaged copy of `solver.ema`
    improved: the last epoch, counted from 0, whose validation was better than all before, by either; None before it
    """

    epoch: int = 0
    step: int = 0
    best: float | None = None
    best_ema: float | None = None
    improved: int | None = None

    def take(self, epoch: int, top1: float, averaged: bool = False) -> bool:
        """Take in a validation of an epoch; returns whether it is the best so far of its kind."""
        name = "best_ema" if averaged else "best"
        better = getattr(self, name) is None or top1 > getattr(self, name)
        if better:
            setattr(self, name, top1)
            self.improved = epoch
        return better


def finished(epoch: int, improved: int | None, config: DotMap) -> str | None:
    """Why a training ends after so many finished epochs, in words for the log; None if it goes on.

    Args:
        improved: of `Progress`.
    """
    patience = config.solver.patience
    if epoch >= config.solver.epochs:
        return f"epoch {epoch} of {config.solver.epochs}; raise solver.epochs to go on"
    if patience is None or improved is None or epoch == 0 or not is_evaluated(epoch - 1, config):
        return None
    waited = epoch - 1 - improved
    if waited < patience:
        return None
    return f"no better validation in {waited} epochs since epoch {improved}; raise solver.patience to go on"


def is_evaluated(epoch: int, config: DotMap) -> bool:
    """Every `eval_freq` epochs and after the last one, but never an epoch of `skip_epoch`."""
    due = (epoch + 1) % config.logging.eval_freq == 0 or epoch + 1 == config.solver.epochs
    return due and epoch not in config.logging.skip_epoch


def refuse_changes(checkpoint: dict[str, Any], source: str | Path, config: DotMap, allow: bool) -> None:
    """Log every key whose value has changed since the checkpoint was written.

    Raises:
        ConfigError: a changed key changes numbers, and `allow` is not set.
    """
    changed = changed_values(checkpoint["config"], config.toDict())
    for key, old, new in changed:
        log.warning("resume: %s was %s and is %s now", key, old, new)
    neutral = set(NEUTRAL_KEYS)
    if checkpoint.get("world_size", get_world_size()) != get_world_size():
        neutral |= {"data.batch_size", "solver.grad_accumulation_steps"}  # changed by `keep_global_batch`
    serious = [f"{key} was {old} and is {new} now" for key, old, new in changed if key not in neutral]
    if serious and not allow:
        raise ConfigError(
            f"resume: {source}: {'; '.join(serious)}: the run would not be the same any more; take the old values, or "
            "add --allow_config_change"
        )


def refuse_without_optimizer(checkpoint: dict[str, Any], source: str | Path) -> None:
    """Raise CheckpointError for a file that has no state of an optimizer: no training can go on from it."""
    if "optimizer" not in checkpoint:
        kind = "released" if is_released(checkpoint) else "converted"
        raise CheckpointError(f"{source}: a {kind} checkpoint can only be started from, by pretrain")


def keep_global_batch(checkpoint: dict[str, Any], source: str | Path, config: DotMap, world_size: int) -> DotMap:
    """The configuration with batch and accumulation for another number of processes, so that each update sees the
    same videos.

    The videos of a process's batch stay if they can, as BatchNorm takes its statistics over them.

    Raises:
        ConfigError: no batch and accumulation give the global batch of the checkpoint.
    """
    old = checkpoint["config"]
    old_world = checkpoint.get("world_size", world_size)
    batch, accumulation = old["data"]["batch_size"], old["solver"]["grad_accumulation_steps"]
    if old_world == world_size:
        return config
    total = old_world * batch * accumulation
    fitting = [size for size in range(batch, 0, -1) if total % (world_size * size) == 0]
    text = f"{batch} videos x {old_world} process(es) x {accumulation} accumulated = {total}"
    if not fitting:
        raise ConfigError(
            f"resume: {source}: an update saw {text} videos, which {world_size} processes cannot share evenly; use a "
            "number of processes that divides it"
        )
    plain = config.toDict()
    plain["data"]["batch_size"], plain["solver"]["grad_accumulation_steps"] = (
        fitting[0],
        total // (world_size * fitting[0]),
    )
    log.warning(
        f"resume: {text} before; now {fitting[0]} videos x {world_size} process(es) x "
        f"{plain['solver']['grad_accumulation_steps']} accumulated = {total}"
    )
    return DotMap(plain, _dynamic=False)


def keep_recompute(checkpoint: dict[str, Any], config: DotMap) -> DotMap:
    """The configuration with the checkpoint's choice for `solver.recompute: auto`: another would change sums."""
    if config.solver.recompute != AUTO:
        return config
    plain = config.toDict()
    plain["solver"]["recompute"] = checkpoint["config"]["solver"].get("recompute", True)
    return DotMap(plain, _dynamic=False)


def improved_epoch(checkpoint: dict[str, Any]) -> int | None:
    """`improved` of a checkpoint. Older files do not state it; their patience starts with the epoch before them."""
    if "improved" in checkpoint:
        return checkpoint["improved"]
    return None if checkpoint["best_accuracy"] is None else checkpoint["epoch"] - 1


def refuse_other_average(state: dict[str, Any], average: AveragedWeights, source: str | Path) -> None:
    """Raise CheckpointError if the averaged copy of a checkpoint has other tensors than the model."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if shapes != {name: tensor.shape for name, tensor in average.state_dict().items()}:
        raise CheckpointError(f"{source}: its entry ema is the average of another model")


def refuse_other_shapes(state: dict[str, Any], optimizer: torch.optim.Optimizer, source: str | Path) -> None:
    """Raise CheckpointError if an averaged gradient has not the shape of its parameter; torch would not notice."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in state.get("state", {}).items():
        for name, tensor in entries.items():
            if number >= len(parameters) or (tensor.dim() > 0 and tensor.shape != parameters[number].shape):
                raise CheckpointError(
                    f"{source}: its optimizer is that of another model: {name} of parameter {number} has the shape "
                    f"{tuple(tensor.shape)}"
                )


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of several processes in one."""
    sums = [sum(column) for column in zip(*(state["loss_sum"] for state in states), strict=True)]
    videos = {name: [v for state in states for v in state.get(name, [])] for name in ("unreadable", "damaged")}
    first_bad = min(state["first_bad"] for state in states)
    return {**states[0], "loss_sum": sums, "first_bad": first_bad, **videos}


def changed_values(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) for each difference of two configurations as plain dictionaries.

    Derived values that older checkpoints left open (None, or OPEN_DTYPES) do not count. A key that is younger than the
    checkpoint had its default.
    """
    found = []
    for key in sorted(old.keys() | new.keys()):
        name = prefix + key
        default = FIELDS[name].default if name in FIELDS else None
        a, b = old.get(key, default), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_values(a, b, f"{name}.")
        elif a != b and name not in ("resume", "pretrain") and not (name in DERIVED_KEYS and a in (None, *OPEN_DTYPES)):
            found.append((name, a, b))
    return found


def percent(accuracy: float | None) -> str:
    return "none yet" if accuracy is None else f"{accuracy:.2f}"
