"""Random lists, configurations and checkpoints end with a UserError or are read; nothing else is ever raised."""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.annotations import read_annotations, read_class_names
from modules.checkpoint import read_checkpoint
from modules.checkpoint_entries import ENTRIES
from utils.config import load_config
from utils.config_schema import FIELDS, SECTIONS
from utils.errors import UserError

BOUNDED = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = st.sampled_from([*FIELDS, *SECTIONS, "x", "", "data.", "network.backbone_kwargs.depth"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


def one_line(error):
    assert error.line and "\n" not in error.line and error.line.isprintable()


@BOUNDED
@given(content=st.text(max_size=200) | st.lists(st.text(max_size=30), max_size=5).map("\n".join))
@pytest.mark.parametrize("modality", ["RGB", "video"])
def test_a_list_is_read_or_refused(tmp_path, modality, content):
    path = tmp_path / "l.txt"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        assert read_annotations(str(path), 5, modality, unlabelled=True)
    except UserError as error:
        one_line(error)
    try:
        assert len(read_class_names(str(path), 3)) == 3
    except UserError as error:
        one_line(error)


@BOUNDED
@given(content=st.text(max_size=200), overrides=st.lists(st.tuples(NAMES, st.text(max_size=20)), max_size=3))
def test_a_configuration_is_read_or_refused(tmp_path, content, overrides):
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    base = tmp_path / "good.yaml"
    base.write_text(
        "data: {dataset: x, batch_size: 2, num_classes: 3}\nnetwork: {arch: ViT-B/16, side_dim: 64}\n"
        "solver: {epochs: 1, lr: 1e-3}\n"
    )
    for file in (path, base):
        try:
            load_config(file, [f"{name}={value}" for name, value in overrides], purpose="model")
        except UserError as error:
            one_line(error)


@BOUNDED
@given(name=st.sampled_from(sorted(ENTRIES)), value=VALUES)
def test_a_checkpoint_is_read_or_refused(tmp_path, name, value):
    whole = {"format": "side4video/1", "trained": {"w": torch.zeros(2)}, "tower": None, "tower_file": "f.pt"}
    whole |= {"tower_sha256": "0" * 64, "tower_sha256_but_positions": "0" * 64, "config": {}, "epoch": 1}
    path = tmp_path / "m.pt"
    torch.save({**whole, name: value}, path)
    with contextlib.suppress(UserError):
        content = read_checkpoint(path)
        assert name.endswith("_sha256") or ENTRIES[name][1](content[name])
