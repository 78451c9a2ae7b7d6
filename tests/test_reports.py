"""Rows, curves and pictures of a run; its averaged copy, its patience, and what is missing before it."""

import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import train_run
from torch import nn

from engine import checkpointing, pictures
from engine.averaging import AveragedWeights
from engine.configuration import default_config, read_config
from engine.metrics import validation_metrics
from engine.metrics_file import MetricsFile, keep_rows, read_rows
from engine.sinks import TerminalSink
from engine.training_state import Progress, finished
from utils.errors import ConfigError

EVERY_UPDATE = "logging.save_minutes=1e-9"
ROW = ["logging.print_freq=1", "data.batch_size=2"]
SAME = ("kind", "epoch", "step", "epochs_done", "loss", "lr", "grad_norm", "top1", "top5", "mean_class")


class Killed(BaseException):
    pass


def kill_at(monkeypatch, updates):
    """The next training ends after so many updates, with its rows written but without their checkpoint."""
    act, seen = checkpointing.Saver._act, []

    def counted(self, decided, epoch, step):
        seen.append(step)
        if len(seen) >= updates:
            self._writer.wait()
            raise Killed
        act(self, decided, epoch, step)

    monkeypatch.setattr(checkpointing.Saver, "_act", counted)


def comparable(folder):
    return [{key: row.get(key) for key in SAME} for row in read_rows(folder / "metrics.jsonl")]


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    return events, {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_killed_run_has_every_row_once_and_the_same_average_as_an_unbroken_one(config, tmp_path, monkeypatch):
    settings = [EVERY_UPDATE, "solver.ema=0.9", "solver.grad_accumulation_steps=2", *ROW]
    whole = train_run(config, tmp_path / "whole", *settings)
    for updates in (3, 3):
        with monkeypatch.context() as patch:
            kill_at(patch, updates)
            with pytest.raises(Killed):
                train_run(config, tmp_path / "killed", "resume=auto", *settings)
    killed = train_run(config, tmp_path / "killed", "resume=auto", *settings)
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
    for name, tensor in whole["ema"].items():
        assert torch.equal(tensor, killed["ema"][name]), name
    assert any(not torch.equal(tensor, whole["trained"][name]) for name, tensor in whole["ema"].items())
    best = [torch.load(tmp_path / name / "model_best_ema.pt", weights_only=True) for name in ("whole", "killed")]
    assert "optimizer" not in best[0] and best[0]["best_accuracy"] == whole["best_accuracy_ema"]
    assert all(torch.equal(tensor, best[1]["trained"][name]) for name, tensor in best[0]["trained"].items())

    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == 2 * [*["train"] * 8, "validation", "validation_ema"]
    train, validation = rows[0], rows[8]
    assert {"kind", "epoch", "step", "time", "loss", "lr", "grad_norm", "clips_per_second", "waiting", "memory_mb"} <= (
        train.keys()
    )
    assert {"top1", "top5", "mean_class", "loss"} <= validation.keys() and train["memory_mb"] > 50
    events, steps = scalars(tmp_path / "killed")
    assert steps["train/loss"] == list(range(1, 17)) and steps["validation/top1"] == [8, 16]
    assert [event.step for event in events.Images("first_batch")] == [0]
    assert Image.open(tmp_path / "killed" / "first_batch.png").width >= 4 * 96
    log = (tmp_path / "whole" / "train.log").read_text()
    assert log.count("peak memory: process ") == 2
    plan = log.partition("epoch 0 [")[0].splitlines()
    assert 10 < len(plan) < 30 and any("average: of about the last 10 updates" in line for line in plan)


def test_rows_go_along_into_another_folder(config, tmp_path):
    train_run(config, tmp_path / "a", "solver.epochs=1", "solver.lr_warmup_step=1", *ROW)
    train_run(config, tmp_path / "b", f"resume={tmp_path / 'a' / 'last_model.pt'}", *ROW)
    assert [row["epoch"] for row in read_rows(tmp_path / "b" / "metrics.jsonl")] == 9 * [0] + 9 * [1]
    assert scalars(tmp_path / "b")[1]["train/loss"] == list(range(1, 17))


def test_rows_beyond_the_checkpoint_and_half_a_line_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    places = [("train", 0, 4), ("validation", 0, 4), ("train", 1, 2), ("train", 1, 3), ("validation", 1, 3)]
    path.write_text("".join(json.dumps(dict(zip(("kind", "epoch", "step"), p, strict=True))) + "\n" for p in places))
    with open(path, "a") as file:
        file.write('{"kind": "tra')
    keep_rows(path, path, 1, 2)
    assert [(row["kind"], row["epoch"], row["step"]) for row in read_rows(path)] == places[:3]
    keep_rows(path, path, 0, 4)  # before the evaluation
    assert [(row["kind"], row["step"]) for row in read_rows(path)] == [("train", 4)]
    keep_rows(path, path, 0, 0)
    assert not path.exists()


def test_numbers_that_json_has_not_are_null(tmp_path):
    MetricsFile(tmp_path / "m").write({"kind": "train", "epoch": 0, "step": 1, "grad_norm": math.inf}, "")
    assert read_rows(tmp_path / "m")[0]["grad_norm"] is None


def test_the_average_is_the_written_out_sum_and_the_weights_come_back():
    torch.manual_seed(0)
    module = nn.BatchNorm1d(3)
    average, decay = AveragedWeights(module, 0.75), 0.75
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for step in range(4):
        with torch.no_grad():
            module.weight.add_(torch.randn(3))
            module(torch.randn(5, 3))
        average.update(module)
        for name, tensor in module.state_dict().items():
            floating = tensor.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * tensor if floating else tensor.clone()
        assert step >= 0
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(Killed), average.in_place_of(module):
        torch.testing.assert_close(dict(module.state_dict()), expected)
        raise Killed
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    torch.testing.assert_close(average.state_dict(), expected)


def test_patience_ends_a_run_and_its_resumption(config, tmp_path):
    settings = ["solver.epochs=5", "solver.patience=1", "solver.lr=1e-30", "solver.lr_warmup_step=0", "data.flip=False"]
    last = train_run(config, tmp_path / "run", *settings)
    assert (last["epoch"], last["improved"]) == (2, 0)
    train_run(config, tmp_path / "run", "resume=auto", *settings)
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("finished: no better validation in 1 epochs since epoch 0; raise solver.patience to go on") == 2
    more = train_run(config, tmp_path / "run", "resume=auto", *settings, "solver.patience=2")
    assert more["epoch"] == 3


def test_patience_counts_a_better_average_and_looks_after_evaluations_only():
    config = default_config(solver={"epochs": 9, "patience": 2}, logging={"eval_freq": 2})
    progress = Progress()
    assert progress.take(1, 50.0) and not progress.take(3, 50.0) and progress.improved == 1
    assert finished(3, 1, config) is None and finished(5, 1, config) is None
    assert "in 2 epochs since epoch 1" in finished(4, 1, config)
    assert progress.take(3, 10.0, averaged=True) and progress.improved == 3
    assert finished(4, progress.improved, config) is None and finished(2, None, config) is None


def test_validation_metrics_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(7), 40).astype(np.float32)
    labels = rng.integers(0, 6, 40)
    scores[3] = np.nan
    right = [bool(not np.isnan(s).any() and s.argmax() == label) for s, label in zip(scores, labels, strict=True)]
    of_class = [np.mean([r for r, other in zip(right, labels, strict=True) if other == label]) for label in set(labels)]
    found = validation_metrics(scores, labels)
    assert found["top1"] == pytest.approx(100 * np.mean(right))
    assert found["mean_class"] == pytest.approx(100 * np.mean(of_class))
    losses = [-math.log(s[label]) for s, label in zip(scores, labels, strict=True) if not np.isnan(s).any()]
    assert found["loss"] == pytest.approx(np.mean(losses))
    assert validation_metrics(scores[:, :5] / 2, labels % 5)["top5"] is None


