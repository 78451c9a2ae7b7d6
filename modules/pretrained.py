"""Published weight files -> the frozen tower, with every tensor accounted for (docs/protocol.md section 1)."""

import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import eva, load_state_dict_from_hf, vision_transformer
from torch import Tensor

from modules.backbones import OPENAI, Architecture, FrozenTower
from modules.hashing import tower_hashes
from modules.torchscript_archive import check_archive, is_torchscript, read_torchscript
from utils.errors import CheckpointError, ConfigError

HUB = "hub"
PRETRAINED_DIR = Path("clip_pretrain")
REMOVED = ("norm.", "fc_norm.", "head.", "head_drop.", "attn_pool.")  # parts of timm's models that FrozenTower removes

log = logging.getLogger(__name__)


def load_tower_weights(tower: FrozenTower, architecture: Architecture, arch: str, weights: str | None = None) -> None:
    """Fill the tower from its weight file and log one line.

    The file may be of any form that `read_state_dict` reads, in half or single precision, with the names of OpenAI,
    EVA-CLIP or timm. It must hold every tensor of the tower. Beside these it may hold blocks that are not read, the
    final norm, the projection and a text tower, but nothing else.

    Args:
        tower: filled in place.
        architecture, arch: entry and value of `network.arch`.
        weights: value of `network.weights`: a path; `hub` for timm's own weights, downloaded or from its cache; or
            None for the architecture's own file in clip_pretrain/.

    Raises:
        ConfigError: the file does not exist, or the architecture has no file of its own.
        CheckpointError: the file cannot be read, or tensors are missing, unknown or of another shape.
    """
    if weights == HUB:
        source, published = fetch_from_hub(tower, architecture, arch)
        weight_file = source
    else:
        path = find_weight_file(architecture, arch, weights)
        source, weight_file, published = str(path), path.name, read_state_dict(path)
    family = eva if isinstance(tower.vit, eva.Eva) else vision_transformer
    not_read = tuple(f"blocks.{i}." for i in range(tower.num_blocks, tower.depth))
    converted = family.checkpoint_filter_fn(published, tower.vit)
    tensors = {name: tensor for name, tensor in converted.items() if not name.startswith((*REMOVED, *not_read))}
    load_strictly(tower.vit, tensors, f"{source} (network.arch {arch})", assign=True)
    tower.weight_file = weight_file
    tower.hashes = tower_hashes({f"vit.{name}": tensor for name, tensor in tensors.items()})
    of_blocks = sum(name.startswith(not_read) for name in converted)
    log.info(
        "tower: %d tensors from %s; not needed: %d of blocks after the last one read, %d others (final norm, "
        "projection, text)",
        len(tensors),
        source,
        of_blocks,
        len(published) - len(tensors) - of_blocks,
    )


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
        fetch = f"python tools/download_weights.py {arch}" if architecture.publisher == OPENAI else "by hand"
        what = (
            f"network.init: {path} is not there; {arch} needs the file {architecture.weight_file} published by "
            f"{architecture.publisher}, in the folder {PRETRAINED_DIR}/; fetch it ({fetch}), or name another with "
            "network.weights, or set network.init: False for a random tower"
        )
    if not path.is_file():
        raise ConfigError(what)
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a state dict (torch.save or .safetensors) or of a TorchScript archive, on the CPU.

    Entries that are not tensors are left out. No code in the file is run.

    Raises:
        CheckpointError: the file cannot be read, holds no tensors, or needs classes that are not allowed.
    """
    try:
        content = read_content(path)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable weight file: {explain(path, error)}") from error
    for nest in ("module", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(nest), dict):
            content = content[nest]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no dictionary of tensors")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def read_content(path: Path) -> Any:
    """Read a file of any of the supported forms; raises what the library that reads it raises."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    check_archive(path)
    if is_torchscript(path):
        return read_torchscript(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


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
