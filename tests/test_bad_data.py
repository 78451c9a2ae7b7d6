"""The programs with broken videos and lists without labels: what stops a run, is skipped, is counted as wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import score_run as score

import test as test_program
import train as train_program
from engine.metrics import class_accuracy, topk_accuracy
from tools.motion_demo import CLASSES
from utils.errors import DataError, UserError


@pytest.fixture
def checkpoint(config, tmp_path):
    train_program.main(["--config", config, "--output", str(tmp_path / "run"), "solver.epochs=1"])
    return tmp_path / "run" / "last_model.pt"


@pytest.fixture
def broken_videos(motion_root, tmp_path):
    """Overrides for the demo's seven mp4 files, of which one is not a video and one is missing."""
    shutil.copytree(motion_root / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "val_00002.mp4").write_bytes(b"not a video" * 50)
    (tmp_path / "videos" / "val_00005.mp4").unlink()
    parts = [f"data.{part}_list={motion_root}/val_videos.txt" for part in ("train", "val")]
    return ["data.modality=video", *parts, *(f"data.{part}_root={tmp_path}/videos" for part in ("train", "val"))]


@pytest.fixture
def broken_frames(motion_root, tmp_path):
    """Overrides for the demo's frame folders, of which the third has no frames."""
    shutil.copytree(motion_root / "frames", tmp_path / "frames")
    shutil.rmtree(tmp_path / "frames" / "val_00002")
    return [f"data.{part}_root={tmp_path}/frames" for part in ("train", "val")]


def train(config, output, *overrides):
    train_program.main(["--config", config, "--output", str(output), *overrides])
    return Path(output, "train.log").read_text()


def write_labels(motion_root, path, labels):
    lines = [line.rsplit(maxsplit=1)[0] for line in (motion_root / "val.txt").read_text().splitlines()]
    path.write_text("".join(f"{line} {label}\n" for line, label in zip(lines, labels, strict=True)))
    return f"data.val_list={path}"


# Evaluation


def test_a_video_file_that_cannot_be_read_is_listed_and_counted_wrong(
    config, checkpoint, broken_videos, motion_root, tmp_path, capsys
):
    whole = score(config, checkpoint, tmp_path / "whole.npz", *broken_videos, f"data.val_root={motion_root}/videos")
    capsys.readouterr()
    for number, more in enumerate((["data.batch_size=1"], ["data.workers=2"], ["--test_crops", "3"])):
        saved = score(config, checkpoint, tmp_path / f"{number}.npz", *broken_videos, *more)
        assert saved["paths"].tolist() == whole["paths"].tolist()
        assert saved["labels"].tolist() == whole["labels"].tolist()
        assert np.isnan(saved["scores"]).all(axis=1).nonzero()[0].tolist() == [2, 5]
        assert np.isnan(saved["scores"]).sum() == 2 * saved["scores"].shape[1]
        if number < 2:
            kept = [0, 1, 3, 4, 6]
            assert np.abs(saved["scores"][kept] - whole["scores"][kept]).max() < 1e-5
        top1 = 100 * np.mean(saved["scores"].argmax(1)[[0, 1, 3, 4, 6]] == saved["labels"][[0, 1, 3, 4, 6]]) * 5 / 7
        output = capsys.readouterr().out
        assert f"on 7 videos: top-1 {top1:.2f}, " in output
        (lowest,) = [line for line in output.splitlines() if "lowest top-1: " in line]
        assert lowest.count(", ") == 4 and f"{CLASSES[2]} 0.00" in lowest and f"{CLASSES[5]} 0.00" in lowest
        lines = [line for line in output.splitlines() if "no scores, counted wrong: " in line]
        assert "videos/val_00002.mp4: pyav cannot read it (" in lines[0] and "val_videos.txt:3" in lines[0]
        assert "videos/val_00005.mp4: no such video" in lines[1] and len(lines) == 2


