"""Runs that are killed, stopped or started again end like runs that nothing has happened to."""

import logging
import math
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import score_run, train_run

import train as train_program
from benchmarks import kill_and_resume
from datasets.loaders import EpochSampler
from engine import run_folder
from engine.checkpointing import BackgroundWriter, Saver
from engine.configuration import default_config, read_config
from engine.optim import build_optimizer
from engine.reporter import Reporter
from engine.run_folder import RunFolder, checkpoints
from engine.scores import PartialScores
from engine.training_state import keep_global_batch
from modules import build_model, checkpoint_entries
from modules.checkpoint import checkpoint_state, model_state, read_checkpoint, save_checkpoint, save_safetensors
from modules.hashing import hash_tensors
from modules.pretrained import read_state_dict
from modules.side4video import Side4Video
from utils.errors import CheckpointError, ConfigError, UserError
from utils.seeding import epoch_order
from utils.signals import Stopped, StopSignals

EVERY_AUGMENTATION = ["data.rand_aug=True", "data.rand_erase=True", "solver.mixup=True", "data.num_sample=2"]
EVERY_UPDATE = "logging.save_minutes=1e-9"


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program's own clears up after it but what a `finally` would."""


@pytest.fixture
def kill_after(monkeypatch):
    """kill_after(updates) ends the next training with Killed once so many updates were made, and saved if due."""
    act = Saver._act

    def arm(updates):
        seen = []

        def counted(self, decided, epoch, step):
            act(self, decided, epoch, step)
            seen.append(step)
            if len(seen) == updates:
                self.wait()
                raise Killed

        monkeypatch.setattr(Saver, "_act", counted)

    yield arm
    monkeypatch.setattr(Saver, "_act", act)


def assert_equal_runs(a, b):
    assert hash_tensors(a["trained"]) == hash_tensors(b["trained"])
    for number, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[key], b["optimizer"]["state"][number][key]) for key in state)
    assert [a[key] for key in ("epoch", "step", "best_accuracy")] == [
        b[key] for key in ("epoch", "step", "best_accuracy")
    ]


def epoch_lines(folder):
    """The line of each epoch's end, without its time, from the last start that wrote it."""
    lines = [line[20:] for line in (folder / "train.log").read_text().splitlines() if " done: loss " in line]
    return sorted({line.split()[1]: line for line in lines}.items())


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.batch_size=2"],
        ["data.batch_size=2", "data.workers=2"],
        ["data.batch_size=1", "data.num_sample=2", "solver.grad_accumulation_steps=2", "data.balance=True"],
        ["data.batch_size=2", *EVERY_AUGMENTATION],
    ],
)
def test_a_run_killed_again_and_again_inside_its_epochs_equals_an_unbroken_one(config, tmp_path, kill_after, overrides):
    """Epochs of eight updates: killed after 3, 5 and 7 more, so twice in one epoch."""
    unbroken = train_run(config, tmp_path / "whole", EVERY_UPDATE, *overrides)
    for updates in (3, 3, 7):
        kill_after(updates)
        with pytest.raises(Killed):
            train_run(config, tmp_path / "killed", EVERY_UPDATE, "resume=auto", *overrides)
    kill_after(math.inf)
    assert_equal_runs(unbroken, train_run(config, tmp_path / "killed", EVERY_UPDATE, "resume=auto", *overrides))
    best = [torch.load(tmp_path / name / "model_best.pt", weights_only=True) for name in ("whole", "killed")]
    assert_equal_runs(*best)
    assert epoch_lines(tmp_path / "whole") == epoch_lines(tmp_path / "killed")


