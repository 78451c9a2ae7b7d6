"""docs/prediction.md as a reader follows it: its commands and its Python, run in order on a small demo checkpoint."""

import csv
import json
import os
import re
import subprocess
import sys

import av
import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from tiny import REPOSITORY, save_untrained

from tools.motion_demo import CLASSES, generate

PAGE = (REPOSITORY / "docs" / "prediction.md").read_text(encoding="utf-8")
PROGRAMS = ("hubconf.py", "test.py", "datasets", "engine", "inference", "modules", "scripts", "tools", "utils")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """(folder, what each command printed) after the whole page; its Python runs as one program, like a notebook."""
    root = tmp_path_factory.mktemp("reader")
    for name in PROGRAMS:
        (root / name).symlink_to(REPOSITORY / name)  # a copy would be compiled anew
    generate(root / "demo_data" / "motion", train_videos=1, val_videos=7, size=64, num_frames=16)
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

    def run(*command):
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    printed = [(text, run("sh", "-eu", "-c", text)) for language, text in BLOCKS if language == "sh"]
    program = "\n".join(text for language, text in BLOCKS if language == "python")
    printed.append(("the program", run(sys.executable, "-c", program + "\nprint(tuple(features.shape))")))
    return root, printed


def output_of(followed, words):
    """What the only block with these words printed."""
    (output,) = [output for text, output in followed[1] if words in text]
    return output


def test_every_block_of_the_page_is_run_or_shows_output():
    assert PAGE.count("```") == 2 * len(BLOCKS)
    languages = [language for language, _ in BLOCKS]
    assert [language for language in languages if language not in ("sh", "python")] == ["", "json"]
    assert languages.count("sh") == 8 and languages.count("python") == 5


def test_a_test_without_a_configuration_scores_the_list_of_the_training(followed):
    output = output_of(followed, "run_test_vision.sh")
    views = re.findall(r"frames x (\d) crops x (\d) clips on 7 videos: top-1 ", output)
    assert views == [("3", "2"), ("1", "1")]
    with np.load(followed[0] / "scores.npz") as saved:
        assert len(saved["paths"]) == 7 and json.loads(str(saved["protocol"]))["accepted_changes"] == {}


def test_the_json_line_of_the_page_has_the_entries_of_a_real_one(followed):
    (example,) = [json.loads(text) for language, text in BLOCKS if language == "json"]
    real = [json.loads(line) for line in (followed[0] / "predictions.json").read_text().splitlines()]
    assert len(real) == 8 and all(list(row) == list(example) for row in real)
    assert list(real[0]["top"][0]) == list(example["top"][0]) and len(real[0]["top"]) == 3
    assert {row["views"] for row in real} == {6} and {row["num_frames"] for row in real} == {16}
    with (followed[0] / "predictions.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == [row["path"] for row in real]


def test_the_first_command_prints_as_the_page_shows(followed):
    output = output_of(followed, "model_best.pt demo_data/motion/videos/val_00000.mp4").splitlines()
    (shown,) = [text.splitlines() for language, text in BLOCKS if language == ""]
    assert output[0] == shown[0] and len(output) == 6
    for line in output[1:]:
        score, name = line.split(maxsplit=1)
        assert re.fullmatch(r"  [01]\.\d{4}  .*", line) and name in CLASSES
    assert re.fullmatch(r"  0\.\d{4}  .*", shown[1]) and shown[1].split(maxsplit=1)[1] in CLASSES
    several = output_of(followed, "predictions.json").splitlines()
    assert len(several) == 8 * 4 + 2 and several[4].startswith(
        "demo_data/motion/videos/val_00001.mp4: 16 frames, 6 views"
    )


def test_pipes_overlays_and_templates_do_what_the_page_says(followed):
    with av.open(str(followed[0] / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 16
    assert "val_00003: 16 frames" in output_of(followed, "--set")
    lines = [line for line in output_of(followed, "predictions.json").splitlines() if line.startswith("{")]
    assert len(lines) == 2 and json.loads(lines[1])["path"] == "demo_data/motion/frames/val_00001"


def test_the_time_line_has_the_rows_of_the_page(followed):
    *windows, last = map(json.loads, (followed[0] / "timeline.json").read_text().splitlines())
    assert len(windows) > 2 and all(list(row) == ["path", "start", "end", "top"] for row in windows)
    assert list(last) == ["path", "segments", "windows", "dropped", "damage", "error"]
    assert list(last["segments"][0]) == ["start", "end", "name", "score"] and last["windows"] == len(windows)
    assert (followed[0] / "timeline.png").read_bytes()[:4] == b"\x89PNG"
    piped = [json.loads(line) for line in output_of(followed, "timeline.json").splitlines() if line.startswith("{")]
    assert piped and piped[-1]["path"] == "-" and piped[-1]["error"] is None


def test_features_and_tokens_are_where_the_page_says(followed):
    root, _ = followed
    index = json.loads((root / "features" / "index.json").read_text())
    features = load_file(root / "features" / index["shards"][0])["features"]
    assert features.shape == (7, 1, 64) and [video["label"] for video in index["videos"]] == list(range(7))
    tokens = json.loads((root / "tokens" / "index.json").read_text())
    assert tokens["shape"] == [2, 1, 8, 65, 192] and tokens["layers"] == [3] and len(tokens["shards"]) == 2
    assert [video["shard"][:12] for video in tokens["videos"]] == ["tokens-00000"] * 4 + ["tokens-00001"] * 3
    assert "tokens: 7 videos x 2 views x 1 layers x 8 frames x 65 tokens x 192 width" in output_of(followed, "last:1")


def test_two_processes_write_what_one_writes(followed):
    from inference import Recognizer

    root, _ = followed
    index = json.loads((root / "tokens" / "index.json").read_text())
    model = Recognizer.load(root / "exp_onehot" / "demo")
    for number in (0, 5):
        video = index["videos"][number]
        stored = load_file(root / "tokens" / video["shard"])["tokens"][video["row"]]
        tokens = [item.tokens for item in model.features(root / video["path"], tokens=True) if item.layer == 3]
        assert np.abs(stored[0, 0].numpy() - np.stack(tokens)).max() < 1e-4


def test_the_python_of_the_page_runs_and_names_a_class_for_each_video(followed):
    *results, shape = output_of(followed, "the program").splitlines()
    assert len(results) == 7 and shape == "(1, 64)"
    for number, line in enumerate(results):
        path, name = line.split(maxsplit=1)
        assert path == f"demo_data/motion/videos/val_{number:05d}.mp4" and name in CLASSES
