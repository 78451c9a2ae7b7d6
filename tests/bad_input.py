"""Bad input, and the one line that each ends with: `python tests/bad_input.py > docs/errors.md` prints the page.

tests/test_bad_input.py runs the cases again and compares them with the page. DIR stands for the folder of the case.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import test as test_program
import train as train_program
from tools import (
    browse_data,
    certify,
    check_data,
    compare_scores,
    convert_checkpoint,
    demo_page,
    download_weights,
    draw_predictions,
    export,
    motion_demo,
    motion_test,
    plan,
    prepare_data,
    publish,
    visualize,
)
from utils import config as config_program
from utils.config_schema import FIELDS, Field
from utils.errors import run_program

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
HEAD = """# What goes wrong, and what it says

Written by `python tests/bad_input.py > docs/errors.md`; a test runs every case again. Each ends the program with
status 1 (2 where the command line itself cannot be read), and nothing is written. DIR stands for a folder.
"""
Prepare = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Case:
    """One bad input: a program, its arguments, and files that are put into DIR before."""

    section: str
    what: str
    program: Callable[[list[str]], object]
    arguments: list[str]
    files: dict[str, str | bytes] = field(default_factory=dict)


def make_base(folder: Path) -> None:
    """A tiny data set of frames and videos, and the configuration tiny.yaml that trains on it."""
    motion_demo.generate(folder / "data", train_videos=8, val_videos=2, size=32, num_frames=4)
    data = {
        "dataset": "motion_demo",
        "num_segments": 2,
        "batch_size": 2,
        "workers": 0,
        "num_classes": 10,
        "label_list": f"{folder}/data/classes.csv",
        "input_size": 32,
        **{f"{part}_root": f"{folder}/data/frames" for part in ("train", "val")},
        **{f"{part}_list": f"{folder}/data/{part}.txt" for part in ("train", "val")},
    }
    network = {"arch": "timm/vit_tiny_patch16_224", "init": False, "side_dim": 64}
    network["backbone_kwargs"] = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    tree = {"data": data, "network": network, "solver": {"epochs": 1, "lr": 1e-3}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def train(*overrides: str, config: str = "DIR/tiny.yaml") -> list[str]:
    return ["--config", config, "--output", "DIR/run", *overrides]


def test(*overrides: str, weights: str = "DIR/m.pt") -> list[str]:
    return ["--config", "DIR/tiny.yaml", "--weights", weights, *overrides]


WRONG_KIND = {
    "bool": "maybe",
    "bool or auto": "maybe",
    "int": "many",
    "float": "fast",
    "str": "[1, 2]",
    "file": "[1, 2]",
    "folder": "[1, 2]",
    "model": "[1, 2]",
    "list of int": "three",
    "list of float": "three",
    "int or list of int": "wide",
    "layers": "some",
    "class weights": "even",
    "dict": "7",
}


def out_of_range(entry: Field) -> str | None:
    """A value of the right kind that the field's rule refuses."""
    if entry.rule is None:
        return None
    candidates = ["-1", "0", "1000000000000", "other", "''", "[]", "[-1]", "[0.5]", "img.jpg"]
    for text in candidates:
        value = yaml.safe_load(text)
        try:
            entry.read(value)
        except ValueError:
            if not isinstance(value, str) or entry.kind in ("str", "layers"):
                return text
    return None


