"""docs/report.md as a reader follows it: its commands, run in order on a small demo checkpoint."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from tiny import REPOSITORY, save_untrained

from tools.motion_demo import generate

PAGE = (REPOSITORY / "docs" / "report.md").read_text(encoding="utf-8")
PROGRAMS = ("configs", "datasets", "engine", "inference", "modules", "scripts", "test.py", "tools", "utils")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """(folder, what each command printed) after the whole page."""
    root = tmp_path_factory.mktemp("reader")
    for name in PROGRAMS:
        (root / name).symlink_to(REPOSITORY / name)  # a copy would be compiled anew
    generate(root / "demo_data" / "motion", train_videos=1, val_videos=9, size=64, num_frames=16)
    demo = yaml.safe_load((REPOSITORY / "configs" / "demo" / "motion.yaml").read_text())
    demo["data"]["label_list"] = str(root / demo["data"]["label_list"])
    (root / "demo.yaml").write_text(yaml.safe_dump(demo))
    (root / "exp_onehot" / "demo").mkdir(parents=True)
    save_untrained(root / "demo.yaml", root / "exp_onehot" / "demo" / "model_best.pt")
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    (root / "bin" / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{root / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    printed = []
    for language, text in BLOCKS:
        if language == "sh":
            done = subprocess.run(
                ["sh", "-eu", "-c", text], cwd=root, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
    return root, printed


def test_every_command_of_the_page_writes_what_the_page_says(followed):
    root, printed = followed
    assert PAGE.count("```") == 2 * len(BLOCKS) and len(printed) == 5
    report = root / "exp_onehot" / "demo" / "report"
    named = re.findall(r"^\| `(\w+\.(?:html|csv))` \|", PAGE, re.MULTILINE)
    assert sorted(path.name for path in report.iterdir()) == sorted(named)
    assert printed[0].splitlines()[-2].endswith("report: exp_onehot/demo/report/report.html")
    assert all((root / name).is_file() for name in ("scores.npz", "fused.npz", "motion.csv", "look.png", "look.mp4"))
    scores, one, fused = (np.load(root / f"{name}.npz")["scores"] for name in ("scores", "one_view", "fused"))
    assert fused == pytest.approx(2 / 3 * scores + 1 / 3 * one, abs=1e-6)


def test_the_output_has_the_lines_that_the_page_explains(followed):
    comparison, motion = followed[1][1], followed[1][3]
    for words in (
        "9 videos in both",
        "top-1: ",
        "McNemar p = ",
        "frames: test_clips 2 -> 1",
        "pixels: test_crops 3 -> 1",
    ):
        assert words in comparison
    assert "verdict: " in comparison and "weights:" not in comparison
    (shown,) = [text.splitlines() for language, text in BLOCKS if language == ""]
    for line in shown:
        assert line.split("top-1")[0] in motion
    assert "4 of 8 frames" in motion and "2 of 8 frames" in motion and "pair, " in motion
