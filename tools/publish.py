"""Write a trained model as a folder that hubs expect, and push it there on request.

    python tools/publish.py CHECKPOINT FOLDER [--with_tower] [--scores FILE.npz] [--license ID] [--push ORG/NAME]

FOLDER gets model.safetensors (what was trained; with --with_tower the frozen tower too), config.json,
preprocessor_config.json, README.md (a model card) and metrics.jsonl, all at once. Nothing leaves this machine without
--push. Recognizer.load, test.py and pretrain= read the folder, and the name ORG/NAME. docs/publishing.md shows it.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dotmap import DotMap
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import read_class_names
from engine.configuration import config_of_checkpoint, read_config
from engine.metrics_file import METRICS, read_rows
from engine.run_facts import facts_of_run
from engine.scores import Scores, load_scores, seal_of
from engine.sinks import Row
from modules.backbones import find_architecture
from modules.checkpoint import (
    FORMAT,
    checkpoint_state,
    holds_tower,
    is_released,
    read_checkpoint,
    save_safetensors,
)
from modules.checkpoint_places import PUBLISHED, find_checkpoint, hub_reason
from modules.hashing import hash_tensors, tower_hashes
from modules.released import from_released
from modules.tower_files import load_whole_model
from tools.model_card import PATH_KEYS, Published, model_card
from utils.atomic import check_folder, write_folder, write_json, write_text
from utils.errors import DataError, UserError, run_program
from utils.hub_names import is_repository
from utils.published_weights import hash_file
from utils.version import VERSION

LEFT_OUT = ("optimizer", "scaler", "ema", "best_accuracy_ema", "improved", "progress")  # of a checkpoint


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="publish.py", description="Write a trained model as a folder for a hub.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model_best.pt of a run, its folder, a released one")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write; must be new or empty")
    parser.add_argument("--with_tower", action="store_true", help="put the frozen tower into model.safetensors too")
    parser.add_argument(
        "--scores", metavar="FILE.npz", action="append", default=[], help="of test.py --save_scores; can be repeated"
    )
    parser.add_argument("--license", metavar="ID", help="of your weights, as the hub names it, such as mit")
    parser.add_argument("--config", metavar="FILE", help="YAML file, for a released checkpoint, which holds none")
    parser.add_argument("--weights", metavar="FILE", help="the tower's file for --with_tower, if not in clip_pretrain/")
    parser.add_argument("--push", metavar="ORG/NAME", help="upload the folder to the Hugging Face Hub")
    args = parser.parse_args(argv)
    check_folder(args.folder)
    hub = Hub.open(args.push) if args.push else None

    source = find_checkpoint(args.checkpoint)
    checkpoint = read_checkpoint(source)
    config = read_model_config(checkpoint, source, args.config)
    state = published_state(checkpoint, source, config, args.with_tower, args.weights)
    tests = [(Path(file).name, scores_of(file, state)) for file in args.scores]
    rows = read_rows(source.parent / METRICS)
    card = Published(
        name=args.push or args.folder.absolute().name,
        licence=args.license,
        checkpoint=state,
        config=config,
        has_tower=state["tower"] is not None,
        trained_parameters=sum(tensor.numel() for tensor in parameters_of(state["trained"])),
        trained_sha256=hash_tensors(state["trained"]),
        source_sha256=state["source_sha256"],
        run=facts_of_run(rows),
        validation=validation_of(rows, checkpoint),
        tests=tests,
    )

    def fill(folder: Path) -> None:
        save_safetensors(folder / PUBLISHED, state)
        write_json(folder / "config.json", describe_model(config, state))
        write_json(folder / "preprocessor_config.json", describe_pixels(config))
        write_text(folder / "README.md", model_card(card))
        if rows:
            (folder / METRICS).write_bytes((source.parent / METRICS).read_bytes())

    write_folder(args.folder, fill)
    for file in sorted(args.folder.iterdir()):
        print(f"{file} ({size_text(file.stat().st_size)})")
    if state["tower"] is not None and not args.with_tower:
        print("the tower is in no published file, so model.safetensors holds it: the model could not be loaded without")
    if not rows:
        print(f"{source.parent / METRICS} is not there: the card calls time, hardware and memory unknown")
    if hub is not None:
        print(f"pushed: {hub.push(args.folder)}")


def parameters_of(trained: dict[str, Tensor]) -> list[Tensor]:
    """The tensors that an optimizer changes: those of BatchNorm's statistics are not."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return [tensor for name, tensor in trained.items() if not name.endswith(statistics)]