def key_cases() -> Iterator[Case]:
    for key, entry in FIELDS.items():
        if key == "base":
            continue
        yield Case("Values of another kind", key, train_program.main, train(f"{key}={WRONG_KIND[entry.kind]}"))
        if (value := out_of_range(entry)) is not None:
            yield Case("Values out of range", key, train_program.main, train(f"{key}={value}"))


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def configuration_cases() -> Iterator[Case]:
    files: dict[str, tuple[str, str | bytes]] = {
        "an empty file": ("c.yaml", ""),
        "no mapping": ("c.yaml", "- 1\n"),
        "a tab": ("c.yaml", "data:\n\tdataset: x\n"),
        "a bracket that is not closed": ("c.yaml", "data: {dataset: x\n"),
        "a key given twice": ("c.yaml", "data:\n  workers: 1\n  workers: 2\n"),
        "an unknown key": ("c.yaml", "data:\n  worker: 1\n"),
        "an unknown section": ("c.yaml", "dat:\n  workers: 1\n"),
        "a section without keys": ("c.yaml", "data: 3\n"),
        "a dotted key in a file": ("c.yaml", "data.workers: 1\n"),
        "no text": ("c.yaml", b"\xff\xfe\x00\x01"),
        "a base that is not there": ("c.yaml", "base: gone.yaml\n"),
        "a base that is based on the file": ("c.yaml", "base: c.yaml\n"),
        "aliases that stand for a billion values": ("c.yaml", BOMB),
        "a date that does not exist": ("c.yaml", "data:\n  dataset: 2020-13-45\n"),
        "a required key that is missing": ("c.yaml", "data:\n  dataset: x\n"),
        "an old key with another value": ("c.yaml", "base: tiny.yaml\nnetwork:\n  tm: tsm\n"),
    }
    for what, (name, content) in files.items():
        yield Case("Configuration files", what, train_program.main, train(config="DIR/c.yaml"), {name: content})
    yield Case("Configuration files", "a file that is not there", train_program.main, train(config="DIR/gone.yaml"))
    yield Case("Configuration files", "a folder", train_program.main, train(config="DIR/data"))
    overrides = {
        "no equals sign": "solver.lr",
        "no key": "=1",
        "a misspelt key": "solver.lrr=1",
        "a key of another section": "data.lr=1",
        "a section": "data=1",
        "a base": "base=c.yaml",
        "no YAML": "data.resize=[1,",
        "a very long value": f"data.workers={'9' * 500}",
        "a control character": "data.protocol=\x1b[31m",
        "a dangerous argument of timm": "network.backbone_kwargs.checkpoint_path=/tmp/x.pt",
        "a misspelt argument of timm": "network.backbone_kwargs.depht=2",
        "a million workers": "data.workers=1000000",
        "a number padded to thousands of digits": "data.image_tmpl=img_{:099999d}.jpg",
    }
    for what, override in overrides.items():
        yield Case("Command lines", what, train_program.main, train(override))
    together = {
        "resume and pretrain": ["resume=DIR/tiny.yaml", "pretrain=DIR/tiny.yaml"],
        "mixup of an odd batch": ["solver.mixup=True", "data.batch_size=3"],
        "mixup with another smoothing": ["solver.mixup=True", "solver.smoothing=0.2"],
        "dense sampling of too many frames": ["data.dense=True", "data.num_segments=129"],
        "a start behind the end": ["solver.start_epoch=5"],
        "multistep without steps": ["solver.type=multistep"],
        "weights of a random tower": ["network.weights=DIR/tiny.yaml"],
        "a resize below the input": ["data.resize=16"],
        "an evaluation of nothing": ["solver.evaluate=True"],
        "one clip a process": ["data.batch_size=1"],
        "a batch that the videos do not fill": ["data.batch_size=64"],
        "an unknown tower": ["network.arch=ViT-B16"],
        "an unknown model of timm": ["network.arch=timm/vit_tinny"],
        "runs that differ in their data": ["runs={a: {data.batch_size: 8}}"],
        "runs that differ in what the tower sees": ["runs={a: {solver.mixup: True}}"],
        "a misspelt key of a run": ["runs={a: {solver.lrr: 1}}"],
        "runs from one checkpoint": ["runs={a: {}}", "resume=DIR/tiny.yaml"],
        "a tower that is no transformer": ["network.arch=timm/resnet18", "network.backbone_kwargs={}"],
        "an input that patches do not fill": ["data.input_size=40"],
        "blocks that the tower has not": ["network.side_layers=[3]"],
        "a tower without weights of its own": ["network.init=True"],
        "another number of weights than classes": ["solver.class_weights=[1,2,3]"],
        "weights that are all 0": ["solver.class_weights=[0,0,0,0,0,0,0,0,0,0]"],
        "a weight below 0": ["solver.class_weights=[1,1,1,1,1,1,1,1,1,-1]"],
        "classes balanced twice": ["solver.class_weights=balanced", "data.balance=True"],
        "videos that are all too short": ["data.min_frames=5"],
        "more videos of a class than there are": ["data.shot=5"],
    }
    for what, values in together.items():
        yield Case("Values that do not go together", what, train_program.main, train(*values))
    for key in (
        "data.train_list",
        "data.val_list",
        "data.train_root",
        "data.label_list",
        "pretrain",
        "network.weights",
    ):
        more = ["network.init=True"] if key == "network.weights" else []
        yield Case("Paths", f"{key} that is not there", train_program.main, train(f"{key}=DIR/gone", *more))
    gone = [f"{key}=DIR/gone" for key in ("data.train_list", "data.val_root", "data.label_list", "network.weights")]
    yield Case("Paths", "several things that are not there", train_program.main, train(*gone, "network.init=True"))
    yield Case("Paths", "several of a test", test_program.main, test(*gone[1:3]))


