import numpy as np
import pytest
import torch
from tiny import published_form, tiny_config, tiny_tower

from engine.metrics import topk_accuracy
from modules import build_model
from modules.checkpoint import (
    load_model_state,
    model_state,
    read_checkpoint,
    save_checkpoint,
)
from modules.hashing import hash_tensors
from utils.atomic import write_atomically
from utils.errors import CheckpointError


def make_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return build_model(tiny_config(**kwargs))


def state_of(model):
    return {**model_state(model), "trained": model.trained.state_dict(), "config": {"seed": 1}, "epoch": 1}


def test_a_round_trip_gives_the_same_logits(tmp_path):
    model, other = make_model(0), make_model(1)
    save_checkpoint(tmp_path / "m.pt", state_of(model))
    load_model_state(other, read_checkpoint(tmp_path / "m.pt"), "m.pt")
    clips = torch.randn(2, 2, 3, 32, 32)
    assert model.eval()(clips).equal(other.eval()(clips))


def test_the_tower_is_left_out_when_a_named_file_holds_it(tmp_path):
    torch.save(published_form(tiny_tower()), tmp_path / "clip.pt")
    named = {"init": True, "weights": str(tmp_path / "clip.pt")}
    with_file, without = make_model(**named), make_model()
    save_checkpoint(tmp_path / "small.pt", state_of(with_file))
    save_checkpoint(tmp_path / "whole.pt", state_of(without))
    small, whole = read_checkpoint(tmp_path / "small.pt"), read_checkpoint(tmp_path / "whole.pt")
    assert small["tower"] is None and small["tower_file"] == "clip.pt"
    assert set(whole["tower"]) == set(without.backbone.state_dict()) and whole["tower_file"] is None
    load_model_state(make_model(3, **named), small, "small.pt")


def test_another_tower_is_refused(tmp_path):
    torch.save(published_form(tiny_tower()), tmp_path / "clip.pt")
    save_checkpoint(tmp_path / "m.pt", state_of(make_model(init=True, weights=str(tmp_path / "clip.pt"))))
    with pytest.raises(CheckpointError, match=r"m.pt: was trained beside another frozen tower \(clip.pt"):
        load_model_state(make_model(5), read_checkpoint(tmp_path / "m.pt"), "m.pt")


def test_another_side_width_is_refused_in_one_line(tmp_path):
    save_checkpoint(tmp_path / "m.pt", state_of(make_model()))
    config = tiny_config().toDict()
    config["network"]["side_dim"] = 128
    wide = build_model(type(tiny_config())(config, _dynamic=False))
    with pytest.raises(CheckpointError, match=r"m.pt.*of another shape.*\(64,.*instead of \(128,") as caught:
        load_model_state(wide, read_checkpoint(tmp_path / "m.pt"), "m.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, reason", [(None, "no such checkpoint"), (b"", "readable"), (b"PK junk", "readable")])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content, reason):
    path = tmp_path / "m.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"m.pt: .*{reason}") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_dictionary_of_something_else_is_refused(tmp_path):
    torch.save({"format": "other"}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        read_checkpoint(tmp_path / "m.pt")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "m.pt"
    write_atomically(path, lambda file: file.write(b"old"))

    def broken(file):
        file.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_hash_sees_names_types_shapes_and_every_bit():
    base = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = {"b": base["b"].clone(), "a": base["a"].clone()}
    changed_bit = base["a"].clone()
    changed_bit.view(torch.int32)[2] ^= 1
    others = [
        {"a": changed_bit, "b": base["b"]},
        {"a": base["a"].view(2, 2), "b": base["b"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"], "b": base["b"].half()},
    ]
    assert hash_tensors(same) == hash_tensors(base)
    assert len({hash_tensors(other) for other in [base, *others]}) == 5


def test_topk_accuracy_by_hand():
    scores = np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]], np.float32)
    labels = np.array([1, 2, 0, 1])
    assert topk_accuracy(scores, labels, 1) == 25.0  # of equal scores the lower class counts as the higher
    assert topk_accuracy(scores, labels, 2) == 75.0
    assert topk_accuracy(scores, labels, 5) == 100.0
