"""Write a checkpoint in another form: as the authors of Side4Video release theirs, as train.py does, as safetensors.

    python tools/convert_checkpoint.py CONFIG SOURCE TARGET [--format FORM] [--verify] [key=value ...]

The form of SOURCE is recognised; TARGET is safetensors if it is called so, else of the form --format. CONFIG is a
run's YAML file; only its model and class names count, and no data need be there. The optimizer's state stays behind.
The form `official` holds the frozen tower, and if SOURCE does not, it comes from its file, as in training; the others
hold it if SOURCE does. Prints where every tensor went; --verify compares the scores of both files on a random clip.
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
from modules.hashing import hash_tensors
from modules.released import released_names
from modules.side4video import Side4Video
from utils.errors import CheckpointError, run_program

Row = tuple[str, Tensor, str]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint in another form.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run, see docs/configuration.md")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="checkpoint to read, of any form")
    parser.add_argument("target", metavar="TARGET", type=Path, help="file to write, which must not exist")
    parser.add_argument(
        "--format",
        choices=("official", "ours", "safetensors"),
        help=f"of TARGET, if its name does not end {SAFETENSORS}",
    )
    parser.add_argument("--verify", action="store_true", help="compare the scores of both files on a random clip")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.config, args.overrides, purpose="model")
    rows = convert(config, args.source, args.target, args.format)

    widths = [max(len(text) for text in column) for column in zip(*map(describe, rows), strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(describe(row), widths, strict=True)).rstrip())
    print(f"{len(flat_tensors(read_checkpoint(args.source)))} tensors of {args.source} -> ", end="")
    print(f"{len(flat_tensors(read_checkpoint(args.target)))} tensors of {args.target}")
    print("weights only: no optimizer state is carried over, so resume= cannot go on from the new file")
    if args.verify:
        print(f"largest difference of the scores: {verify(config, args.source, args.target):g}; all tensors are equal")


def convert(config: DotMap, source: Path, target: Path, form: str | None = None) -> list[Row]:
    """Write `target` and return where every tensor went.

    Raises:
        CheckpointError: `target` exists or its form is unclear or the source's own; `source` cannot be read or does not
            fit the configuration; the tower has no released names.
        ConfigError: the model cannot be built, or the tower's file is absent.
    """
    named_safetensors = target.suffix == SAFETENSORS
    form = form or ("safetensors" if named_safetensors else None)
    if form is None or (form == "safetensors") != named_safetensors:
        raise CheckpointError(
            f"{target}: unclear form; call it *{SAFETENSORS}, or else give --format official or --format ours"
        )
    if target.exists():
        raise CheckpointError(f"{target}: exists already and is not overwritten; choose another name")
    model, checkpoint = load(config, source)
    if form == form_of(source, checkpoint):
        raise CheckpointError(f"{source}: is of the form {form!r} already, nothing to convert")

    if form == "official":
        save_released(target, model, checkpoint.get("epoch", 0))
    else:
        state = checkpoint_state(
            model_state(model),
            model.trained.state_dict(),
            checkpoint.get("config") or config.toDict(),
            class_names(config, checkpoint),
            epoch=checkpoint.get("epoch", 0),
            best_accuracy=checkpoint.get("best_accuracy"),
            decoder=checkpoint.get("decoder"),
        )
        (save_safetensors if form == "safetensors" else save_checkpoint)(target, state)
    return trace(model, checkpoint, read_checkpoint(target))


def load(config: DotMap, path: Path, keep_type: bool = True) -> tuple[Side4Video, dict[str, Any]]:
    """A new model filled from a checkpoint of any form, and what was read.

    The tower is in float32, whatever `network.backbone_dtype` says, or with `keep_type` in the type in which the file
    holds it: nothing is rounded.
    """
    checkpoint, plain = read_checkpoint(path), config.toDict()
    plain["network"]["backbone_dtype"] = "float32"
    model = build_model(DotMap(plain, _dynamic=False), load_tower=not holds_tower(checkpoint))
    if keep_type and holds_tower(checkpoint):
        ours, tensors = own_names(model, checkpoint), flat_tensors(checkpoint)
        tower = [tensors[name] for name, own in ours.items() if own.startswith("tower.")]
        if len(types := {tensor.dtype for tensor in tower if tensor.is_floating_point()}) == 1:
            model.backbone.convert(types.pop())
    load_model_state(model, checkpoint, path, new_size=False)
    return model, checkpoint


def form_of(path: Path, checkpoint: dict[str, Any]) -> str:
    if path.suffix == SAFETENSORS:
        return "safetensors"
    return "official" if is_released(checkpoint) else "ours"


def class_names(config: DotMap, checkpoint: dict[str, Any]) -> list[str] | None:
    """The checkpoint's own; a released one has none, so those of the configuration."""
    if is_released(checkpoint) and config.data.label_list:
        return read_class_names(config.data.label_list, config.data.num_classes)
    return checkpoint.get("class_names")


def trace(model: Side4Video, source: dict[str, Any], target: dict[str, Any]) -> list[Row]:
    """(name in source, tensor, names in target), one a tensor of the source; `-` where it has no place in the target.

    Tensors that only the target has follow, with the tower's file, or `made here`, in brackets before them.
    """
    ours, theirs = own_names(model, source), own_names(model, target)
    places: dict[str, list[str]] = {}
    for name, own in theirs.items():
        places.setdefault(own, []).append(name)
    held, written = flat_tensors(source), flat_tensors(target)
    rows = [(name, held[name], ", ".join(places.get(own, "-"))) for name, own in ours.items()]
    known = set(ours.values())
    for name, own in theirs.items():
        if own not in known:
            file = source.get("tower_file") if own.startswith("tower.") else None
            rows.append((f"({file or 'made here'})", written[name], name))
    return rows


def own_names(model: Side4Video, checkpoint: dict[str, Any]) -> dict[str, str]:
    """Name of each tensor in a checkpoint -> our name of the tensor that it is or is a part of, or its own."""
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
    """The largest difference of the softmax scores that two files give a random clip, each in a new float32 model.

    Raises:
        CheckpointError: it is not 0, or the models' tensors are not equal to the bit.
    """
    data = config.data
    clip = torch.randn(
        1, data.num_segments, 3, data.input_size, data.input_size, generator=torch.Generator().manual_seed(config.seed)
    )
    scores, hashes = zip(*(scores_and_hash(config, path, clip) for path in (source, target)), strict=True)
    difference = (scores[0] - scores[1]).abs().max().item()
    if difference != 0 or hashes[0] != hashes[1]:  # NaN too
        raise CheckpointError(
            f"{target}: is not the model of {source}: scores of a random clip differ by up to {difference:g}, tensors "
            f"are {'equal' if hashes[0] == hashes[1] else 'not equal'}; remove it"
        )
    return difference


@torch.no_grad()
def scores_and_hash(config: DotMap, path: Path, clip: Tensor) -> tuple[Tensor, str]:
    model, _ = load(config, path, keep_type=False)
    return model.eval()(clip).softmax(dim=-1), hash_tensors(model.state_dict())


if __name__ == "__main__":
    run_program(main)
