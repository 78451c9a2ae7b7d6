"""tools/extract_features.py: what a shard holds, that a broken run goes on, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import save_untrained

from inference import Recognizer
from tools import extract_features
from tools.motion_demo import CLASSES
from utils.errors import DataError, UserError


@pytest.fixture
def checkpoint(config, tmp_path):
    save_untrained(config, tmp_path / "model_best.pt")
    return tmp_path / "model_best.pt"


@pytest.fixture
def run(checkpoint, motion_root, tmp_path, capsys):
    """run(argument, ...) -> (folder, index, what was printed); the list of 7 frame folders unless another is given."""

    def run(*arguments, source=None, out="out"):
        source = [source] if source else [motion_root / "val.txt", "--root", motion_root / "frames"]
        values = [checkpoint, source[0], tmp_path / out, *source[1:], *arguments, "--workers", "0"]
        extract_features.main([str(value) for value in values])
        printed = capsys.readouterr().out
        return tmp_path / out, json.loads((tmp_path / out / "index.json").read_text()), printed

    return run


def row_of(folder, index, number, name):
    video = index["videos"][number]
    return load_file(folder / video["shard"])[name][video["row"]]


def test_features_of_every_video_are_where_the_index_says(run, checkpoint, motion_root):
    folder, index, _ = run("--shard_videos", "3", "--crops", "3")
    assert [path.name for path in sorted(folder.iterdir())] == [
        *(f"features-0000{number}-of-00003.safetensors" for number in range(3)),
        "index.json",
    ]
    lines = (motion_root / "val.txt").read_text().splitlines()
    recognizer = Recognizer.load(checkpoint)
    for number, (line, video) in enumerate(zip(lines, index["videos"], strict=True)):
        path, num_frames, label = line.split()
        assert video["path"] == str(motion_root / "frames" / path)
        assert (video["num_frames"], video["label"], video["error"]) == (int(num_frames), int(label), None)
        views = row_of(folder, index, number, "features")
        assert views.shape == (3, 64) and views.dtype == torch.float32
        expected = recognizer.features(video["path"], crops=3)
        assert np.abs(views.mean(0).numpy() - expected).max() < 1e-5
    assert (index["shape"], index["class_names"], index["content"]) == ([3, 64], list(CLASSES), "features")
    assert load_file(folder / index["shards"][1])["indices"].tolist() == [3, 4, 5]


def test_tokens_are_the_towers_and_their_size_is_said_before_they_are_read(run, checkpoint, capsys, monkeypatch):
    folder, index, printed = run("--tokens", "1", "--clips", "2")
    recognizer = Recognizer.load(checkpoint)
    tokens = row_of(folder, index, 6, "tokens")
    assert list(tokens.shape) == index["shape"] == [2, 1, 4, 17, 32] and index["layers"] == [1]
    expected = [item.tokens for item in recognizer.features(index["videos"][6]["path"], tokens=True) if item.layer == 1]
    assert np.abs(tokens[0, 0].numpy() - np.stack(expected)).max() < 1e-5
    size = 7 * 2 * 4 * 17 * 32 * 4
    assert printed.startswith(
        "tokens: 7 videos x 2 views x 1 layers x 4 frames x 17 tokens x 32 width in float32; 1 of 1 shards to write, "
        f"{size / 1024:.1f} KiB; "
    )
    assert load_file(folder / index["shards"][0])["tokens"].nbytes == size

    monkeypatch.setattr(Recognizer, "outputs", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--tokens", "all", out="other")
    assert "7 videos x 1 views x 2 layers" in capsys.readouterr().out


def test_what_does_not_fit_on_the_disk_is_refused_before_it_starts(run, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DataError, match="out: 59.5 KiB are needed and 100 bytes are free; choose fewer layers"):
        run("--tokens", "0")
    assert not list((tmp_path / "out").iterdir())


def test_a_broken_run_goes_on_and_gives_what_an_unbroken_one_gives(run, tmp_path, monkeypatch):
    whole, _, _ = run("--shard_videos", "2", out="whole")

    class Stopped(Exception):
        pass

    def stop(path, *args):
        if "00002" in path.name:
            raise Stopped
        real(path, *args)

    real = extract_features.write_shard
    monkeypatch.setattr(extract_features, "write_shard", stop)
    with pytest.raises(Stopped):
        run("--shard_videos", "2")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(done) == 2 and not (tmp_path / "out" / "index.json").exists()
    monkeypatch.setattr(extract_features, "write_shard", real)
    folder, _, printed = run("--shard_videos", "2")
    assert "; 2 of 4 shards to write, " in printed
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for path in whole.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert "; 0 of 4 shards to write, 0 bytes; " in run("--shard_videos", "2")[2]


def test_a_folder_of_another_run_is_not_mixed_with_this_one(run, tmp_path):
    folder, _, _ = run("--shard_videos", "4")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for changes, difference in [
        (["--shard_videos", "4", "--clips", "2"], r" \(shape, clips differ\)"),
        (["--shard_videos", "4", "--set", "data.dense=True"], r" \(protocol differ\)"),
        (["--shard_videos", "3"], ""),
        (["--tokens", "all"], ""),
    ]:
        with pytest.raises(DataError, match=f"00000-of-00002.safetensors: belongs to another run{difference}; choose"):
            run(*changes)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "features-00001-of-00002.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match="00001-of-00002.safetensors: is no readable shard .* delete it"):
        run("--shard_videos", "4")


def test_videos_that_cannot_be_read_are_named_and_the_rest_is_done(run, motion_root, tmp_path, capsys):
    good = [motion_root / "videos" / f"val_0000{number}.mp4" for number in range(2)]
    (tmp_path / "list.txt").write_text(f"{good[0]}\ngone.mp4\n{good[1]}\nlost.mp4\n")
    with pytest.raises(DataError, match="^2 videos could not be read, see .*index.json; the first: .*gone.mp4: "):
        run("--shard_videos", "3", source=tmp_path / "list.txt")
    folder = tmp_path / "out"
    index = json.loads((folder / "index.json").read_text())
    assert [bool(video["error"]) for video in index["videos"]] == [False, True, False, True]
    assert [video["row"] for video in index["videos"]] == [0, None, 1, None]
    assert load_file(folder / index["shards"][0])["indices"].tolist() == [0, 2]
    assert load_file(folder / index["shards"][1])["features"].shape == (0, 1, 64)  # of its videos none could be read


@pytest.mark.parametrize("layers", ["2", "1,0", "0,0", "last:3", "every2:1", "", "x"])
def test_layers_that_the_tower_does_not_give_are_one_line(run, layers):
    with pytest.raises(UserError, match="^--tokens: .* of the blocks that the side network reads: 0, 1$") as caught:
        run(f"--tokens={layers}")
    assert "\n" not in caught.value.line


def test_shards_of_tokens_hold_what_fits_in_memory(checkpoint):
    recognizer = Recognizer.load(checkpoint)
    tokens = extract_features.choose_output(recognizer, "all", 1)
    assert tokens.video_bytes == 2 * 4 * 17 * 32 * 4
    assert extract_features.default_shard(tokens) == 2**30 // tokens.video_bytes
    assert extract_features.default_shard(extract_features.choose_output(recognizer, None, 1)) == 1000
