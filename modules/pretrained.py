"""Published weight files -> the frozen tower, with every tensor accounted for (docs/protocol.md section 1)."""

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import eva, load_state_dict_from_hf, vision_transformer
from torch import Tensor

from modules.activations import (
    fitting_arch,
    fitting_model,
    problem_with_activation,
    stated_activation,
    stated_by_timm,
    tower_activation,
)
from modules.backbones import Architecture, FrozenTower
from modules.hashing import tower_hashes
from modules.torchscript_archive import check_archive, is_torchscript, read_torchscript
from modules.weight_layouts import find_tower_part
from utils.errors import CheckpointError, ConfigError

HUB = "hub"
PRETRAINED_DIR = Path("clip_pretrain")
# Entries that hold the state dict in files of trainings. Averaged weights come first: timm tests and publishes these.
AVERAGED = ("state_dict_ema", "model_ema")
NESTS = (*AVERAGED, "module", "model", "state_dict")
LONGEST_SAFETENSORS_HEADER = 100_000_000  # bytes, the format's own limit
REMOVED = ("norm.", "fc_norm.", "head.", "head_drop.", "attn_pool.")  # parts of timm's models that FrozenTower removes

log = logging.getLogger(__name__)


def load_tower_weights(
    tower: FrozenTower,
    architecture: Architecture,
    arch: str,
    weights: str | None = None,
    wanted: Mapping[str, str] | None = None,
) -> None:
    """Fill the tower from its weight file and log one line, and a warning if its activation may be the wrong one.

    The file may be of any form that `read_state_dict` reads, in half or single precision, with the names of OpenAI,
    open_clip, Hugging Face's CLIP, EVA-CLIP or timm, for the tower alone or within a larger model. It must hold every
    tensor of the tower. Beside these it may hold blocks that are not read, the final norm, the projection and a text
    tower, but nothing else.

    Args:
        tower: filled in place.
        architecture, arch: entry and value of `network.arch`.
        weights: value of `network.weights`: a path; `hub` for timm's own weights, downloaded or from its cache; or
            None for the architecture's own file in clip_pretrain/.
        wanted: hashes of the only tower that will be used (modules/hashing.py); there is no warning about another one.

    Raises:
        ConfigError: the file does not exist, or the architecture has no file of its own.
        CheckpointError: the file cannot be read, or tensors are missing, unknown or of another shape.
    """
    path = None
    if weights == HUB:
        source, published = fetch_from_hub(tower, architecture, arch)
        weight_file = source
    else:
        path = find_weight_file(architecture, arch, weights)
        source, weight_file, published = str(path), path.name, read_state_dict(path)
    part = find_tower_part(published, source)
    if path is None:
        stated = stated_by_timm(architecture.timm_name, tower.pretrained_cfg.get("tag") or "")
    else:
        stated = stated_activation(path, set(published), part)
    family = eva if isinstance(tower.vit, eva.Eva) else vision_transformer
    not_read = tuple(f"blocks.{i}." for i in range(tower.num_blocks, tower.depth))
    converted = family.checkpoint_filter_fn(part.tensors, tower.vit)
    tensors = {name: tensor for name, tensor in converted.items() if not name.startswith((*REMOVED, *not_read))}
    try:
        load_strictly(tower.vit, tensors, f"{source} (network.arch {arch})", assign=True)
    except CheckpointError as error:
        fitting = fitting_model(part, stated)
        if fitting is None or fitting_arch(fitting) == arch or fitting == architecture.timm_name:
            raise
        raise CheckpointError(f"{error}; network.arch={fitting_arch(fitting)} has the sizes of this file") from error
    tower.weight_file = weight_file
    tower.hashes = tower_hashes({f"vit.{name}": tensor for name, tensor in tensors.items()})
    of_blocks = sum(name.startswith(not_read) for name in converted)
    activation = tower_activation(tower.vit)
    log.info(
        "tower: %d tensors from %s, activation %s; not needed: %d of blocks after the last one read, %d others (final "
        "norm, projection, text)",
        len(tensors),
        source,
        activation,
        of_blocks,
        part.others + len(part.tensors) - len(tensors) - of_blocks,
    )
    if wanted is not None and not same_tower(tower.hashes, wanted):
        return
    if problem := problem_with_activation(activation, stated, arch, architecture, source, path):
        log.warning(problem)


