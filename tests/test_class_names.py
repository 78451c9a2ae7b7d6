"""A checkpoint's class names against those of data.label_list: equal, unknown, reordered, other."""

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import score_run, train_run

from engine.class_names import class_order
from engine.metrics import topk_accuracy
from tools.motion_demo import CLASSES
from utils.errors import CheckpointError, UserError

NAMES = ["fold", "lift", "push", "turn"]


@pytest.mark.parametrize("there", [NAMES, [" fold", "lift ", "push", "turn\n"]])
def test_equal_names_leave_the_columns_where_they_are_and_say_nothing(there, caplog):
    caplog.set_level("INFO")
    assert class_order(NAMES, there, "m.pt") is None and not caplog.messages


@pytest.mark.parametrize(
    "here, there, reason",
    [(None, NAMES, "no data.label_list"), (NAMES, None, "m.pt has none"), (None, None, "no data")],
)
def test_without_names_on_a_side_nothing_is_compared_and_one_line_says_so(here, there, reason, caplog):
    caplog.set_level("INFO")
    assert class_order(here, there, "m.pt", remap=True) is None
    assert len(caplog.messages) == 1 and f"could not be compared, {reason}" in caplog.messages[0]


def test_another_order_is_refused_or_followed():
    there = ["fold", "turn", "lift", "push"]
    with pytest.raises(CheckpointError) as caught:
        class_order(NAMES, there, "m.pt")
    assert str(caught.value) == (
        "m.pt: 3 of 4 class names differ from data.label_list: 1: 'lift' here, 'turn' in the checkpoint; "
        "2: 'push' here, 'lift' in the checkpoint; 3: 'turn' here, 'push' in the checkpoint; "
        "only the order differs: test.remap_labels=True brings the scores of a test into this one"
    )
    order = class_order(NAMES, there, "m.pt", remap=True)
    assert np.array([there])[:, order].tolist() == [NAMES]


@pytest.mark.parametrize("there", [["fold", "lift", "push", "Turn"], ["fold", "lift", "push"], ["a", "b", "c", "d"]])
def test_other_names_are_refused_whatever_is_asked(there):
    with pytest.raises(CheckpointError, match=r"m.pt: \d of 4 class names differ.*without data.label_list") as caught:
        class_order(NAMES, there, "m.pt", remap=True)
    assert "\n" not in str(caught.value)


@pytest.fixture
def reordered(config, tmp_path):
    """The configuration with the same videos and classes, numbered backwards."""
    settings = yaml.safe_load(Path(config).read_text())
    last = len(CLASSES) - 1
    with open(tmp_path / "backwards.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "name"), *enumerate(reversed(CLASSES))])
    for part in ("train", "val"):
        lines = [line.rsplit(maxsplit=1) for line in Path(settings["data"][f"{part}_list"]).read_text().splitlines()]
        settings["data"][f"{part}_list"] = str(tmp_path / f"{part}.txt")
        (tmp_path / f"{part}.txt").write_text("".join(f"{start} {last - int(label)}\n" for start, label in lines))
    settings["data"]["label_list"] = str(tmp_path / "backwards.csv")
    (tmp_path / "backwards.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "backwards.yaml")


def test_testing_in_another_order_is_refused_or_gives_the_same_accuracy(config, reordered, tmp_path, capsys):
    train_run(config, tmp_path / "run", "solver.epochs=1")
    last = tmp_path / "run" / "last_model.pt"
    plain = score_run(config, last, tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"last_model.pt: \d+ of \d+ class names differ .*only the order differs"):
        score_run(reordered, last, tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()
    remapped = score_run(reordered, last, tmp_path / "b.npz", "test.remap_labels=True")
    assert np.array_equal(remapped["scores"], plain["scores"][:, ::-1])
    assert plain["class_names"].tolist() == list(CLASSES)
    assert remapped["class_names"].tolist() == list(reversed(CLASSES))
    for k in (1, 5):
        accuracies = [topk_accuracy(saved["scores"], saved["labels"], k) for saved in (plain, remapped)]
        assert accuracies[0] == accuracies[1]
    unnamed = score_run(config, last, tmp_path / "c.npz", "data.label_list=None")
    assert "class names: could not be compared, no data.label_list" in capsys.readouterr().out
    assert unnamed["class_names"].tolist() == list(CLASSES)  # those of the checkpoint


def test_only_a_new_training_goes_on_to_other_class_names_with_a_new_head(config, reordered, tmp_path):
    trained = train_run(config, tmp_path / "run", "solver.epochs=1")
    last = tmp_path / "run" / "last_model.pt"
    for changes in ([f"resume={last}"], [f"pretrain={last}", "solver.evaluate=True"]):
        with pytest.raises(UserError, match="class names differ .*only the order differs"):
            train_run(reordered, tmp_path / changes[0][:6], *changes)
    still = [
        "solver.lr=1e-30",
        "solver.weight_decay=0",
    ]  # nothing moves, so what the run started from is in its checkpoint
    kept = train_run(config, tmp_path / "kept", f"pretrain={last}", *still)["trained"]
    anew = train_run(reordered, tmp_path / "anew", f"pretrain={last}", *still)["trained"]
    assert kept["head.weight"].equal(trained["trained"]["head.weight"])
    assert not anew["head.weight"].equal(trained["trained"]["head.weight"])
    assert anew["side.pos"].equal(trained["trained"]["side.pos"])
    assert "other class names; the head is made anew" in (tmp_path / "anew" / "train.log").read_text()