@pytest.mark.parametrize("runs", [[], ["runs={slow: {solver.lr: 1e-4}, fast: {}}"]], ids=["one", "several"])
def test_skipped_videos_of_an_epoch_are_counted_over_the_kill(config, tmp_path, kill_after, motion_root, runs):
    """One of the sixteen videos is missing; whenever the epoch is cut, its report names that video once."""
    listed = tmp_path / "train.txt"
    lines = (motion_root / "train.txt").read_text().splitlines()
    listed.write_text("\n".join(["missing 6 0", *lines[1:]]) + "\n")
    overrides = [f"data.train_list={listed}", "data.on_error=skip", "data.batch_size=2", "solver.epochs=1", *runs]
    for updates in range(1, 8):
        folder = tmp_path / str(updates)
        arguments = ["--config", config, "--output", str(folder), EVERY_UPDATE, "resume=auto", *overrides]
        kill_after(updates)
        with pytest.raises(Killed):
            train_program.main(arguments)
        kill_after(math.inf)
        train_program.main(arguments)
        assert "epoch 0: 1 training videos could not be read" in (folder / "train.log").read_text()


def test_skipping_to_the_step_loads_none_of_the_videos_before_it(config, tmp_path, kill_after, monkeypatch):
    from datasets.video_dataset import TrainVideoDataset

    kill_after(5)
    with pytest.raises(Killed):
        train_run(config, tmp_path / "run", EVERY_UPDATE, "data.batch_size=2", "solver.epochs=1")
    kill_after(math.inf)
    loaded, load = [], TrainVideoDataset._load
    monkeypatch.setattr(
        TrainVideoDataset,
        "_load",
        lambda self, epoch, index, place: loaded.append(index) or load(self, epoch, index, place),
    )
    train_run(config, tmp_path / "run", EVERY_UPDATE, "data.batch_size=2", "solver.epochs=1", "resume=auto")
    assert len(loaded) == 6 == len(set(loaded))  # three batches of two


def test_three_real_kills_change_nothing(tmp_path):
    """Processes and SIGKILL; `python -m benchmarks.kill_and_resume` does 20, with two processes too."""
    line = kill_and_resume.compare(kill_and_resume.SETTINGS[0], tmp_path, 3, random.Random(1))
    assert "all equal to the bit" in line


# ---------------------------------------------------------------- where a run goes on


