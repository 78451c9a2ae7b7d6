"""The folder of one training run: what is in it, and who may write to it."""

import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from dotmap import DotMap

from modules.checkpoint import save_checkpoint
from utils.atomic import write_atomically
from utils.errors import ConfigError

LAST, BEST = "last_model.pt", "model_best.pt"
CONFIG, LOG = "config.yaml", "train.log"


def prepare_run_folder(config: DotMap, output: str | None) -> Path:
    """Make the folder and write the resolved configuration into it.

    Args:
        output: the folder; None means exp_onehot/<dataset>/<arch>/<time>.

    Raises:
        ConfigError: the folder holds the checkpoint of another run.
    """
    architecture = config.network.arch.replace("/", "-")
    default = Path("exp_onehot", config.data.dataset, architecture, time.strftime("%Y%m%d_%H%M%S"))
    folder = Path(output) if output else default
    goes_on = config.resume and Path(config.resume).resolve().parent == folder.resolve()
    if (folder / LAST).exists() and not goes_on:
        raise ConfigError(
            f"--output {folder}: holds {LAST} of another run; choose another folder, or resume={folder / LAST}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.toDict(), sort_keys=False)
    write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))
    return folder


def save_run(folder: Path, state: dict[str, Any], is_best: bool) -> None:
    """Write the last checkpoint, and the best one too if this is it."""
    save_checkpoint(folder / LAST, state)
    if is_best:
        with open(folder / LAST, "rb") as last:
            write_atomically(folder / BEST, lambda file: shutil.copyfileobj(last, file))
