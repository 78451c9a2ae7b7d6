"""docs/custom_data.md, followed step by step: its files are written and its commands run, on sixteen small videos."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tools import motion_demo
from utils.config import load_config

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "custom_data.md").read_text(encoding="utf-8")
PROGRAMS = ("train.py", "test.py", "datasets", "engine", "modules", "scripts", "tools", "utils")
CLASSES = ["growing", "moving left", "moving right", "shrinking"]
VIDEOS = 4  # of each class


def steps() -> list[tuple[str, str]]:
    """(what, text) of each block in order: "sh" and commands, or a file's name and content.

    The file of a yaml block is the last one that the text above it names.
    """
    found, file = [], None
    for match in re.finditer(r"`(configs/\w+\.yaml)`|^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL):
        name, language, text = match.groups()
        file = name or file
        if language:
            found.append((file if language == "yaml" else language, text))
    return found


def make_videos(root: Path) -> None:
    """Write data/mine/videos/CLASS/NUMBER.mp4 with four classes, and data/few/videos with two."""
    made = root / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(motion_demo, "VIDEO_FILES", VIDEOS * len(motion_demo.CLASSES))
        motion_demo.generate(made, train_videos=1, val_videos=motion_demo.VIDEO_FILES, size=40, num_frames=6)
    for line in (made / "val_videos.txt").read_text().splitlines():
        path, label = line.split()
        name = motion_demo.CLASSES[int(label)]
        for data, classes in (("mine", CLASSES), ("few", CLASSES[1:3])):
            if name in classes:
                folder = root / "data" / data / "videos" / name
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(made / "videos" / path, folder)
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Follow the whole page; returns (folder, [(commands, their output)])."""
    root = tmp_path_factory.mktemp("reader")
    for name in PROGRAMS:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root)
    make_videos(root)
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    (root / "bin" / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{root / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    printed = []
    for what, text in steps():
        if what == "sh":
            command = ["sh", "-eu", "-c", text]
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed.append((text, done.stdout))
        else:
            (root / what).parent.mkdir(exist_ok=True)
            (root / what).write_text(text)
    return root, printed


def test_the_page_gives_a_real_tower_the_recipe_of_the_shipped_configuration(followed):
    root, _ = followed
    ours, shipped = (
        load_config(path, purpose="model")
        for path in (root / "configs/mine_vitb16.yaml", REPOSITORY / "configs/k400/vitb16.yaml")
    )
    assert ours.network == shipped.network and ours.solver == shipped.solver
    assert (ours.data.num_segments, ours.data.batch_size) == (shipped.data.num_segments, shipped.data.batch_size)
    assert (ours.data.resize, ours.data.input_size) == (None, 224)


def lines(path):
    return path.read_text().splitlines()


def test_every_block_of_the_page_is_a_command_or_a_file_that_a_command_reads():
    blocks = steps()
    commands = "".join(text for what, text in blocks if what == "sh")
    files = [what for what, _ in blocks if what != "sh"]
    assert len(files) == len(set(files)) and all(file in commands for file in files)
    assert PAGE.count("```") == 2 * (len(blocks) + 2)  # two more blocks show the folders, and lines of segments


def test_the_page_leads_to_lists_as_it_describes_them(followed):
    root, _ = followed
    assert lines(root / "data/mine/classes.csv") == ["id,name", *(f"{i},{name}" for i, name in enumerate(CLASSES))]
    for data, classes in (("mine", CLASSES), ("few", CLASSES[1:3])):
        held_out = lines(root / f"data/{data}/val_videos.txt")
        train = lines(root / f"data/{data}/train_videos.txt")
        assert len(held_out) == len(classes) and len(train) == (VIDEOS - 1) * len(classes)
        for line in [*held_out, *train]:
            path, label = line.rsplit(" ", 1)
            assert path.split("/")[0] == classes[int(label)] and (root / f"data/{data}/videos" / path).is_file()
    for line in lines(root / "data/mine/train.txt"):
        path, num_frames, label = line.rsplit(" ", 2)
        assert (path.split("/")[0], num_frames) == (CLASSES[int(label)], "6")


def test_the_page_leads_to_a_trained_model_and_scores(followed):
    root, printed = followed
    checkpoint = torch.load(root / "exp_onehot/mine/model_best.pt", weights_only=True)
    assert checkpoint["class_names"] == CLASSES
    saved = np.load(root / "exp_onehot/mine/scores.npz")
    assert saved["scores"].shape == (4, 4) and np.allclose(saved["scores"].sum(1), 1, atol=1e-5)
    assert saved["class_names"].tolist() == CLASSES and saved["labels"].tolist() == [0, 1, 2, 3]
    protocol = json.loads(str(saved["protocol"]))
    assert (protocol["dataset"], protocol["protocol"], protocol["resize"]) == ("mine", "kinetics", 36)
    assert "labels swapped: 'moving left' and 'moving right'\n" in (root / "exp_onehot/mine/train.log").read_text()
    (tested,) = [output for text, output in printed if "run_test_vision.sh" in text]
    assert "4 frames x 3 crops x 2 clips on 4 videos: top-1 " in tested


def test_the_page_leads_to_the_same_model_on_frames_and_on_fewer_classes(followed):
    root, printed = followed
    on_frames, on_packed = [output for text, output in printed if "configs/mine_frames.yaml" in text]
    # Without date and time before, and the seconds a video behind.
    scores = [re.findall(r"(?m)^\S+ \S+ (\d.* top-1 [^,\n]*)", output) for output in (on_frames, on_packed)]
    assert scores[0] == scores[1] != []
    assert "4 frames x 1 crops x 1 clips on 4 videos: top-1 " in on_frames
    few = torch.load(root / "exp_onehot/few/last_model.pt", weights_only=True)
    assert few["class_names"] == CLASSES[1:3] and few["trained"]["head.weight"].shape[0] == 2
    assert few["config"]["data"]["resize"] == 36 and few["config"]["data"]["shot"] == 2
    assert "4 training and 2 validation videos" in (root / "exp_onehot/few/train.log").read_text()
