"""Checkpoints of this project: round trips, the proof of the frozen tower, and what is refused."""

import numpy as np
import pytest
import torch
from tiny import checkpoint_of, published_form, tiny_config, tiny_tower

from engine.metrics import topk_accuracy
from modules import build_model
from modules.checkpoint import (
    describe_checkpoint,
    load_model_state,
    load_weights,
    model_state,
    read_checkpoint,
    save_checkpoint,
    save_released,
    save_safetensors,
)
from modules.hashing import hash_tensors
from utils.atomic import write_atomically
from utils.errors import CheckpointError


def make_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return build_model(tiny_config(**kwargs))


def save_tower_file(path, change=None):
    """A published file of the tiny tower, in which tensor `change` is another one; returns the choices that name it."""
    state = published_form(tiny_tower())
    if change:
        state[change] = state[change] + 1
    torch.save(state, path)
    return {"init": True, "weights": str(path)}


def test_a_round_trip_gives_the_same_logits(tmp_path):
    model, other = make_model(0), make_model(1)
    save_checkpoint(tmp_path / "m.pt", checkpoint_of(model))
    load_model_state(other, read_checkpoint(tmp_path / "m.pt"), "m.pt")
    clips = torch.randn(2, 2, 3, 32, 32)
    assert model.eval()(clips).equal(other.eval()(clips))


def test_the_tower_is_left_out_when_a_named_file_holds_it(tmp_path):
    named = save_tower_file(tmp_path / "clip.pt")
    with_file, without = make_model(**named), make_model()
    save_checkpoint(tmp_path / "small.pt", checkpoint_of(with_file))
    save_checkpoint(tmp_path / "whole.pt", checkpoint_of(without))
    small, whole = read_checkpoint(tmp_path / "small.pt"), read_checkpoint(tmp_path / "whole.pt")
    assert small["tower"] is None and small["tower_file"] == "clip.pt"
    assert set(whole["tower"]) == set(without.backbone.state_dict()) and whole["tower_file"] is None
    load_model_state(make_model(3, **named), small, "small.pt")


@pytest.mark.parametrize("change", ["visual.positional_embedding", "visual.class_embedding"])
def test_a_tower_file_that_differs_in_one_tensor_is_refused(tmp_path, change):
    """The position table counts too: it may differ at another input size only."""
    save_checkpoint(tmp_path / "m.pt", checkpoint_of(make_model(**save_tower_file(tmp_path / "clip.pt"))))
    other = make_model(**save_tower_file(tmp_path / "other.pt", change))
    with pytest.raises(CheckpointError, match=r"m.pt: was trained beside another frozen tower \(clip.pt"):
        load_weights(other, tmp_path / "m.pt")


def test_a_tower_that_was_changed_in_the_checkpoint_is_refused(tmp_path):
    checkpoint = checkpoint_of(make_model())
    checkpoint["tower"]["vit.pos_embed"] = checkpoint["tower"]["vit.pos_embed"] + 1
    save_checkpoint(tmp_path / "m.pt", checkpoint)
    with pytest.raises(CheckpointError, match=r"m.pt: was trained beside another frozen tower \(held by the file"):
        load_weights(make_model(), tmp_path / "m.pt")


def test_a_tower_from_a_checkpoint_replaces_one_from_a_file_in_the_next_checkpoint_too(tmp_path):
    first, second = make_model(7), make_model(**save_tower_file(tmp_path / "clip.pt"))
    save_checkpoint(tmp_path / "m.pt", checkpoint_of(first))
    load_weights(second, tmp_path / "m.pt")
    expected, found = model_state(first), model_state(second)
    assert found["tower_file"] is None and found["tower_sha256"] == expected["tower_sha256"]
    assert hash_tensors(found["tower"]) == hash_tensors(expected["tower"])


def test_the_log_line_says_which_checkpoint_was_loaded_and_where_its_tower_came_from(tmp_path):
    model, named = make_model(), make_model(**save_tower_file(tmp_path / "clip.pt"))
    save_checkpoint(tmp_path / "whole.pt", checkpoint_of(model))
    save_checkpoint(tmp_path / "small.pt", checkpoint_of(named))
    save_safetensors(tmp_path / "m.safetensors", checkpoint_of(model))
    save_released(tmp_path / "released.pt", model, epoch=30)
    sha256 = model_state(named)["tower_sha256"][:12]
    expected = {
        "whole.pt": "(ours, epoch 1) loaded; it holds the frozen tower",
        "small.pt": f"(ours, epoch 1) loaded; it was trained beside this tower, clip.pt, SHA-256 {sha256}",
        "m.safetensors": "(safetensors, epoch 1) loaded; it holds the frozen tower",
        "released.pt": "(released, epoch 30) loaded; it holds the frozen tower",
    }
    for name, text in expected.items():
        path = tmp_path / name
        assert describe_checkpoint(read_checkpoint(path), path) == f"weights: {path} {text}"


def test_another_tower_is_refused(tmp_path):
    save_checkpoint(tmp_path / "m.pt", checkpoint_of(make_model(**save_tower_file(tmp_path / "clip.pt"))))
    with pytest.raises(CheckpointError, match=r"m.pt: was trained beside another frozen tower \(clip.pt"):
        load_model_state(make_model(5), read_checkpoint(tmp_path / "m.pt"), "m.pt")


def test_another_side_width_is_refused_in_one_line(tmp_path):
    save_checkpoint(tmp_path / "m.pt", checkpoint_of(make_model()))
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