def test_auto_starts_from_the_beginning_goes_on_and_says_when_it_is_finished(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = train_run(config, tmp_path / "run", "solver.epochs=1", "solver.lr_warmup_step=1", "resume=auto")
    assert "no checkpoint in" in (tmp_path / "run" / "train.log").read_text()
    assert first["epoch"] == 1
    train_run(config, tmp_path / "run", "resume=auto")
    before = (tmp_path / "run" / "last_model.pt").read_bytes()
    train_run(config, tmp_path / "run", "resume=auto")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "finished: epoch 2 of 2; raise solver.epochs to go on" in log
    assert (tmp_path / "run" / "last_model.pt").read_bytes() == before


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(config, tmp_path):
    unbroken = train_run(config, tmp_path / "run")
    last = tmp_path / "run" / "last_model.pt"
    last.write_bytes(last.read_bytes()[:1000])
    assert_equal_runs(unbroken, train_run(config, tmp_path / "run", "resume=auto"))
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"resume: {last}: not a readable checkpoint" in log and "last_model_1.pt" in log
    for path in checkpoints(tmp_path / "run"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="last_model.pt: damaged, and no older checkpoint"):
        train_run(config, tmp_path / "run", "resume=auto")


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_newest_checkpoints_stay_as_the_configuration_says(config, tmp_path, keep):
    train_run(config, tmp_path / "run", "solver.epochs=4", f"logging.keep={keep}")
    found = checkpoints(tmp_path / "run")
    steps = [torch.load(path, weights_only=True) for path in found]
    places = [(state["epoch"], state["step"]) for state in steps]
    assert places == [(4, 0), (3, 4), (3, 0)][:keep]


def test_the_best_model_goes_along_into_another_folder(config, tmp_path):
    train_run(config, tmp_path / "a")
    train_run(config, tmp_path / "b", f"resume={tmp_path / 'a' / 'last_model.pt'}", "solver.epochs=3", "solver.lr=1e-9",
              "--allow_config_change")  # fmt: skip
    best = [torch.load(tmp_path / name / "model_best.pt", weights_only=True) for name in "ab"]
    last = torch.load(tmp_path / "b" / "last_model.pt", weights_only=True)
    assert best[1]["best_accuracy"] == last["best_accuracy"] >= best[0]["best_accuracy"]


def test_a_best_model_that_is_lost_is_no_threshold_for_ever(config, tmp_path):
    train_run(config, tmp_path / "run", "solver.epochs=1", "solver.lr_warmup_step=1")
    (tmp_path / "run" / "model_best.pt").unlink()
    last = train_run(config, tmp_path / "run", "resume=auto")
    best = torch.load(tmp_path / "run" / "model_best.pt", weights_only=True)
    assert best["best_accuracy"] == last["best_accuracy"] and best["epoch"] == 2
    assert "that model is lost" in (tmp_path / "run" / "train.log").read_text()


# ---------------------------------------------------------------- another number of processes


def checkpoint_of(world_size, batch_size, accumulation):
    config = default_config(data={"batch_size": batch_size}, solver={"grad_accumulation_steps": accumulation})
    return {"config": config.toDict(), "world_size": world_size}, config


@pytest.mark.parametrize(
    ("old", "world", "expected"),
    [
        ((8, 32, 1), 4, (32, 2)),
        ((1, 4, 4), 2, (4, 2)),
        ((2, 4, 1), 4, (2, 1)),
        ((8, 32, 1), 1, (32, 8)),
        ((4, 6, 1), 8, (3, 1)),
    ],
)
def test_another_number_of_processes_keeps_the_global_batch(old, world, expected):
    checkpoint, config = checkpoint_of(*old)
    adapted = keep_global_batch(checkpoint, "m.pt", config, world)
    assert (adapted.data.batch_size, adapted.solver.grad_accumulation_steps) == expected
    assert world * expected[0] * expected[1] == math.prod(old)


def test_a_global_batch_that_cannot_be_shared_is_refused_with_the_numbers():
    checkpoint, config = checkpoint_of(2, 4, 1)
    with pytest.raises(ConfigError, match=r"4 videos x 2 process\(es\) x 1 accumulated = 8.*3 processes cannot share"):
        keep_global_batch(checkpoint, "m.pt", config, 3)


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(1, 4, 2), (2, 2, 2), (4, 2, 1), (8, 1, 1)])
def test_every_update_sees_the_same_videos_on_any_number_of_processes(world, batch, accumulation):
    updates, seen = 5, []
    order = partial(epoch_order, 7, num_videos=43)
    samplers = [EpochSampler(order, updates * accumulation * batch, rank, world) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(2, start=2 * accumulation * batch)
        seen.append([index for _, index in sampler])
    order = np.random.default_rng(np.random.SeedSequence(7, spawn_key=(2,))).permutation(43)
    for update in range(3):
        size = accumulation * batch
        together = {index for own in seen for index in own[update * size : (update + 1) * size]}
        assert together == set(order[(update + 2) * 8 : (update + 3) * 8].tolist())


# ---------------------------------------------------------------- the folder


def test_changed_values_are_listed_and_refused_unless_allowed(config, tmp_path):
    train_run(config, tmp_path / "run", "solver.epochs=1", "solver.lr_warmup_step=1")
    changes = ["resume=auto", "solver.lr=0.5", "data.workers=1"]
    with pytest.raises(UserError, match=r"resume: .*solver.lr was 0.001 and is 0.5 now: .*--allow_config_change"):
        train_run(config, tmp_path / "run", *changes)
    train_run(config, tmp_path / "run", *changes, "--allow_config_change")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "data.workers was 0 and is 1 now" in log and "solver.lr was 0.001 and is 0.5 now" in log


def test_an_evaluation_leaves_the_configuration_of_a_run_as_it_is(config, tmp_path):
    train_run(config, tmp_path / "run", "solver.epochs=1", "solver.lr_warmup_step=1")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    last = tmp_path / "run" / "last_model.pt"
    arguments = [f"pretrain={last}", "solver.evaluate=True", "data.workers=1"]
    train_program.main(["--config", config, "--output", str(tmp_path / "run"), *arguments])
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_start_that_fails_leaves_nothing_behind(config, tmp_path):
    with pytest.raises(UserError, match="do not fill one step"):
        train_run(config, tmp_path / "new" / "run", "data.batch_size=64")
    assert not (tmp_path / "new").exists()


def test_a_start_that_fails_changes_nothing_of_a_run_that_is_there(config, tmp_path):
    train_run(config, tmp_path / "run", "solver.epochs=1", "solver.lr_warmup_step=1")

    def files():
        found = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "train.log"]
        return {path: path.read_bytes() for path in found}

    before = files()
    with pytest.raises(UserError):
        train_run(config, tmp_path / "run", "resume=auto", "solver.lr=1")
    assert files() == before


