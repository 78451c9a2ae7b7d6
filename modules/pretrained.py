"""Published weight files -> the frozen tower, strictly (docs/protocol.md section 1)."""

import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import eva, load_state_dict_from_hf, vision_transformer
from torch import Tensor

from modules.backbones import OPENAI, Architecture, FrozenTower
from modules.hashing import tower_hashes
from modules.torchscript_archive import is_torchscript, read_torchscript
from utils.errors import CheckpointError, ConfigError

HUB = "hub"
PRETRAINED_DIR = Path("clip_pretrain")
CUT_OFF = ("norm.", "fc_norm.", "head.", "head_drop.", "attn_pool.")  # what FrozenTower prunes: nothing reads it

log = logging.getLogger(__name__)


def load_tower_weights(tower: FrozenTower, architecture: Architecture, arch: str, weights: str | None = None) -> None:
    """Fill the tower from `weights`, or from the architecture's own file in clip_pretrain/, and log one line.

    `weights` is a path, or `hub`: what timm publishes for a `timm/<name>`, from its cache or downloaded.

    The file is any that `read_state_dict` reads, in half or single precision, with OpenAI's or timm's names; every
    tensor of the tower must be in it, and nothing that the tower does not know but its final norm, its projection and
    the text tower.

    Raises:
        ConfigError: no file is there, or the architecture has none of its own.
        CheckpointError: the file cannot be read, or tensors are missing, unknown or of another shape.
    """
    if weights == HUB:
        source, published = fetch_from_hub(tower, architecture, arch)
        name = source
    else:
        source = find_weight_file(architecture, arch, weights)
        name, published = source.name, read_state_dict(source)
    family = eva if isinstance(tower.vit, eva.Eva) else vision_transformer
    cut_off = (*CUT_OFF, *(f"blocks.{i}." for i in range(tower.num_blocks, tower.depth)))
    converted = family.checkpoint_filter_fn(published, tower.vit)
    tensors = {name: tensor for name, tensor in converted.items() if not name.startswith(cut_off)}
    load_strictly(tower.vit, tensors, f"{source} (network.arch {arch})", assign=True)
    tower.weight_file = name
    tower.hashes = tower_hashes({f"vit.{name}": tensor for name, tensor in tensors.items()})
    unused = len(published) - len(tensors)
    log.info(
        "tower: %d tensors from %s; %d others not needed (final norm, projection, text)", len(tensors), source, unused
    )


def fetch_from_hub(tower: FrozenTower, architecture: Architecture, arch: str) -> tuple[str, dict[str, Tensor]]:
    """Name and tensors of timm's own weights. A named architecture is refused: timm's are not those it stands for."""
    if architecture.weight_file is not None:
        raise ConfigError(f"network.weights: hub is for timm/<name>; {arch} means the file {architecture.weight_file}")
    pretrained = tower.vit.pretrained_cfg
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
    """The file that `network.weights` or the architecture names; an error says which, whose and where."""
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
    """The tensors of a state dict (torch.save or .safetensors) or of a TorchScript archive, by name, on the CPU.

    No code of the file is run.

    Raises:
        CheckpointError: the file cannot be read, holds something else, or asks for more than tensors need.
    """
    try:
        content = read_content(path)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable weight file: {explain(error)}") from error
    for nest in ("module", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(nest), dict):
            content = content[nest]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no dictionary of tensors")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def read_content(path: Path) -> Any:
    """Whatever a file holds; the errors are those of the library that reads it."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if is_torchscript(path):
        return read_torchscript(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def explain(error: Exception) -> str:
    """One line for an error of `read_content`; torch's own words advise to run what it refused."""
    text = str(error).strip()
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {refused[1]}, which no tensor needs and is refused"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or no file of weights at all"
    return text.splitlines()[0] if text else type(error).__name__


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], source: str, assign: bool = False) -> None:
    """`load_state_dict` whose error is one line that lists what is missing, unknown or of another shape.

    With `assign`, tensors of the module's types become its own, with no copy: a mapped file stays where it is, and must
    not be written to afterwards. Those of other types are converted one by one. Parameters may be on the meta device.
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
    """One CheckpointError that counts and lists them all, unless every list is empty."""
    complaints = [
        f"{len(names)} {kind.replace('_', ' ')}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in misfits.items()
        if names
    ]
    if complaints:
        raise CheckpointError(f"{source}: tensors do not fit; {'; '.join(complaints)}")