def same_tower(hashes: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether two results of `tower_hashes` are of one tower, perhaps at two input sizes."""
    return any(digest == wanted.get(name) for name, digest in hashes.items())


def fetch_from_hub(tower: FrozenTower, architecture: Architecture, arch: str) -> tuple[str, dict[str, Tensor]]:
    """Return name and tensors of timm's own weights for a `timm/<name>`.

    Raises:
        ConfigError: `arch` stands for another published file, timm has no weights for it, or the download failed.
    """
    if architecture.weight_file is not None:
        raise ConfigError(f"network.weights: hub is for timm/<name>; {arch} means the file {architecture.weight_file}")
    pretrained = tower.pretrained_cfg
    if not pretrained.get("hf_hub_id"):
        raise ConfigError(f"network.weights: hub has no weights for {arch}; name a file, or another tag of the model")
    source = f"hub:{pretrained['hf_hub_id']}"
    filename = {"filename": pretrained["hf_hub_filename"]} if pretrained.get("hf_hub_filename") else {}
    try:
        return source, load_state_dict_from_hf(pretrained["hf_hub_id"], weights_only=True, **filename)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            f"network.weights: {source} could not be fetched ({reason}); try again with a connection, or name a file"
        ) from error


def find_weight_file(architecture: Architecture, arch: str, weights: str | None) -> Path:
    """Return the file that `network.weights` or the architecture names.

    Raises:
        ConfigError: it does not exist. The message says which file is needed, who publishes it and where to put it.
    """
    if weights is not None:
        path, what = Path(weights), f"network.weights: {weights} does not exist"
    elif architecture.weight_file is None:
        raise ConfigError(
            f"network.init: {arch} has no weight file of its own; name one with network.weights, "
            "or set network.init: False for a random tower"
        )
    else:
        path = PRETRAINED_DIR / architecture.weight_file
        what = (
            f"network.init: {path} is not there; {arch} needs the file {architecture.weight_file} published by "
            f"{architecture.publisher}, in the folder {PRETRAINED_DIR}/; fetch it (python tools/download_weights.py "
            f"{arch}), or name another with network.weights, or set network.init: False for a random tower"
        )
    if not path.is_file():
        raise ConfigError(what)
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a state dict (torch.save or safetensors) or of a TorchScript archive, on the CPU.

    The file's content decides its form, not its name. Of a training's file, the entry with the state dict is read; if
    there are averaged weights (EMA), these. Entries that are not tensors are left out. No code in the file is run.

    Raises:
        CheckpointError: the file cannot be read, holds no tensors, or needs classes that are not allowed.
    """
    try:
        content = read_content(path)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable weight file: {explain(path, error)}") from error
    while isinstance(content, dict):
        nests = [nest for nest in NESTS if isinstance(content.get(nest), dict)]
        if not nests:
            break
        if nests[0] in AVERAGED:
            log.info("%s: the averaged weights in %s are read, as timm does", path, nests[0])
        content = content[nests[0]]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no dictionary of tensors")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def read_content(path: Path) -> Any:
    """Read a file of any of the supported forms; raises what the library that reads it raises."""
    if is_safetensors(path):
        return safetensors.torch.load_file(path)
    check_archive(path)
    if is_torchscript(path):
        return read_torchscript(path)
    # Trainings store their arguments in a Namespace, which runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return load_pickled(path)


def load_pickled(path: Path) -> Any:
    """Read what torch.save wrote, on the CPU, without running code; tensors of a zip stay in the file until used."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    if path.suffix == ".safetensors":  # which torch would believe
        with open(path, "rb") as file:
            return torch.load(file, **options)
    return torch.load(path, mmap=zipfile.is_zipfile(path), **options)


def is_safetensors(path: Path) -> bool:
    """Whether a file is of the safetensors format, by its content: the length of a header, and the header in JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= LONGEST_SAFETENSORS_HEADER


def explain(path: Path, error: Exception) -> str:
    """Why a file cannot be read, in words; torch's own advise to load it unsafely, or ask for a bug report."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, not the file itself: run git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page: download the file itself"
    text = str(error).strip()
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {refused[1]}, which no tensor needs and is refused"
    if (
        isinstance(error, pickle.UnpicklingError | zipfile.BadZipFile | SafetensorError)
        or "PytorchStreamReader" in text
    ):
        return "it is damaged, or not a file of weights at all"
    return text.splitlines()[0] if text else type(error).__name__


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], source: str, assign: bool = False) -> None:
    """`load_state_dict` with an error of one line.

    Args:
        module: its parameters may be on the meta device if `assign` is set.
        tensors: state dict of the module.
        source: where the tensors come from, for errors.
        assign: use the tensors themselves instead of copying them; only those of another dtype are converted, one by
            one. Tensors of a memory-mapped file stay in the file, which must not be changed afterwards.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape.
    """
    own = module.state_dict()
    refuse_misfits(
        source,
        missing=[name for name in own if name not in tensors],
        unknown=[name for name in tensors if name not in own],
        of_another_shape=[
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
    )
    if assign:
        tensors = {name: tensors[name].to(tensor.dtype).contiguous() for name, tensor in own.items()}
    module.load_state_dict(tensors, assign=assign)


def refuse_misfits(source: str, **misfits: list[str]) -> None:
    """Raise one CheckpointError that counts and lists all misfits, by kind, unless every list is empty."""
    complaints = [
        f"{len(names)} {kind.replace('_', ' ')}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in misfits.items()
        if names
    ]
    if complaints:
        raise CheckpointError(f"{source}: tensors do not fit; {'; '.join(complaints)}")
