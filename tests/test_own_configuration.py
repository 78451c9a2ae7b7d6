"""A test and the training before it: the configuration in the checkpoint, and what may differ from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import checkpoint_of, save_untrained, score_run

import test as test_program
from engine.configuration import TRAINED_WITH, changed_since_training, default_config, read_config
from modules.checkpoint import read_checkpoint, save_checkpoint, save_released
from utils.config_schema import FIELDS
from utils.errors import ConfigError

# Key -> a value that differs from the trained one. Each changes what the weights get, and no shape.
OTHERS = {
    "data.protocol": "something",
    "data.num_segments": 3,
    "data.index_base": 0,
    "data.count_frames": True,
    "data.input_size": 24,
    "data.resize": 40,
    "data.mean": [0.0, 0.5, 1.0],
    "data.std": [1.0, 0.5, 0.25],
    "data.dense": True,
    "network.arch": "timm/vit_tiny_patch16_224.other",
    "network.backbone_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "network.side": "linear",
    "network.average_frames": False,
    "network.side_variant": "post",
    "network.side_layers": [0, 1],
}
# Keys that another machine, another list or another way to hold the same videos needs.
MAY_DIFFER = {
    "data.workers": 2,
    "data.prefetch": 3,
    "data.batch_size": 2,
    "data.on_error": "skip",
    "data.image_tmpl": "frame{:05d}.jpg",
    "data.decoder": "decord",
    "data.dataset": "another",
    "data.rand_aug": True,
    "data.flip": False,
    "solver.precision": "bf16",
    "solver.lr": 0.5,
    "network.backbone_dtype": "bfloat16",
    "network.drop_fc": 0.1,
    "network.shard_backbone": True,
    "test.view_batch": 3,
    "seed": 7,
}


def changed(config, key, value):
    """The configuration with another value, as if a file had stated it."""
    section, _, name = key.rpartition(".")
    plain = config.toDict()
    (plain[section] if section else plain)[name] = value
    return default_config(**plain)


def as_text(value):
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("\n...")


@pytest.fixture
def checkpoint(config, tmp_path):
    save_untrained(config, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def scores_without_config(checkpoint, file, *arguments):
    test_program.main(["--weights", str(checkpoint), "--save_scores", str(file), *arguments])
    return np.load(file)


def test_a_test_without_a_configuration_equals_one_with_that_of_the_training(checkpoint, config, tmp_path):
    alone = scores_without_config(checkpoint, tmp_path / "a.npz")
    given = score_run(config, checkpoint, tmp_path / "b.npz")
    assert alone.files == given.files
    assert all(np.array_equal(alone[name], given[name]) for name in alone.files)
    assert json.loads(str(alone["protocol"]))["accepted_changes"] == {}


def test_lists_roots_and_modality_follow_the_command_line_without_a_configuration(checkpoint, motion_root, tmp_path):
    videos = [f"data.val_list={motion_root}/val_videos.txt", f"data.val_root={motion_root}/videos"]
    saved = scores_without_config(checkpoint, tmp_path / "v.npz", *videos, "data.modality=video")
    assert saved["paths"][0].endswith(".mp4") and np.isfinite(saved["scores"]).all()


def test_a_list_that_moved_since_the_training_is_one_line_that_names_the_checkpoint(checkpoint, tmp_path):
    content = read_checkpoint(checkpoint)
    content["config"]["data"]["val_list"] = "gone.txt"
    save_checkpoint(tmp_path / "moved.pt", content)
    with pytest.raises(ConfigError, match="^.*moved.pt: data.val_list: no such file: .*gone.txt$"):
        test_program.main(["--weights", str(tmp_path / "moved.pt")])


def test_the_other_values_cover_every_key_that_the_schema_marks():
    assert set(OTHERS) == set(TRAINED_WITH) and not set(MAY_DIFFER) & set(TRAINED_WITH)
    assert set(MAY_DIFFER) < set(FIELDS)


@pytest.mark.parametrize("key", OTHERS)
def test_each_key_that_changes_what_the_weights_get_is_found(config, key):
    trained = read_config(config)
    checkpoint = {"config": trained.toDict()}
    section, _, name = key.rpartition(".")
    value = "timm/vit_small_patch16_224" if key == "network.arch" else OTHERS[key]
    other = changed(trained, key, value)
    assert changed_since_training(checkpoint, "m.pt", other) == {
        key: {"trained": trained.toDict()[section][name], "now": value}
    }
    assert changed_since_training({"config": other.toDict()}, "m.pt", other) == {}


@pytest.mark.parametrize("key", MAY_DIFFER)
def test_what_a_machine_or_a_list_needs_may_differ(config, key):
    trained = read_config(config)
    other = changed(trained, key, MAY_DIFFER[key])
    assert changed_since_training({"config": trained.toDict()}, "m.pt", other) == {}


def test_two_names_of_one_tower_are_no_change(config):
    trained = read_config(config)
    other = changed(trained, "network.arch", "timm/vit_tiny_patch16_224.augreg_in21k")
    assert changed_since_training({"config": trained.toDict()}, "m.pt", other) == {}
    clip = default_config(network={"arch": "ViT-B/16", "backbone_kwargs": {}})
    for arch, same in (("timm/vit_base_patch16_clip_quickgelu_224", True), ("timm/vit_base_patch16_clip_224", False)):
        found = changed_since_training({"config": clip.toDict()}, "m.pt", changed(clip, "network.arch", arch))
        assert (found == {}) == same


def test_numbers_of_frame_files_do_not_count_where_video_files_are_read(config):
    trained = read_config(config)
    for settings in (trained, changed(trained, "data.index_base", 0)):
        videos = changed(settings, "data.modality", "video")
        assert changed_since_training({"config": trained.toDict()}, "m.pt", videos) == {}


def test_values_that_an_older_checkpoint_left_open_and_keys_that_are_gone_are_no_change(config):
    trained = read_config(config)
    old = trained.toDict()
    for name in ("protocol", "resize", "mean", "std"):
        old["data"][name] = None
    old["network"] |= {"side_layers": None, "side_variant": None, "n_old": 3}
    del old["data"]["count_frames"]
    assert changed_since_training({"config": old}, "m.pt", trained) == {}
    assert list(changed_since_training({"config": old}, "m.pt", changed(trained, "data.std", [1.0, 1.0, 1.0]))) == [
        "data.std"
    ]


@pytest.mark.parametrize("with_config", [True, False])
def test_changes_are_refused_in_one_line_that_lists_them_and_accepted_ones_are_written_down(
    checkpoint, config, tmp_path, capfd, with_config
):
    """From the file, from the command line, and from --dense alike."""
    own = ["--config", config] if with_config else []
    arguments = ["--weights", str(checkpoint), *own, "--save_scores", str(tmp_path / "s.npz")]
    changes = ["data.num_segments=2", "--dense", "data.resize=[40,48]"]
    with pytest.raises(ConfigError, match="model.pt: data.num_segments was 4 and is 2 now; data.resize") as caught:
        test_program.main([*arguments, *changes])
    line = caught.value.line
    assert "; data.dense was False and is True now: " in line and line.endswith("or add --accept_changes")
    assert "\n" not in str(caught.value) and not (tmp_path / "s.npz").exists()
    capfd.readouterr()
    test_program.main([*arguments, *changes, "--accept_changes"])
    saved = np.load(tmp_path / "s.npz")
    protocol = json.loads(str(saved["protocol"]))
    assert protocol["accepted_changes"] == {
        "data.num_segments": {"trained": 4, "now": 2},
        "data.resize": {"trained": 32, "now": [40, 48]},
        "data.dense": {"trained": False, "now": True},
    }
    output = "".join(capfd.readouterr())
    for text in ("num_segments was 4 and is 2", "resize was 32 and is [40, 48]", "dense was False and is True"):
        assert f"accepted change since the training of {checkpoint}: data.{text} now" in output


def test_a_configuration_file_that_differs_is_refused(checkpoint, config):
    content = yaml.safe_load(Path(config).read_text())
    content["data"]["num_segments"] = 2
    Path(config).write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="model.pt: data.num_segments was 4 and is 2 now: "):
        test_program.main(["--config", config, "--weights", str(checkpoint)])


@pytest.mark.parametrize("form", ["released", "old"])
def test_a_checkpoint_without_a_configuration_needs_one_and_is_compared_with_none(config, tmp_path, form):
    content = yaml.safe_load(Path(config).read_text())
    content["network"]["arch"] = "ViT-B/16"
    Path(config).write_text(yaml.safe_dump(content))
    model = save_untrained(config, tmp_path / "ours.pt")
    path = tmp_path / f"{form}.pt"
    if form == "released":
        save_released(path, model)
    else:
        save_checkpoint(path, checkpoint_of(model))
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=rf"{form}.pt: .* no configuration; name .* such as .*/config.yaml$"):
        test_program.main(["--weights", str(path)])
    saved = score_run(config, path, tmp_path / "s.npz", "data.num_segments=2")
    expected = score_run(config, tmp_path / "ours.pt", tmp_path / "o.npz", "data.num_segments=2", "--accept_changes")
    assert np.array_equal(saved["scores"], expected["scores"])


def test_the_type_of_the_tower_is_that_of_this_machine_not_of_the_training(checkpoint, tmp_path):
    content = read_checkpoint(checkpoint)
    content["config"]["network"]["backbone_dtype"] = "bfloat16"  # as resolved on a GPU
    save_checkpoint(tmp_path / "gpu.pt", content)
    alone = scores_without_config(tmp_path / "gpu.pt", tmp_path / "a.npz", "solver.precision=fp32")
    expected = scores_without_config(checkpoint, tmp_path / "b.npz", "solver.precision=fp32")
    if not torch.cuda.is_available():
        assert np.array_equal(alone["scores"], expected["scores"])