def list_cases() -> Iterator[Case]:
    lines: dict[str, str | bytes] = {
        "no lines": "",
        "a column that is missing": "train_00000 4\n",
        "a label that is no number": "train_00000 4 left\n",
        "a label outside of the classes": "train_00000 4 10\n",
        "a negative label": "train_00000 4 -2\n",
        "no frames": "train_00000 0 1\n",
        "half a frame": "train_00000 1.5 1\n",
        "labels in a part of the list": "train_00000 4 1\ntrain_00001 4 -1\n",
        "no labels in training": "train_00000 4 -1\n",
        "a line of megabytes": "x" * 3_000_000 + " 4 1\n",
        "no UTF-8": b"train_\xff 4 1\n",
        "a video that is not there": "gone 4 1\ngone 4 1\n",
        "more frames than there are": "train_00000 9 1\ntrain_00000 9 1\n",
    }
    for what, content in lines.items():
        yield Case("Lists", what, train_program.main, train("data.train_list=DIR/l.txt"), {"l.txt": content})
    segments = {
        "no column first_frame": "train_00000 4 1\n",
        "a first frame before the video": "train_00000 -1 4 1\n",
        "a segment without frames": "train_00000 0 0 1\n",
        "a segment behind the end": "train_00000 3 2 1\ntrain_00000 3 2 1\n",
    }
    for what, content in segments.items():
        arguments = train("data.train_list=DIR/l.txt", "data.val_list=DIR/l.txt", "data.segments=True")
        yield Case("Segments", what, train_program.main, arguments, {"l.txt": content})
    yield Case(
        "Segments", "frames that are counted", train_program.main, train("data.segments=True", "data.count_frames=True")
    )
    names = ["id,name\n", *(f"{label},class {label}\n" for label in range(10))]
    classes: dict[str, str | bytes] = {
        "no header": "".join(names[1:]),
        "an id that is missing": "".join(names[:-1]),
        "an id given twice": "".join([*names, "3,again\n"]),
        "an id outside of the classes": "".join([*names[:-1], "12,x\n"]),
        "a name given twice": "".join([*names[:-1], "9,class 3\n"]),
        "a name that is empty": "".join([*names[:-1], "9,\n"]),
        "three columns": "".join([*names[:-1], "9,a,b\n"]),
        "a field of 180,000 characters": "".join([*names[:-1], '9,"', *["x" * 60_000 + "\n"] * 3, '"']),
    }
    for what, content in classes.items():
        yield Case("Class files", what, train_program.main, train("data.label_list=DIR/c.csv"), {"c.csv": content})


PNG_BOMB = bytes.fromhex("89504e470d0a1a0a0000000d49484452000186a0000186a0080200000027309c9f0000000049444154")


