"""Convert a checkpoint between three forms: `official`, `ours` and `safetensors`.

    python tools/convert_checkpoint.py CONFIG SOURCE TARGET [--format FORM] [--verify] [key=value ...]

`official` is the form in which the authors of Side4Video released their checkpoints, `ours` the form that train.py
writes. The form of SOURCE is detected. A TARGET named *.safetensors is written as `safetensors`; otherwise --format
gives the form. CONFIG is the YAML file of the run; the program reads the model and the class names from it and needs no
data.

The optimizer's state is not converted. `official` files contain the frozen tower; if SOURCE does not, the tower is
loaded from its weight file, as in training. Files of the other forms contain the tower if SOURCE does. The program
prints where each tensor went. --verify compares the scores of both files on a random clip.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from dotmap import DotMap
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import read_class_names
from engine.configuration import read_config
from modules import build_model
from modules.checkpoint import (
    SAFETENSORS,
    checkpoint_state,
    flat_tensors,
    holds_tower,
    is_released,
    load_model_state,
    model_state,
    read_checkpoint,
    save_checkpoint,
    save_released,
    save_safetensors,
)
from modules.checkpoint_places import find_checkpoint
from modules.hashing import hash_tensors
from modules.pretrained import is_safetensors
from modules.released import released_names
from modules.side4video import Side4Video
from utils.errors import CheckpointError, run_program

Row = tuple[str, Tensor, str]  # name in the source, tensor, names in the target


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Convert a checkpoint to another form.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run, see docs/configuration.md")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="checkpoint to read, in any form")
    parser.add_argument("target", metavar="TARGET", type=Path, help="file to write; must not exist")
    parser.add_argument(
        "--format",
        choices=("official", "ours", "safetensors"),
        help=f"form of TARGET, if its name does not end in {SAFETENSORS}",
    )
    parser.add_argument("--verify", action="store_true", help="compare the scores of both files on a random clip")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.config, args.overrides, purpose="model")
    args.source = find_checkpoint(args.source)
    rows = convert(config, args.source, args.target, args.format)

    widths = [max(len(text) for text in column) for column in zip(*map(describe, rows), strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(describe(row), widths, strict=True)).rstrip())
    held, written = (len(flat_tensors(read_checkpoint(path))) for path in (args.source, args.target))
    print(f"{held} tensors of {args.source} -> {written} tensors of {args.target}")
    print("weights only: no optimizer state is converted, so resume= cannot continue from the new file")
    if args.verify:
        print(f"largest difference of the scores: {verify(config, args.source, args.target):g}; all tensors are equal")


def convert(config: DotMap, source: Path, target: Path, form: str | None = None) -> list[Row]:
    """Write `target` and return where each tensor went (see `trace`).

    Args:
        form: "official", "ours" or "safetensors"; None takes "safetensors" from the name of `target`.

    Raises:
        CheckpointError: `target` exists, its form is unclear or equals that of `source`; `source` cannot be read or
            does not fit the configuration; the tower has no released names.
        ConfigError: the model cannot be built, or the tower's weight file is absent.
    """
    if form is None and target.suffix == SAFETENSORS:
        form = "safetensors"
    if form is None or (form == "safetensors") != (target.suffix == SAFETENSORS):
        raise CheckpointError(
            f"{target}: unclear form; call it *{SAFETENSORS}, or give --format official or --format ours"
        )
    if target.exists():
        raise CheckpointError(f"{target}: exists already and is not overwritten; choose another name")
    model, checkpoint = load(config, source)
    if form == form_of(source, checkpoint):
        raise CheckpointError(f"{source}: is of the form {form!r} already, nothing to convert")

    epoch = checkpoint.get("epoch", 0)
    if form == "official":
        save_released(target, model, epoch)
    else:
        state = checkpoint_state(
            model_state(model),
            model.trained.state_dict(),
            checkpoint.get("config") or config.toDict(),
            class_names(config, checkpoint),
            epoch=epoch,
            best_accuracy=checkpoint.get("best_accuracy"),
            decoder=checkpoint.get("decoder"),
        )
        save = save_safetensors if form == "safetensors" else save_checkpoint
        save(target, state)
    return trace(model, checkpoint, read_checkpoint(target))


def load(config: DotMap, path: Path, keep_dtype: bool = True) -> tuple[Side4Video, dict[str, Any]]:
    """Build a model, fill it from a checkpoint in any form, and return (model, checkpoint).

    Args:
        keep_dtype: keep the tower in the dtype that the file holds it in, so that nothing is rounded. Otherwise it is
            converted to float32. `network.backbone_dtype` is not used.
    """
    checkpoint, plain = read_checkpoint(path), config.toDict()
    plain["network"]["backbone_dtype"] = "float32"
    model = build_model(DotMap(plain, _dynamic=False), load_tower=not holds_tower(checkpoint))
    if keep_dtype and holds_tower(checkpoint):
        ours, tensors = own_names(model, checkpoint), flat_tensors(checkpoint)
        tower = [tensors[name] for name, own in ours.items() if own.startswith("tower.")]
        dtypes = {tensor.dtype for tensor in tower if tensor.is_floating_point()}
        if len(dtypes) == 1:
            model.backbone.convert(dtypes.pop())
    load_model_state(model, checkpoint, path, new_size=False)
    return model, checkpoint


def form_of(path: Path, checkpoint: dict[str, Any]) -> str:
    if is_safetensors(path):
        return "safetensors"
    return "official" if is_released(checkpoint) else "ours"


def class_names(config: DotMap, checkpoint: dict[str, Any]) -> list[str] | None:
    """The class names in the checkpoint; for a released one, which has none, those of the configuration."""
    if is_released(checkpoint) and config.data.label_list:
        return read_class_names(config.data.label_list, config.data.num_classes)
    return checkpoint.get("class_names")


def trace(model: Side4Video, source: dict[str, Any], target: dict[str, Any]) -> list[Row]:
    """One row per tensor of the source: its name, the tensor, and its names in the target, `-` if it has none.

    After these come the tensors that only the target has, with their origin in brackets instead of the name: the
    tower's weight file, or `made here`.
    """
    source_names, target_names = own_names(model, source), own_names(model, target)
    source_tensors, target_tensors = flat_tensors(source), flat_tensors(target)
    places: dict[str, list[str]] = {}
    for name, own in target_names.items():
        places.setdefault(own, []).append(name)
    rows = [(name, source_tensors[name], ", ".join(places.get(own, ["-"]))) for name, own in source_names.items()]
    known = set(source_names.values())
    for name, own in target_names.items():
        if own not in known:
            file = source.get("tower_file") if own.startswith("tower.") else None
            rows.append((f"({file or 'made here'})", target_tensors[name], name))
    return rows


def own_names(model: Side4Video, checkpoint: dict[str, Any]) -> dict[str, str]:
    """Name of each tensor in a checkpoint -> our name of the tensor that it is, or is a part of.

    A tensor of a released checkpoint that has no name here keeps its own.
    """
    names = list(flat_tensors(checkpoint))
    if not is_released(checkpoint):
        return {name: name for name in names}
    ours = {
        part: own.replace("backbone.", "tower.", 1) for own, theirs in released_names(model).items() for part in theirs
    }
    return {name: ours.get(name.removeprefix("module."), name) for name in names}


def describe(row: Row) -> tuple[str, str, str, str]:
    name, tensor, place = row
    return name, str(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch."), f"-> {place}"


def verify(config: DotMap, source: Path, target: Path) -> float:
    """Load both files into float32 models and return the largest difference of their softmax scores on a random clip.

    Raises:
        CheckpointError: the difference is not 0, or the models' tensors are not bit-identical.
    """
    shape = (1, config.data.num_segments, 3, config.data.input_size, config.data.input_size)
    clip = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed))
    scores, hashes = zip(*(scores_and_hash(config, path, clip) for path in (source, target)), strict=True)
    difference = (scores[0] - scores[1]).abs().max().item()
    if difference != 0 or hashes[0] != hashes[1]:  # also True for NaN
        raise CheckpointError(
            f"{target}: is not the model of {source}: scores of a random clip differ by up to {difference:g}, tensors "
            f"are {'equal' if hashes[0] == hashes[1] else 'not equal'}; remove it"
        )
    return difference


@torch.no_grad()
def scores_and_hash(config: DotMap, path: Path, clip: Tensor) -> tuple[Tensor, str]:
    model, _ = load(config, path, keep_dtype=False)
    return model.eval()(clip).softmax(dim=-1), hash_tensors(model.state_dict())


if __name__ == "__main__":
    run_program(main)
