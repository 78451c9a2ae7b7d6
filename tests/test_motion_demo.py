"""The demo data: reproducible, no information in single frames, opposite classes reversed, left and right mirrored."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import REPOSITORY

from datasets.annotations import read_annotations, read_class_names
from datasets.flips import flip_pairs
from tools import motion_demo
from tools.motion_demo import ANGLE, CLASSES, MOTIONS, X, draw, generate, render_video, trajectory
from utils.errors import DataError

FRAMES = 16


def steps(states: np.ndarray) -> np.ndarray:
    """Signed change of each state from frame to frame in cycles, in the shorter direction."""
    return (np.diff(states, axis=0) + 0.5) % 1.0 - 0.5


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_only_the_states_of_the_class_change_at_a_steady_visible_rate(label):
    direction = np.array(MOTIONS[CLASSES[label]])
    change = steps(trajectory(label, np.random.default_rng(label), FRAMES))
    moving = direction != 0
    assert np.ptp(change[..., moving], axis=(0, 1)).max() < 1e-9
    assert np.abs(change[..., ~moving]).max() == 0
    slowest, fastest = np.array(motion_demo.RATES)[moving].T
    rate = change[0, 0, moving] / direction[moving]
    assert (slowest <= rate).all() and (rate <= fastest).all()
    assert (fastest < 0.25).all()  # less than half a cycle even between every second frame


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_opposite_class_is_the_same_video_backwards(label):
    forwards = render_video(label, np.random.default_rng(3), num_frames=FRAMES)
    backwards = render_video(label ^ 1, np.random.default_rng(3), num_frames=FRAMES)
    assert forwards.dtype == np.uint8 and forwards.shape == (FRAMES, 64, 64, 3)
    assert np.array_equal(forwards, backwards[::-1])
    assert not np.array_equal(forwards, backwards)


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_every_frame_of_every_class_has_uniform_independent_states(label):
    videos = 2000
    rng = np.random.default_rng(label)
    states = np.stack([trajectory(label, rng, FRAMES) for _ in range(videos)])  # (videos, T, O, 4)
    for frame in (0, 5, FRAMES - 1):
        values = states[:, frame].reshape(videos, -1)  # (videos, O * 4)
        ranks = np.sort(values, axis=0)
        distance = np.abs(ranks - (np.arange(videos)[:, None] + 0.5) / videos).max(axis=0)
        assert distance.max() < 2.2 / videos**0.5  # Kolmogorov-Smirnov, far above the 0.1 % level
        assert np.abs(np.corrcoef(values.T) - np.eye(values.shape[1])).max() < 5 / videos**0.5


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_mirrored_video_shows_the_class_with_left_and_right_swapped(label):
    states = trajectory(label, np.random.default_rng(5), FRAMES)
    mirrored = states.copy()
    mirrored[..., [X, ANGLE]] = 1 - mirrored[..., [X, ANGLE]]
    partner = flip_pairs("kinetics", len(CLASSES), CLASSES).get(label, label)
    assert (partner != label) == ("left" in CLASSES[label] or "right" in CLASSES[label])
    assert (np.sign(steps(mirrored).round(9)) == np.sign(MOTIONS[CLASSES[partner]])).all()

    ground = np.full((64, 64, 3), 0.5)
    objects = [motion_demo._object(np.random.default_rng(number)) for number in range(motion_demo.OBJECTS)]
    difference = draw(states, ground, objects)[:, :, ::-1] - draw(mirrored, ground, [o[:, ::-1] for o in objects]) * 1.0
    assert np.abs(difference).mean() < 0.5  # grey levels; nearest sampling rounds some pixels to the other side


# What a wedge is measured by: mean column and mean row (down is positive) of its pixels, and their number.
COLUMN, ROW, AREA = range(3)
SEEN = {"left": (COLUMN, -1), "right": (COLUMN, 1), "up": (ROW, -1), "down": (ROW, 1)}
SEEN |= {"growing": (AREA, 1), "shrinking": (AREA, -1)}


@pytest.mark.parametrize("name", CLASSES)
def test_class_name_says_what_is_seen(name):
    across = np.linspace(-1, 1, motion_demo.TEXELS)
    inside = (np.hypot(across, across[:, None]) < 0.9) & (np.abs(np.arctan2(across[:, None], across)) < 0.5)
    wedge = np.repeat(inside[..., None], 4, axis=-1).astype(np.float32)
    first = np.array([0.5, 0.5, 0.0, 0.5])
    change = steps(trajectory(CLASSES.index(name), np.random.default_rng(0), 2))[0, 0]
    frames = draw(np.stack([first, first + change])[:, None], np.zeros((64, 64, 3)), [wedge])
    white = [np.nonzero(frame[..., 0] > 127) for frame in frames]
    before, after = ((columns.mean(), rows.mean(), len(rows)) for rows, columns in white)
    words = [word for word in name.split() if word != "moving"]
    assert words
    for seen, sign in map(SEEN.get, words):
        assert sign * (after[seen] - before[seen]) > 0.5


def test_videos_differ_in_split_index_and_seed_and_are_reproducible(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert generate(tmp_path / name, train_videos=9, val_videos=9, size=32, num_frames=3, seed=seed)
    first, again, other = (sorted((tmp_path / name / "frames").rglob("*.jpg")) for name in "abc")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]
    assert not {file.read_bytes() for file in first} & {file.read_bytes() for file in other}
    first_frames = [file.read_bytes() for file in first if file.name == "img_00001.jpg"]
    assert len(set(first_frames)) == len(first_frames) == 18


def test_files_are_what_the_lists_say(tmp_path):
    generate(tmp_path / "demo", train_videos=30, val_videos=10, size=32, num_frames=3)
    records = read_annotations(str(tmp_path / "demo" / "train.txt"), num_classes=len(CLASSES))
    assert np.bincount([record.label for record in records]).tolist() == [3] * len(CLASSES)
    assert read_class_names(str(tmp_path / "demo" / "classes.csv"), len(CLASSES)) == list(CLASSES)
    for record in records:
        frames = sorted((tmp_path / "demo" / "frames" / record.path).iterdir())
        assert [frame.name for frame in frames] == [f"img_{number:05d}.jpg" for number in (1, 2, 3)]
        assert record.num_frames == 3 and Image.open(frames[0]).size == (32, 32)
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]


def test_complete_data_is_left_alone_and_other_data_is_refused(tmp_path):
    settings = dict(train_videos=2, val_videos=1, size=32, num_frames=2)
    root = tmp_path / "demo"
    assert generate(root, **settings)
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    assert not generate(root, **settings)
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before
    with pytest.raises(DataError, match="demo: exists .* delete it"):
        generate(root, **settings, seed=1)
    (root / motion_demo.STAMP).unlink()
    with pytest.raises(DataError, match="delete it"):
        generate(root, **settings)


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(motion_demo, "render_video", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "demo", train_videos=1, val_videos=1)
    assert list(tmp_path.iterdir()) == []


def test_the_program_runs_by_its_path_and_as_a_module(tmp_path):
    arguments = [tmp_path / "demo", "--train_videos", "1", "--val_videos", "1", "--size", "32", "--num_frames", "2"]
    for program, complaint in (
        (["tools/motion_demo.py"], "written"),
        (["-m", "tools.motion_demo"], "are there already"),
    ):
        command = [sys.executable, *program, *map(str, arguments)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.stdout == f"{tmp_path / 'demo'}: 1 training and 1 validation videos {complaint}\n", done.stderr


def test_command_line_names_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/demo: the demo data cannot be written"):
        motion_demo.main([str(tmp_path / "file" / "demo"), "--train_videos", "1", "--val_videos", "1"])
