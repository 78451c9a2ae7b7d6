"""tools/convert_checkpoint.py: bit-identical round trips, verification, refusals, and reading by the programs."""

import itertools
import json
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import REPOSITORY, published_form, score_run, train_run

from engine.configuration import read_config
from modules import build_model, released
from modules.checkpoint import (
    checkpoint_state,
    flat_tensors,
    is_released,
    load_weights,
    model_state,
    read_checkpoint,
    save_checkpoint,
    save_released,
    save_safetensors,
)
from tools.convert_checkpoint import convert, main, trace, verify
from tools.motion_demo import CLASSES
from utils.errors import CheckpointError, UserError

FORMS = {"official": "released.pt", "ours": "ours.pt", "safetensors": "m.safetensors"}
DIRECTIONS = list(itertools.permutations(FORMS, 2))
QKV = "visual.transformer.resblocks.1.attn.in_proj_weight"


@pytest.fixture
def clip_config(config, tmp_path):
    """The tiny configuration without data, and with a CLIP tower, which has released names."""
    content = yaml.safe_load(Path(config).read_text())
    content["network"]["arch"] = "ViT-B/16"
    content["data"] |= {key: None for key in content["data"] if key.startswith(("train_", "val_"))}
    path = tmp_path / "clip.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def make_model(config, seed=0):
    torch.manual_seed(seed)
    model = build_model(config)
    model.train()(torch.randn(2, 4, 3, 32, 32))  # so that running statistics differ from a new model's
    return model.eval()


def save(form, path, model, config):
    if form == "official":
        return save_released(path, model, epoch=7)
    parts = model_state(model), model.trained.state_dict(), config.toDict(), list(CLASSES)
    state = checkpoint_state(*parts, epoch=7, best_accuracy=100 / 3, optimizer={}, scaler={})
    (save_safetensors if form == "safetensors" else save_checkpoint)(path, state)


def same_tensors(a, b):
    a, b = flat_tensors(a), flat_tensors(b)
    return set(a) == set(b) and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("source, target", DIRECTIONS)
def test_there_and_back_is_equal_to_the_bit(clip_config, tmp_path, source, target):
    config = read_config(clip_config, purpose="model")
    paths = {form: tmp_path / name for form, name in FORMS.items()}
    save(source, paths[source], make_model(config), config)
    back = tmp_path / f"back_{FORMS[source]}"
    rows = convert(config, paths[source], paths[target], target)
    convert(config, paths[target], back, source)
    start, between, end = (read_checkpoint(path) for path in (paths[source], paths[target], back))
    assert same_tensors(start, end)
    assert verify(config, paths[source], paths[target]) == 0
    assert is_released(between) == (target == "official") and between["epoch"] == end["epoch"] == 7
    assert [row[0] for row in rows] == list(flat_tensors(start))
    assert sorted(row[2] for row in rows) == sorted(flat_tensors(between))
    if target != "official":
        assert between["class_names"] == list(CLASSES) and between["config"] == config.toDict()
        assert between["tower_file"] is None and "optimizer" not in between
    if "official" not in (source, target):
        assert {k: start[k] for k in start if k not in ("optimizer", "scaler", "improved", "tower", "trained")} == {
            k: end[k] for k in end if k not in ("tower", "trained")
        }
    assert stat.S_IMODE(paths[target].stat().st_mode) == 0o644


def test_a_named_tower_stays_outside_but_for_the_released_form(clip_config, tmp_path):
    config = read_config(clip_config, purpose="model")
    torch.save(published_form(make_model(config).backbone), tmp_path / "clip.pt")
    named = read_config(clip_config, ["network.init=True", f"network.weights={tmp_path / 'clip.pt'}"], purpose="model")
    model = make_model(named, seed=1)
    save("ours", tmp_path / "ours.pt", model, named)
    convert(named, tmp_path / "ours.pt", tmp_path / "m.safetensors")
    small = read_checkpoint(tmp_path / "m.safetensors")
    assert small["tower"] is None and small["tower_file"] == "clip.pt"
    assert verify(named, tmp_path / "ours.pt", tmp_path / "m.safetensors") == 0

    rows = convert(named, tmp_path / "m.safetensors", tmp_path / "released.pt", "official")
    assert verify(named, tmp_path / "m.safetensors", tmp_path / "released.pt") == 0
    assert ("(clip.pt)", QKV) in [(name, place) for name, _, place in rows]
    other = make_model(config, seed=2)
    load_weights(other, tmp_path / "released.pt")  # the file holds the tower, no weight file is needed
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))

    with pytest.raises(CheckpointError, match=r"ours.pt: was trained beside another frozen tower \(clip.pt"):
        convert(config, tmp_path / "ours.pt", tmp_path / "wrong.pt", "official")
    assert not (tmp_path / "wrong.pt").exists()


