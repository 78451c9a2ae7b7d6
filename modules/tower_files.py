"""The weight file of the tower that a checkpoint was trained beside, found by the hash of its tensors."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dotmap import DotMap

from modules.backbones import FrozenTower, find_architecture
from modules.build import build_model
from modules.checkpoint import holds_tower, load_model_state
from modules.pretrained import HUB, PRETRAINED_DIR, load_tower_weights, same_tower
from modules.side4video import Side4Video
from utils.errors import CheckpointError, ConfigError, UserError

UNFINISHED = ".part"  # of a download
HASHES = ("tower_sha256", "tower_sha256_but_positions")

log = logging.getLogger(__name__)


class MissingTowerError(CheckpointError):
    """No file on this machine has the tower of a checkpoint."""


def load_whole_model(
    config: DotMap, checkpoint: dict[str, Any], source: str | Path, weights: str | Path | None = None
) -> Side4Video:
    """The model of a checkpoint on the CPU, with its tower, wherever that is.

    Args:
        config: resolved; the one that the checkpoint was trained with, or fits.
        checkpoint: of `read_checkpoint`.
        source: its file, for errors.
        weights: file of the tower, or `hub`. None: the checkpoint itself if it holds the tower, else `network.weights`
            if that is there, else the file in clip_pretrain/ whose tensors have the hash that the checkpoint states.

    Raises:
        CheckpointError: the checkpoint does not fit, or no file has its tower.
        ConfigError: the model cannot be built.
    """
    model = build_model(config, load_tower=False)
    if holds_tower(checkpoint):
        if weights is not None:
            raise ConfigError(f"{weights}: not needed, {source} holds its tower; leave out the file of the tower")
    elif weights is not None:
        load_tower_weights(model.backbone, find_architecture(config.network.arch), config.network.arch, str(weights))
    else:
        find_tower(model.backbone, config, checkpoint, source)
    load_model_state(model, checkpoint, source)
    return model


def find_tower(tower: FrozenTower, config: DotMap, checkpoint: dict[str, Any], source: str | Path) -> None:
    """Fill the tower from the first candidate that has the checkpoint's hash.

    Raises:
        MissingTowerError: none has it; the message lists what was tried.
    """
    arch = config.network.arch
    wanted = {key: checkpoint[key] for key in HASHES}
    tried = []
    for candidate in candidates(tower, config.network.weights, checkpoint["tower_file"]):
        try:
            load_tower_weights(tower, find_architecture(arch), arch, candidate, wanted)
        except UserError as error:
            if candidate == HUB:
                raise
            log.info("not the tower of %s: %s", source, error.line)
            tried.append(f"{candidate} (does not fit)")
            continue
        if tower.hashes and same_tower(tower.hashes, wanted):
            return
        tried.append(f"{candidate} (another tower)")
    raise MissingTowerError(
        f"{source}: needs the tower that it was trained beside, {checkpoint['tower_file']} (SHA-256 of its tensors "
        f"{checkpoint[HASHES[0]][:12]}); found {', '.join(tried) or 'no file that can be it'}; put the file into "
        f"{PRETRAINED_DIR}/ (python tools/download_weights.py --list), or name it with network.weights"
    )


def candidates(tower: FrozenTower, stated: str | None, name: str) -> Iterator[str]:
    """Where the tower may be, the likeliest first.

    Args:
        tower: its size rules out files that are too small for it.
        stated: `network.weights` of the training.
        name: `tower_file` of the checkpoint.
    """
    if name.startswith(f"{HUB}:"):
        yield HUB
        return
    # Programs of other people run in other folders than the repository root, where ours run.
    roots = Path(__file__).resolve().parents[1], Path()
    folders = {(root / PRETRAINED_DIR).resolve(): root / PRETRAINED_DIR for root in roots}
    files = [file for folder in folders.values() if folder.is_dir() for file in sorted(folder.iterdir())]
    if stated is not None and stated != HUB:
        files.insert(0, Path(stated))
    smallest = 2 * sum(parameter.numel() for parameter in tower.parameters())  # published files hold half precision
    fitting = [
        file for file in files if file.is_file() and file.suffix != UNFINISHED and file.stat().st_size >= smallest
    ]
    yield from map(str, sorted(fitting, key=lambda file: (file.name != name, fitting.index(file))))
