"""Checkpoints: what was trained, how far, and proof of the frozen tower it was trained beside.

A file is a dict of tensors, numbers and strings, read with `weights_only=True`:

    format            "side4video/1"
    trained           state dict of the side network and head
    tower             state dict of the frozen tower, or None when its tensors came from a named file
    tower_file        name of that file, or None
    tower_sha256      hash of the tower's tensors, checked at load
    optimizer, scaler state dicts
    epoch             epochs finished
    best_accuracy     best validation top-1 in percent so far, -1.0 before the first
    config            the resolved configuration
    class_names       list, or None

Random states are not stored because none carries over an epoch: every draw of data derives from (seed, epoch, index,
repeat), and the global generators are seeded from (seed, epoch, process) at the start of each.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from modules.pretrained import load_strictly
from modules.side4video import Side4Video
from utils.errors import CheckpointError

FORMAT = "side4video/1"


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`write(file)` into a new file beside `path`, then rename: a reader finds the old file or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def model_state(model: Side4Video) -> dict[str, Any]:
    """The part of a checkpoint that makes the model. The hash takes a while for a big tower: compute it once."""
    tower = model.backbone.state_dict()
    return {
        "tower": None if model.backbone.weight_file else tower,
        "tower_file": model.backbone.weight_file,
        "tower_sha256": hash_tensors(tower),
    }


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project onto the CPU. No code of the file is run.

    Raises:
        CheckpointError: the file is absent, unreadable, or no checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project (no entry format: {FORMAT!r})")
    return content


def load_model_state(model: Side4Video, checkpoint: dict[str, Any], source: str | Path) -> None:
    """Fill a model from a checkpoint, with proof that its tower is the one that the side network was trained beside.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape, or the tower is another one.
    """
    if checkpoint["tower"] is not None:
        load_strictly(model.backbone, checkpoint["tower"], f"{source} (frozen tower)")
        model.backbone.weight_file = None
    load_strictly(model.trained, checkpoint["trained"], str(source))
    if (found := hash_tensors(model.backbone.state_dict())) != checkpoint["tower_sha256"]:
        raise CheckpointError(
            f"{source}: was trained beside another frozen tower ({checkpoint['tower_file'] or 'held by the file'}, "
            f"SHA-256 of its tensors {checkpoint['tower_sha256'][:12]}, here {found[:12]}); check network.arch, "
            "network.init and network.weights"
        )
