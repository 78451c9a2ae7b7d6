"""Write what a trained model makes of every video of a list: clip features, or the tokens of its tower.

    python tools/extract_features.py CHECKPOINT LIST OUT [--tokens LAYERS] [--crops 1|3|5|10] [--clips N]
                                     [--shard_videos N] [--workers N] [--root DIR] [--set KEY=VALUE] ...
    python -m torch.distributed.run --nproc-per-node 2 tools/extract_features.py ...          several processes

OUT gets one safetensors file for each stretch of the list, a shard, and index.json when all are there. A shard appears
when it is complete, so the same command goes on where a broken run stopped, on any number of processes. A video that
cannot be read is named in the index; the others are done, and the exit status is 1.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import VideoRecord
from inference.inputs import find_videos
from inference.recognizer import CROPS, Recognizer
from modules.backbones import choose_layers
from modules.hashing import hash_tensors
from tools.recognizer_options import add_model_options, load_recognizer
from utils.atomic import write_atomically
from utils.distributed import barrier, close_distributed, from_first, get_rank, get_world_size, init_distributed
from utils.errors import ConfigError, DataError, UserError, run_program

FORMAT = "side4video-features/1"
INDEX, METADATA = "index.json", "side4video"
SHARD_VIDEOS = 1000
SHARD_BYTES = 2**30  # of tokens; they are held until their shard is written
PIXEL_KEYS = ("protocol", "num_segments", "input_size", "resize", "mean", "std", "dense", "index_base", "image_tmpl")


@dataclass(frozen=True)
class Output:
    """What is written of each video: one tensor of `shape`, under `name`.

    forward: maps normalised clips (views, T, 3, H, W) to (views, *shape[1:])
    shape: (V, S) of features, (V, layers, T, 1 + N, D) of tokens
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    layers: list[int] | None = None

    @property
    def video_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="extract_features.py", description="Write features or tokens of videos.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model_best.pt of a run, its folder, a released one")
    parser.add_argument("list", metavar="LIST", help="list (*.txt) with a path a line, or a directory of videos")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards and index.json")
    parser.add_argument(
        "--tokens",
        metavar="LAYERS",
        help="the tower's tokens after these blocks, not features: all, last:N, or numbers from 0 like 0,3,11",
    )
    parser.add_argument("--crops", type=int, choices=CROPS, default=1, help="crops of a clip (default 1)")
    parser.add_argument("--clips", type=int, default=1, metavar="N", help="clips of a video (default 1)")
    parser.add_argument(
        "--shard_videos",
        type=int,
        metavar="N",
        help=f"videos of a shard (default {SHARD_VIDEOS}, of tokens as many as fit {SHARD_BYTES >> 30} GiB)",
    )
    add_model_options(parser)
    args = parser.parse_args(argv)
    for name in ("clips", "shard_videos"):
        if (getattr(args, name) or 1) < 1:
            parser.error(f"--{name}: {getattr(args, name)} is less than 1")
    device = init_distributed()
    errors = extract(args, device if args.device == "auto" else None)
    close_distributed()
    if errors:
        raise DataError(f"{len(errors)} videos could not be read, see {args.out / INDEX}; the first: {errors[0]}")


