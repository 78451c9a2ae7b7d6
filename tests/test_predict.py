"""tools/predict.py: the rows it writes, in every form, and the scores in them, which are those of test.py."""

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from tiny import REPOSITORY, save_untrained, score_run

from engine.configuration import default_config
from inference import overlay, recognizer
from inference.recognizer import Recognizer
from tools import predict
from tools.motion_demo import CLASSES
from tools.recognizer_options import add_model_options, load_recognizer
from utils.errors import DataError, UserError


@pytest.fixture
def checkpoint(config, tmp_path):
    save_untrained(config, tmp_path / "model_best.pt")
    return tmp_path / "model_best.pt"


@pytest.fixture
def run(checkpoint, capsys):
    """run(argument, ...) -> what the program prints, without loader processes."""

    def run(*arguments):
        capsys.readouterr()  # what was printed before
        predict.main([str(checkpoint), *map(str, arguments), "--workers", "0"])
        return capsys.readouterr().out

    return run


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_json_rows_hold_the_scores_of_a_test_bit_for_bit(run, checkpoint, config, motion_root, tmp_path):
    views = ["--test_crops", "3", "--test_clips", "2"]
    saved = score_run(config, checkpoint, tmp_path / "s.npz", *views)
    inputs = [motion_root / "val.txt", "--root", motion_root / "frames"]
    rows = rows_of(run(*inputs, "--crops", "3", "--clips", "2", "--topk", "10", "--json", "-"))
    assert [os.path.relpath(row["path"], motion_root / "frames") for row in rows] == saved["paths"].tolist()
    for row, scores in zip(rows, saved["scores"], strict=True):
        assert list(row) == ["path", "num_frames", "top", "views", "error"]
        assert (row["num_frames"], row["views"], row["error"]) == (6, 6, None)
        assert [list(entry) for entry in row["top"]] == [["label", "name", "score"]] * 10
        labels = [entry["label"] for entry in row["top"]]
        assert labels == np.argsort(-scores, kind="stable").tolist()
        assert [entry["name"] for entry in row["top"]] == [CLASSES[label] for label in labels]
        assert np.array_equal(np.float32([entry["score"] for entry in row["top"]]), scores[labels])


def test_one_unreadable_video_has_a_row_with_its_error_and_the_rest_is_done(run, capsys, motion_root, tmp_path):
    (tmp_path / "broken.mp4").write_text("no video")
    video = motion_root / "videos" / "val_00000.mp4"
    with pytest.raises(DataError, match="^1 of 3 videos could not be read, see their rows$"):
        run(video, tmp_path / "broken.mp4", motion_root / "frames" / "val_00001", "--json", "-")
    good, broken, folder = rows_of(capsys.readouterr().out)
    assert good["path"] == str(video) and len(good["top"]) == len(folder["top"]) == 5
    error = broken.pop("error")
    assert broken == {"path": str(tmp_path / "broken.mp4"), "num_frames": None, "top": [], "views": 0}
    assert error.startswith(f"{tmp_path}/broken.mp4: pyav cannot read it") and "\n" not in error


def test_csv_and_text_and_json_files_say_the_same(run, motion_root, tmp_path):
    directory = motion_root / "videos"
    text = run(directory, "--topk", "2", "--json", tmp_path / "new" / "o.json", "--csv", tmp_path / "o.csv")
    rows = rows_of((tmp_path / "new" / "o.json").read_text())
    table = list(csv.DictReader(io.StringIO((tmp_path / "o.csv").read_text())))
    assert len(rows) == len(table) == 7
    of_a_class = [f"{name}_{place}" for place in (1, 2) for name in ("label", "name", "score")]
    assert list(table[0]) == ["path", "num_frames", "views", "error", *of_a_class]
    lines = iter(text.splitlines())
    for row, cells in zip(rows, table, strict=True):
        assert (cells["path"], cells["num_frames"], cells["views"], cells["error"]) == (row["path"], "6", "1", "")
        assert next(lines) == f"{row['path']}: 6 frames, 1 view"
        for place, entry in enumerate(row["top"], 1):
            assert {key: str(value) for key, value in entry.items()} == {key: cells[f"{key}_{place}"] for key in entry}
            assert next(lines) == f"  {entry['score']:.4f}  {entry['name']}"
    assert next(lines, None) is None


def test_rows_are_written_as_they_come(run, motion_root, tmp_path, monkeypatch):
    """A run that is killed has written what it had done: nothing waits in a buffer."""
    seen = []

    class Stopped(Exception):
        pass

    def stop(self, records, crops, clips):
        for number, video in enumerate(real(self, records, crops, clips)):
            if number == 2:
                seen.append((tmp_path / "o.json").read_text())
                raise Stopped
            yield video

    real = Recognizer.score_videos
    monkeypatch.setattr(Recognizer, "score_videos", stop)
    with pytest.raises(Stopped):
        run(motion_root / "videos", "--json", tmp_path / "o.json")
    assert [Path(row["path"]).name for row in rows_of(seen[0])] == ["val_00000.mp4", "val_00001.mp4"]


