"""Where a training starts: the weights of `resume` or `pretrain`, and the state that a resumed run goes on with.

`modules.checkpoint` describes the file.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from dotmap import DotMap

from engine.class_names import class_order, names_differ
from engine.configuration import DERIVED_KEYS
from modules.checkpoint import describe_checkpoint, is_released, load_model_state
from modules.side4video import Side4Video
from utils.errors import CheckpointError

NOT_COMPARED = ("resume", "pretrain")  # keys that say where a run starts, not how it trains

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


def restore_training(
    checkpoint: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: DotMap,
) -> tuple[int, float | None]:
    """Restore optimizer and scaler from the checkpoint of `resume`. Returns (next epoch, best top-1 in percent so far).

    Learning rates and weight decay stay those of `config`. Every key whose value has changed is logged.

    Raises:
        CheckpointError: the file has no state of an optimizer.
    """
    if "optimizer" not in checkpoint:
        kind = "released" if is_released(checkpoint) else "converted"
        raise CheckpointError(f"{config.resume}: a {kind} checkpoint can only be started from, by pretrain")
    for key, old, new in changed_values(checkpoint["config"], config.toDict()):
        log.warning("resume: %s was %s and is %s now", key, old, new)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
    scaler.load_state_dict(checkpoint["scaler"])
    epoch, best = checkpoint["epoch"], checkpoint["best_accuracy"]
    log.info("resume: epoch %d, best top-1 so far %s", epoch, percent(best))
    return epoch, best


def changed_values(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) for each difference of two configurations as plain dictionaries.

    Derived values that older checkpoints left open (None, or `auto`) do not count.
    """
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_values(a, b, f"{name}.")
        elif a != b and name not in NOT_COMPARED and not (name in DERIVED_KEYS and a in (None, "auto")):
            found.append((name, a, b))
    return found


def percent(accuracy: float | None) -> str:
    return "none yet" if accuracy is None else f"{accuracy:.2f}"