def read_model_config(checkpoint: dict[str, Any], source: Path, config: str | None) -> DotMap:
    """The resolved configuration of the checkpoint, or of the file for one that holds none."""
    if config is None:
        return config_of_checkpoint(checkpoint, source, purpose="model")
    if checkpoint.get("config"):
        raise UserError(f"--config {config}: not needed, {source} holds its own configuration; leave it out")
    return read_config(config, purpose="model")


def published_state(
    checkpoint: dict[str, Any], source: Path, config: DotMap, with_tower: bool, weights: str | None
) -> dict[str, Any]:
    """The entries of the published file: those of the checkpoint that a reader needs.

    The tower is in it if `with_tower`, or if it is in no weight file. The configuration names no absolute paths.

    Raises:
        CheckpointError: the checkpoint does not fit the configuration, or its tower is nowhere.
    """
    tower: dict[str, Tensor] | None
    if is_released(checkpoint):
        plain = config.toDict()
        model = load_whole_model(config, checkpoint, source)
        tower, trained = from_released(model, checkpoint["model_state_dict"], str(source))
        names = read_class_names(config.data.label_list, config.data.num_classes) if config.data.label_list else None
        file = find_architecture(config.network.arch).weight_file
        part = {"tower": tower if with_tower or file is None else None, "tower_file": file, **tower_hashes(tower)}
        state = checkpoint_state(part, trained, plain, names, epoch=checkpoint.get("epoch") or 0)
    else:
        state = {name: value for name, value in checkpoint.items() if name not in LEFT_OUT}
        if with_tower and not holds_tower(checkpoint):
            plain = config.toDict()
            plain["network"]["backbone_dtype"] = "float32"
            model = load_whole_model(DotMap(plain, _dynamic=False), checkpoint, source, weights)
            state["tower"] = dict(model.backbone.state_dict())
            state |= tower_hashes(state["tower"])
        elif holds_tower(checkpoint) and checkpoint["tower_file"] is not None and not with_tower:
            state["tower"] = None
        state["config"] = config.toDict() if not checkpoint.get("config") else checkpoint["config"]
    state["config"] = without_paths(state["config"])
    return {**state, "source_sha256": checkpoint.get("source_sha256") or hash_file(source)}


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what only the machine of the training has: absolute paths, and where it started."""

    def kept(value: Any) -> Any:
        private = isinstance(value, str) and (PurePosixPath(value).is_absolute() or value.startswith("~"))
        return None if private else value

    data = {key: kept(value) if key in PATH_KEYS else value for key, value in config.get("data", {}).items()}
    network = {key: kept(value) if key == "weights" else value for key, value in config.get("network", {}).items()}
    return {**config, "data": data, "network": network, "resume": None, "pretrain": None}


def scores_of(file: str, state: dict[str, Any]) -> Scores:
    """A score file of these weights.

    Raises:
        DataError: it has changed since it was written, is of other weights, or has no labels.
    """
    scores = load_scores(file)
    if seal_of(file) is False or (scores.certificate is not None and seal_of(file) is None):
        raise DataError(f"{file}: has changed since test.py wrote it; test again")
    found, stated = hash_tensors(state["trained"]), scores.protocol.get("model_sha256")
    if stated != found:
        raise DataError(
            f"{file}: holds scores of other weights (SHA-256 {str(stated)[:12]}, here {found[:12]}); test this "
            "checkpoint"
        )
    if not scores.labelled:
        raise DataError(f"{file}: has no labels, and so no accuracy")
    return scores


def validation_of(rows: list[Row], checkpoint: dict[str, Any]) -> Row | None:
    """The row of the evaluation of just these weights: that after the checkpoint's last epoch, if there is one."""
    if is_released(checkpoint) or checkpoint.get("step"):
        return None
    found = [
        row
        for row in rows
        if row["kind"] in ("validation", "validation_ema") and row["epoch"] == checkpoint.get("epoch", 0) - 1
    ]
    if "optimizer" in checkpoint:  # weights that were trained on, not their average
        found = [row for row in found if row["kind"] == "validation"]
    if len(found) > 1:
        found = [row for row in found if row.get("top1") == checkpoint.get("best_accuracy")]
    return found[0] if len(found) == 1 else None


