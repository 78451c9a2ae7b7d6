"""The resolved configuration of a file or of a checkpoint: open values are derived once, right after loading."""

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dotmap import DotMap

from datasets.sampling import protocol_of
from datasets.transforms import protocol_resize
from engine.sinks import NO_WANDB
from modules.backbones import find_architecture, stated_pixels
from modules.checkpoint import is_released
from modules.pretrained import find_weight_file
from modules.probes import PROBES
from utils.config import Purpose, config_from_dict, load_config, resize_problem
from utils.config_schema import FIELDS, SECTIONS
from utils.distributed import device_type
from utils.errors import ConfigError
from utils.precision import has_bfloat16_units, resolve_precision

AUTO = "auto"  # of `solver.recompute`: open until the memory of the GPU is known
OPEN_DTYPES = ("precision", "auto")  # values of `network.backbone_dtype` that are no type

# Keys that may be open in a file (None, or one of OPEN_DTYPES), and that `resolve_config` fills.
DERIVED_KEYS = (
    "data.protocol",
    "data.input_size",
    "data.resize",
    "data.mean",
    "data.std",
    "network.side_variant",
    "network.side_layers",
    "network.backbone_dtype",
    "test.view_batch",
)

VARIANT_LAYERS = {"pre": "all", "post": "every2"}  # tower blocks that each variant reads by default

# Keys that decide what trained weights get of a video: another value in a test is noticed by nothing else.
TRAINED_WITH = [key for key, field in FIELDS.items() if field.trained_with]
FOLDER_KEYS = ("data.index_base", "data.count_frames")  # these mean nothing for video files

# Values for the keys that the schema requires: a tower of two blocks with random weights, and five classes.
SMALL: dict[str, dict[str, Any]] = {
    "data": {"dataset": "small", "batch_size": 4, "num_classes": 5, "input_size": 32, "num_segments": 2, "workers": 0},
    "network": {
        "arch": "timm/vit_tiny_patch16_224",
        "init": False,
        "backbone_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        "side_dim": 64,
    },
    "solver": {"epochs": 1, "lr": 1e-3},
}


def read_config(
    path: str | Path, overrides: Sequence[str] = (), purpose: Purpose = "train", complete: bool = False
) -> DotMap:
    """The resolved configuration of one run; arguments and errors as of `load_config` and `resolve_config`.

    Args:
        complete: everything that a training needs must be there, not only its data.
    """
    return resolve_config(load_config(path, overrides, purpose, missing_parts if complete else None))


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported here."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is hidden from imports
        return False


def missing_parts(values: dict[str, Any]) -> list[str]:
    """What a training needs beside lists and roots and does not find: the tower's weights, the package of a sink.

    With a checkpoint to start from, weights are not missing: it may hold the tower.
    """
    missing = []
    if values["logging.wandb"] is not None and not installed("wandb"):
        missing.append(NO_WANDB)
    needs_weights = values["network.init"] and values["network.weights"] is None
    if needs_weights and values["resume"] is None and values["pretrain"] is None:
        try:
            find_weight_file(find_architecture(values["network.arch"]), values["network.arch"], None)
        except ConfigError as error:
            missing.append(error.line)
    return missing


def config_of_checkpoint(
    checkpoint: dict[str, Any],
    source: str | Path,
    overrides: Sequence[str] = (),
    purpose: Purpose = "test",
    device: torch.device | None = None,
    predicting: bool = False,
) -> DotMap:
    """The resolved configuration that a checkpoint holds.

    The type of the tower, `network.backbone_dtype`, follows anew from precision and device unless `overrides` set it:
    the training may have run on another device.

    Args:
        checkpoint: of `read_checkpoint`.
        source: its file, for errors.
        overrides, purpose: as of `load_config`.
        device, predicting: as of `resolve_config`.

    Raises:
        ConfigError: the checkpoint holds no configuration, or as from `load_config` and `resolve_config`.
    """
    if not checkpoint.get("config"):
        kind = "a released checkpoint" if is_released(checkpoint) else "it"
        beside = Path(source).parent / "config.yaml"
        found = f", such as {beside}" if beside.is_file() else ""
        raise ConfigError(f"{source}: {kind} holds no configuration; name its YAML file by config (--config){found}")
    plain = copy.deepcopy(checkpoint["config"])
    plain.get("network", {})["backbone_dtype"] = "precision"
    return resolve_config(config_from_dict(plain, str(source), purpose, overrides), device, predicting)


