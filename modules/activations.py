"""The activation in a tower's feed-forward layers, and the one that its weights were trained with.

OpenAI's models use QuickGELU, most others GELU. No tensor shows which, so weights load into either kind of tower, and
one of the two gives wrong tokens. What shows it lies beside the tensors: a configuration file, the numbers that only
OpenAI's files hold, the hash of the file, or the tag of timm's weights.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
from timm.layers import QuickGELU
from torch import nn

from modules.backbones import ARCHITECTURES, OPENAI, TIMM_PREFIX, Architecture, QuickGELUMlp
from modules.weight_layouts import HUGGING_FACE_NAMES, TowerPart, TowerSize, tower_size
from utils.errors import CheckpointError
from utils.published_weights import PUBLISHED_FILES, hash_file

QUICK_GELU, GELU = "QuickGELU", "GELU"
NUMBERS_OF_OPENAI = ("input_resolution", "context_length", "vocab_size")  # no other file holds them
# Sizes in timm's names of CLIP towers -> width.
CLIP_WIDTHS = {
    "xsmall": 256,
    "medium": 512,
    "betwixt": 640,
    "base": 768,
    "large": 1024,
    "huge": 1280,
    "giant": 1408,
    "gigantic": 1664,
}


class Stated(NamedTuple):
    """What is known about a tower's weights: `activation` is their training's, `by` says what states it."""

    activation: str
    by: str


def tower_activation(vit: nn.Module) -> str:
    """Name of the activation in the blocks of a timm tower."""
    mlp = cast(Any, vit).blocks[0].mlp
    return QUICK_GELU if isinstance(mlp, QuickGELUMlp) or isinstance(mlp.act, QuickGELU) else type(mlp.act).__name__


def stated_activation(path: Path, names: set[str], part: TowerPart) -> Stated | None:
    """What a file, or the configuration file beside it, says about the activation. None: nothing.

    Args:
        path: the weight file.
        names: of all tensors in it.
        part: the tower in it.

    Raises:
        CheckpointError: the configuration beside it cannot be read.
    """
    size = tower_size(part)
    if size is None:
        return None
    if part.layout == HUGGING_FACE_NAMES:
        return _stated_by_hugging_face(path.parent / "config.json", size)
    if any(name.rpartition(".")[2] in NUMBERS_OF_OPENAI for name in names):
        return Stated(QUICK_GELU, f"{path} holds numbers that only files of OpenAI hold, whose models use QuickGELU")
    return _stated_by_open_clip(path.parent / "open_clip_config.json", size)


def stated_by_timm(timm_name: str, tag: str) -> Stated | None:
    """What timm says about its own weights: those trained with QuickGELU have their tag at both kinds of model."""
    quick = sibling(timm_name, QUICK_GELU)
    if quick is None or tag not in {name.partition(".")[2] for name in timm.list_pretrained(f"{quick}.*")}:
        return None
    return Stated(QUICK_GELU, f"timm lists the weights {tag!r} for {quick}")


def problem_with_activation(
    tower: str, stated: Stated | None, arch: str, architecture: Architecture, source: str, path: Path | None
) -> str | None:
    """Why the activation of a tower may be another than its weights were trained with, in one line; None: it is right.

    Args:
        tower: result of `tower_activation`.
        stated: result of `stated_activation` or `stated_by_timm`.
        arch, architecture: value and entry of `network.arch`.
        source: where the weights come from.
        path: their file, or None.
    """
    of_openai = path is not None and architecture.publisher == OPENAI
    if of_openai and path is not None and hash_file(path) == PUBLISHED_FILES[arch].sha256:
        return None
    if stated is not None and stated.activation != tower:
        fitting = sibling(architecture.timm_name, stated.activation)
        remedy = f"set network.arch={fitting_arch(fitting)}" if fitting else "timm has no such model"
        return f"weights: {source}: {stated.by}, but {arch} computes {tower}, so its tokens will be wrong; {remedy}"
    if not of_openai:
        return None
    start = f"weights: {source}: not the file that OpenAI published for {arch} (another SHA-256)"
    if stated is not None:
        return f"{start}; {stated.by}, and {arch} computes {tower} too, as {TIMM_PREFIX}{architecture.timm_name} does"
    other = sibling(architecture.timm_name, GELU)
    return (
        f"{start}; {arch} computes {tower}. If the weights were trained with GELU, as those of LAION, set "
        f"network.arch={TIMM_PREFIX}{other}"
    )


def sibling(timm_name: str, activation: str) -> str | None:
    """timm's model that differs from a CLIP tower in the activation alone, or the same one; None if there is none."""
    model = timm_name.partition(".")[0].replace("_quickgelu", "")
    if activation == QUICK_GELU:
        model = model.replace("_clip_", "_clip_quickgelu_")
    return model if activation in (QUICK_GELU, GELU) and "_clip_" in model and timm.is_model(model) else None


def fitting_arch(timm_name: str) -> str:
    """The value of `network.arch` for a timm model: OpenAI's name where there is one."""
    names = {entry.timm_name: arch for arch, entry in ARCHITECTURES.items() if entry.publisher == OPENAI}
    return names.get(timm_name, f"{TIMM_PREFIX}{timm_name}")


def fitting_model(part: TowerPart, stated: Stated | None) -> str | None:
    """timm's CLIP tower that has the sizes of a file with OpenAI's or Hugging Face's names; None if none has."""
    size = tower_size(part)
    names = [name for name, width in CLIP_WIDTHS.items() if size is not None and width == size.width]
    if size is None or not names:
        return None
    pixels = math.isqrt(size.num_patches) * size.patch_size
    start = f"vit_{names[0]}_patch{size.patch_size}_clip_"
    model = f"{start}{pixels}"
    if not timm.is_model(model):
        return None
    activation = stated.activation if stated is not None else GELU
    return sibling(model, activation) or model


def _stated_by_hugging_face(path: Path, size: TowerSize) -> Stated | None:
    config = _read_json(path)
    vision = config.get("vision_config") or config.get("vision_config_dict") or config
    if not isinstance(vision, dict) or not any("clip" in str(c.get("model_type")) for c in (config, vision)):
        return None
    # transformers leaves out what equals its defaults.
    stated = vision.get("hidden_size", 768), vision.get("num_hidden_layers", 12), vision.get("patch_size", 32)
    if stated != (size.width, size.depth, size.patch_size):
        return None
    act = vision.get("hidden_act", "quick_gelu")
    activation = {"quick_gelu": QUICK_GELU, "gelu": GELU}.get(act, str(act))
    return Stated(activation, f"{path} states hidden_act {act}")


def _stated_by_open_clip(path: Path, size: TowerSize) -> Stated | None:
    model = _read_json(path).get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vision, dict):
        return None
    # open_clip's defaults
    stated = vision.get("width", 768), vision.get("layers", 12), vision.get("patch_size", 16)
    if stated != (size.width, size.depth, size.patch_size):
        return None
    quick = bool(model.get("quick_gelu", False))
    return Stated(QUICK_GELU if quick else GELU, f"{path} states {'quick_gelu' if quick else 'no quick_gelu'}")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file, or something else in it."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read, but says how the weights beside it were trained ({error}); fetch it again, or "
            "move it away"
        ) from error
    return content if isinstance(content, dict) else {}