def test_the_table_says_what_has_no_place_and_what_is_new(clip_config, tmp_path):
    config = read_config(clip_config, purpose="model")
    model = make_model(config)
    save("official", tmp_path / "a.pt", model, config)
    save("ours", tmp_path / "b.pt", model, config)
    released, ours = read_checkpoint(tmp_path / "a.pt"), read_checkpoint(tmp_path / "b.pt")
    state = released["model_state_dict"]
    released["model_state_dict"] = {f"module.{name}": tensor for name, tensor in state.items()} | {"x": torch.ones(2)}
    there = {name: place for name, _, place in trace(model, released, ours)}
    assert there["x"] == "-" and there[f"module.{QKV}"] == "tower.vit.blocks.1.attn.qkv.weight"
    assert trace(model, ours, released)[-1][0::2] == ("(made here)", "x")


def test_parts_of_one_tensor_are_listed_together(clip_config, tmp_path, monkeypatch):
    start = "visual.transformer.side_transformer.*.attn."
    parted = {"trained.side.blocks.*.attn.qkv.": tuple(f"{start}{part}_proj." for part in "qkv")}
    monkeypatch.setitem(released.RELEASED_NAMES, "pre", released.RELEASED_NAMES["pre"] | parted)
    config = read_config(clip_config, purpose="model")
    save("ours", tmp_path / "ours.pt", make_model(config), config)
    rows = convert(config, tmp_path / "ours.pt", tmp_path / "released.pt", "official")
    names = [f"{start.replace('*', '0')}{part}_proj.bias" for part in "qkv"]
    assert dict((row[0], row[2]) for row in rows)["trained.side.blocks.0.attn.qkv.bias"] == ", ".join(names)
    convert(config, tmp_path / "released.pt", tmp_path / "m.safetensors")
    assert verify(config, tmp_path / "ours.pt", tmp_path / "m.safetensors") == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bit", [0, 30])
def test_one_changed_bit_is_found(clip_config, tmp_path, form, bit):
    config = read_config(clip_config, purpose="model")
    model = make_model(config)
    save("ours", tmp_path / "source.pt", model, config)
    model.trained.head.weight.data.view(torch.int32)[0, 0] ^= 1 << bit
    save(form, tmp_path / FORMS[form], model, config)
    with pytest.raises(
        CheckpointError, match=f"{FORMS[form]}: is not the model of .*source.pt: .*tensors are not equal"
    ):
        verify(config, tmp_path / "source.pt", tmp_path / FORMS[form])


