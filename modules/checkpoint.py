"""Checkpoints: save and load the trained weights, and check that they run beside the tower they were trained with.

A checkpoint of this project is a dict of tensors, numbers and strings, written by torch.save and read with
`weights_only=True`:

    format            "side4video/1"
    trained           state dict of the side network and the head
    tower             state dict of the frozen tower; None if its weights are in a published file
    tower_file        name of that file, or None
    tower_sha256      hash of the tower's tensors in float32, compared at load with the tower that is there
    tower_sha256_but_positions  the same without the position table, compared at another input size
    optimizer, scaler state dicts; absent in converted files
    epoch             number of finished epochs
    step              finished iterations of the next epoch, a multiple of solver.grad_accumulation_steps
    progress          for each process, the sums that the reports of that epoch continue with (engine/reporter.py)
    world_size        number of processes
    best_accuracy     best validation top-1 so far in percent; None before the first evaluation (-1.0 in older files)
    ema               state dict of the averaged copy of `trained`; absent without `solver.ema`
    best_accuracy_ema, improved  the best of the averaged copy; the last epoch with a better validation, or None
    trained_sha256, ema_sha256, optimizer_sha256  hashes of these state dicts, checked at load; absent in older files
    config            the resolved configuration
    class_names       list of class names in label order, or None
    decoder           the decoder of video files with its version, or None for frame folders

Random states are not stored, because no iteration depends on those of another: all random choices about data derive
from (seed, epoch, index, repeat), and the global generators are seeded from (seed, epoch, iteration, process) before
each iteration.

The same functions read two other forms:

    released      a checkpoint by the authors of Side4Video (modules/released.py)
    .safetensors  written by tools/convert_checkpoint.py: tensors `trained.*` and, if the tower is held, `tower.*`; all
                  other entries except `optimizer` and `scaler` as JSON in the metadata entry "side4video"
"""

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from modules.checkpoint_entries import check_entries, optimizer_tensors
from modules.hashing import TOWER_POSITIONS, hash_tensors, tower_hashes
from modules.pretrained import explain, is_safetensors, load_pickled, load_strictly
from modules.released import from_released, to_released
from modules.side4video import Side4Video
from modules.torchscript_archive import check_archive
from utils.atomic import write_atomically
from utils.errors import CheckpointError

FORMAT = "side4video/1"
SAFETENSORS = ".safetensors"
METADATA = "side4video"

log = logging.getLogger(__name__)


def model_state(model: Side4Video) -> dict[str, Any]:
    """Return the entries of a checkpoint that describe the frozen tower. Call it once, before the tower is sharded.

    If the weights come from a published file, the hashes are those of the file's tensors, before the conversion to
    `network.backbone_dtype`. Otherwise the tower is in the checkpoint, and the hashes are those of its tensors.
    """
    backbone = model.backbone
    if backbone.weight_file is not None and backbone.hashes is not None:
        return {"tower": None, "tower_file": backbone.weight_file, **backbone.hashes}
    tower = backbone.state_dict()
    return {"tower": tower, "tower_file": None, **tower_hashes(tower)}


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
    ema: dict[str, Tensor] | None = None,
    best_accuracy_ema: float | None = None,
    improved: int | None = None,
    optimizer: dict[str, Any] | None = None,
    scaler: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the entries of a checkpoint that are listed at the top of this file, except `format`.

    Args:
        model_part: result of `model_state`.
        trained: state dict of the side network and the head.
        config: the resolved configuration as a plain dictionary.
        ema: state dict of the averaged copy; None leaves the entry out.
        optimizer, scaler: state dicts. With None both entries are left out, and no run can resume from the file.
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
    if ema is not None:
        state |= {"ema": ema, "best_accuracy_ema": best_accuracy_ema}
    return state if optimizer is None else {**state, "improved": improved, "optimizer": optimizer, "scaler": scaler}


