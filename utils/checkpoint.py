"""Checkpoints: what was trained, how far, and proof of the frozen tower it was trained beside.

A file is a dict of tensors, numbers and strings, read with `weights_only=True`:

    format            "side4video/1"
    trained           state dict of the side network and head
    tower             state dict of the frozen tower, or None when its tensors came from a named file
    tower_file        name of that file, or None
    tower_sha256      hash of the tower's tensors, checked at load
    tower_sha256_but_positions  the same without the position table, checked at another input size
    optimizer, scaler state dicts
    epoch             epochs finished
    best_accuracy     best validation top-1 in percent so far, -1.0 before the first
    config            the resolved configuration
    class_names       list, or None

Random states are not stored because none carries over an epoch: every draw of data derives from (seed, epoch, index,
repeat), and the global generators are seeded from (seed, epoch, process) at the start of each.

The released checkpoints of Side4Video (utils/official.py) are read by the same functions.
"""

import hashlib
import logging
import math
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from modules.pretrained import load_strictly
from modules.side4video import Side4Video
from utils.errors import CheckpointError
from utils.official import from_official, to_official

FORMAT = "side4video/1"
TOWER_POSITIONS = "vit.pos_embed"

log = logging.getLogger(__name__)


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
        "tower_sha256_but_positions": hash_tensors(_but_positions(tower)),
    }


def _but_positions(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the only tensor that another input size changes."""
    return {name: tensor for name, tensor in tower.items() if name != TOWER_POSITIONS}


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def save_official(path: Path, model: Side4Video, epoch: int = 0, optimizer: dict[str, Any] | None = None) -> None:
    """Write the whole model, tower included, atomically in the form of the released checkpoints.

    `optimizer` is a state dict that goes into the file as it is. One of ours numbers the parameters in our order, which
    other code cannot use, so leave it out unless it came from such a file.
    """
    state = {"epoch": epoch, "model_state_dict": to_official(model), "optimizer_state_dict": optimizer or {}}
    write_atomically(path, lambda file: torch.save(state, file))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project, or a released one of Side4Video, onto the CPU. No code of the file is run.

    Raises:
        CheckpointError: the file is absent, unreadable, or neither of the two.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "GLOBAL" in line), lines[0])  # torch says more before it
        raise CheckpointError(f"{path}: not a readable checkpoint: {reason}") from error
    if not isinstance(content, dict) or not (content.get("format") == FORMAT or is_official(content)):
        raise CheckpointError(
            f"{path}: not a checkpoint of this project (no entry format: {FORMAT!r}), nor a released one of Side4Video "
            "(no state dict model_state_dict)"
        )
    return content


def is_official(checkpoint: dict[str, Any]) -> bool:
    """True for a released checkpoint of Side4Video, whose weights are `model_state_dict`."""
    state = checkpoint.get("model_state_dict")
    return isinstance(state, dict) and all(isinstance(tensor, Tensor) for tensor in state.values())


def holds_tower(checkpoint: dict[str, Any]) -> bool:
    """True if the frozen tower's weights come from the checkpoint and need no file of their own."""
    return is_official(checkpoint) or checkpoint["tower"] is not None


def load_weights(model: Side4Video, path: str | Path, **choices: bool) -> dict[str, Any]:
    """Fill a model from a checkpoint file of this project or a released one of Side4Video; returns what was read.

    If the file holds the tower, the model can be built without its weights: `build_model(config, load_tower=False)`.
    `choices` are those of `load_model_state`.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
    """
    checkpoint = read_checkpoint(path)
    load_model_state(model, checkpoint, path, **choices)
    return checkpoint


def load_model_state(
    model: Side4Video,
    checkpoint: dict[str, Any],
    source: str | Path,
    *,
    new_head: bool = False,
    new_size: bool = True,
) -> bool:
    """Fill a model from a checkpoint, with proof that its tower is the one that the side network was trained beside.

    Args:
        checkpoint: of `read_checkpoint`, in either form.
        source: its file, for errors.
        new_head: a head of another number of classes is left out, and the model keeps its own.
        new_size: position tables of another input size are resampled, bicubically.

    Returns:
        True if the head came from the checkpoint.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape, or the tower is another one.
    """
    official = is_official(checkpoint)
    if official:
        tower, trained = from_official(model, checkpoint["model_state_dict"], str(source))
    else:
        tower, trained = (state and dict(state) for state in (checkpoint["tower"], checkpoint["trained"]))
    head_kept = _fit_head(model, trained, source, new_head)
    resampled = new_size and _fit_positions(model, tower, trained, source)
    if tower is not None:
        load_strictly(model.backbone, tower, f"{source} (frozen tower)")
        model.backbone.weight_file = None
    load_strictly(model.trained, trained, str(source))
    if official:
        return head_kept

    present = model.backbone.state_dict()
    found = hash_tensors(_but_positions(present) if resampled else present)
    if found != (expected := checkpoint["tower_sha256_but_positions" if resampled else "tower_sha256"]):
        raise CheckpointError(
            f"{source}: was trained beside another frozen tower ({checkpoint['tower_file'] or 'held by the file'}, "
            f"SHA-256 of its tensors {expected[:12]}, here {found[:12]}); check network.arch, network.init and "
            "network.weights"
        )
    return head_kept


def _fit_head(model: Side4Video, trained: dict[str, Tensor], source: str | Path, new_head: bool) -> bool:
    """Put the model's own head in the place of one with another number of classes; False if that was needed."""
    head = model.trained.head
    classes = len(trained.get("head.bias", head.bias))
    if classes == head.out_features:
        return True
    if not new_head:
        raise CheckpointError(f"{source}: its head has {classes} classes, data.num_classes is {head.out_features}")
    trained.update({f"head.{name}": tensor for name, tensor in head.state_dict().items()})
    log.info("head: made anew for %d classes; that of %s has %d", head.out_features, source, classes)
    return False


def _fit_positions(
    model: Side4Video, tower: dict[str, Tensor] | None, trained: dict[str, Tensor], source: str | Path
) -> bool:
    """Resample position tables of another grid of patches to the model's, bicubically; True if that was needed."""
    own = model.trained.side.pos
    table = trained.get("side.pos", own)
    old, new = math.isqrt(len(table)), math.isqrt(len(own))
    if old == new or old**2 != len(table):
        return False
    trained["side.pos"] = resample_abs_pos_embed(table[None], [new, new], num_prefix_tokens=0)[0]
    prefix, table = 0 if model.backbone.vit.no_embed_class else 1, (tower or {}).get(TOWER_POSITIONS)
    if table is not None and table.shape[:2] == (1, prefix + old**2):
        tower[TOWER_POSITIONS] = resample_abs_pos_embed(table, [new, new], num_prefix_tokens=prefix)
    log.info("positions: %d x %d patches of %s resampled to %d x %d", old, old, source, new, new)
    return True
