"""tools/compare_scores.py: what changed, whether it is chance, and where a reproduction departs from its reference."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from tiny import save_untrained, score_run

from engine.scores import Scores, load_scores, save_scores
from tools import compare_scores
from tools.motion_demo import CLASSES
from utils.errors import DataError


def write(path, predicted, labels, num_classes=6, sure=0.9, names=None, paths=None, **protocol):
    """A file of scores in which each video gets `sure` for its predicted class, or NaN for -1."""
    n = len(labels)
    scores = np.full((n, num_classes), (1 - sure) / (num_classes - 1), np.float32)
    scores[np.arange(n), predicted] = sure
    scores[np.asarray(predicted) < 0] = np.nan
    paths = paths or [f"v{number}" for number in range(n)]
    save_scores(path, Scores(paths, np.asarray(labels), scores, np.zeros(n, bool), names, protocol))
    return str(path)


@pytest.fixture
def say(capsys):
    def run(*arguments):
        compare_scores.main([*map(str, arguments)])
        return capsys.readouterr().out

    return run


LABELS = [0, 1, 2, 3, 4, 5] * 10


def test_gains_losses_and_classes_are_counted_with_mcnemars_test(tmp_path, say):
    before, after = list(LABELS), list(LABELS)
    before[0:12] = [(label + 1) % 6 for label in LABELS[0:12]]  # twelve wrong
    after[10:13] = [(label + 1) % 6 for label in LABELS[10:13]]  # three wrong, of which two were
    a, b = write(tmp_path / "a.npz", before, LABELS), write(tmp_path / "b.npz", after, LABELS)
    out = say(a, b, "--csv", tmp_path / "changed.csv")
    assert "60 videos in both, 0 only in" in out
    assert "difference +15.00" in out and "10 gained, 1 lost, McNemar p = 0.012" in out
    assert "top-1: 80.00 (68.2 to 88.2) -> 95.00" in out and "v0: class 1 -> class 0" in out
    assert "more than chance" in out.split("verdict")[1]
    assert "class 0: 8 -> 9 of 10 (2 gained, 1 lost, p = 1)" in out
    with (tmp_path / "changed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["change"] for row in rows].count("gained") == 10 and len(rows) == 11
    assert rows[-1] == {"file": b, "path": "v12", "class": "class 0", "before": "class 0", "after": "class 1",
                        "change": "lost"}  # fmt: skip


def test_videos_are_matched_by_path_and_the_rest_is_counted(tmp_path, say):
    a = write(tmp_path / "a.npz", [0, 1, 2, 3], [0, 1, 2, 3], paths=["w", "x", "y", "x"])
    b = write(tmp_path / "b.npz", [3, 9 % 6, 1, 5], [3, 0, 1, 5], paths=["z", "w", "x", "more"])
    out = say(a, b)
    assert "2 videos in both, 2 only in" in out and "same answer: 50.00 %" in out
    with pytest.raises(DataError, match=r"c.npz: no video of .*a.npz in it; paths start with 'q' and 'w'"):
        say(a, write(tmp_path / "c.npz", [0], [0], paths=["q"]))


def test_columns_of_the_same_names_are_put_into_one_order(tmp_path, say):
    names = list("abcdef")
    order = [3, 0, 1, 2, 5, 4]  # of the names in the second file
    a = write(tmp_path / "a.npz", LABELS, LABELS, names=names)
    renamed = [order.index(label) for label in LABELS]
    b = write(tmp_path / "b.npz", renamed, renamed, names=[names[k] for k in order])
    out = say(a, b)
    assert "classes: 6 have another label there" in out and "verdict: equal up to rounding" in out
    with pytest.raises(DataError, match="class 5 is 'g', but in .* it is 'f'"):
        say(a, write(tmp_path / "c.npz", LABELS, LABELS, names=list("abcdeg")))


def test_an_order_of_classes_that_no_name_shows_is_found(tmp_path, say):
    a = write(tmp_path / "a.npz", LABELS, LABELS)
    b = write(tmp_path / "b.npz", [(label + 2) % 6 for label in LABELS], LABELS)
    out = say(a, b)
    assert "classes: the columns seem to be in another order (0 -> 2, 1 -> 3, 2 -> 4, 3 -> 5, 4 -> 0, ...)" in out
    assert "verdict: what differs: classes; the difference in top-1 is more than chance" in out


def test_unread_videos_count_as_wrong_and_unlabelled_ones_are_only_compared(tmp_path, say):
    a = write(tmp_path / "a.npz", [0, 1, 2, -1], [0, 1, 2, 3])
    b = write(tmp_path / "b.npz", [0, 1, -1, 3], [0, 1, 2, 3])
    out = say(a, b)
    assert out.count("1 without scores in") == 2 and "1 gained, 1 lost" in out
    c = write(tmp_path / "c.npz", [0, 1, 3, 3], [-1] * 4)
    out = say(c, c)
    assert "same answer: 100.00 %" in out and "top-1:" not in out


def test_fused_scores_are_the_weighted_mean_and_can_be_compared_again(tmp_path, say):
    files = [write(tmp_path / f"{number}.npz", predicted, [0, 1, 2], input_size=32, num_segments=8 * (number + 1))
             for number, predicted in enumerate(([0, 0, 2], [1, 1, 1], [0, 1, 1]))]  # fmt: skip
    out = say(*files, "--weights", 1, 1, 2, "--fused", tmp_path / "out" / "fused.npz")
    fused, parts = load_scores(tmp_path / "out" / "fused.npz"), [load_scores(file).scores for file in files]
    assert fused.scores == pytest.approx(0.25 * parts[0] + 0.25 * parts[1] + 0.5 * parts[2])
    assert "fused with weights 1, 1, 2 against" in out
    assert fused.protocol["input_size"] == 32 and "num_segments" not in fused.protocol
    assert [part["weight"] for part in fused.protocol["fused"]] == [1, 1, 2]
    assert "verdict" in say(files[0], tmp_path / "out" / "fused.npz")
    assert "fused with weights 1, 1 against" in say(*files[:2], "--fused", tmp_path / "equal.npz")


@pytest.mark.parametrize(
    "arguments",
    [["a"], ["a", "b", "--weights", "1"], ["a", "b", "--weights", "-1", "1"], ["a", "b", "--weights", "0", "0"]],
)
def test_wrong_arguments_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare_scores.main(arguments)
    assert "error: " in capsys.readouterr().err


@pytest.fixture
def tested(config, tmp_path):
    save_untrained(config, tmp_path / "m.pt")

    def run(name, *arguments):
        score_run(config, tmp_path / "m.pt", tmp_path / f"{name}.npz", *arguments)
        return tmp_path / f"{name}.npz"

    return run


def copied(motion_root, folder, change):
    """The frames of the validation videos, each written by `change(source, target, number)`."""
    for video in sorted((motion_root / "frames").glob("val_*")):
        (folder / video.name).mkdir(parents=True)
        for number in range(1, 7):
            change(video, folder / video.name / f"img_{number:05d}.jpg", number)
    return f"data.val_root={folder}"


def test_it_says_where_a_reproduction_departs(tested, motion_root, tmp_path, say):
    def shift(video, target, number):
        target.write_bytes((video / f"img_{min(number + 1, 6):05d}.jpg").read_bytes())

    def encode(video, target, number):
        Image.open(video / target.name).save(target, quality=40)

    reference = tested("reference")
    out = say(reference, tested("same"))
    assert "seen: the same frames with the same pixels" in out and "verdict: equal up to rounding" in out
    out = say(reference, tested("frames", copied(motion_root, tmp_path / "shifted", shift)))
    assert "\n  frames: " in out and "other frames (or another crop)" in out and "\n  pixels: " not in out
    out = say(reference, tested("pixels", copied(motion_root, tmp_path / "encoded", encode)))
    assert "\n  pixels: " in out and "the same frames, other pixels" in out and "\n  frames: " not in out
    out = say(reference, tested("segments", "data.num_segments=5", "--accept_changes"))
    assert "frames: num_segments 4 -> 5" in out
    out = say(reference, tested("resize", "data.resize=40", "--accept_changes"))
    assert "pixels: resize 32 -> 40" in out and "\n  frames: " not in out


def test_other_weights_and_chance_are_told_apart(tmp_path, say):
    after = list(LABELS)
    after[0:3] = [(label + 1) % 6 for label in LABELS[0:3]]
    a = write(tmp_path / "a.npz", LABELS, LABELS, model_sha256="x")
    out = say(a, write(tmp_path / "b.npz", after, LABELS, model_sha256="y"))
    assert "weights: the trained weights differ" in out
    assert "what differs: weights; the difference in top-1 is no more than chance (p = 0.25)" in out
    out = say(a, write(tmp_path / "c.npz", after, LABELS, model_sha256="x"))
    assert "verdict: the weights and all that the files say of frames and pixels agree, but the scores do not" in out


def test_files_that_are_no_scores_are_named(tmp_path, say):
    a = write(tmp_path / "a.npz", [0], [0])
    (tmp_path / "text.npz").write_text("no scores")
    np.savez(tmp_path / "other.npz", paths=["x"], labels=[0])
    np.savez(tmp_path / "shape.npz", paths=["x"], labels=[0], scores=np.zeros(3))
    np.savez(tmp_path / "names.npz", paths=["x"], labels=[0], scores=np.zeros((1, 3)), class_names=["a"])
    np.savez(tmp_path / "plain.npz", paths=["v0"], labels=[0], scores=np.eye(1, 6))
    for name, problem in {
        "gone": "no such file",
        "text": "cannot be read as scores",
        "other": "holds no scores",
        "shape": "1 paths, 1 labels and scores of shape",
        "names": "1 class names for 3 columns",
    }.items():
        with pytest.raises(DataError, match=f"{name}.npz: {problem}"):
            say(a, tmp_path / f"{name}.npz")
    assert "same answer: 100.00 %" in say(a, tmp_path / "plain.npz")  # without a protocol, of another program


def test_saved_scores_are_read_back(tmp_path):
    save_scores(tmp_path / "s.npz", Scores(["a"], np.array([3]), np.eye(1, 10, 3, np.float32), np.ones(1, bool),
                list(CLASSES),
                {"dense": False}, np.array([7]), np.ones((1, 4, 4, 4), np.float32)))  # fmt: skip
    again = load_scores(tmp_path / "s.npz")
    assert again.paths == ["a"] and again.class_names == list(CLASSES) and again.protocol == {"dense": False}
    assert (
        again.damaged.tolist() == [True]
        and again.num_frames.tolist() == [7]
        and again.thumbnails.shape == (1, 4, 4, 4)
        and again.labelled
    )
    assert json.loads(str(np.load(tmp_path / "s.npz")["protocol"])) == {"dense": False}
