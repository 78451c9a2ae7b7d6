"""The configuration: what is accepted and what it becomes, and for each mistake the line that the user reads."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dotmap import DotMap

from utils import config_schema
from utils.config import load_config, main
from utils.config_schema import ANY, FIELDS, KINDS, LEGACY, REQUIRED, SECTIONS
from utils.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent
MINIMAL = """\
data:
  dataset: kinetics400
  batch_size: 4
  num_classes: 400
  train_root: frames
  train_list: train.txt
  val_root: frames
  val_list: val.txt
network:
  arch: ViT-B/16
  side_dim: 320
solver:
  epochs: 30
  lr: 1e-3
"""
SECTION_LINES = {"data": 1, "network": 9, "solver": 12}


@pytest.fixture(autouse=True)
def run_folder(tmp_path, monkeypatch):
    (tmp_path / "frames").mkdir()
    for name in ("train.txt", "val.txt", "names.csv", "last_model.pt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "run.yaml") -> str:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def load(*overrides: str, text: str = MINIMAL, purpose: str = "train") -> DotMap:
    return load_config(write(text), overrides, purpose)


def error_line(*overrides: str, text: str = MINIMAL, purpose: str = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, text=text, purpose=purpose)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_keys(values: dict[str, object]) -> str:
    """MINIMAL with these dotted keys set, in YAML."""
    tree = yaml.safe_load(MINIMAL)
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = value
    return yaml.safe_dump(tree)


# What is accepted


def test_a_minimal_configuration_is_filled_with_every_default_in_the_order_of_the_schema():
    plain = load().toDict()
    flat = {}
    for name, value in plain.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if name in SECTIONS else {name: value}
    assert list(flat) == [key for key in FIELDS if key != "base"]
    given = {"solver.lr": 0.001, "solver.epochs": 30, "network.side_dim": 320, "network.arch": "ViT-B/16"}
    assert given.items() <= flat.items()
    defaults = {key: field.default for key, field in FIELDS.items() if field.default not in (REQUIRED, None)}
    assert {key: flat[key] for key in defaults} == defaults


def test_every_default_is_a_value_of_its_own_field_and_every_field_has_a_sentence():
    for key, field in FIELDS.items():
        assert field.kind in KINDS and field.doc.endswith(".") and "|" not in field.doc, key
        if field.default is not REQUIRED:
            assert field.read(field.default) == field.default, key


def test_no_key_is_hidden_by_a_method_of_the_dotmap():
    names = {part for key in FIELDS for part in key.split(".")}
    assert not [name for name in names if hasattr(DotMap, name)]


def test_an_unknown_name_raises_at_every_level_of_the_result():
    config = load("network.backbone_kwargs.depth=4")
    for read in (
        lambda: config.nope,
        lambda: config.data.nope,
        lambda: config["solver"]["nope"],
        lambda: config.network.backbone_kwargs.nope,
    ):
        with pytest.raises((AttributeError, KeyError)):
            read()
    assert config.network.backbone_kwargs.depth == 4


def test_the_plain_form_is_plain_and_loads_to_the_same_configuration():
    config = load(
        "network.backbone_kwargs={depth: 4, init_values: 1e-5, act: None, sizes: [1, [2, 3e0]], more: {a: b}}",
        "logging.skip_epoch=[0, 1]",
        "solver.lr=1e-5",
        "data.label_list=names.csv",
        "resume=last_model.pt",
    )

    def assert_plain(value):
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            assert_plain(item)

    assert_plain(config.toDict())
    again = load(text=yaml.safe_dump(config.toDict()))
    assert again.toDict() == config.toDict()
    assert config.network.backbone_kwargs.toDict()["sizes"] == [1, [2, 3.0]]


def test_two_loads_share_no_list_or_mapping():
    first = load()
    first.solver.betas.append(0)
    first.network.backbone_kwargs["depth"] = 4
    assert load().solver.betas == [0.9, 0.999] and load().network.backbone_kwargs == {}


@pytest.mark.parametrize("text", ["1e-3", "1.e-3", "1E-3", "0.001", "1.0e-3", ".1e-2", "+1e-03"])
def test_a_float_is_read_however_it_is_written_in_the_file_and_on_the_command_line(text):
    assert load(text=MINIMAL.replace("lr: 1e-3", f"lr: {text}")).solver.lr == 0.001
    assert load(f"solver.lr={text}").solver.lr == 0.001
    assert load(f"solver.betas=[0.9, {text}]").solver.betas == [0.9, 0.001]
    assert load(f"network.backbone_kwargs.eps={text}").network.backbone_kwargs.eps == 0.001


@pytest.mark.parametrize(
    "override, value",
    [
        ("data.num_segments=16", 16),
        ("data.num_segments=16.0", 16),
        ("seed=1e3", 1000),
        ("solver.weight_decay=1", 1.0),
        ("solver.lr_decay_step=5", 5),
        ("solver.lr_decay_step=[5, 1e1]", [5, 10]),
        ("solver.lr_decay_step=None", None),
        ("solver.clip_grad=null", None),
        ("data.label_list=", None),
        ("logging.skip_epoch=[0,1]", [0, 1]),
        ("data.random_shift=False", False),
        ("data.image_tmpl='{:06d}.jpg'", "{:06d}.jpg"),
        ("network.arch=timm/vit_a=b", "timm/vit_a=b"),
        ("network.backbone_kwargs={depth: 4, name: None}", {"depth": 4, "name": None}),
        ("resume=last_model.pt", "last_model.pt"),
    ],
)
def test_an_override_replaces_the_value_and_has_the_type_of_its_field(override, value):
    key = override.partition("=")[0]
    found = load(override, text=with_keys({"data.label_list": "names.csv"}))
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is (DotMap if isinstance(value, dict) else type(value))


def test_an_override_below_backbone_kwargs_sets_one_name_and_the_last_override_holds():
    text = with_keys({"network.backbone_kwargs": {"depth": 12, "embed_dim": 192}})
    config = load("network.backbone_kwargs.depth=2", "network.backbone_kwargs.depth=4", text=text)
    assert config.network.backbone_kwargs.toDict() == {"depth": 4, "embed_dim": 192}


def test_a_quoted_number_stays_text_among_the_backbone_kwargs():
    assert load("network.backbone_kwargs.name='16'").network.backbone_kwargs.name == "16"


# Bases


def test_bases_are_merged_key_by_key_below_the_file_and_are_found_beside_it():
    write("data: {workers: 1, prefetch: 3}\nnetwork: {backbone_kwargs: {depth: 4}}\nseed: 1\n", "shared/first.yaml")
    write("base: first.yaml\ndata: {workers: 2}\nseed: 2\n", "shared/second.yaml")
    config = load(text="base: shared/second.yaml\nseed: 3\n" + MINIMAL)
    assert (config.data.workers, config.data.prefetch, config.seed, config.data.batch_size) == (2, 3, 3, 4)
    assert config.network.backbone_kwargs.toDict() == {"depth": 4} and "base" not in config


def test_backbone_kwargs_replace_those_of_the_base_as_a_whole():
    write("network: {backbone_kwargs: {depth: 4, embed_dim: 192}}\n", "base.yaml")
    text = "base: base.yaml\n" + MINIMAL.replace("network:\n", "network:\n  backbone_kwargs: {depth: 2}\n")
    assert load(text=text).network.backbone_kwargs.toDict() == {"depth": 2}


def test_an_error_names_the_file_and_line_of_the_base_it_stands_in():
    write("seed: 1\ndata:\n  workers: -1\n", "shared/base.yaml")
    line = error_line(text="base: shared/base.yaml\n" + MINIMAL)
    assert line == "shared/base.yaml:3: data.workers: is -1, must be a whole number, from 0 to 1024"


def test_an_override_can_set_right_what_a_base_has_wrong():
    write("network: {tm: True}\n", "base.yaml")
    load("network.tm=False", text="base: base.yaml\n" + MINIMAL)


def test_bases_in_a_circle_are_an_error():
    write("base: two.yaml\n", "one.yaml")
    write("base: ./one.yaml\n", "two.yaml")
    with pytest.raises(ConfigError, match="^two.yaml:1: base: one.yaml is itself based on this file$"):
        load_config("one.yaml")


@pytest.mark.parametrize(
    "base, problem",
    [("gone.yaml", "no such file: .*gone.yaml"), ("[a]", r"is \['a'\], must be a file, or None")],
)
def test_a_base_that_is_no_file_is_an_error(base, problem):
    write(f"seed: 1\nbase: {base}\n")
    with pytest.raises(ConfigError, match=f"^run.yaml:2: base: {problem}$"):
        load_config("run.yaml")


def test_base_none_means_no_base():
    assert load(text="base: None\n" + MINIMAL) == load()


# Mistakes in the file as such


@pytest.mark.parametrize(
    "text, line",
    [
        ("", "run.yaml: empty; it must hold `section:` and keys"),
        ("- a\n", "run.yaml: not a mapping; it must hold `section:` and keys"),
        ("seed: 1\ndata: [1]\n", "run.yaml:2: data: a section, so keys must stand below it, not [1]"),
        ("data:\n", "run.yaml:1: data: a section, so keys must stand below it, not None"),
        ("solver.lr: 1\n", "run.yaml:1: solver.lr: in a file, a key stands below its section"),
        ("seed: 1\nseed: 2\n", "run.yaml:2: seed: given twice, first at run.yaml:1"),
        ("data:\n  shot: 1\n  shot: 1\n", "run.yaml:3: data.shot: given twice, first at run.yaml:2"),
        ("data: {}\nnetwork: {}\ndata: {}\n", "run.yaml:3: data: given twice, first at run.yaml:1"),
        (
            "network:\n  backbone_kwargs:\n    depth: 1\n    depth: 1\n",
            "run.yaml:4: network.backbone_kwargs.depth: given twice, first at run.yaml:3",
        ),
        ("data:\n  ? [a]\n  : 1\n", "run.yaml:2: data.: a key must be a word"),
        ("seed: 1\ndata: {a: 1\n", "run.yaml:3: not valid YAML: expected ',' or '}', but got '<stream end>'"),
        ("data:\n  image_tmpl: {:05d}.jpg\n", "run.yaml:2: not valid YAML: "),
        ("data:\n\tshot: 1\n", "run.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("data: &a\n  loop: *a\n", "run.yaml: not valid YAML: "),
        ("data:\n  dataset: 2023-02-30\n", "run.yaml: not valid YAML: day is out of range for month"),
        ("seed: !!python/none 1\n", "run.yaml:1: not valid YAML: could not determine a constructor for the tag"),
        ("seed: 1\n---\nseed: 2\n", "run.yaml:2: not valid YAML: but found another document"),
    ],
)
def test_a_file_of_the_wrong_form_is_an_error_with_its_line(text, line):
    assert error_line(text=text).startswith(line)


def test_a_file_that_is_absent_or_a_folder_or_not_text_is_an_error():
    Path("latin.yaml").write_bytes(b"seed: \xff\n")
    for path, reason in {
        "gone.yaml": "No such file or directory",
        "frames": "Is a directory",
        "latin.yaml": "'utf-8' codec can't decode",
    }.items():
        with pytest.raises(ConfigError, match=f"^{path}: cannot be read: {reason}"):
            load_config(path)


# Unknown and missing keys


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("data.lr", "solver.lr"),
        ("data.side_dim", "network.side_dim"),
        ("data.batchsize", "data.batch_size"),
        ("data.num_segment", "data.num_segments"),
        ("network.seed", "seed"),
        ("network.weight", "network.weights"),
        ("logging.print_frequency", "logging.print_freq"),
        ("lr", "solver.lr"),
        ("sed", "seed"),
        ("solvr", "solver"),
        ("dta.batch_size", "data.batch_size"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_key_of_all_sections(key, nearest):
    problem = f"{key}: unknown key; did you mean {nearest}?"
    section, _, name = key.rpartition(".")
    assert error_line(f"{key}=1") == f"command line: {problem}"
    if section in SECTION_LINES:
        text = MINIMAL.replace(f"{section}:\n", f"{section}:\n  {name}: 1\n")
        assert error_line(text=text) == f"run.yaml:{SECTION_LINES[section] + 1}: {problem}"
    elif not section:
        assert error_line(text=f"{MINIMAL}{key}: 1\n") == f"run.yaml:15: {problem}"


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if field.default is REQUIRED])
def test_a_required_key_that_is_missing_is_an_error_with_its_sentence(key):
    name = key.rpartition(".")[2]
    text = "".join(line for line in MINIMAL.splitlines(True) if not line.startswith(f"  {name}:"))
    assert error_line(text=text) == f"run.yaml: {key}: missing, and there is no default: {FIELDS[key].doc}"


# Wrong values


@pytest.mark.parametrize(
    "override, shown",
    [
        ("data.batch_size=0", "0"),
        ("data.batch_size=True", "True"),
        ("data.batch_size=2.5", "2.5"),
        ("data.batch_size='4'", "'4'"),
        ("data.batch_size=four", "'four'"),
        ("data.batch_size=.inf", "inf"),
        ("data.batch_size=[4]", "[4]"),
        ("data.batch_size=None", "None"),
        ("data.batch_size=null", "None"),
        ("data.dataset=", "None"),
        ("data.dataset=None", "None"),
        ("data.dataset=400", "400"),
        ("data.dataset=2023-02-01", "datetime.date(2023, 2, 1)"),
        ("data.dataset=' '", "' '"),
        ("data.image_tmpl=img.jpg", "'img.jpg'"),
        ("data.image_tmpl='{}_{}.jpg'", "'{}_{}.jpg'"),
        ("data.image_tmpl='{name}.jpg'", "'{name}.jpg'"),
        ("data.modality=flow", "'flow'"),
        ("data.workers=-1", "-1"),
        ("data.prefetch=0", "0"),
        ("data.num_segments=0", "0"),
        ("data.num_sample=0", "0"),
        ("data.num_classes=0", "0"),
        ("data.input_size=0", "0"),
        ("data.shot=0", "0"),
        ("data.protocol=ucf", "'ucf'"),
        ("data.index_base=-1", "-1"),
        ("data.flip=1", "1"),
        ("data.resize=wide", "'wide'"),
        ("data.resize=[256]", "[256]"),
        ("data.resize=[256, 320, 3]", "[256, 320, 3]"),
        ("data.mean=0.5", "0.5"),
        ("data.mean=[0.5]", "[0.5]"),
        ("data.mean=[123.7, 116.3, 103.5]", "[123.7, 116.3, 103.5]"),
        ("data.std=[0.5, 0.5, 0]", "[0.5, 0.5, 0]"),
        ("data.std=[58.4, 57.1, 57.4]", "[58.4, 57.1, 57.4]"),
        ("data.std=[0.5, 0.5]", "[0.5, 0.5]"),
        ("data.dense=1", "1"),
        ("data.dense=None", "None"),
        ("data.train_list=3", "3"),
        ("network.arch=", "None"),
        ("network.backbone_kwargs=4", "4"),
        ("network.backbone_kwargs=None", "None"),
        ("network.backbone_kwargs.day=2023-02-01", "{'day': datetime.date(2023, 2, 1)}"),
        ("network.side_dim=0", "0"),
        ("network.side_dim=-64", "-64"),
        ("network.side_dim=100", "100"),
        ("network.side_variant=both", "'both'"),
        ("network.side_layers=every3", "'every3'"),
        ("network.side_layers=last:0", "'last:0'"),
        ("network.side_layers=[a]", "['a']"),
        ("network.drop_fc=1", "1"),
        ("network.drop_fc=-0.1", "-0.1"),
        ("solver.smoothing=1.0", "1.0"),
        ("solver.type=linear", "'linear'"),
        ("solver.precision=fp64", "'fp64'"),
        ("solver.epochs=0", "0"),
        ("solver.lr=fast", "'fast'"),
        ("solver.lr=0", "0"),
        ("solver.lr=True", "True"),
        ("solver.lr=.nan", "nan"),
        ("solver.lr=1e999", "'1e999'"),
        ("solver.lr=" + "1" * 400, "1" * 80 + "..."),
        ("solver.lr=1e-3x", "'1e-3x'"),
        ("solver.lr_warmup_step=-1", "-1"),
        ("solver.lr_decay_step=0", "0"),
        ("solver.lr_decay_step=[4, 0]", "[4, 0]"),
        ("solver.lr_decay_step=[4, 4.5]", "[4, 4.5]"),
        ("solver.betas=0.9", "0.9"),
        ("solver.betas=[0.9]", "[0.9]"),
        ("solver.betas=[0.9, 1]", "[0.9, 1]"),
        ("solver.betas=[0.9, None]", "[0.9, 'None']"),
        ("solver.grad_accumulation_steps=0", "0"),
        ("solver.clip_grad=0", "0"),
        ("solver.weight_decay=-1", "-1"),
        ("logging.print_freq=0", "0"),
        ("logging.eval_freq=0", "0"),
        ("logging.skip_epoch=3", "3"),
        ("logging.skip_epoch=[-1]", "[-1]"),
        ("test.view_batch=0", "0"),
        ("seed=-1", "-1"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_an_error_that_says_what_it_must_be(override, shown):
    key = override.partition("=")[0]
    key = "network.backbone_kwargs" if key.startswith("network.backbone_kwargs") else key
    assert error_line(override) == f"command line: {key}: is {shown}, must be {FIELDS[key].must}"


def test_an_error_in_the_file_names_file_line_and_key():
    line = error_line(text=MINIMAL.replace("lr: 1e-3", "lr: abc"))
    assert line == "run.yaml:14: solver.lr: is 'abc', must be a number, above 0"
    line = error_line(text=MINIMAL.replace("side_dim: 320", "side_dim: 300"))
    limits = "a whole number, a positive multiple of 64, at most 16384"
    assert line == f"run.yaml:11: network.side_dim: is 300, must be {limits}"


@pytest.mark.parametrize(
    "override, line",
    [
        ("solver.lr", "command line: 'solver.lr' must have the form key=value, like solver.lr=1e-3"),
        ("=3", "command line: '=3' must have the form key=value, like solver.lr=1e-3"),
        ("--dense", "command line: '--dense' must have the form key=value, like solver.lr=1e-3"),
        ("data=3", "command line: data: a section; set one of its keys, like data.NAME=VALUE"),
        ("base=run.yaml", "command line: base: only a file can name its base"),
        ("solver.betas=[0.9", "command line: solver.betas: not valid YAML: expected ',' or ']'"),
        ("data.train_list=@x", "command line: data.train_list: not valid YAML: found character '@'"),
        ("network.backbone_kwargs={a: 1, a: 2}", "command line: network.backbone_kwargs: a: given twice"),
        ("network.backbone_kwargs.a.b=1", "command line: network.backbone_kwargs.a.b: unknown key; did you mean "),
        ("network.backbone_kwargs.=1", "command line: network.backbone_kwargs.: unknown key; did you mean "),
    ],
)
def test_an_override_of_the_wrong_form_is_an_error(override, line):
    assert error_line(override).startswith(line)


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["data.dense=True", "data.num_segments=129"], "data.num_segments: is 129, at most 128 with data.dense"),
        (["data.input_size=224", "data.resize=223"], "data.resize: is 223, below data.input_size, which is 224"),
        (["data.input_size=224", "data.resize=[256, 200]"], "data.resize: is [256, 200], below data.input_size"),
        (["data.input_size=224", "data.resize=-1"], "data.resize: is -1, below data.input_size, which is 224"),
        (["solver.start_epoch=30"], "solver.start_epoch: is 30, must be below solver.epochs, which is 30"),
        (["resume=last_model.pt", "pretrain=last_model.pt"], "pretrain: not together with resume, whose checkpoint"),
        (["network.init=False", "network.weights=last_model.pt"], "network.weights: contradicts network.init: False"),
        (["solver.mixup=True", "data.batch_size=3"], "data.batch_size: times data.num_sample is 3; solver.mixup pairs"),
        (["solver.mixup=True", "solver.smoothing=0"], "solver.smoothing: is 0.0, but solver.mixup goes with 0.1"),
        (["solver.type=multistep", "solver.lr_decay_step="], "solver.lr_decay_step: solver.type: multistep needs it: "),
    ],
)
def test_keys_that_contradict_each_other_are_an_error(overrides, line):
    assert error_line(*overrides).startswith(f"command line: {line}")


def test_limits_themselves_are_accepted():
    load("solver.mixup=True", "data.batch_size=3", "data.num_sample=2")
    load("solver.mixup=True", "data.batch_size=3", purpose="test")
    load("data.dense=True", "data.num_segments=128", "solver.start_epoch=29", "solver.lr_warmup_step=0")
    load("data.input_size=224", "data.resize=224", "data.mean=[0, 1, 0.5]", "data.std=[1, 1, 1e-3]")
    load("data.input_size=224", "data.resize=[224, 224]", "data.index_base=0")
    load("data.num_segments=129", "network.weights=last_model.pt", "network.drop_fc=0", "solver.betas=[0, 0]")


# Legacy keys


def neutral_value(key: str) -> object:
    value = LEGACY[key][0]
    return {ANY: "whatever", "network.side_dim": 320, "solver.sync_bn": False}.get(value, value)


def test_a_configuration_with_every_legacy_key_at_its_neutral_value_loads_to_the_one_without():
    assert load(text=with_keys({key: neutral_value(key) for key in LEGACY})) == load()


@pytest.mark.parametrize("key", [key for key, (neutral, _) in LEGACY.items() if neutral is None])
def test_none_is_written_in_either_way_for_a_legacy_key(key):
    assert load(f"{key}=None") == load(f"{key}=null") == load()


@pytest.mark.parametrize("key", [key for key, (neutral, _) in LEGACY.items() if neutral is not ANY])
@pytest.mark.parametrize("other", [7, "Transf"])
def test_a_legacy_key_at_another_value_is_refused_with_the_reason(key, other):
    line = error_line(text=with_keys({key: other}))
    assert line.startswith("run.yaml:")
    assert line.endswith(f": {key}: is {other!r}, but only {neutral_value(key)!r} is supported: {LEGACY[key][1]}")
    assert error_line(f"{key}={other}").startswith(f"command line: {key}: is {other!r}, but only ")


def test_a_legacy_truth_value_is_not_a_number():
    assert "is 0, but only False is supported" in error_line("network.tm=0")
    assert "is False, but only 0 is supported" in error_line("network.drop_out=False")


def test_n_emb_must_equal_side_dim_and_does_not_replace_it():
    assert load("network.n_emb=320") == load("network.n_emb=None") == load()
    assert error_line("network.n_emb=256") == (
        "command line: network.n_emb: is 256, but only 320 is supported: "
        "Another name of `network.side_dim`, and must equal it."
    )
    assert "network.side_dim: missing" in error_line(text=MINIMAL.replace("side_dim", "n_emb"))


def test_the_older_name_of_sync_bn_must_agree_with_the_new_one():
    assert load("network.sync_bn=False") == load()
    assert load("network.sync_bn=True", "solver.sync_bn=True") == load("solver.sync_bn=True")
    assert error_line("network.sync_bn=True") == (
        "command line: network.sync_bn: is True, but only False is supported: "
        "Another name of `solver.sync_bn`, and must equal it."
    )


def test_no_key_is_both_legacy_and_in_the_schema():
    assert not LEGACY.keys() & FIELDS.keys()


# Lists, roots and other paths


@pytest.mark.parametrize(
    "purpose, evaluate, needed",
    [
        ("train", False, {"train_list", "train_root", "val_list", "val_root"}),
        ("train", True, {"val_list", "val_root"}),
        ("test", False, {"val_list", "val_root"}),
    ],
)
@pytest.mark.parametrize("name", ["train_list", "train_root", "val_list", "val_root"])
def test_the_lists_and_roots_that_a_run_needs_must_be_given_and_exist(purpose, evaluate, needed, name):
    key = f"data.{name}"
    kind = FIELDS[key].kind
    setting = f"solver.evaluate={evaluate}"
    removed = "".join(line for line in MINIMAL.splitlines(True) if f"{name}:" not in line)
    if name not in needed:
        load(setting, f"{key}=gone", purpose=purpose)
        load(setting, text=removed, purpose=purpose)
        return
    missing = f"{key}: missing, and this run needs it: {FIELDS[key].doc}"
    assert error_line(setting, f"{key}=None", purpose=purpose) == f"command line: {missing}"
    assert error_line(setting, text=removed, purpose=purpose) == f"run.yaml: {missing}"
    for wrong in ("gone", "frames" if kind == "file" else "val.txt"):
        line = error_line(setting, f"{key}={wrong}", purpose=purpose)
        assert line == f"command line: {key}: no such {kind}: {Path.cwd() / wrong}"


@pytest.mark.parametrize("key", ["resume", "pretrain", "network.weights", "data.label_list"])
def test_a_file_that_is_named_must_exist(key):
    load(f"{key}=last_model.pt")
    assert error_line(f"{key}=gone.pt") == f"command line: {key}: no such file: {Path.cwd() / 'gone.pt'}"


def test_hub_is_no_file():
    assert load("network.weights=hub").network.weights == "hub"


@pytest.mark.parametrize("text, value", [("all", "all"), ("last:3", "last:3"), ("[1,3]", [1, 3]), ("None", None)])
def test_side_layers_are_a_rule_or_a_list(text, value):
    assert load(f"network.side_layers={text}").network.side_layers == value


@pytest.mark.parametrize("key", ["resume", "pretrain", "network.weights"])
def test_a_test_does_not_ask_for_the_files_of_the_training(key):
    load(f"{key}=gone.pt", purpose="test")


def test_lists_are_relative_to_the_current_folder_and_not_to_the_file():
    write(MINIMAL, "configs/run.yaml")
    load_config("configs/run.yaml")


# The programs


def test_the_check_prints_nothing_when_all_is_well_and_raises_the_line_otherwise(capsys):
    write(MINIMAL)
    main(["train", "run.yaml", "solver.lr=1e-4"])
    main(["test", "run.yaml", "data.train_list=None"])
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ConfigError, match="command line: data.lr: unknown key; did you mean solver.lr"):
        main(["train", "run.yaml", "data.lr=1"])


@pytest.mark.parametrize("argv", [[], ["train"], ["run.yaml"], ["fit", "run.yaml"]])
def test_the_check_says_how_it_is_called(argv):
    with pytest.raises(ConfigError, match="^usage: python -m utils.config train|test CONFIG"):
        main(argv)


def test_the_command_ends_with_status_1_and_one_line_and_loads_no_torch():
    write(MINIMAL)
    program = "import sys, utils.config; assert not {'torch', 'numpy', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
    command = [sys.executable, "-m", "utils.config", "train", str(Path("run.yaml").resolve())]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    names = {"6: data.train_list": "file: train.txt", "5: data.train_root": "folder: frames"}
    names |= {"8: data.val_list": "file: val.txt", "7: data.val_root": "folder: frames"}
    kinds = {place: name.split(": ") for place, name in names.items()}
    missing = [
        f"{Path('run.yaml').resolve()}:{at}: no such {kind}: {REPOSITORY / name}" for at, (kind, name) in kinds.items()
    ]
    line = f"4 things are missing: {'; '.join(missing)}"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {line}\n")


def test_the_documentation_is_the_one_that_the_schema_writes():
    assert (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8") == config_schema.markdown()