@pytest.mark.parametrize(
    "source, target, form, complaint",
    [
        ("ours.pt", "new.pt", None, "new.pt: unclear form; call it "),
        ("ours.pt", "new.safetensors", "official", "new.safetensors: unclear form"),
        ("ours.pt", "new.pt", "safetensors", "new.pt: unclear form"),
        ("ours.pt", "new.pt", "ours", "ours.pt: is of the form 'ours' already"),
        ("released.pt", "new.pt", "official", "released.pt: is of the form 'official' already"),
        ("m.safetensors", "new.safetensors", None, "m.safetensors: is of the form 'safetensors' already"),
        ("ours.pt", "released.pt", "official", "released.pt: exists already"),
        ("ours.pt", "ours.pt", "official", "ours.pt: exists already"),
        ("gone.pt", "new.safetensors", None, "gone.pt: no such checkpoint"),
        ("other.safetensors", "new.pt", "ours", "other.safetensors: not a checkpoint of this project"),
        ("extra.safetensors", "new.pt", "ours", "extra.safetensors: not a readable checkpoint: "),
        ("junk.safetensors", "new.pt", "ours", "junk.safetensors: not a readable checkpoint: "),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(clip_config, tmp_path, source, target, form, complaint):
    config = read_config(clip_config, purpose="model")
    model = make_model(config)
    for kind, name in FORMS.items():
        save(kind, tmp_path / name, model, config)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    facts = {"side4video": json.dumps({"format": "side4video/1"})}
    save_file({"a.b": torch.ones(1)}, tmp_path / "extra.safetensors", metadata=facts)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=complaint) as caught:
        convert(config, tmp_path / source, tmp_path / target, form)
    assert "\n" not in str(caught.value)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_eva_comes_back_with_its_tables_rebuilt(clip_config, tmp_path):
    config = read_config(clip_config, ["network.arch=EVA02-CLIP-L-14"], purpose="model")
    released, ours, back = (tmp_path / name for name in ("released.pt", "ours.pt", "back.pt"))
    save("official", released, make_model(config), config)
    rows = convert(config, released, ours, "ours")
    assert ("visual.rope.freqs_cos", "-") in [(name, place) for name, _, place in rows]
    rows = convert(config, ours, back, "official")
    assert ("(made here)", "visual.rope.freqs_cos") in [(name, place) for name, _, place in rows]
    assert same_tensors(read_checkpoint(released), read_checkpoint(back)) and verify(config, released, ours) == 0


@pytest.mark.parametrize("source, target", DIRECTIONS)
def test_a_tower_of_another_type_keeps_it(clip_config, tmp_path, source, target):
    config = read_config(clip_config, ["network.backbone_dtype=bfloat16"], purpose="model")
    torch.manual_seed(0)
    save(source, tmp_path / FORMS[source], build_model(config), config)
    convert(config, tmp_path / FORMS[source], tmp_path / FORMS[target], target)
    convert(config, tmp_path / FORMS[target], tmp_path / f"back_{FORMS[source]}", source)
    start, end = (read_checkpoint(tmp_path / name) for name in (FORMS[source], f"back_{FORMS[source]}"))
    assert same_tensors(start, end) and {t.dtype for t in flat_tensors(end).values()} >= {torch.bfloat16, torch.float32}
    assert verify(config, tmp_path / FORMS[source], tmp_path / FORMS[target]) == 0


def test_a_tower_without_released_names_goes_to_safetensors_only(config, tmp_path):
    kwargs = ["network.arch=timm/deit3_small_patch16_224", "network.backbone_kwargs.init_values=0.1"]
    loaded = read_config(config, kwargs, purpose="model")
    save("ours", tmp_path / "ours.pt", make_model(loaded), loaded)
    with pytest.raises(CheckpointError, match="ls1.gamma: .*no name for"):
        convert(loaded, tmp_path / "ours.pt", tmp_path / "new.pt", "official")
    assert not (tmp_path / "new.pt").exists()
    convert(loaded, tmp_path / "ours.pt", tmp_path / "m.safetensors")
    assert verify(loaded, tmp_path / "ours.pt", tmp_path / "m.safetensors") == 0


def test_the_configuration_must_be_that_of_the_file(clip_config, tmp_path):
    config = read_config(clip_config, purpose="model")
    save("ours", tmp_path / "ours.pt", make_model(config), config)
    for override, complaint in [
        ("data.num_classes=7", f"its head has {len(CLASSES)} classes, data.num_classes is 7"),
        ("data.input_size=64", "tensors do not fit; .*of another shape"),
    ]:
        with pytest.raises(CheckpointError, match=f"ours.pt.*{complaint}"):
            convert(
                read_config(clip_config, [override], purpose="model"), tmp_path / "ours.pt", tmp_path / "a.safetensors"
            )


def test_the_program_prints_the_table_and_the_difference(clip_config, tmp_path, capsys):
    config = read_config(clip_config, purpose="model")
    save("ours", tmp_path / "ours.pt", make_model(config), config)
    main([clip_config, str(tmp_path / "ours.pt"), str(tmp_path / "r.pt"), "--format", "official", "--verify"])
    *table, counts, weights_only, difference = capsys.readouterr().out.splitlines()
    tensors = len(read_checkpoint(tmp_path / "r.pt")["model_state_dict"])
    assert len(table) == tensors and counts.startswith(f"{tensors} tensors of ") and counts.endswith("r.pt")
    row = ["tower.vit.blocks.1.attn.qkv.weight", "(96,", "32)", "float32", "->", QKV]
    assert row in [line.split() for line in table]
    assert "no optimizer state" in weights_only
    assert difference == "largest difference of the scores: 0; all tensors are equal"


def test_the_program_runs_from_the_repository_root(clip_config, tmp_path):
    command = [sys.executable, "tools/convert_checkpoint.py", clip_config, tmp_path / "gone.pt", tmp_path / "new.pt"]
    done = subprocess.run([*command, "--format", "ours"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'gone.pt'}: no such checkpoint\n"


def test_train_and_test_read_safetensors(config, tmp_path):
    first = train_run(config, tmp_path / "run", "solver.epochs=1")
    ours, converted = tmp_path / "run" / "last_model.pt", tmp_path / "m.safetensors"
    main([config, str(ours), str(converted), "--verify"])
    scores = [score_run(config, path, tmp_path / "s.npz")["scores"] for path in (ours, converted)]
    assert np.array_equal(*scores)
    short = ["solver.epochs=1", "logging.skip_epoch=[0]"]
    tuned = [train_run(config, tmp_path / path.stem, f"pretrain={path}", *short) for path in (ours, converted)]
    assert same_tensors(*tuned) and not same_tensors(first, tuned[0])
    with pytest.raises(UserError, match="m.safetensors: a converted checkpoint can only be started from, by pretrain"):
        train_run(config, tmp_path / "resumed", f"resume={converted}")
    with safe_open(converted, framework="pt") as file:
        assert json.loads(file.metadata()["side4video"])["epoch"] == 1