def test_two_runs_never_share_a_folder(tmp_path, monkeypatch):
    config = default_config()
    with (
        RunFolder(config, str(tmp_path / "run")),
        pytest.raises(ConfigError, match="run: another run is writing to it"),
    ):
        RunFolder(config, str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "20260101_000000")
    paths = {RunFolder(config, None).path for _ in range(3)}
    assert len(paths) == 3


@pytest.mark.parametrize("what", ["a file", "below a file"])
def test_an_output_that_cannot_be_a_folder_is_one_line(tmp_path, what):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" if what == "a file" else tmp_path / "file" / "run"
    with pytest.raises(ConfigError, match=r"^--output .*file.*: cannot be made: "):
        RunFolder(default_config(), str(path))


def test_unfinished_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".last_model.pt.x1y2").write_text("half")
    (tmp_path / ".model_best.pt.z3").write_text("half")
    with RunFolder(default_config(), str(tmp_path)):
        assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the writer


STATE = {"trained": {"w": torch.zeros(3)}, "optimizer": {}, "scaler": {}, "tower": None, "best_accuracy": None}


def test_the_state_is_copied_before_the_steps_go_on(tmp_path, monkeypatch):
    from engine import checkpointing

    write = checkpointing.save_last
    monkeypatch.setattr(checkpointing, "save_last", lambda *args: (time.sleep(0.2), write(*args))[1])
    state = {**STATE, "trained": {"w": torch.zeros(3)}}
    writer = BackgroundWriter(tmp_path, 2)
    writer.write(state)
    state["trained"]["w"].fill_(7)
    writer.close()
    assert torch.load(tmp_path / "last_model.pt", weights_only=True)["trained"]["w"].tolist() == [0, 0, 0]


def test_a_full_disk_is_loud_the_run_goes_on_and_the_next_save_is_the_retry(tmp_path, monkeypatch, caplog):
    writer = BackgroundWriter(tmp_path, 2)
    writer.write(STATE)
    writer.wait()
    before = (tmp_path / "last_model.pt").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        writer.write({**STATE, "epoch": 1}, ["model_best.pt"])
        writer.wait()
        assert "CHECKPOINT NOT WRITTEN" in caplog.text and "No space left on device" in caplog.text
        assert (tmp_path / "last_model.pt").read_bytes() == before
        with pytest.raises(UserError, match="could not be written: No space left on device"):
            writer.close()
    writer.write(STATE)
    writer.close()
    best = torch.load(tmp_path / "model_best.pt", weights_only=True)
    assert best["epoch"] == 1  # the best of the failed write is made good


# ---------------------------------------------------------------- signals


