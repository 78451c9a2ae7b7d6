"""docs/prediction.md as a reader follows it: its commands and its Python, run in order on a small demo checkpoint."""

import csv
import json
import os
import re
import subprocess
import sys

import av
import numpy as np
import pages
import pytest
from safetensors.torch import load_file

from tools.motion_demo import CLASSES

PAGE = "docs/prediction.md"


@pytest.fixture(scope="module")
def followed(reader):
    """(folder, what each command printed) after the whole page; its Python runs as one program, like a notebook."""
    printed = pages.follow(PAGE, reader)
    program = "\n".join(block.text for block in pages.blocks(PAGE) if block.language == "python")
    command = [sys.executable, "-c", program + "\nprint(tuple(features.shape))"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=reader, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return reader, [*printed, ("the program", done.stdout)]


def blocks(*languages):
    return [block.text for block in pages.blocks(PAGE) if block.language in languages]


def output_of(followed, words):
    return pages.output_of(followed[1], words)


def test_every_block_of_the_page_is_run_or_shows_output():
    languages = [block.language for block in pages.blocks(PAGE)]
    assert [language for language in languages if language not in ("sh", "python")] == ["", "json"]
    assert languages.count("sh") == 9 and languages.count("python") == 5


def test_a_test_without_a_configuration_scores_the_list_of_the_training(followed):
    output = output_of(followed, "run_test_vision.sh") + output_of(followed, "python test.py")
    views = re.findall(r"frames x (\d) crops x (\d) clips on 9 videos: top-1 ", output)
    assert views == [("3", "2"), ("1", "1")]
    with np.load(followed[0] / "scores.npz") as saved:
        assert len(saved["paths"]) == 9 and json.loads(str(saved["protocol"]))["accepted_changes"] == {}


def test_the_json_line_of_the_page_has_the_entries_of_a_real_one(followed):
    (example,) = map(json.loads, blocks("json"))
    real = [json.loads(line) for line in (followed[0] / "predictions.json").read_text().splitlines()]
    assert len(real) == 10 and all(list(row) == list(example) for row in real)
    assert list(real[0]["top"][0]) == list(example["top"][0]) and len(real[0]["top"]) == 3
    assert {row["views"] for row in real} == {6} and {row["num_frames"] for row in real} == {16}
    with (followed[0] / "predictions.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == [row["path"] for row in real]


def test_the_first_command_prints_as_the_page_shows(followed):
    output = output_of(followed, "model_best.pt demo_data/motion/videos/val_00000.mp4").splitlines()
    (shown,) = [text.splitlines() for text in blocks("")]
    assert output[0] == shown[0] and len(output) == 6
    for line in output[1:]:
        score, name = line.split(maxsplit=1)
        assert re.fullmatch(r"  [01]\.\d{4}  .*", line) and name in CLASSES
    assert re.fullmatch(r"  0\.\d{4}  .*", shown[1]) and shown[1].split(maxsplit=1)[1] in CLASSES
    several = output_of(followed, "predictions.json").splitlines()
    assert len(several) == 10 * 4 and several[4].startswith("demo_data/motion/videos/val_00001.mp4: 16 frames, 6 views")


def test_pipes_overlays_and_templates_do_what_the_page_says(followed):
    with av.open(str(followed[0] / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 16
    assert "val_00003: 16 frames" in output_of(followed, "--set")
    lines = [line for line in output_of(followed, "head -n 2").splitlines() if line.startswith("{")]
    assert len(lines) == 2 and json.loads(lines[1])["path"] == "demo_data/motion/frames/val_00001"


def test_the_time_line_has_the_rows_of_the_page(followed):
    *windows, last = map(json.loads, (followed[0] / "timeline.json").read_text().splitlines())
    assert len(windows) > 2 and all(list(row) == ["path", "start", "end", "top"] for row in windows)
    assert list(last) == ["path", "segments", "windows", "dropped", "damage", "error"]
    assert list(last["segments"][0]) == ["start", "end", "name", "score"] and last["windows"] == len(windows)
    assert (followed[0] / "timeline.png").read_bytes()[:4] == b"\x89PNG"
    piped = [json.loads(line) for line in output_of(followed, "cat demo_data").splitlines() if line.startswith("{")]
    assert piped and piped[-1]["path"] == "-" and piped[-1]["error"] is None


def test_features_and_tokens_are_where_the_page_says(followed):
    root, _ = followed
    index = json.loads((root / "features" / "index.json").read_text())
    features = load_file(root / "features" / index["shards"][0])["features"]
    assert features.shape == (9, 1, 64) and [video["label"] for video in index["videos"]] == list(range(9))
    tokens = json.loads((root / "tokens" / "index.json").read_text())
    assert tokens["shape"] == [2, 1, 8, 65, 192] and tokens["layers"] == [3] and len(tokens["shards"]) == 3
    numbers = [int(video["shard"][7:12]) for video in tokens["videos"]]
    assert numbers == [0] * 4 + [1] * 4 + [2]
    assert "tokens: 9 videos x 2 views x 1 layers x 8 frames x 65 tokens x 192 width" in output_of(followed, "last:1")


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
    assert len(results) == 9 and shape == "(1, 64)"
    for number, line in enumerate(results):
        path, name = line.split(maxsplit=1)
        assert path == f"demo_data/motion/videos/val_{number:05d}.mp4" and name in CLASSES