def test_a_broken_frame_folder_stops_a_test_or_is_skipped(config, checkpoint, broken_frames, tmp_path):
    with pytest.raises(DataError, match=r"frames/val_00002/img_00001.jpg: frame missing; listed at .*val.txt:3"):
        score(config, checkpoint, tmp_path / "s.npz", *broken_frames)
    assert not (tmp_path / "s.npz").exists()
    saved = score(config, checkpoint, tmp_path / "s.npz", *broken_frames, "data.on_error=skip")
    assert np.isnan(saved["scores"]).all(axis=1).nonzero()[0].tolist() == [2]


def test_a_test_in_which_no_video_can_be_read_is_an_error(config, checkpoint, broken_videos, tmp_path):
    root = tmp_path / "nothing"
    root.mkdir()
    with pytest.raises(DataError, match=f"none of the 7 videos can be read; the first: {root}/val_00000.mp4: no such"):
        score(config, checkpoint, tmp_path / "s.npz", *broken_videos, f"data.val_root={root}")


def test_a_row_of_nans_is_wrong_whatever_its_label():
    scores = np.array([[np.nan] * 3, [0.1, 0.7, 0.2], [np.nan] * 3, [0.5, 0.2, 0.3]])
    assert topk_accuracy(scores, np.array([0, 1, 2, 2]), 1) == 25.0
    assert topk_accuracy(scores, np.array([0, 1, 2, 2]), 3) == 50.0
    assert class_accuracy(scores, np.array([0, 1, 2, 0])) == {2: 0.0, 0: 50.0, 1: 100.0}
    assert list(class_accuracy(scores, np.array([0, 1, 2, 0]))) == [2, 0, 1]


# Damaged videos


@pytest.fixture
def damaged_videos(motion_root, tmp_path):
    """Overrides for the demo's seven mp4 files, of which the third and the sixth lack their last byte."""
    shutil.copytree(motion_root / "videos", tmp_path / "videos")
    for number in (2, 5):
        path = tmp_path / "videos" / f"val_{number:05d}.mp4"
        path.write_bytes(path.read_bytes()[:-1])
    parts = [f"data.{part}_list={motion_root}/val_videos.txt" for part in ("train", "val")]
    return ["data.modality=video", *parts, *(f"data.{part}_root={tmp_path}/videos" for part in ("train", "val"))]


def test_damaged_videos_are_scored_and_named_in_the_log_and_the_score_file(
    config, checkpoint, damaged_videos, motion_root, tmp_path, capsys
):
    whole = score(config, checkpoint, tmp_path / "whole.npz", *damaged_videos, f"data.val_root={motion_root}/videos")
    assert not whole["damaged"].any()
    for workers in (0, 2):
        capsys.readouterr()
        saved = score(config, checkpoint, tmp_path / f"{workers}.npz", *damaged_videos, f"data.workers={workers}")
        assert saved["damaged"].nonzero()[0].tolist() == [2, 5]
        assert np.array_equal(saved["scores"], whole["scores"])  # the missing byte holds no picture
        output = capsys.readouterr().out
        assert "2 of 7 videos are damaged, and what can be decoded of them is scored" in output
        assert output.count("scored in part: ") == 2
        assert "videos/val_00002.mp4: damaged (the file ends 1 bytes before" in output and "val_videos.txt:3" in output


def test_damaged_videos_count_as_unreadable_where_the_configuration_says_so(
    config, checkpoint, damaged_videos, tmp_path, capsys
):
    saved = score(config, checkpoint, tmp_path / "s.npz", *damaged_videos, "data.on_damage=error")
    assert np.isnan(saved["scores"]).all(axis=1).nonzero()[0].tolist() == [2, 5]
    assert not saved["damaged"].any()
    assert "no scores, counted wrong: " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"val_0000[25].mp4: damaged \(.*; data.on_damage=accept uses what can be"):
        train(config, tmp_path / "new", *damaged_videos, "data.on_damage=error", "data.batch_size=7")


