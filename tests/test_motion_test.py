"""tools/motion_test.py: clips in other orders of their frames, through the loop of test.py, and what it says."""

import csv
import shutil

import numpy as np
import pytest
import torch
from tiny import save_untrained, score_run

from engine.motion import IN_ORDER, REVERSED, SHUFFLED, STILL, reversal_pairs, shuffle, variants
from tools import motion_test
from tools.motion_demo import CLASSES
from utils.errors import ConfigError, DataError


def test_variants_change_which_frames_a_clip_has_and_nothing_else():
    clips = torch.arange(2 * 8).view(2, 8, 1, 1, 1) * torch.ones(1, 1, 3, 2, 2)
    frames = {name: change(clips)[..., 0, 0, 0].int().tolist() for name, change in variants(8).items()}
    assert list(frames) == [IN_ORDER, REVERSED, SHUFFLED, STILL, "4 of 8 frames", "2 of 8 frames"]
    assert frames[IN_ORDER] == [[*range(8)], [*range(8, 16)]]
    assert frames[REVERSED] == [[*range(7, -1, -1)], [*range(15, 7, -1)]]
    assert [sorted(row) for row in frames[SHUFFLED]] == frames[IN_ORDER] != frames[SHUFFLED]
    assert np.subtract(frames[SHUFFLED][1], 8).tolist() != frames[SHUFFLED][0]  # each clip in another order
    assert frames[STILL] == [[4] * 8, [12] * 8]
    assert frames["4 of 8 frames"][0] == [1, 3, 5, 7] and frames["2 of 8 frames"][1] == [10, 14]
    assert list(variants(2)) == [IN_ORDER, REVERSED, SHUFFLED, STILL]
    generator = torch.Generator().manual_seed(0)
    assert all(shuffle(2, generator).tolist() == [1, 0] for _ in range(5))
    assert torch.equal(variants(8, seed=3)[SHUFFLED](clips), variants(8, seed=3)[SHUFFLED](clips))


def test_names_say_which_classes_reverse_into_each_other():
    assert reversal_pairs(CLASSES) == {label: label ^ 1 for label in range(10)}
    names = ["Opening something", "Closing something", "Moving something up", "moving something down", "Eating",
             "Putting something into something", "Putting something out of something", "Turning towards it",
             "Turning away from it", "Pushing left to right", "Pushing right to left", "Spinning anticlockwise",
             "Spinning clockwise", "Left", "Cupping", "Downing"]  # fmt: skip
    pairs = {0: 1, 2: 3, 5: 6, 7: 8, 9: 10, 11: 12}
    assert reversal_pairs(names) == pairs | {b: a for a, b in pairs.items()}


@pytest.fixture
def tested(config, tmp_path):
    save_untrained(config, tmp_path / "m.pt")
    return config, str(tmp_path / "m.pt")


def test_scores_in_order_and_reversed_are_those_of_test_py_on_such_frames(tested, motion_root, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(motion_test, "describe", lambda by_name, *rest: seen.update(by_name) or [])
    motion_test.main([*tested, "data.workers=0"])
    for video in (motion_root / "frames").glob("val_*"):
        (tmp_path / "back" / video.name).mkdir(parents=True)
        for number in range(1, 7):
            shutil.copy(video / f"img_{number:05d}.jpg", tmp_path / "back" / video.name / f"img_{7 - number:05d}.jpg")
    # Six frames of six, so that the reversed video has the reversed clip.
    six = ["data.num_segments=6", "--accept_changes"]
    motion_test.main([*tested, *six])
    in_order = score_run(*tested, tmp_path / "a.npz", *six)["scores"]
    back = score_run(*tested, tmp_path / "b.npz", *six, f"data.val_root={tmp_path / 'back'}")["scores"]
    assert np.array_equal(seen[IN_ORDER], in_order)
    assert np.abs(seen[REVERSED] - back).max() < 1e-6 < np.abs(in_order - back).max()
    assert seen["3 of 6 frames"].shape == (7, 10)


def test_a_model_that_reads_motion_and_one_that_does_not_are_told_apart():
    names, labels = ["up", "down"], np.array([0, 1] * 20)
    pairs = reversal_pairs(names)
    own, other = np.eye(2)[labels], np.eye(2)[1 - labels]
    moving = {IN_ORDER: own, REVERSED: other, SHUFFLED: np.eye(2)[np.arange(40) // 2 % 2], STILL: np.eye(2)[[0] * 40]}
    said = "\n".join(motion_test.describe(moving, labels, names, pairs, 5))
    assert "always answering the most frequent class gives 50.0 %" in said
    assert "of the 50.0 points above that, 50.0 need the order of the frames and 50.0 need more than one" in said
    assert "(40 videos): 100.0 % get the other class of their pair, 0.0 % their own" in said
    assert "up: 100, 0, 50, 100; down 100 %" in said
    still = dict.fromkeys(moving, own)
    said = "\n".join(motion_test.describe(still, labels, names, pairs, 5))
    assert "0.0 need the order of the frames" in said and "0.0 % get the other class of their pair, 100.0 %" in said
    said = "\n".join(motion_test.describe(still, labels, names, {}, 5))
    assert "no two class names say that they reverse" in said
    unread = {name: np.where(np.arange(40)[:, None] < 20, np.nan, scores) for name, scores in moving.items()}
    assert "reversed  top-1   0.00" in "\n".join(motion_test.describe(unread, labels, names, pairs, 0))


def test_the_program_prints_every_variant_and_writes_a_table(tested, tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text("growing,moving up left\n0, 1\n")
    arguments = ["--pairs", str(tmp_path / "pairs.csv"), "--csv", str(tmp_path / "out" / "classes.csv"), "--list", "3"]
    motion_test.main([*tested, *arguments])
    out = capsys.readouterr().out
    for name in variants(4):
        assert f"{name}  top-1 " in out
    assert "reversed videos of 2 pairs of classes (3 videos)" in out and "(3 of 7)" in out
    with (tmp_path / "out" / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES[:7]) and rows[1]["partner"] == "moving left"
    assert {*variants(4)} <= rows[0].keys()


@pytest.mark.parametrize("text", ["up\n", "growing,growing\n", "growing,x\n", "1,2,3\n", "0,1\n0,2\n", "growing,10\n"])
def test_a_line_of_pairs_that_is_none_is_named(tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=r"p.csv:\d: (a line must hold two|'moving left' is in two pairs)"):
        motion_test.read_pairs(str(tmp_path / "p.csv"), list(CLASSES))


def test_what_cannot_be_tested_is_refused(tested, tmp_path):
    with pytest.raises(ConfigError, match="data.num_segments was 4 and is 3 now.*--accept_changes"):
        motion_test.main([*tested, "data.num_segments=3"])
    with pytest.raises(ConfigError, match="data.num_segments: clips of one frame have no motion"):
        motion_test.main([*tested, "data.num_segments=1"])
    (tmp_path / "u.txt").write_text("val_00000 6 -1\n")
    with pytest.raises(DataError, match="u.txt: no labels"):
        motion_test.main([*tested, f"data.val_list={tmp_path / 'u.txt'}"])
    with pytest.raises(DataError, match="img_00001.jpg: frame missing"):
        motion_test.main([*tested, f"data.val_root={tmp_path}"])