def compressed_frames() -> bytes:
    """A zip file of frames, as most programs write it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(1, 5):
            archive.writestr(f"img_{number:05d}.jpg", bytes(100))
    return content.getvalue()


def media_cases() -> Iterator[Case]:
    listed = {"l.txt": "v 4 1\nv 4 1\n"}
    frames: dict[str, str | bytes] = {
        "an empty frame": b"",
        "a frame that is text": b"<html>404</html>",
        "a frame that ends too soon": b"\xff\xd8\xff\xe0" + b"\0" * 30,
        "a header that promises 10,000 megapixels": PNG_BOMB,
    }
    for what, content in frames.items():
        files = {**listed, **{f"frames/v/img_{number:05d}.jpg": content for number in range(1, 5)}}
        arguments = train("data.train_root=DIR/frames", "data.train_list=DIR/l.txt")
        yield Case("Frames and videos", what, train_program.main, arguments, files)
    for what, content in {
        "a zip file that ends too soon": b"PK\x03\x04" + b"\0" * 26,
        "a compressed zip file": compressed_frames(),
    }.items():
        files = {**listed, "frames/v.zip": content}
        arguments = train("data.train_root=DIR/frames", "data.train_list=DIR/l.txt")
        yield Case("Frames and videos", what, train_program.main, arguments, files)
    files = {"l.txt": "val_00000.mp4 2 9 1\n" * 2}
    arguments = train("data.modality=video", "data.segments=True", "data.train_root=DIR/data/videos")
    arguments += ["data.train_list=DIR/l.txt", "data.val_root=DIR/data/videos", "data.val_list=DIR/l.txt"]
    yield Case("Segments", "a segment behind the end of a video file", train_program.main, arguments, files)
    for what, content in {"an empty video": b"", "a video that is text": b"no video"}.items():
        files = {"l.txt": "v.mp4 1\nv.mp4 1\n", "v.mp4": content}
        arguments = train("data.modality=video", *(f"data.{p}_root=DIR" for p in ("train", "val")))
        arguments += [f"data.{part}_list=DIR/l.txt" for part in ("train", "val")]
        yield Case("Frames and videos", what, train_program.main, arguments, files)


def checkpoint_bytes(config: dict) -> bytes:
    """A checkpoint with a configuration, and tensors that fit no model."""
    content, tensors = io.BytesIO(), {"a": torch.zeros(1)}
    hashes = {"tower_sha256": "0" * 64, "tower_sha256_but_positions": "0" * 64}
    torch.save(
        {
            "format": "side4video/1",
            "trained": tensors,
            "tower": tensors,
            "tower_file": None,
            **hashes,
            "config": config,
        },
        content,
    )
    return content.getvalue()


def file_cases() -> Iterator[Case]:
    contents: dict[str, bytes] = {
        "an empty file": b"",
        "text": b"no weights",
        "a page of HTML": b"<!DOCTYPE html><html>404</html>",
        "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 12\n",
        "a zip that ends too soon": b"PK\x03\x04" + b"\0" * 26,
        "a pickle that wants code": b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00echoq\x01\x85q\x02Rq\x03.",
    }
    for what, content in contents.items():
        yield Case("Checkpoints", what, test_program.main, test(), {"m.pt": content})
        arguments = train("network.init=True", "network.weights=DIR/w.pt")
        yield Case("Weight files", what, train_program.main, arguments, {"w.pt": content})
    trained = yaml.safe_load(
        "{data: {dataset: motion_demo, num_segments: 8, dense: true, batch_size: 2, num_classes: 10, input_size: 32}, "
        "network: {arch: timm/vit_tiny_patch16_224, side_dim: 64}, solver: {epochs: 1, lr: 0.001}}"
    )
    trained["network"]["backbone_kwargs"] = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    for what, config, arguments in (
        ("frames of another number than in training", trained, test()),
        ("no configuration, not even its own", {}, ["--weights", "DIR/m.pt"]),
    ):
        yield Case("Checkpoints", what, test_program.main, arguments, {"m.pt": checkpoint_bytes(config)})
    yield Case("Checkpoints", "a file that is not there", test_program.main, test())
    yield Case("Checkpoints", "a folder", test_program.main, test(weights="DIR/data"))
    yield Case("Checkpoints", "text called .safetensors", test_program.main, test(weights="DIR/m.safetensors"),
               {"m.safetensors": b"no weights at all"})  # fmt: skip
    yield Case("Score files", "a folder", test_program.main, test("--save_scores", "DIR/data"))
    yield Case(
        "Score files", "a folder that is a file", test_program.main, test("--save_scores", "DIR/tiny.yaml/s.npz")
    )
    yield Case("Output", "a file", train_program.main, ["--config", "DIR/tiny.yaml", "--output", "DIR/tiny.yaml"])


def scores() -> dict[str, str | bytes]:
    """A score file of two videos, as another program may write it."""
    content = io.BytesIO()
    np.savez(content, paths=["x", "y"], labels=[0, 1], scores=np.eye(2, 10, dtype=np.float32))
    return {"a.npz": content.getvalue()}


def tool_cases() -> Iterator[Case]:
    table: list[tuple[str, Callable[[list[str]], object], list[str], dict[str, str | bytes]]] = [
        ("check_data: a misspelt key", check_data.main, ["DIR/tiny.yaml", "data.lst=1"], {}),
        ("browse_data: a file instead of a folder", browse_data.main, ["DIR/tiny.yaml", "DIR/tiny.yaml"], {}),
        ("browse_data: no clips", browse_data.main, ["DIR/tiny.yaml", "DIR/out", "--clips", "0"], {}),
        ("browse_data: no such list", browse_data.main, ["DIR/tiny.yaml", "DIR/out", "data.val_list=DIR/gone"], {}),
        ("check_data: fewer than no workers", check_data.main, ["DIR/tiny.yaml", "--workers", "-1"], {}),
        ("plan: a GPU without a size", plan.main, ["DIR/tiny.yaml", "--gpu", "large"], {}),
        ("plan: no GPUs", plan.main, ["DIR/tiny.yaml", "--gpus", "0"], {}),
        ("plan: no videos", plan.main, ["DIR/tiny.yaml", "--videos", "0"], {}),
        ("plan: a misspelt key", plan.main, ["DIR/tiny.yaml", "data.batchsize=1"], {}),
        ("extract: a folder without videos", prepare_data.main, ["extract", "DIR/data/frames", "DIR/out"], {}),
        ("extract: a list that is not there", prepare_data.main, ["extract", "DIR/gone.txt", "DIR/out"], {}),
        ("extract: no size", prepare_data.main, ["extract", "DIR/data", "DIR/out", "--short_side", "0"], {}),
        ("extract: a quality of 101", prepare_data.main, ["extract", "DIR/data", "DIR/out", "--quality", "101"], {}),
        ("pack: a folder that is not there", prepare_data.main, ["pack", "DIR/gone", "DIR/out"], {}),
        ("pack: the frames of one video", prepare_data.main, ["pack", "DIR/data/frames/train_00000", "DIR/out"], {}),
        ("pack: no frames", prepare_data.main, ["pack", "DIR/data/videos", "DIR/out"], {}),
        ("pack: fewer than no workers", prepare_data.main, ["pack", "DIR/data", "DIR/out", "--workers", "-1"], {}),
        ("list: a root that is not there", prepare_data.main, ["list", "folders", "DIR/gone", "DIR/out"], {}),
        ("list: no annotation file", prepare_data.main, ["list", "kinetics", "DIR/data", "DIR/out"], {}),
        ("list: another csv file", prepare_data.main,
         ["list", "kinetics", "DIR/data", "DIR/out", "--train", "DIR/k.csv"], {"k.csv": "a,b\n1,2\n"}),
        ("convert: a form that is unclear", convert_checkpoint.main, ["DIR/tiny.yaml", "DIR/m.pt", "DIR/o.pt"], {}),
        ("convert: a source that is not there", convert_checkpoint.main,
         ["DIR/tiny.yaml", "DIR/m.pt", "DIR/o.safetensors"], {}),
        ("download: an unknown name", download_weights.main, ["ViT-X"], {}),
        ("download: another file in its place", download_weights.main, ["EVA02-CLIP-L-14", "--dir", "DIR"],
         {"EVA02_CLIP_L_psz14_s4B.pt": b"mine"}),
        ("export: a file of another kind", export.main, ["DIR/m.pt", "DIR/out.tflite"], {}),
        ("export: a checkpoint that is not there", export.main, ["DIR/m.pt", "DIR/out.onnx"], {}),
        ("export: a file below a file", export.main, ["DIR/m.pt", "DIR/tiny.yaml/out.onnx"], {}),
        ("export: a video without a check", export.main, ["DIR/m.pt", "DIR/out.onnx", "--video", "DIR/v.mp4"], {}),
        ("demo page: no room for uploads", demo_page.main, ["DIR/m.pt", "--max_mb", "0"], {}),
        ("demo page: a port that cannot be", demo_page.main, ["DIR/m.pt", "--port", "70000"], {}),
        ("demo data: no videos", motion_demo.main, ["DIR/demo", "--train_videos", "0"], {}),
        ("demo data: a folder that is in use", motion_demo.main, ["DIR/data/frames"], {}),
        ("utils.config: no arguments", config_program.main, [], {}),
        ("compare: a file that is not there", compare_scores.main, ["DIR/a.npz", "DIR/b.npz"], {}),
        ("compare: text called .npz", compare_scores.main, ["DIR/a.npz", "DIR/b.npz"], {"a.npz": "no scores"}),
        ("compare: one file", compare_scores.main, ["DIR/a.npz"], {}),
        ("compare: another number of weights", compare_scores.main, ["DIR/a.npz", "DIR/b.npz", "--weights", "1"], {}),
        ("compare: fused scores that are a folder", compare_scores.main,
         ["DIR/a.npz", "DIR/b.npz", "--fused", "DIR/data"], {}),
        ("certify: a file that is not there", certify.main, ["DIR/a.npz", "DIR/tiny.yaml"], {}),
        ("certify: text called .npz", certify.main, ["DIR/a.npz", "DIR/tiny.yaml"], {"a.npz": "no scores"}),
        ("certify: a misspelt key", certify.main, ["DIR/a.npz", "DIR/tiny.yaml", "data.val_lst=1"], scores()),
        ("certify: fewer videos than there are", certify.main,
         ["DIR/a.npz", "DIR/tiny.yaml", "--expected", "1"], scores()),
        ("certify: scores of another list", certify.main, ["DIR/a.npz", "DIR/tiny.yaml"], scores()),
        ("publish: a checkpoint that is not there", publish.main, ["DIR/m.pt", "DIR/out"], {}),
        ("publish: a folder without a checkpoint", publish.main, ["DIR/data", "DIR/out"], {}),
        ("publish: a folder that is in use", publish.main, ["DIR/m.pt", "DIR/data"], {}),
        ("publish: a folder that is a file", publish.main, ["DIR/m.pt", "DIR/tiny.yaml"], {}),
        ("publish: a name that no hub has", publish.main, ["DIR/m.pt", "DIR/out", "--push", "name"], {}),
        ("motion test: clips of one frame", motion_test.main, ["DIR/tiny.yaml", "DIR/m.pt", "data.num_segments=1"], {}),
        ("motion test: a list without labels", motion_test.main,
         ["DIR/tiny.yaml", "DIR/m.pt", "data.val_list=DIR/u.txt"], {"u.txt": "val_00000 4 -1\n"}),
        ("motion test: a checkpoint that is not there", motion_test.main, ["DIR/tiny.yaml", "DIR/m.pt"], {}),
        ("visualize: a checkpoint that is not there", visualize.main, ["DIR/m.pt", "DIR/v.mp4", "DIR/out"], {}),
        ("visualize: pictures below a file", visualize.main, ["DIR/m.pt", "DIR/v.mp4", "DIR/tiny.yaml/out"], {}),
        ("draw_predictions: no gif", draw_predictions.main, ["DIR/m.pt", "DIR/v.mp4", "--out", "DIR/out.png"], {}),
        ("draw_predictions: no columns", draw_predictions.main,
         ["DIR/m.pt", "DIR/v.mp4", "--out", "DIR/out.gif", "--columns", "0"], {}),
        ("draw_predictions: a checkpoint that is not there", draw_predictions.main,
         ["DIR/m.pt", "DIR/v.mp4", "--out", "DIR/out.gif"], {}),
        ("test.py: a report that is a file", test_program.main, test("--report", "DIR/tiny.yaml"), {}),
        ("test.py: a report without labels", test_program.main,
         test("--report", "DIR/out", "data.val_list=DIR/u.txt"), {"u.txt": "val_00000 4 -1\n"}),
        ("test.py: no clips", test_program.main, [*test(), "--test_clips", "0"], {}),
        ("test.py: two crops", test_program.main, [*test(), "--test_crops", "2"], {}),
        ("train.py: no configuration", train_program.main, [], {}),
        ("train.py: an unknown flag", train_program.main, [*train(), "--fast"], {}),
    ]  # fmt: skip
    for what, program, arguments, files in table:
        yield Case("Programs and tools", what, program, arguments, files)


def all_cases() -> list[Case]:
    makers = (key_cases, configuration_cases, list_cases, media_cases, file_cases, tool_cases)
    return [case for maker in makers for case in maker()]


def run(case: Case, base: Path) -> tuple[int, str, list[str]]:
    """Status, last line of stderr, and what was left in DIR beside the files that were there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "case"
        shutil.copytree(base, folder, copy_function=os.link)
        (folder / "tiny.yaml").unlink()
        text = (base / "tiny.yaml").read_text(encoding="utf-8").replace(str(base), str(folder))
        (folder / "tiny.yaml").write_text(text, encoding="utf-8")
        for path, content in case.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
        before = set(folder.rglob("*"))
        argv, errors = sys.argv, io.StringIO()
        sys.argv = ["program", *(argument.replace("DIR", str(folder)) for argument in case.arguments)]
        status = 0
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                run_program(case.program)
        except SystemExit as end:
            status = int(end.code or 0)
        except Exception as error:  # what must not happen
            status = 99
            print(f"TRACEBACK {type(error).__name__}: {error}", file=errors)
        finally:
            sys.argv = argv
        left = sorted(str(path.relative_to(folder)) for path in set(folder.rglob("*")) - before)
        lines = errors.getvalue().rstrip("\n").split("\n")
        return status, re.sub(r" object at 0x\w+", "", lines[-1].replace(str(folder), "DIR")), left


def page(rows: list[tuple[Case, int, str]]) -> str:
    """The text of docs/errors.md."""
    lines, section = [HEAD], None
    for case, status, line in sorted(rows, key=lambda row: [c.section for c, *_ in rows].index(row[0].section)):
        if case.section != section:
            section = case.section
            lines += [f"## {section}\n", "| input | status | line |", "|---|---|---|"]
        cells = [text.replace("|", "\\|") for text in (case.what, line)]
        lines.append(f"| {cells[0]} | {status} | `{cells[1]}` |")
    return re.sub(r"\n(## )", r"\n\n\1", "\n".join(lines)).replace("\n\n\n", "\n\n") + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        base.mkdir()
        make_base(base)
        rows = [(case, *run(case, base)[:2]) for case in all_cases()]
    sys.stdout.write(page(rows))


if __name__ == "__main__":
    main()