def changed_since_training(checkpoint: dict[str, Any], source: str | Path, config: DotMap) -> dict[str, dict[str, Any]]:
    """The keys in TRAINED_WITH whose values differ from those of the training.

    Args:
        checkpoint: of `read_checkpoint`. One without a configuration gives {}: nothing is known of its training.
        source: its file, for errors.
        config: resolved.

    Returns:
        key -> {"trained": value of the checkpoint, "now": value of `config`}, in the order of the schema.

    Raises:
        ConfigError: the configuration in the checkpoint is not valid.
    """
    if not checkpoint.get("config"):
        return {}
    known = {}  # without keys that no longer exist, which are of no meaning here
    for name, value in checkpoint["config"].items():
        if name in SECTIONS and isinstance(value, dict):
            known[name] = {key: item for key, item in value.items() if f"{name}.{key}" in FIELDS}
    trained = resolve_config(config_from_dict(known, str(source), "model"))
    both_folders = trained.data.modality == config.data.modality == "RGB"
    changes = {}
    for key in TRAINED_WITH:
        if both_folders or key not in FOLDER_KEYS:
            section, _, name = key.rpartition(".")
            old, new = (_plain(settings[section][name]) for settings in (trained, config))
            if _meaning(key, old) != _meaning(key, new):
                changes[key] = {"trained": old, "now": new}
    return changes


def _plain(value: Any) -> Any:
    return value.toDict() if isinstance(value, DotMap) else value


def _meaning(key: str, value: Any) -> Any:
    """Two names of one timm model, or of its weights, mean the same tower; the hash of its tensors decides the rest."""
    return find_architecture(value).timm_name.partition(".")[0] if key == "network.arch" else value


def resolve_config(config: DotMap, device: torch.device | None = None, predicting: bool = False) -> DotMap:
    """Return a configuration in which every key of DERIVED_KEYS has its value; resolving it again changes nothing.

    The protocol follows from the data set's name, the size of the resize from the protocol; input size, mean, std and
    side variant from the tower; the layers from the variant; the tower's type from precision and device; the views in
    the model at once from the batch size.

    Args:
        device: where the model will run; None: the GPU if there is one.
        predicting: the model only answers, so the tower's type `auto` may be faster than that of a test.

    Raises:
        ConfigError: unknown architecture, or one whose input size or mean timm does not state, or `data.resize` below
            the input size.
    """
    plain = copy.deepcopy(config.toDict())
    data, network = plain["data"], plain["network"]
    architecture = find_architecture(network["arch"])
    data["protocol"] = data["protocol"] or protocol_of(data["dataset"])
    for key, value in stated_pixels(architecture).items():
        if data[key] is None:
            if value is None:
                raise ConfigError(f"data.{key}: missing, and timm states none for {network['arch']}; set it")
            data[key] = value
    if problem := resize_problem(data["resize"], data["input_size"]):
        raise ConfigError(f"data.resize: {problem}")
    if data["resize"] is None:
        data["resize"] = protocol_resize(data["protocol"], data["input_size"])
    network["side_variant"] = network["side_variant"] or architecture.side_variant
    if network["side_layers"] is None:
        is_probe = network["side"] in PROBES
        network["side_layers"] = "last:1" if is_probe else VARIANT_LAYERS[network["side_variant"]]
    if network["backbone_dtype"] in OPEN_DTYPES:
        asked = predicting and network["backbone_dtype"] == "auto"
        network["backbone_dtype"] = _tower_dtype(plain["solver"]["precision"], device, asked)
    plain["test"]["view_batch"] = plain["test"]["view_batch"] or data["batch_size"]
    runs = {name: resolve_config(own, device).toDict() for name, own in config.runs.items()}
    plain["runs"] = runs
    return DotMap(plain, _dynamic=False)


def default_config(**changes: Any) -> DotMap:
    """Return a resolved configuration for tests and benchmarks: the schema's defaults, and SMALL where it has none.

    Args:
        changes: sections as dictionaries, `data={"num_segments": 8}`, and keys without a section, `seed=1`. They
            replace single keys. No file or folder has to exist.

    Raises:
        ConfigError: as from `load_config`.
    """
    plain: dict[str, Any] = copy.deepcopy(SMALL)
    for name, value in changes.items():
        plain[name] = {**plain.get(name, {}), **value} if isinstance(value, dict) else value
    return resolve_config(config_from_dict(plain, "default_config", purpose="model"))


def _tower_dtype(precision: str, device: torch.device | None, fast: bool) -> str:
    """The type of `solver.precision` on a GPU; on a CPU bfloat16 for bf16, and if `fast` for amp, if it has units."""
    device = device or torch.device(device_type())
    if device.type == "cuda":
        return str(resolve_precision(precision, device).dtype).removeprefix("torch.")
    wanted = precision == "bf16" or (fast and precision == "amp")
    return "bfloat16" if wanted and has_bfloat16_units() else "float32"
