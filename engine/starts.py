"""Where the runs of a training start: each from nothing, from a checkpoint, or from where it stopped.

Their models share one tower. Each is drawn and loaded as if it were alone, so that it becomes the same model.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dotmap import DotMap

from engine.run_folder import AUTO, find_start
from engine.training_state import (
    finished,
    improved_epoch,
    keep_global_batch,
    keep_recompute,
    load_start,
    refuse_changes,
    refuse_without_optimizer,
)
from modules.backbones import FrozenTower
from modules.build import build_tower, build_trained
from modules.checkpoint import holds_tower, model_state
from modules.side4video import Side4Video, share_tower
from utils.config_schema import FIELDS, OWN_KEYS
from utils.distributed import get_rank, get_world_size
from utils.errors import CheckpointError, ConfigError
from utils.logger import log_as
from utils.seeding import seed_everything

log = logging.getLogger(__name__)


@dataclass
class Start:
    """The start of one run.

    name, config: of the run; batch and accumulation follow the number of processes after a resume
    source, checkpoint: what it starts from, or None
    resumed: it goes on from there; otherwise it only takes the weights
    done: why nothing is left to do, or None
    """

    name: str
    config: DotMap
    source: Path | None
    checkpoint: dict[str, Any] | None
    resumed: bool
    done: str | None


def find_starts(config: DotMap, folders: Mapping[str, Path], allow_config_change: bool) -> list[Start]:
    """The start of every run, on every process.

    Args:
        config: of the training.
        folders: of each run, by name.
        allow_config_change: resume although keys have changed that change numbers.

    Raises:
        CheckpointError, ConfigError: a checkpoint cannot be read or does not fit.
    """
    if config.runs and config.resume not in (None, AUTO):
        raise ConfigError("resume: with runs, only auto: each of them goes on from its own folder in --output")
    starts = []
    for name, own in (config.runs or {"": config}).items():
        with log_as(name):
            starts.append(_find(name, own, folders[name], allow_config_change))
    plans = [_shared_values(start.config) for start in starts]
    for start, plan in zip(starts, plans, strict=True):
        if changed := [key for key, value in plan.items() if value != plans[0][key]]:
            raise ConfigError(
                f"resume: {', '.join(changed)}: differs between the runs {starts[0].name} and {start.name}, because "
                "they were trained on other numbers of processes; resume each of them alone"
            )
    return starts


def _find(name: str, config: DotMap, folder: Path, allow_config_change: bool) -> Start:
    source, checkpoint = find_start(config, folder)
    if config.solver.evaluate and checkpoint is None:
        raise ConfigError("solver.evaluate: there is no checkpoint to evaluate; set resume or pretrain")
    resumed, done = checkpoint is not None and config.resume is not None, None
    if checkpoint is not None and source is not None and resumed and not config.solver.evaluate:
        refuse_without_optimizer(checkpoint, source)
        config = keep_recompute(checkpoint, keep_global_batch(checkpoint, source, config, get_world_size()))
        refuse_changes(checkpoint, source, config, allow_config_change)
        if checkpoint.get("step", 0) == 0:
            done = finished(checkpoint["epoch"], improved_epoch(checkpoint), config)
    if done:
        log.info("finished: %s", done)
    return Start(name, config, source, checkpoint, resumed, done)


def _shared_values(config: DotMap) -> dict[str, Any]:
    """The keys that no run may have for itself, with their values."""
    plain = config.toDict()
    values = {}
    for key in FIELDS.keys() - {"base", *OWN_KEYS}:
        section, _, name = key.rpartition(".")
        values[key] = plain[section][name] if section else plain[name]
    return values


def as_started(config: DotMap, starts: Sequence[Start]) -> DotMap:
    """The configuration of a training with the values that its starts have settled."""
    if not config.runs:
        return starts[0].config
    plain = config.toDict()
    for key, value in _shared_values(starts[0].config).items():
        section, _, name = key.rpartition(".")
        (plain[section] if section else plain)[name] = value
    plain["runs"] = {start.name: start.config.toDict() for start in starts}
    return DotMap(plain, _dynamic=False)


def build_models(starts: Sequence[Start], class_names: list[str] | None) -> tuple[list[Side4Video], list[dict]]:
    """The model of each run on the CPU, and for each the tower's entries of a checkpoint.

    Args:
        class_names: of this training, in label order.

    Returns:
        models that share the tower of the run that reads most of it; on processes other than 0, the entries are {}.

    Raises:
        CheckpointError: a checkpoint does not fit.
        ConfigError: impossible sizes, or the weight file is absent.
    """
    towers: dict[Any, tuple[FrozenTower, torch.Tensor]] = {}  # and the state of the generator after it was drawn
    models: list[Side4Video] = []
    parts: list[dict[str, Any]] = []
    known: dict[str | None, dict[str, Any]] = {}
    for start in starts:
        config, checkpoint = start.config, start.checkpoint
        load_tower = checkpoint is None or not holds_tower(checkpoint)
        kind = (str(config.network.side_layers), load_tower)
        if kind not in towers:
            seed_everything(config.seed)  # so that weights do not depend on anything drawn before
            tower = build_tower(config, load_tower)
            towers[kind] = tower, torch.get_rng_state()
        tower, drawn = towers[kind]
        torch.set_rng_state(drawn)
        if config.init_seed is not None:
            torch.manual_seed(config.init_seed)
        model = Side4Video(tower, build_trained(config, tower))
        if checkpoint is not None and start.source is not None:
            with log_as(start.name):
                is_new = not start.resumed
                new_head = is_new and not config.solver.evaluate
                load_start(model, checkpoint, start.source, class_names, new_head=new_head, new_size=is_new)
        part = model_state(model) if get_rank() == 0 and not config.solver.evaluate else {}
        parts.append(known.setdefault(part.get("tower_sha256"), part))  # held towers that are equal are kept once
        models.append(model)
    names = ", ".join(start.name for start in starts)
    different = f"the runs {names} were trained beside different towers, and cannot share one"
    # Held towers of the same blocks take each other's place above, so they are compared by the hashes of their files.
    held = {(str(s.config.network.side_layers), s.checkpoint.get("tower_sha256")) for s in starts if s.checkpoint}
    if len(held) > len({layers for layers, _ in held}):
        raise CheckpointError(different)
    try:
        share_tower(models)
    except ValueError as error:
        raise CheckpointError(different) from error
    return models, parts
