"""Shared fixtures: tiny data sets on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from tiny import random_frame, save_untrained

import train as train_program
from inference import Recognizer
from tools.motion_demo import CLASSES, generate


@pytest.fixture
def make_frame_folders(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """make(lengths, ...) -> (root, list): one JPEG folder "video <i>" per length, labels in turn."""

    def make(
        lengths: Sequence[int],
        size: tuple[int, int] = (40, 32),
        num_classes: int = 4,
        image_tmpl: str = "img_{:05d}.jpg",
    ) -> tuple[str, str]:
        lines = []
        for video, length in enumerate(lengths):
            folder = tmp_path / "frames" / f"video {video}"
            folder.mkdir(parents=True)
            for number in range(1, length + 1):
                random_frame((video, number), size).save(folder / image_tmpl.format(number), quality=90)
            lines.append(f"{folder.name} {length} {video % num_classes}\n")
        list_path = tmp_path / "list.txt"
        list_path.write_text("".join(lines))
        return str(tmp_path / "frames"), str(list_path)

    return make


@pytest.fixture(scope="session")
def motion_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "motion"
    generate(root, train_videos=16, val_videos=7, size=32, num_frames=6)
    return root


@pytest.fixture
def config(motion_root, tmp_path):
    """A YAML file: two epochs of four steps, a tower of two blocks, dropout so that random states matter."""
    data = {
        "dataset": "motion_demo",
        "num_segments": 4,
        "batch_size": 4,
        "workers": 0,
        "num_classes": len(CLASSES),
        "label_list": str(motion_root / "classes.csv"),
        "input_size": 32,
        **{f"{part}_root": str(motion_root / "frames") for part in ("train", "val")},
        **{f"{part}_list": str(motion_root / f"{part}.txt") for part in ("train", "val")},
    }
    network = {"arch": "timm/vit_tiny_patch16_224", "init": False, "side_dim": 64, "drop_fc": 0.5}
    network["backbone_kwargs"] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    solver = {"epochs": 2, "lr": 1e-3, "lr_warmup_step": 1}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"data": data, "network": network, "solver": solver}))
    return str(path)


@pytest.fixture(scope="session")
def trained_demo(tmp_path_factory):
    """(checkpoint, folder of the data) of a small model that has learned the motions; half a minute of training."""
    folder = tmp_path_factory.mktemp("trained")
    root = folder / "motion"
    generate(root, train_videos=240, val_videos=20, size=32, num_frames=8)
    data = {
        "dataset": "motion_demo",
        "num_segments": 6,
        "batch_size": 8,
        "workers": 0,
        "num_classes": len(CLASSES),
        "label_list": str(root / "classes.csv"),
        "input_size": 32,
        **{f"{part}_root": str(root / "frames") for part in ("train", "val")},
        **{f"{part}_list": str(root / f"{part}.txt") for part in ("train", "val")},
    }
    network = {"arch": "timm/vit_tiny_patch16_224", "init": False, "side_dim": 64}
    network["backbone_kwargs"] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    solver = {"epochs": 6, "lr": 3e-3, "lr_warmup_step": 1}
    (folder / "demo.yaml").write_text(yaml.safe_dump({"data": data, "network": network, "solver": solver}))
    train_program.main(["--config", str(folder / "demo.yaml"), "--output", str(folder / "run")])
    return folder / "run" / "model_best.pt", root


@pytest.fixture
def checkpoint(config, tmp_path):
    """model_best.pt of the test's configuration, untrained."""
    save_untrained(config, tmp_path / "model_best.pt")
    return tmp_path / "model_best.pt"


@pytest.fixture
def recognizer(checkpoint):
    return Recognizer.load(checkpoint)