def extract(args: argparse.Namespace, device: torch.device | None = None) -> list[str]:
    """Do what the command line says, in every process; returns why videos could not be read."""
    recognizer = load_recognizer(args, device)
    records = find_videos([args.list], recognizer.config.data.image_tmpl, args.root)
    output = choose_output(recognizer, args.tokens, args.crops * args.clips)
    shard_videos = args.shard_videos or default_shard(output)
    shards = [(first, min(first + shard_videos, len(records))) for first in range(0, len(records), shard_videos)]
    facts = describe(recognizer, records, output, args, shard_videos)
    paths = [args.out / f"{output.name}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    # Process 0 looks for all, so that nobody sees a shard that another process has just written.
    missing = from_first(outcome(lambda: missing_shards(args.out, paths, facts)) if get_rank() == 0 else None)
    if isinstance(missing, UserError):
        raise missing
    if get_rank() == 0:
        announce(output, facts, shards, missing, args.out)
    own = missing[get_rank() :: get_world_size()]
    total, quiet = sum(shards[number][1] - shards[number][0] for number in own), None if get_rank() == 0 else True
    with tqdm(total=total, unit="video", disable=quiet) as progress:
        for number in own:
            first, last = shards[number]
            write_shard(paths[number], recognizer, records[first:last], first, output, args, facts, progress)
    barrier()
    if get_rank() == 0:
        write_index(args.out, paths, records, facts)
    barrier()
    return [video["error"] for video in json.loads((args.out / INDEX).read_text())["videos"] if video["error"]]


def choose_output(recognizer: Recognizer, tokens: str | None, views: int) -> Output:
    """What to write; raises ConfigError for layers whose tokens the tower does not give."""
    tower, data = recognizer.model.backbone, recognizer.config.data
    if tokens is None:
        width = recognizer.model.trained.side.pos.shape[1]
        features = recognizer.clip_features
        return Output("features", lambda clips: features(clips).float(), (views, width), torch.float32)
    layers = layers_of(tokens, tower.layers, tower.depth)

    def chosen(clips: Tensor) -> Tensor:
        given = zip(tower.layers, tower.layer_tokens(clips), strict=True)
        return torch.stack([tokens for layer, tokens in given if layer in layers], dim=1)

    shape = (views, len(layers), data.num_segments, 1 + tower.num_patches, tower.width)
    return Output("tokens", chosen, shape, tower.dtype, layers)


def layers_of(text: str, given: list[int], depth: int) -> list[int]:
    """The blocks that `--tokens` names, of those whose tokens the tower gives: rising numbers from 0."""
    try:
        if text == "all":
            return given
        layers = choose_layers(text if ":" in text else [int(part) for part in text.split(",")], depth)
    except (ValueError, ConfigError):
        layers = []
    if not layers or not set(layers) <= set(given):
        raise ConfigError(
            f"--tokens: {text!r} must be all, last:N or rising numbers like 0,2, of the blocks that the side network "
            f"reads: {', '.join(map(str, given))}"
        )
    return layers


def default_shard(output: Output) -> int:
    return SHARD_VIDEOS if output.name == "features" else max(1, SHARD_BYTES // output.video_bytes)


def describe(
    recognizer: Recognizer, records: list[VideoRecord], output: Output, args: argparse.Namespace, shard_videos: int
) -> dict[str, Any]:
    """All that decides what the shards hold: a shard with other facts belongs to another run."""
    config, model = recognizer.config, recognizer.model
    videos = [(record.name, record.num_frames, record.label) for record in records]
    return {
        "format": FORMAT,
        "content": output.name,
        "shape": list(output.shape),
        "dtype": str(output.dtype).removeprefix("torch."),
        "layers": output.layers,
        "crops": args.crops,
        "clips": args.clips,
        "precision": recognizer.precision.name,
        "arch": config.network.arch,
        "model_sha256": hash_tensors(model.state_dict()),
        "protocol": {key: config.data[key] for key in PIXEL_KEYS},
        "num_videos": len(records),
        "list_sha256": hashlib.sha256(json.dumps(videos).encode()).hexdigest(),
        "shard_videos": shard_videos,
        "class_names": recognizer.class_names,
    }


def outcome(function: Callable[[], Any]) -> Any:
    """The result, or the UserError, which then goes to all processes."""
    try:
        return function()
    except UserError as error:
        return error


def missing_shards(out: Path, paths: list[Path], facts: dict[str, Any]) -> list[int]:
    """Numbers of the shards that are not there yet.

    Raises:
        DataError: the folder holds shards of another run or cannot be made, or the disk has too little room.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = sorted(out.glob("*.safetensors"))
    except OSError as error:
        raise DataError(f"{out}: cannot be used: {error.strerror}") from error
    for path in there:
        own = read_shard(path)["run"] if path in paths else None
        if own != facts:
            changed = [] if own is None else [key for key in facts if own.get(key) != facts[key]]
            difference = f" ({', '.join(changed)} differ)" if changed else ""
            raise DataError(f"{path}: belongs to another run{difference}; choose another folder, or delete this one")
    return [number for number, path in enumerate(paths) if path not in there]


def read_shard(path: Path) -> dict[str, Any]:
    """{"run": facts, "indices": [...], "num_frames": [...], "errors": {index: why}} of a shard; {} for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: is no readable shard ({error}); delete it, and it is made again") from error
    return content or {"run": None}


def announce(output: Output, facts: dict[str, Any], shards: list[Any], missing: list[int], out: Path) -> None:
    """Say how much will be written; raises DataError if the disk cannot hold it."""
    videos = sum(shards[number][1] - shards[number][0] for number in missing)
    size, free = videos * output.video_bytes, shutil.disk_usage(out).free
    names = ("views", "width") if output.layers is None else ("views", "layers", "frames", "tokens", "width")
    shape = " x ".join(f"{size} {name}" for size, name in zip(output.shape, names, strict=True))
    sys.stdout.write(
        f"{output.name}: {facts['num_videos']} videos x {shape} in {facts['dtype']}; {len(missing)} of {len(shards)} "
        f"shards to write, {as_size(size)}; {as_size(free)} free in {out}\n"
    )
    sys.stdout.flush()
    if size > free:
        raise DataError(f"{out}: {as_size(size)} are needed and {as_size(free)} are free; choose fewer layers or views")


def as_size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def write_shard(
    path: Path,
    recognizer: Recognizer,
    records: list[VideoRecord],
    first: int,
    output: Output,
    args: argparse.Namespace,
    facts: dict[str, Any],
    progress: tqdm,
) -> None:
    """Write one shard atomically: the tensor of all its videos that can be read, and the numbers of these videos."""
    tensors, indices, num_frames, errors = [], [], [], {}
    found = recognizer.outputs(records, output.forward, lambda outputs: outputs.cpu(), args.crops, args.clips)
    for index, (_, frames, tensor, error) in enumerate(found, first):
        progress.update()
        if tensor is None:
            errors[index] = error
            continue
        tensors.append(tensor)
        indices.append(index)
        num_frames.append(frames)
    content = torch.stack(tensors) if tensors else torch.empty(0, *output.shape, dtype=output.dtype)
    held = {output.name: content.contiguous(), "indices": torch.tensor(indices, dtype=torch.int64)}
    metadata = {METADATA: json.dumps({"run": facts, "indices": indices, "num_frames": num_frames, "errors": errors})}
    try:
        write_atomically(path, lambda file: save_file(held, file.name, metadata=metadata))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def write_index(out: Path, paths: list[Path], records: list[VideoRecord], facts: dict[str, Any]) -> None:
    """Write index.json: the facts of the run, and for each video of the list where its tensor is."""
    videos = [
        {"path": record.name, "label": record.label, "num_frames": None, "shard": None, "row": None, "error": None}
        for record in records
    ]
    for path in paths:
        shard = read_shard(path)
        for row, (index, num_frames) in enumerate(zip(shard["indices"], shard["num_frames"], strict=True)):
            videos[index] |= {"num_frames": num_frames, "shard": path.name, "row": row}
        for index, error in shard["errors"].items():
            videos[int(index)]["error"] = error
    content = {**facts, "shards": [path.name for path in paths], "videos": videos}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(out / INDEX, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    run_program(main)
