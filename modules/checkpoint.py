"""Checkpoints: what was trained, how far, and proof of the frozen tower it was trained beside.

A file is a dict of tensors, numbers and strings, read with `weights_only=True`:

    format            "side4video/1"
    trained           state dict of the side network and head
    tower             state dict of the frozen tower, or None when its tensors came from a named file
    tower_file        name of that file, or None
    tower_sha256      hash of the tower's tensors in float32, as its file holds them, checked at load
    tower_sha256_but_positions  the same without the position table, checked at another input size
    optimizer, scaler state dicts
    epoch             epochs finished
    step              batches of the next epoch that are done too, a multiple of solver.grad_accumulation_steps
    progress          what the reports of that epoch have to go on with, by process (engine/reporter.py)
    world_size        number of processes
    best_accuracy     best validation top-1 in percent so far, None before the first (-1.0 in older files)
    config            the resolved configuration
    class_names       list, or None
    decoder           what decoded video files, with its version, or None for frame folders

Random states are not stored because none carries over an epoch: every draw of data derives from (seed, epoch, index,
repeat), and the global generators are seeded from (seed, epoch, process) at the start of each.

The released checkpoints of Side4Video (modules/released.py) are read by the same functions, and so are the .safetensors
files of tools/convert_checkpoint.py: tensors `trained.*` and, if held, `tower.*`; the rest, without the states of
optimizer and scaler, is JSON in the metadata entry "side4video".
"""

import json
import logging
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from modules.hashing import TOWER_POSITIONS, tower_hashes
from modules.pretrained import load_strictly
from modules.released import from_official, to_official
from modules.side4video import Side4Video
from utils.atomic import write_atomically
from utils.errors import CheckpointError

FORMAT = "side4video/1"
SAFETENSORS = ".safetensors"
METADATA = "side4video"

log = logging.getLogger(__name__)


def model_state(model: Side4Video) -> dict[str, Any]:
    """The part of a checkpoint that makes the model, to be computed once, before the tower is sharded.

    The hash of a tower from a named file is that of the file's tensors, taken before they were converted to
    `network.backbone_dtype`; the hash of a tower that the checkpoint holds is that of what it holds.
    """
    tower = model.backbone.state_dict()
    named = model.backbone.weight_file is not None
    return {
        "tower": None if named else tower,
        "tower_file": model.backbone.weight_file,
        **((named and model.backbone.hashes) or tower_hashes(tower)),
    }


def checkpoint_state(
    model_part: dict[str, Any],
    trained: dict[str, Tensor],
    config: dict[str, Any],
    class_names: list[str] | None,
    *,
    epoch: int = 0,
    step: int = 0,
    progress: list[dict[str, Any]] | None = None,
    world_size: int = 1,
    best_accuracy: float | None = None,
    decoder: str | None = None,
    optimizer: dict[str, Any] | None = None,
    scaler: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The entries of a checkpoint, as listed at the top of this file.

    Args:
        model_part: of `model_state`.
        trained: state dict of the side network and head.
        config: the resolved configuration as a plain dictionary.
        optimizer, scaler: state dicts; None leaves the entries out, and a run cannot go on from such a file.
    """
    state = {
        **model_part,
        "trained": trained,
        "epoch": epoch,
        "step": step,
        "progress": progress or [],
        "world_size": world_size,
        "best_accuracy": best_accuracy,
        "config": config,
        "class_names": class_names,
        "decoder": decoder,
    }
    return state if optimizer is None else {**state, "optimizer": optimizer, "scaler": scaler}


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


def save_safetensors(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically as a .safetensors file, without the states of optimizer and scaler."""
    left_out = {"tower", "trained", "optimizer", "scaler"}
    facts = {"format": FORMAT, **{key: value for key, value in state.items() if key not in left_out}}
    tensors = {name: tensor.contiguous() for name, tensor in flat_tensors(state).items()}
    write_atomically(path, lambda file: save_file(tensors, file.name, metadata={METADATA: json.dumps(facts)}))


def flat_tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint: `tower.*` and `trained.*`, or the released names."""
    if is_official(checkpoint):
        return checkpoint["model_state_dict"]
    parts = {part: checkpoint[part] or {} for part in ("tower", "trained")}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, Any]:
    """What `save_safetensors` wrote; {} for a file of something else."""
    parts = {"tower": {}, "trained": {}}
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        if not facts:
            return {}
        for name in file.keys():  # noqa: SIM118, the file is no dictionary
            part, _, rest = name.partition(".")
            parts[part][rest] = file.get_tensor(name)
    return {**facts, "tower": parts["tower"] or None, "trained": parts["trained"]}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project, or a released one of Side4Video, onto the CPU. No code of the file is run.

    A .safetensors file of this project reads as the same dictionary, without `optimizer` and `scaler`.

    Raises:
        CheckpointError: the file is absent, unreadable, or neither of the two.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if path.suffix == SAFETENSORS:
            content = _read_safetensors(path)
        else:
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
    if content.get("best_accuracy") == -1.0:
        content["best_accuracy"] = None
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
        load_strictly(model.backbone, tower, f"{source} (frozen tower)", assign=True)
        model.backbone.weight_file = model.backbone.hashes = None
    load_strictly(model.trained, trained, str(source))
    if official:
        return head_kept

    key = "tower_sha256_but_positions" if resampled else "tower_sha256"
    present = tower_hashes(tower) if tower is not None else model_state(model)
    if (found := present[key]) != (expected := checkpoint[key]):
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
    vit, table = model.backbone.vit, (tower or {}).get(TOWER_POSITIONS)
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    if table is not None and table.shape[:2] == (1, prefix + old**2):
        tower[TOWER_POSITIONS] = resample_abs_pos_embed(table, [new, new], num_prefix_tokens=prefix)
    log.info("positions: %d x %d patches of %s resampled to %d x %d", old, old, source, new, new)
    return True