def averaged_state(state: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of the averaged copy alone: `trained` is the average, and no run can resume from it."""
    left_out = ("ema", "best_accuracy_ema", "improved", "optimizer", "scaler")
    kept = {key: value for key, value in state.items() if key not in left_out}
    return {**kept, "trained": state["ema"], "best_accuracy": state["best_accuracy_ema"]}


def checkpoint_bytes(model: Side4Video, model_part: dict[str, Any], averaged: bool = False) -> int:
    """About the size of a checkpoint file of a training: weights, AdamW's two averages of each, the averaged copy and
    the tower if they are held."""
    trained = sum(tensor.nbytes for tensor in model.trained.state_dict().values())
    return (4 if averaged else 3) * trained + sum(tensor.nbytes for tensor in (model_part.get("tower") or {}).values())


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    content = {"format": FORMAT, **state, **state_hashes(state)}
    write_atomically(path, lambda file: torch.save(content, file))


def state_hashes(state: dict[str, Any]) -> dict[str, str]:
    """`trained_sha256`, and `ema_sha256` and `optimizer_sha256` if these are there."""
    hashes = {f"{part}_sha256": hash_tensors(state[part]) for part in ("trained", "ema") if part in state}
    if "optimizer" in state:
        hashes["optimizer_sha256"] = hash_tensors(optimizer_tensors(state["optimizer"]))
    return hashes


def save_released(path: Path, model: Side4Video, epoch: int = 0, optimizer: dict[str, Any] | None = None) -> None:
    """Write the whole model, tower included, atomically in the form of the released checkpoints.

    Args:
        path: the file to write.
        model: the model, with its tower on the CPU or one device.
        epoch: stored as it is.
        optimizer: state dict of an optimizer of the authors' code, stored as it is. Ours numbers the parameters in
            another order, so it is of no use in such a file.
    """
    state = {"epoch": epoch, "model_state_dict": to_released(model), "optimizer_state_dict": optimizer or {}}
    write_atomically(path, lambda file: torch.save(state, file))


def save_safetensors(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically as a .safetensors file, without the states of optimizer and scaler."""
    left_out = {"tower", "trained", "ema", "optimizer", "scaler"}
    facts = {"format": FORMAT, **{key: value for key, value in state.items() if key not in left_out}}
    facts["trained_sha256"] = hash_tensors(state["trained"])
    facts["facts_sha256"] = _hash_facts(facts)
    tensors = {name: tensor.contiguous() for name, tensor in flat_tensors(state).items()}
    write_atomically(path, lambda file: save_file(tensors, file.name, metadata={METADATA: json.dumps(facts)}))


def _hash_facts(facts: dict[str, Any]) -> str:
    """SHA-256 of the entries that a .safetensors file holds as JSON, without the hash itself."""
    kept = {key: value for key, value in facts.items() if key != "facts_sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def flat_tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint by name: `tower.*` and `trained.*`, or the released names."""
    if is_released(checkpoint):
        return checkpoint["model_state_dict"]
    parts = {part: checkpoint[part] or {} for part in ("tower", "trained")}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read a file of `save_safetensors`; {} for any other file of that format."""
    parts: dict[str, dict[str, Tensor]] = {"tower": {}, "trained": {}}
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        if not facts:
            return {}
        if facts.get("facts_sha256", found := _hash_facts(facts)) != found:
            raise ValueError("its metadata has changed since it was written (SHA-256)")
        for name in file.keys():  # noqa: SIM118, the file is not a dictionary
            part, _, rest = name.partition(".")
            parts[part][rest] = file.get_tensor(name)
    if parts["tower"] and tower_hashes(parts["tower"])["tower_sha256"] != facts.get("tower_sha256"):
        raise ValueError("the tensors of tower have changed since it was written (SHA-256)")
    return {**facts, "tower": parts["tower"] or None, "trained": parts["trained"]}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of any of the three forms onto the CPU. No code in the file is run.

    Returns:
        The entries listed at the top of this file, without `optimizer` and `scaler` for a .safetensors file; for a
        released checkpoint, its own entries.

    Raises:
        CheckpointError: the file does not exist, cannot be read, or is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if is_safetensors(path):
            content = _read_safetensors(path)
        else:
            check_archive(path)
            content = load_pickled(path)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {explain(path, error)}") from error
    if not isinstance(content, dict) or not (content.get("format") == FORMAT or is_released(content)):
        raise CheckpointError(
            f"{path}: not a checkpoint of this project (no entry format: {FORMAT!r}), nor a released one of Side4Video "
            "(no state dict model_state_dict)"
        )
    if isinstance(best := content.get("best_accuracy"), float) and best == -1.0:
        content["best_accuracy"] = None
    if content.get("format") == FORMAT:
        try:
            check_entries(content)
            for name in ("trained_sha256", "ema_sha256", "optimizer_sha256", "facts_sha256"):
                content.pop(name, None)  # of the file, not of the training
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged, or not written by this project: {error}") from error
    return content


def is_released(checkpoint: dict[str, Any]) -> bool:
    """True for a checkpoint by the authors of Side4Video, which has its weights in `model_state_dict`."""
    state = checkpoint.get("model_state_dict")
    return isinstance(state, dict) and all(isinstance(tensor, Tensor) for tensor in state.values())


def holds_tower(checkpoint: dict[str, Any]) -> bool:
    """True if the checkpoint contains the frozen tower, so that the tower needs no weight file."""
    return is_released(checkpoint) or checkpoint["tower"] is not None


def describe_checkpoint(checkpoint: dict[str, Any], source: str | Path) -> str:
    """One line for the log after `load_model_state`: file, form, epoch, and where the frozen tower came from."""
    form = "safetensors" if is_safetensors(Path(source)) else "ours"
    facts = ["released" if is_released(checkpoint) else form]
    if (epoch := checkpoint.get("epoch")) is not None:
        facts.append(f"epoch {epoch}")
    tower = (
        "holds the frozen tower"
        if holds_tower(checkpoint)
        else f"was trained beside this tower, {checkpoint['tower_file']}, SHA-256 {checkpoint['tower_sha256'][:12]}"
    )
    return f"weights: {source} ({', '.join(facts)}) loaded; it {tower}"


def load_weights(
    model: Side4Video, path: str | Path, *, new_head: bool = False, new_size: bool = True
) -> dict[str, Any]:
    """Read a checkpoint of any form, fill the model with `load_model_state`, and return what was read.

    If the file holds the tower, the model may be built without weights: `build_model(config, load_tower=False)`.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
    """
    checkpoint = read_checkpoint(path)
    load_model_state(model, checkpoint, path, new_head=new_head, new_size=new_size)
    return checkpoint


def load_model_state(
    model: Side4Video,
    checkpoint: dict[str, Any],
    source: str | Path,
    *,
    new_head: bool = False,
    new_size: bool = True,
) -> bool:
    """Fill a model from a checkpoint, and check that its tower is the one that the side network was trained beside.

    Args:
        model: on the CPU, not sharded.
        checkpoint: result of `read_checkpoint`.
        source: file of the checkpoint, for errors and the log.
        new_head: if the checkpoint's head has another number of classes, the model keeps its own head.
        new_size: position tables of another input size are resampled bicubically.

    Returns:
        True if the head came from the checkpoint.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape, or the tower is another one.
    """
    tower: dict[str, Tensor] | None
    if is_released(checkpoint):
        tower, trained = from_released(model, checkpoint["model_state_dict"], str(source))
    else:
        tower = dict(checkpoint["tower"]) if holds_tower(checkpoint) else None
        trained = dict(checkpoint["trained"])
    head_kept = _fit_head(model, trained, source, new_head)
    resampled = new_size and _fit_positions(model, tower, trained, source)
    if tower is not None:
        load_strictly(model.backbone, tower, f"{source} (frozen tower)", assign=True)
        model.backbone.weight_file = model.backbone.hashes = None
    load_strictly(model.trained, trained, str(source))
    if not is_released(checkpoint):  # a released checkpoint holds its tower and has no hash to compare with
        hashes = tower_hashes(tower) if tower is not None else model_state(model)
        _check_tower(checkpoint, hashes, resampled, source)
    return head_kept


def _check_tower(checkpoint: dict[str, Any], hashes: dict[str, str], resampled: bool, source: str | Path) -> None:
    """Compare the hashes of the tower that is there with those in the checkpoint.

    Raises:
        CheckpointError: they differ.
    """
    key = "tower_sha256_but_positions" if resampled else "tower_sha256"
    if (found := hashes[key]) != (expected := checkpoint[key]):
        raise CheckpointError(
            f"{source}: was trained beside another frozen tower ({checkpoint['tower_file'] or 'held by the file'}, "
            f"SHA-256 of its tensors {expected[:12]}, here {found[:12]}); check network.arch, network.init and "
            "network.weights"
        )


def _fit_head(model: Side4Video, trained: dict[str, Tensor], source: str | Path, new_head: bool) -> bool:
    """If the head in `trained` has another number of classes, replace it by the model's own and return False."""
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
    """Resample the position tables in `tower` and `trained` to the model's grid of patches, if theirs is another one.

    Grids are square. Tables whose size fits no grid are left for `load_strictly` to refuse.

    Returns:
        True if tables were resampled.
    """
    own = model.trained.side.pos
    table = trained.get("side.pos", own)
    old, new = math.isqrt(len(table)), math.isqrt(len(own))
    if old == new or old**2 != len(table):
        return False
    trained["side.pos"] = resample_abs_pos_embed(table[None], [new, new], num_prefix_tokens=0)[0]
    if tower is not None and TOWER_POSITIONS in tower:
        vit, tower_table = model.backbone.vit, tower[TOWER_POSITIONS]
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens  # towers without a class position have only patches
        if tower_table.shape[:2] == (1, prefix + old**2):
            tower[TOWER_POSITIONS] = resample_abs_pos_embed(tower_table, [new, new], num_prefix_tokens=prefix)
    log.info("positions: %d x %d patches of %s resampled to %d x %d", old, old, source, new, new)
    return True