def test_a_signal_waits_for_the_step_and_a_second_interrupt_does_not():
    with StopSignals() as signals:
        with pytest.raises(Stopped) as stopped, signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
        assert stopped.value.status == 143 and stopped.value.line == "stopped by SIGTERM"
        signals.received = None
        with pytest.raises(Stopped) as stopped, signals.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second interrupt must raise")
        assert stopped.value.status == 130
        signals.received = None
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_saves_after_the_update_and_the_run_goes_on_from_there(config, tmp_path, monkeypatch):
    unbroken = train_run(config, tmp_path / "whole", "data.batch_size=2")
    wish, calls = Saver._wish, []

    def signalled(self):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return wish(self)

    monkeypatch.setattr(Saver, "_wish", signalled)
    with pytest.raises(Stopped) as stopped:
        train_run(config, tmp_path / "run", "data.batch_size=2", "resume=auto")
    assert "epoch 0, step 5 are in" in stopped.value.line
    state = torch.load(tmp_path / "run" / "last_model.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, 5)
    assert_equal_runs(unbroken, train_run(config, tmp_path / "run", "data.batch_size=2", "resume=auto"))


def test_a_missing_output_of_the_log_is_no_half_file(tmp_path):
    """The folder stays when the start is over, whatever happens then."""
    config = default_config()
    with pytest.raises(Killed), RunFolder(config, str(tmp_path / "run")) as folder:
        folder.begin(config, 1)
        raise Killed
    assert [path.name for path in Path(tmp_path / "run").iterdir()] == ["config.yaml"]


# ---------------------------------------------------------------- values and files that lie


def test_scores_that_are_not_finite_stop_training_and_test_before_anything_is_called_best(
    config, tmp_path, monkeypatch
):
    train_run(config, tmp_path / "run", "solver.epochs=1", "solver.lr_warmup_step=1")
    state = torch.load(tmp_path / "run" / "last_model.pt", weights_only=True)
    state["trained"]["head.bias"][0] = math.nan
    save_checkpoint(tmp_path / "nan.pt", {key: value for key, value in state.items() if "trained_sha" not in key})
    message = r"the scores of 7 of 7 readable videos are not finite, the first: val_00000"
    with pytest.raises(UserError, match=message):
        score_run(config, tmp_path / "nan.pt", tmp_path / "s.npz")
    assert not (tmp_path / "s.npz").exists()
    still = ["solver.lr=1e-30", "solver.epochs=1", "solver.lr_warmup_step=0"]
    monkeypatch.setattr(Reporter, "step", lambda *_: None)  # the loss would be noticed first
    with pytest.raises(UserError, match=message):
        train_run(config, tmp_path / "new", f"pretrain={tmp_path / 'nan.pt'}", *still)
    assert not (tmp_path / "new" / "model_best.pt").exists()


def test_an_evaluation_without_a_checkpoint_is_refused(config, tmp_path):
    with pytest.raises(
        UserError, match="^solver.evaluate: there is no checkpoint to evaluate; set resume or pretrain$"
    ):
        train_run(config, tmp_path / "run", "solver.evaluate=True")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def small_checkpoints(tmp_path_factory):
    """A checkpoint as .pt and as .safetensors, of a model of a few kilobytes."""
    folder = tmp_path_factory.mktemp("small")
    config = default_config(network={"backbone_kwargs": {"patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 1}})
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    model(torch.randn(2, 2, 3, 32, 32)).sum().backward()
    optimizer.step()
    parts = (model_state(model), model.trained.state_dict(), config.toDict(), None)
    state = checkpoint_state(*parts, epoch=1, best_accuracy=50.0, optimizer=optimizer.state_dict(), scaler={})
    save_checkpoint(folder / "m.pt", state)
    save_safetensors(folder / "m.safetensors", state)
    return folder


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_no_flipped_bit_changes_a_value_unnoticed(small_checkpoints, tmp_path, name):
    content = bytearray((small_checkpoints / name).read_bytes())
    sound = read_checkpoint(small_checkpoints / name)
    draw, refused = random.Random(0), 0
    for _ in range(60):
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        content[place] ^= bit
        (tmp_path / name).write_bytes(content)
        content[place] ^= bit
        try:
            flipped = read_checkpoint(tmp_path / name)
        except CheckpointError as error:
            assert "\n" not in error.line
            refused += 1
            continue
        assert equal(flipped, sound), f"byte {place}"  # bytes that only fill up
    assert refused > 40


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or a != a and b != b


def test_a_compressed_archive_is_refused_and_not_read_as_garbage(small_checkpoints, tmp_path):
    import zipfile

    with (
        zipfile.ZipFile(small_checkpoints / "m.pt") as source,
        zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry.filename))
    with pytest.raises(CheckpointError, match="is compressed, as by a zip program"):
        read_checkpoint(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="is compressed, as by a zip program"):
        read_state_dict(tmp_path / "m.pt")


@pytest.mark.parametrize("value", [None, True, -7, 1.5, math.nan, "text", [], [1], {}, {"a": 1}, torch.zeros(2)])
def test_an_entry_of_another_kind_is_one_line_or_of_no_consequence(small_checkpoints, tmp_path, value):
    state = torch.load(small_checkpoints / "m.pt", weights_only=True)
    for name in state:
        torch.save({**state, name: value}, tmp_path / "m.pt")
        try:
            content = read_checkpoint(tmp_path / "m.pt")
        except CheckpointError as error:
            assert "\n" not in error.line and str(tmp_path / "m.pt") in error.line
            continue
        holds = checkpoint_entries.ENTRIES[name][1]
        assert name.endswith("_sha256") or holds(content[name]), (name, value)


# ---------------------------------------------------------------- scores of a test that was interrupted


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_an_interrupted_test_goes_on_and_gives_the_same_scores(config, tmp_path, monkeypatch, stopped_after):
    train_run(config, tmp_path / "run", "solver.epochs=1", "solver.lr_warmup_step=1")
    arguments = (config, tmp_path / "run" / "last_model.pt")
    views = ["--test_crops", "3", "test.view_batch=3"]
    whole = score_run(*arguments, tmp_path / "whole.npz", *views)
    add, seen = PartialScores.add, []

    def interrupted(self, indices, *rows):
        add(self, indices, *rows)
        seen.extend(indices)
        if len(seen) == stopped_after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PartialScores, "add", interrupted)
        with pytest.raises(Killed):
            score_run(*arguments, tmp_path / "s.npz", *views)
    assert not (tmp_path / "s.npz").exists() and list(tmp_path.glob("s.npz.partial-*"))
    with pytest.raises(UserError, match=r"holds scores of another test \(different: test_crops\); remove it"):
        score_run(*arguments, tmp_path / "s.npz", "--test_crops", "5", "test.view_batch=3")
    monkeypatch.setattr(
        PartialScores, "add", lambda self, indices, *rows: (seen.extend(indices), add(self, indices, *rows))
    )
    resumed = score_run(*arguments, tmp_path / "s.npz", *views)
    assert sorted(seen) == list(range(7))  # each video once
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole.files)
    assert not list(tmp_path.glob("s.npz.partial-*"))


def test_a_test_that_goes_on_knows_the_damaged_videos_of_before(tmp_path):
    partial = PartialScores(tmp_path / "s.npz", {"crops": 3})
    partial.add([4, 2], np.zeros((2, 5), np.float32), {2: "b.mp4: damaged"})
    partial.write()
    assert PartialScores(tmp_path / "s.npz", {"crops": 3}).damaged == {2: "b.mp4: damaged"}


@pytest.mark.parametrize("place", ["a folder", "below a file"])
def test_scores_that_cannot_be_written_are_refused_before_any_work(config, tmp_path, place):
    (tmp_path / "file").write_text("")
    path = tmp_path if place == "a folder" else tmp_path / "file" / "s.npz"
    with pytest.raises(UserError, match="cannot be written"):
        score_run(config, tmp_path / "no checkpoint is looked for.pt", path)


def test_a_disk_without_room_for_the_checkpoints_is_refused_at_the_start(config, tmp_path, monkeypatch):
    usage = run_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: usage._replace(free=3_000_000))
    with pytest.raises(
        UserError, match=r"--output .*: 3.0 MB are free, but 4 checkpoints of .* MB need .* MB; make room"
    ):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the device's memory