def test_damaged_training_videos_are_counted_and_named_each_epoch(config, damaged_videos, tmp_path):
    log = train(config, tmp_path / "new", *damaged_videos, "data.batch_size=7", "data.workers=2")
    lines = [line for line in log.splitlines() if "training videos are damaged" in line]
    assert [line.split(" ", 2)[2][:9] for line in lines] == ["epoch 0: ", "epoch 1: "]
    assert all("2 training videos are damaged, and what can be decoded of them was used: " in line for line in lines)
    assert all(line.index("val_00002.mp4: damaged") < line.index("val_00005.mp4: damaged") for line in lines)
    assert log.count("scored in part: ") == 4  # validation, twice


# Training


def test_a_broken_video_stops_training_with_its_path(config, broken_videos, tmp_path):
    with pytest.raises(UserError, match="videos/val_0000[25].mp4: ") as caught:
        train(config, tmp_path / "new", *broken_videos, "data.batch_size=7")
    assert "\n" not in caught.value.line


def test_skipped_training_videos_are_counted_and_reported_each_epoch(config, broken_videos, tmp_path):
    overrides = [*broken_videos, "data.on_error=skip", "data.batch_size=7"]
    log = train(config, tmp_path / "new", *overrides, "data.workers=2")
    lines = [line for line in log.splitlines() if "replaced: " in line]
    assert [line.split(" ", 2)[2][:9] for line in lines] == ["epoch 0: ", "epoch 1: "]
    assert all("2 training videos could not be read and were replaced: " in line for line in lines)
    assert all(line.index("val_00002.mp4: pyav cannot") < line.index("val_00005.mp4: no such") for line in lines)
    assert log.count("no scores, counted wrong: ") == 4  # validation, twice


def test_few_shot_training_says_how_many_videos_it_has(config, tmp_path):
    log = train(config, tmp_path / "new", "data.shot=1", "solver.epochs=1", "data.batch_size=2")
    assert f"{len(CLASSES)} training and 7 validation videos" in log


# Lists without labels


def test_a_list_without_labels_gets_scores_and_no_accuracy_and_needs_a_file_for_them(
    config, checkpoint, motion_root, tmp_path, capsys
):
    override = write_labels(motion_root, tmp_path / "unlabelled.txt", [-1] * 7)
    labelled = score(config, checkpoint, tmp_path / "a.npz")
    capsys.readouterr()
    saved = score(config, checkpoint, tmp_path / "b.npz", override)
    output = capsys.readouterr().out
    assert "on 7 videos: no labels, " in output and "top-1" not in output
    assert saved["labels"].tolist() == [-1] * 7
    assert np.array_equal(saved["scores"], labelled["scores"])
    with pytest.raises(DataError, match=r"unlabelled.txt: no labels.*--save_scores FILE.npz"):
        test_program.main(["--config", config, "--weights", str(checkpoint), override])


def test_in_a_list_without_labels_nothing_is_counted_wrong(
    config, checkpoint, broken_frames, motion_root, tmp_path, capsys
):
    override = write_labels(motion_root, tmp_path / "unlabelled.txt", [-1] * 7)
    capsys.readouterr()
    score(config, checkpoint, tmp_path / "s.npz", *broken_frames, "data.on_error=skip", override)
    output = capsys.readouterr().out
    assert "no scores: " in output and "val_00002" in output and "counted wrong" not in output


def test_training_and_its_validation_need_labels(config, motion_root, tmp_path):
    override = write_labels(motion_root, tmp_path / "unlabelled.txt", [-1] * 7)
    for overrides in ([override], [f"data.train_list={tmp_path}/unlabelled.txt"]):
        with pytest.raises(DataError, match="unlabelled.txt:1: label -1 means unlabelled, but training and validation"):
            train(config, tmp_path / "new", *overrides)