def test_an_overlay_shows_every_frame_with_the_classes_below(run, motion_root, tmp_path):
    for source in ("videos/val_00003.mp4", "frames/val_00003"):
        run(motion_root / source, "--overlay", tmp_path / "o.mp4", "--topk", "3")
        plain = list(overlay.all_frames(recognizer.given_videos([motion_root / source])[0], default_config().data))
        with av.open(str(tmp_path / "o.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == (10 if "mp4" in source else 25)
        assert [frame.shape for frame in frames] == [(240, 240, 3)] * 6  # of 32 pixels, enlarged
        for number, (frame, expected) in enumerate(zip(frames, plain, strict=True)):
            enlarged = overlay.draw_classes(expected, [])
            differences = np.abs(frame.astype(int) - np.asarray(enlarged)).mean(axis=(1, 2))
            assert differences[:180].mean() < 6 < differences[200:].mean(), number


def test_what_is_drawn_is_names_and_bars_as_long_as_the_scores():
    black = np.zeros((240, 400, 3), np.uint8)
    drawn = np.asarray(overlay.draw_classes(black, [("long", 0.75), ("short", 0.25)])).astype(int)
    assert drawn.shape == (240, 400, 3) and not drawn[:209].any()
    blue = drawn[[212, 227], :, 2] > 100  # a row of each bar, above its text
    assert [int(row.nonzero()[0].max()) + 1 for row in blue] == [pytest.approx(300, abs=2), pytest.approx(100, abs=2)]
    other = np.asarray(overlay.draw_classes(black, [("lung", 0.75), ("short", 0.25)])).astype(int)
    assert (drawn[210:225] != other[210:225]).any() and (drawn[225:] == other[225:]).all()


def test_an_overlay_is_written_whole_or_not_at_all(run, motion_root, tmp_path, monkeypatch):
    (tmp_path / "o.mp4").write_text("the last one")
    monkeypatch.setattr(overlay, "draw_classes", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(motion_root / "videos" / "val_00000.mp4", "--overlay", tmp_path / "o.mp4")
    assert (tmp_path / "o.mp4").read_text() == "the last one" and not list(tmp_path.glob(".o.mp4*"))
    with pytest.raises(UserError, match="--overlay: needs one video, and these are 7"):
        run(motion_root / "videos", "--overlay", tmp_path / "o.mp4")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topk", "0"], "--topk: 0 is less than 1"),
        (["--clips", "0"], "--clips: 0 is less than 1"),
        (["--crops", "2"], "--crops: invalid choice"),
        (["--json", "-", "--csv", "-"], "only one of them can be the standard output"),
        (["--overlay", "o.avi"], r"o.avi must be called \*.mp4"),
    ],
)
def test_impossible_arguments_show_the_usage(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run("a.mp4", *arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_file_that_cannot_be_written_is_one_line_before_any_video_is_read(run, capsys, motion_root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^--json: .*/file/o.json cannot be written: "):
        run(motion_root / "videos", "--json", tmp_path / "file" / "o.json")
    assert capsys.readouterr().out == ""


def test_options_reach_the_recognizer(checkpoint):
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    add_model_options(parser)
    options = ["--precision", "bf16", "--workers", "3", "--set", "data.dense=True", "--set", "test.view_batch=2"]
    loaded = load_recognizer(parser.parse_args([str(checkpoint), *options, "--device", "cpu"]))
    assert (loaded.precision.name, loaded.precision.device.type) == ("bf16", "cpu")
    assert (loaded.config.data.workers, loaded.config.data.dense, loaded.config.test.view_batch) == (3, True, 2)


def test_the_script_keeps_the_callers_folder_and_a_reader_that_stops_is_no_error(checkpoint, motion_root, tmp_path):
    """One process for both: `| head -1` of many rows ends it quietly, with SIGPIPE's status."""
    command = (
        f"{{ sh '{REPOSITORY}/scripts/run_predict.sh' model_best.pt {'motion ' * 3} --json -; echo $? >&2; }} | head -1"
    )
    (tmp_path / "motion").symlink_to(motion_root / "frames")
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert json.loads(done.stdout)["path"] == "motion/train_00000"
    assert done.stderr.splitlines()[-1] == "141" and "Traceback" not in done.stderr


def test_the_script_without_paths_shows_its_usage():
    done = subprocess.run(["sh", f"{REPOSITORY}/scripts/run_predict.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: sh scripts/run_predict.sh CHECKPOINT PATH...")