def test_out_of_memory_is_one_line_with_the_sizes_and_what_to_change(config, tmp_path, monkeypatch):
    train_run(config, tmp_path / "run", "solver.epochs=1", "solver.lr_warmup_step=1")

    def full(self, *inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr(Side4Video, "forward", full)
    with pytest.raises(UserError) as caught:
        train_run(config, tmp_path / "new", "data.batch_size=4", "solver.recompute=False")
    assert caught.value.line == (
        "cpu: out of memory with 4 videos of 1 clip(s) and 4 frames; set solver.recompute=True data.batch_size=4 "
        "solver.grad_accumulation_steps=1, which keeps 4 videos an update"
    )
    with pytest.raises(UserError, match="cpu: out of memory with 4 views at once; set test.view_batch=2"):
        score_run(config, tmp_path / "run" / "last_model.pt", tmp_path / "s.npz")


def test_a_run_of_two_processes_goes_on_in_one_with_the_same_updates(config, tmp_path):
    """The checkpoint is that of one process, labelled as one of two with half of the batch each."""
    settings = ["solver.lr_warmup_step=1", "data.batch_size=4"]
    train_run(config, tmp_path / "run", "solver.epochs=1", *settings)
    for path in checkpoints(tmp_path / "run"):
        state = torch.load(path, weights_only=True)
        state["world_size"], state["config"]["data"]["batch_size"] = 2, 2
        save_checkpoint(path, state)
    train_run(config, tmp_path / "run", "resume=auto", "solver.lr_warmup_step=1", "data.batch_size=2")
    log = (tmp_path / "run" / "train.log").read_text()
    before, now = "2 videos x 2 process(es) x 1 accumulated = 4", "2 videos x 1 process(es) x 2 accumulated = 4"
    assert f"resume: {before} before; now {now}" in log and "effective batch: 2 videos x 1 process(es) x 2" in log
    written = read_config(tmp_path / "run" / "config.yaml")
    assert (written.data.batch_size, written.solver.grad_accumulation_steps) == (2, 2)


def test_an_open_recompute_is_settled_at_the_start_and_kept_by_resumptions(config, tmp_path):
    settings = ["solver.lr_warmup_step=1", "solver.recompute=auto"]
    train_run(config, tmp_path / "run", "solver.epochs=1", *settings)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "solver.recompute: auto becomes True: memory is planned on a GPU only" in log
    assert read_config(tmp_path / "run" / "config.yaml").solver.recompute is True
    for path in checkpoints(tmp_path / "run"):
        state = torch.load(path, weights_only=True)
        assert state["config"]["solver"]["recompute"] is True
        state["config"]["solver"]["recompute"] = False
        save_checkpoint(path, state)
    train_run(config, tmp_path / "run", "resume=auto", *settings)
    assert read_config(tmp_path / "run" / "config.yaml").solver.recompute is False


def test_several_runs_settle_each_their_own_open_recompute(config, tmp_path):
    runs = "runs={open: {solver.recompute: auto}, off: {solver.recompute: False}}"
    settings = ["solver.epochs=1", "solver.lr_warmup_step=1", runs]
    train_program.main(["--config", config, "--output", str(tmp_path / "both"), *settings])
    written = {name: read_config(tmp_path / "both" / name / "config.yaml").solver.recompute for name in ("open", "off")}
    assert written == {"open": True, "off": False}
    together = read_config(tmp_path / "both" / "config.yaml")
    assert {name: own.solver.recompute for name, own in together.runs.items()} == written