def test_the_picture_shows_the_pixels_that_enter_the_model():
    pixels = torch.randint(0, 256, (2, 3, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    shape = (1, 1, 3, 1, 1)
    clips = (pixels / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    page = pictures.batch_picture(clips, torch.tensor([1, 0]), mean, std, ["left", "right"])
    line = pictures.LINE
    assert page.shape == (2 * (96 + line), 3 * 96, 3)
    for clip in range(2):
        for frame in range(3):
            top, left = clip * (96 + line) + line, frame * 96
            shown = page[top : top + 96, left : left + 96]
            assert np.array_equal(shown, pixels[clip, frame].permute(1, 2, 0).numpy())
    mixture = torch.tensor([0.02, 0.6, 0.34, 0.02, 0.02])
    assert pictures.describe_target(mixture, None) == "class 1 0.60 + class 2 0.34"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_living_line_and_a_pipe_none(monkeypatch):
    for output, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setenv("TERM", "xterm")
        sink = TerminalSink(epochs=3)
        sink.start_epoch(0, 5, 0)
        sink.write({"kind": "train"}, "epoch 0 [1/5] loss 1.2345, left 0:01:00 of the epoch, 0:02:00 of the run")
        for _ in range(5):
            sink._line and setattr(sink._line, "last_print_t", 0)
            sink.step()
        sink.close()
        assert ("epoch 1/3" in output.getvalue()) == shown and "\n" not in output.getvalue()


def test_all_that_is_missing_is_named_in_one_line(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gone = [f"data.{key}=gone" for key in ("train_list", "val_root", "label_list")]
    with pytest.raises(ConfigError) as caught:
        read_config(
            config, [*gone, "network.init=True", "network.arch=ViT-B/16", "network.backbone_kwargs={}"], complete=True
        )
    line = caught.value.line
    assert line.startswith("4 things are missing: ") and "\n" not in line
    assert all(f"data.{key}: no such" in line for key in ("train_list", "val_root", "label_list"))
    assert "network.init: clip_pretrain/ViT-B-16.pt is not there" in line


def test_wandb_that_is_not_installed_is_one_line(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="^logging.wandb: the package wandb is not installed; pip install -r req"):
        read_config(config, ["logging.wandb=mine"], complete=True)


def test_wandb_is_told_the_rows(config, tmp_path, monkeypatch):
    class Run:
        def __init__(self):
            self.rows, self.ended = [], False

        def log(self, values, step):
            self.rows.append((step, values))

        def finish(self):
            self.ended = True

    class Fake:
        __spec__ = object()
        run = Run()

        @classmethod
        def init(cls, **arguments):
            cls.arguments = arguments
            return cls.run

        @staticmethod
        def Image(pixels):
            return pixels.shape

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    train_run(config, tmp_path / "run", "logging.wandb=mine", *ROW)
    assert Fake.arguments["project"] == "mine" and Fake.run.ended
    assert [step for step, values in Fake.run.rows if "train/loss" in values] == list(range(1, 17))
    assert (tmp_path / "run" / "wandb_id.txt").read_text().strip() == Fake.arguments["id"]