def describe_model(config: DotMap, state: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json."""
    data, network = config.data, config.network
    names = state.get("class_names") or [f"class {label}" for label in range(data.num_classes)]
    return {
        "model_type": "side4video",
        "architectures": ["Side4Video"],
        "format": FORMAT,
        "side4video_version": VERSION,
        "num_labels": data.num_classes,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "num_frames": data.num_segments,
        "image_size": data.input_size,
        "hidden_size": network.side_dim,
        "tower": {
            "arch": network.arch,
            "timm_name": find_architecture(network.arch).timm_name,
            "file": state["tower_file"],
            "sha256": state["tower_sha256"],
            "included": state["tower"] is not None,
        },
        "side4video": state["config"],
    }


def describe_pixels(config: DotMap) -> dict[str, Any]:
    """The content of preprocessor_config.json: from frames to what the model takes."""
    data = config.data
    return {
        "num_frames": data.num_segments,
        "frame_sampling": {"protocol": data.protocol, "dense": data.dense},
        "do_resize": True,
        "size": {"shortest_edge": data.resize}
        if isinstance(data.resize, int)
        else {"height": data.resize[0], "width": data.resize[1]},
        "resample": 3,  # bicubic, antialiased
        "do_center_crop": True,
        "crop_size": {"height": data.input_size, "width": data.input_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
    }


def size_text(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face Hub that a folder is pushed to.

    api: an HfApi
    name: `org/name`
    """

    api: Any
    name: str

    @classmethod
    def open(cls, name: str) -> "Hub":
        """Look before any work whether the folder can be pushed; nothing is sent but the question who asks.

        Raises:
            UserError: the name has another form, huggingface_hub is not installed, or there is no valid token.
        """
        if not is_repository(name):
            raise UserError(f"--push {name}: must have the form ORG/NAME")
        try:
            from huggingface_hub import HfApi, get_token
        except ImportError as error:
            raise UserError(
                "--push: the package huggingface_hub is not installed; pip install huggingface_hub"
            ) from error
        if get_token() is None:
            raise UserError("--push: no token of the hub is set; run hf auth login, or set HF_TOKEN")
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        try:
            api.whoami()
        except Exception as error:  # its own exceptions, and those of HTTP
            raise UserError(
                f"--push {name}: the hub does not answer or knows no such token ({hub_reason(error)})"
            ) from error
        return cls(api, name)

    def push(self, folder: Path) -> str:
        """Upload a folder, into a new repository if there is none; returns its address.

        Raises:
            UserError: it failed; the folder stays.
        """
        try:
            self.api.create_repo(self.name, exist_ok=True)
            self.api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message=f"Side4Video {VERSION}: tools/publish.py"
            )
        except Exception as error:  # its own exceptions, and those of HTTP
            raise UserError(
                f"--push {self.name}: {hub_reason(error)}; {folder} is complete: hf upload {self.name} {folder} tries "
                "again"
            ) from error
        return f"{self.api.endpoint}/{self.name}"


if __name__ == "__main__":
    run_program(main)
