"""The programs as a user runs them, on the generated motion data: train, resume, test, one and two processes."""

import json

import numpy as np
import pytest
import torch
import yaml
from tiny import run_script, score_run, train_run

import test as test_program
import train as train_program
from datasets.transforms import normalize_clips
from engine import loops
from modules.hashing import hash_tensors
from tools.motion_demo import CLASSES
from utils.errors import UserError

EVERY_AUGMENTATION = ["data.rand_aug=True", "data.rand_erase=True", "solver.mixup=True", "data.num_sample=2"]


def assert_same_training(a, b):
    assert hash_tensors(a["trained"]) == hash_tensors(b["trained"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[key], b["optimizer"]["state"][i][key]) for key in state)
    assert (a["epoch"], a["best_accuracy"]) == (b["epoch"], b["best_accuracy"])


def test_training_writes_checkpoints_config_and_log(config, tmp_path):
    checkpoint = train_run(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    files = {"last_model.pt", "last_model_1.pt", "model_best.pt", "config.yaml", "train.log"}
    assert names == files | {"metrics.jsonl", "first_batch.png", "tensorboard"}
    assert checkpoint["epoch"] == 2 and checkpoint["class_names"] == list(CLASSES)
    assert checkpoint["tower"] is not None  # random: only the checkpoint holds it
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == checkpoint["config"]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "trained" in log and "effective batch" in log and "seed 1024" in log
    assert log.index("epoch 0 [") < 30 * 200 and log[: log.index("epoch 0 [")].count("\n") < 30


@pytest.mark.parametrize("overrides", [[], EVERY_AUGMENTATION])
def test_the_same_seed_trains_the_same_weights_and_another_does_not(config, tmp_path, overrides):
    first = train_run(config, tmp_path / "a", *overrides)
    assert_same_training(first, train_run(config, tmp_path / "b", "data.workers=2", *overrides))
    other = train_run(config, tmp_path / "c", "seed=7", *overrides)
    assert hash_tensors(first["trained"]) != hash_tensors(other["trained"])


@pytest.mark.parametrize("overrides", [[], EVERY_AUGMENTATION])
def test_a_resumed_run_equals_an_unbroken_one(config, tmp_path, overrides):
    overrides = ["solver.epochs=3", *overrides]
    unbroken = train_run(config, tmp_path / "whole", *overrides)

    class Stopped(Exception):
        pass

    def stop_in_the_second_epoch(*args):
        if args[5] == 1:
            raise Stopped
        return real(*args)

    real, train_program.train_one_epoch = train_program.train_one_epoch, stop_in_the_second_epoch
    try:
        with pytest.raises(Stopped):
            train_run(config, tmp_path / "broken", *overrides)
    finally:
        train_program.train_one_epoch = real
    last = tmp_path / "broken" / "last_model.pt"
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert_same_training(unbroken, train_run(config, tmp_path / "broken", f"resume={last}", *overrides))


def test_an_output_folder_of_another_run_is_not_overwritten(config, tmp_path):
    train_run(config, tmp_path / "run", "solver.epochs=1")
    before = (tmp_path / "run" / "last_model.pt").read_bytes()
    with pytest.raises(UserError, match=r"--output .*run: holds last_model.pt of another run.*resume="):
        train_run(config, tmp_path / "run")
    assert (tmp_path / "run" / "last_model.pt").read_bytes() == before


def test_skipped_epochs_are_saved_all_the_same(config, tmp_path):
    checkpoint = train_run(config, tmp_path / "run", "logging.skip_epoch=[0,1]")
    assert checkpoint["epoch"] == 2 and checkpoint["best_accuracy"] is None
    assert not (tmp_path / "run" / "model_best.pt").exists()
    assert "validation: top-1" not in (tmp_path / "run" / "train.log").read_text()


def test_pretrain_starts_from_the_weights_of_a_checkpoint_and_evaluate_only_evaluates(config, tmp_path):
    trained = train_run(config, tmp_path / "run")
    last = tmp_path / "run" / "last_model.pt"
    train_program.main(
        ["--config", config, "--output", str(tmp_path / "eval"), f"pretrain={last}", "solver.evaluate=True"]
    )
    log = (tmp_path / "eval" / "train.log").read_text()
    assert "validation: top-1" in log and not (tmp_path / "eval" / "last_model.pt").exists()
    # with a rate too small to matter, training from them leaves them where they are
    still = train_run(config, tmp_path / "still", f"pretrain={last}", "solver.lr=1e-30", "solver.weight_decay=0")
    for name, parameter in trained["trained"].items():
        if "running" not in name and "num_batches" not in name:
            assert parameter.equal(still["trained"][name]), name


def test_accumulation_makes_one_update_of_several_batches(config, tmp_path):
    common = ["solver.epochs=1", "data.batch_size=2"]
    steps = {
        accumulation: next(iter(checkpoint["optimizer"]["state"].values()))["step"].item()
        for accumulation in (1, 3, 4)
        for checkpoint in [
            train_run(config, tmp_path / str(accumulation), *common, f"solver.grad_accumulation_steps={accumulation}")
        ]
    }
    assert steps == {1: 8, 3: 2, 4: 2}  # of 8 batches, 3 by 3 leaves two unused


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_on_a_cpu_too(config, tmp_path, precision):
    checkpoint = train_run(config, tmp_path / precision, f"solver.precision={precision}", "solver.clip_grad=1.0")
    assert all(tensor.isfinite().all() for tensor in checkpoint["trained"].values())
    assert bool(checkpoint["scaler"]) == (precision == "fp16")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(config, tmp_path):
    # the head overflows in float32 at the second step; the report comes at the fourth, the end of the epoch
    with pytest.raises(UserError, match=r"not finite at epoch 0, iteration [123]; ") as caught:
        train_run(config, tmp_path / "run", "solver.lr=1e36", "solver.lr_warmup_step=0")
    assert "\n" not in caught.value.line
    assert not (tmp_path / "run" / "last_model.pt").exists()


def test_one_clip_a_process_is_refused_because_nothing_would_be_learnt(config, tmp_path):
    with pytest.raises(UserError, match="data.batch_size: .*at least 2"):
        train_run(config, tmp_path / "run", "data.batch_size=1")


def test_scores_are_in_list_order_and_sum_to_one(config, tmp_path, motion_root):
    train_run(config, tmp_path / "run", "solver.epochs=1")
    saved = score_run(config, tmp_path / "run" / "last_model.pt", tmp_path / "s.npz", "--test_crops", "3")
    lines = (motion_root / "val.txt").read_text().splitlines()
    assert saved["paths"].tolist() == [line.split()[0] for line in lines]
    assert saved["labels"].tolist() == [int(line.split()[2]) for line in lines]
    assert saved["labels"].dtype == np.int64 and saved["scores"].dtype == np.float32
    assert saved["scores"].shape == (7, len(CLASSES)) and np.allclose(saved["scores"].sum(1), 1, atol=1e-5)
    protocol = json.loads(str(saved["protocol"]))
    assert (protocol["test_crops"], protocol["test_clips"], protocol["dense"]) == (3, 1, False)


def test_scores_are_the_mean_over_views_of_softmax(config, tmp_path):
    """Against one view at a time through a model that is built and loaded here."""
    from datasets.loaders import build_eval_loader
    from engine.configuration import read_config
    from modules import build_model
    from modules.checkpoint import load_model_state, read_checkpoint

    train_run(config, tmp_path / "run", "solver.epochs=1")
    checkpoint = tmp_path / "run" / "last_model.pt"
    saved = score_run(config, checkpoint, tmp_path / "s.npz", "--test_crops", "3", "--test_clips", "2")
    settings = read_config(config)
    model = build_model(settings).eval()
    load_model_state(model, read_checkpoint(checkpoint), checkpoint)
    loader = build_eval_loader(settings, crops=3, clips=2)
    for index in range(len(loader.dataset)):
        views = loader.dataset[index]["clips"]
        assert len(views) == 6
        with torch.no_grad():
            mean, std = tuple(settings.data.mean), tuple(settings.data.std)
            pixels = [normalize_clips(view[None], mean, std) for view in views]
            single = [model(clips).softmax(-1)[0] for clips in pixels]
        assert np.abs(saved["scores"][index] - torch.stack(single).mean(0).numpy()).max() < 1e-5


@pytest.mark.parametrize("changes", [["test.view_batch=1"], ["test.view_batch=64"], ["data.workers=2"]])
def test_chunks_and_workers_do_not_change_scores(config, tmp_path, changes):
    train_run(config, tmp_path / "run", "solver.epochs=1")
    arguments = (config, tmp_path / "run" / "last_model.pt")
    plain = score_run(*arguments, tmp_path / "a.npz", "--test_clips", "3", "--test_crops", "5")
    other = score_run(*arguments, tmp_path / "b.npz", "--test_clips", "3", "--test_crops", "5", *changes)
    assert np.abs(plain["scores"] - other["scores"]).max() < 1e-5


def test_two_processes_train_and_test_through_the_scripts(config, tmp_path):
    output = tmp_path / "run"
    done = run_script("run_train_vision.sh", config, "--output", output, "data.batch_size=2", NUM_GPUS="2")
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and done.stdout.count("validation: top-1") == 2
    for processes in ("1", "2"):
        flags = ["--test_crops", "3", "--test_clips", "2", "--save_scores", tmp_path / f"{processes}.npz"]
        done = run_script("run_test_vision.sh", config, output / "model_best.pt", *flags, NUM_GPUS=processes)
        assert done.returncode == 0, done.stderr
        assert "4 frames x 3 crops x 2 clips on 7 videos: top-1" in done.stdout
    one, two = (np.load(tmp_path / f"{processes}.npz") for processes in ("1", "2"))
    assert np.abs(one["scores"] - two["scores"]).max() < 1e-5
    assert one["paths"].tolist() == two["paths"].tolist()


def test_two_processes_resume_like_an_unbroken_run(config, tmp_path):
    def run(output, *overrides):
        done = run_script("run_train_vision.sh", config, "--output", output, *overrides, NUM_GPUS="2")
        assert done.returncode == 0, done.stderr
        return torch.load(output / "last_model.pt", weights_only=True)

    common = ["data.batch_size=2", "logging.skip_epoch=[0,1]"]
    unbroken = run(tmp_path / "whole", *common)
    run(tmp_path / "half", *common, "solver.epochs=1", "solver.lr_warmup_step=1")
    resumed = run(tmp_path / "rest", *common, f"resume={tmp_path / 'half' / 'last_model.pt'}")
    # the first epoch is all warm-up, so its rates do not depend on solver.epochs
    assert_same_training(unbroken, resumed)


def test_a_broken_frame_ends_the_script_with_one_line_that_names_it(config, tmp_path, motion_root):
    list_file = tmp_path / "list.txt"
    list_file.write_text("train_00000 6 0\nno_such_video 6 1\n" * 4)
    done = run_script("run_train_vision.sh", config, "--output", tmp_path / "run", f"data.train_list={list_file}")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "no_such_video" in last and f"{list_file}:" in last


def test_a_typo_ends_the_script_before_anything_starts(config):
    done = run_script("run_train_vision.sh", config, "solver.lrr=1")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: command line: solver.lrr: unknown key; did you mean solver.lr?"


@pytest.mark.parametrize(
    "change, message",
    [
        (["data.num_classes=3"], r"val.txt:4: label .*in 0\.\.2, got '3'|classes.csv"),
        (["network.arch=ViT-B-16"], "network.arch: unknown architecture 'ViT-B-16', the nearest is 'ViT-B/16'"),
        (["network.side_dim=96"], "network.side_dim: "),
        (["network.init=True"], "network.init: timm/vit_tiny_patch16_224 has no weight file of its own"),
        (["data.batch_size=32"], "16 videos do not fill one step"),
        (["data.input_size=36"], "data.input_size: 36"),
    ],
)
def test_mistakes_end_training_with_one_line(config, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        train_run(config, tmp_path / "run", *change)
    assert "\n" not in caught.value.line


def test_an_open_input_size_is_the_towers_in_training_and_testing(config, tmp_path):
    changes = ["data.input_size=None", "network.backbone_kwargs.patch_size=56"]  # 224 pixels, 4 x 4 patches
    checkpoint = train_run(config, tmp_path / "run", "solver.epochs=1", *changes)
    assert checkpoint["config"]["data"]["input_size"] == 224
    assert checkpoint["trained"]["side.pos"].shape == (16, 64)
    saved = score_run(config, tmp_path / "run" / "last_model.pt", tmp_path / "s.npz", *changes)
    assert json.loads(str(saved["protocol"]))["input_size"] == 224


CUSTOM = [
    "data.protocol=something",
    "data.resize=[36, 40]",
    "data.flip=False",
    "data.mean=[0,0.5,1]",
    "data.std=[1,0.5,1]",
]


def test_the_settings_of_a_custom_data_set_hold_in_training_and_testing_and_are_stored(config, tmp_path, monkeypatch):
    seen = set()
    monkeypatch.setattr(loops, "normalize_clips", lambda *args: (seen.add(args[1:]), normalize_clips(*args))[1])
    data = train_run(config, tmp_path / "run", "solver.epochs=1", *CUSTOM)["config"]["data"]
    assert [data[key] for key in ("protocol", "resize", "flip")] == ["something", [36, 40], False]
    assert seen == {((0.0, 0.5, 1.0), (1.0, 0.5, 1.0))}
    log = (tmp_path / "run" / "train.log").read_text()
    assert "protocol something" in log and "mean 0.0000, 0.5000, 1.0000, std 1.0000, 0.5000, 1.0000" in log
    saved = score_run(config, tmp_path / "run" / "last_model.pt", tmp_path / "s.npz", *CUSTOM)
    assert len(seen) == 1
    stored = {"protocol": "something", "resize": [36, 40], "index_base": 1, "mean": [0, 0.5, 1], "std": [1, 0.5, 1]}
    assert stored.items() <= json.loads(str(saved["protocol"])).items()
    for custom in CUSTOM:
        if "flip" not in custom:
            others = [override for override in CUSTOM if override != custom]
            changed = [*others, "--accept_changes"]
            other = score_run(config, tmp_path / "run" / "last_model.pt", tmp_path / "o.npz", *changed)
            assert np.abs(other["scores"] - saved["scores"]).max() > 1e-6, custom


def test_a_resize_below_the_towers_own_input_size_is_one_line(config, tmp_path):
    with pytest.raises(UserError, match="^data.resize: is 200, below data.input_size, which is 224$"):
        train_run(config, tmp_path / "run", "data.input_size=None", "data.resize=200")


def test_testing_without_a_checkpoint_is_one_line(config, tmp_path):
    with pytest.raises(UserError, match="gone.pt: no such checkpoint"):
        test_program.main(["--config", config, "--weights", str(tmp_path / "gone.pt")])


def test_a_test_writes_all_scores_or_none(config, tmp_path, monkeypatch):
    train_run(config, tmp_path / "run", "solver.epochs=1")
    monkeypatch.setattr(np, "savez", lambda file, **arrays: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        score_run(config, tmp_path / "run" / "last_model.pt", tmp_path / "s.npz")
    assert not (tmp_path / "s.npz").exists() and not list(tmp_path.glob(".s.npz*"))
