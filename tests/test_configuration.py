"""The resolved configuration: derived once, never changed afterwards."""

import copy

import pytest
import torch
import yaml
from tiny import train_run

from engine.configuration import DERIVED_KEYS, default_config, read_config, resolve_config
from engine.training_state import changed_values
from utils.config import load_config
from utils.errors import ConfigError


def value_of(config, key):
    section, _, name = key.rpartition(".")
    return (config[section] if section else config)[name]


@pytest.mark.parametrize("arch", ["ViT-B/32", "EVA02-CLIP-bigE-14", "timm/vit_base_patch16_siglip_256"])
def test_no_derived_value_is_left_open_and_resolving_again_changes_nothing(arch):
    network = {"arch": arch, "backbone_kwargs": {}}
    config = default_config(data={"input_size": None}, network=network)
    assert not [key for key in DERIVED_KEYS if value_of(config, key) in (None, "auto")]
    assert resolve_config(config).toDict() == config.toDict()


def test_derived_values_are_those_of_the_tower_the_protocol_and_the_batch():
    network = {"arch": "EVA02-CLIP-L-14-336", "backbone_kwargs": {}}
    config = default_config(data={"dataset": "something-v2", "input_size": None, "batch_size": 6}, network=network)
    data = config.data
    assert (data.protocol, data.input_size, data.resize) == ("something", 336, [384, 480])
    assert data.mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert data.std == pytest.approx([0.26862954, 0.26130258, 0.27577711])
    assert (config.network.side_variant, config.network.side_layers) == ("post", "every2")
    assert (config.network.backbone_dtype, config.test.view_batch) == ("float32", 6)


def test_given_values_are_kept():
    data = {"dataset": "something-v2", "protocol": "kinetics", "resize": 300, "mean": [0, 0, 0], "std": [1, 1, 1]}
    network = {"arch": "ViT-B/16", "side_variant": "post", "side_layers": [1, 5], "backbone_dtype": "bfloat16"}
    config = default_config(data=data, network=network, test={"view_batch": 3})
    assert {key: config.data[key] for key in data} == data
    assert {key: config.network[key] for key in network} == network and config.test.view_batch == 3


def test_an_unknown_key_is_an_error_here_too():
    with pytest.raises(ConfigError, match="data.num_segment: unknown key; did you mean data.num_segments"):
        default_config(data={"num_segment": 4})


def test_resolving_leaves_its_argument_as_it_is(config):
    loaded = load_config(config)
    before = copy.deepcopy(loaded.toDict())
    resolve_config(loaded)
    assert loaded.toDict() == before and loaded.data.protocol is None


def test_training_does_not_change_its_configuration_and_the_run_holds_the_resolved_values(config, tmp_path):
    resolved = read_config(config).toDict()
    checkpoint = train_run(config, tmp_path / "run", "solver.epochs=1")
    resolved["solver"]["epochs"] = 1
    assert checkpoint["config"] == resolved == yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


def test_a_value_that_an_older_checkpoint_left_open_is_no_change():
    new = default_config().toDict()
    old = copy.deepcopy(new)
    for key in DERIVED_KEYS:
        section, _, name = key.rpartition(".")
        old[section][name] = "auto" if name == "backbone_dtype" else None
    old["solver"]["clip_grad"], old["data"]["mean"] = 1.0, [0.0, 0.0, 0.0]
    assert changed_values(old, new) == [
        ("data.mean", [0.0, 0.0, 0.0], new["data"]["mean"]),
        ("solver.clip_grad", 1.0, None),
    ]


def test_a_tower_on_a_gpu_has_the_type_of_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert default_config(solver={"precision": "bf16"}).network.backbone_dtype == "bfloat16"
