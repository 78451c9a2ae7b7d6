"""Where a checkpoint is: a file, a folder, or a name on the Hugging Face Hub. The one way from a name to a file."""

import logging
import os
from pathlib import Path

from utils.errors import CheckpointError
from utils.hub_names import split_hub_name

BEST = "model_best.pt"
PUBLISHED = "model.safetensors"  # of a folder that tools/publish.py wrote, and of a hub

log = logging.getLogger(__name__)


def find_checkpoint(name: str | Path) -> Path:
    """The file that a name stands for.

    Args:
        name: a file; a folder, of which model_best.pt is taken, or its only .pt or .safetensors file; or `org/name` or
            `org/name@revision` of the Hugging Face Hub, if no file or folder has this name here. A name of the hub is
            downloaded into the hub's cache, or taken from there. HF_ENDPOINT names a mirror; HF_HUB_OFFLINE=1 forbids
            the network.

    Returns:
        the file. A path that leads to nothing, and is no name of the hub, is returned as it is.

    Raises:
        CheckpointError: the folder holds no checkpoint or several, or the hub has no such model or is not reached.
    """
    path = Path(name)
    if path.is_dir():
        return _in_folder(path)
    hub_name = split_hub_name(str(name))
    return path if path.exists() or hub_name is None else _fetch(*hub_name)


def _in_folder(path: Path) -> Path:
    if (path / BEST).is_file():
        return path / BEST
    found = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".safetensors"))
    if len(found) != 1:
        names = f"several checkpoints ({', '.join(file.name for file in found)})" if found else "no checkpoint"
        raise CheckpointError(f"{path}: holds {names} and no {BEST}; name one file")
    return found[0]


def _fetch(repository: str, revision: str | None) -> Path:
    endpoint = os.environ.get("HF_ENDPOINT") or None
    shown = repository if revision is None else f"{repository}@{revision}"
    try:
        from huggingface_hub import hf_hub_download  # importing it takes half a second
    except ImportError as error:
        raise CheckpointError(
            f"{shown}: no such file or folder here, and a name of the hub needs the package huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    try:
        file = hf_hub_download(repository, PUBLISHED, revision=revision, endpoint=endpoint)
    except Exception as error:  # its own exceptions, those of HTTP, and those of the disk
        raise CheckpointError(
            f"{shown}: no such file or folder here, and {PUBLISHED} of that name could not be fetched from the hub "
            f"({hub_reason(error)}); check the name, or the connection"
        ) from error
    log.info("checkpoint: %s is %s", shown, file)
    return Path(file)


def hub_reason(error: BaseException) -> str:
    """Why a call of huggingface_hub failed, in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}{'...' if len(words) > 200 else ''}"
