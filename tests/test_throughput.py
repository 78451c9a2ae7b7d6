"""Shares of time on a clock that the test turns, and the advice that follows from them."""

import logging
import math
import re
from pathlib import Path

import pytest
import torch

import train as train_program
from datasets.annotations import read_annotations
from datasets.readers import FrameFolderReader
from datasets.video_dataset import VideoDataset
from engine import throughput as module
from engine.advice import advice, first_frame_size
from engine.configuration import default_config, read_config
from engine.loops import train_one_epoch
from engine.run import Run
from engine.throughput import STEPS, DeviceClock, HostClock, Throughput
from modules import build_model
from utils.config_schema import FIELDS
from utils.parallel import usable_cores
from utils.precision import resolve_precision

CPU = torch.device("cpu")


class TurnedClock(HostClock):
    """Shows what it is set to."""

    now = 0.0

    def mark(self):
        return self.now


def make_config(**data):
    return default_config(data={"input_size": 224, "workers": 4, "num_segments": 8, "batch_size": 16, **data})


def run(throughput, clock, steps, waiting, copying=0.0, computing=1.0, between=0.0):
    """Steps whose parts take so many seconds, and `between` before each."""
    for _ in range(steps):
        clock.now += between
        for phase, seconds in (("data", waiting), ("copy", copying), ("compute", computing)):
            with throughput.phase(phase):
                clock.now += seconds
        throughput.end_step()


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name in ("engine.throughput", "engine.advice")]


@pytest.fixture(autouse=True)
def at_info_level(caplog):
    caplog.set_level(logging.INFO)


# What is measured


def test_the_shares_are_logged_once_after_50_steps_without_what_lies_between_them(caplog):
    clock = TurnedClock()
    throughput = Throughput(make_config(), CPU, clock=clock)
    run(throughput, clock, 49, waiting=0.05, copying=0.01, computing=0.94, between=100)
    assert lines_of(caplog) == []
    run(throughput, clock, 151, waiting=0.05, copying=0.01, computing=0.94, between=100)
    assert lines_of(caplog) == [
        "throughput: steps 9 to 50: 5.0 % of the time waiting for data, 1.0 % copying it, 94.0 % computing"
    ]


@pytest.mark.parametrize(("workers", "prefetch", "left_out"), [(0, 2, 1), (1, 1, 1), (4, 2, 8), (16, 4, 25)])
def test_the_first_step_and_the_stock_of_the_workers_do_not_count(caplog, workers, prefetch, left_out):
    clock = TurnedClock()
    throughput = Throughput(make_config(workers=workers, prefetch=prefetch), CPU, clock=clock)
    run(throughput, clock, left_out, waiting=0, computing=100)
    run(throughput, clock, STEPS - left_out, waiting=3, computing=1)
    assert lines_of(caplog)[0].startswith(f"throughput: steps {left_out + 1} to 50: 75.0 % of the time waiting")


@pytest.mark.parametrize(("waiting", "advised"), [(9, False), (10, False), (11, True), (90, True)])
def test_advice_comes_above_10_per_cent_of_waiting(caplog, waiting, advised):
    clock = TurnedClock()
    run(Throughput(make_config(), CPU, clock=clock), clock, STEPS, waiting=waiting, computing=100 - waiting)
    report, *rest = lines_of(caplog)
    assert f": {waiting}.0 % of the time waiting" in report
    assert bool(rest) == advised and (not rest or "what to change" in rest[0])
    given = advice(make_config(), waiting / 100, usable_cores(), 1)
    assert rest[1:] == ([f"throughput: - {line}" for line in given] if advised else [])


def test_of_several_processes_the_one_that_waited_longest_is_reported(caplog, monkeypatch):
    monkeypatch.setattr(module, "gather", lambda own: [*own, ([0.5, 0.1, 0.4], 1), ([0.2, 0.7, 0.1], 2)])
    monkeypatch.setattr(module, "get_world_size", lambda: 3)
    monkeypatch.setattr(module, "get_local_world_size", lambda: 3)
    clock = TurnedClock()
    run(Throughput(make_config(), CPU, clock=clock), clock, STEPS, waiting=0.01)
    report, _, first, *_ = lines_of(caplog)
    assert "50.0 % of the time waiting for data, 10.0 % copying it, 40.0 % computing (process 1, which" in report
    assert "3 process(es)" in first


def test_what_all_steps_waited_is_the_same_for_everybody_who_asks():
    clock = TurnedClock()
    throughput = Throughput(make_config(), CPU, clock=clock)
    run(throughput, clock, 2, waiting=1)
    run(throughput, clock, 2, waiting=3)
    assert throughput.waited() == throughput.waited() == (8, 4)
    run(throughput, clock, 60, waiting=5)
    assert throughput.waited() == (308, 64)


def test_training_marks_the_wait_for_a_batch_and_the_work_on_it_over_short_epochs(config, monkeypatch, caplog):
    """Epochs of 20 steps; nothing is logged before the 50th, and the start of an epoch counts as waiting."""
    config = read_config(config, ["data.workers=0", "logging.print_freq=20"])
    clock = TurnedClock()

    class SlowLoader(list):
        def __iter__(self):
            clock.now += 4  # its workers start
            for batch in list.__iter__(self):
                clock.now += 2
                yield batch

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    loader = SlowLoader([{"clips": pixels, "labels": torch.tensor([0, 1])}] * 20)
    model, precision = build_model(config), resolve_precision("fp32", CPU)

    def work(*_):
        clock.now += 6

    model.trained.register_forward_hook(work)
    one = Run(config, model, precision, throughput=Throughput(config, CPU, clock=clock))
    for epoch in range(3):
        assert lines_of(caplog) == []
        train_one_epoch([one], loader, epoch)
        clock.now += 1000  # validation
    waiting, computing = 49 * 2 + 2 * 4, 49 * 6
    share = 100 * waiting / (waiting + computing)
    assert f"steps 2 to 50: {share:.1f} % of the time waiting for data, 0.0 % copying it" in lines_of(caplog)[0]
    assert len(lines_of(caplog)) == 2 + len(advice(config, share / 100, usable_cores(), 1))
    printed = [record.getMessage() for record in caplog.records if record.name == "engine.reporter"]
    assert len(printed) == 3 and all("of which 2.200 s waiting for data" in line for line in printed)


def test_a_training_of_short_epochs_logs_its_shares_once(config, tmp_path):
    overrides = ["solver.epochs=14", "logging.eval_freq=14", "data.workers=1"]  # 4 steps each
    train_program.main(["--config", config, "--output", str(tmp_path / "run"), *overrides])
    found = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "throughput: steps " in line]
    assert len(found) == 1 and "throughput: steps 3 to 50: " in found[0]


@pytest.mark.parametrize("size", [(53, 38), (38, 53)])
def test_the_frame_size_is_that_of_the_first_video_and_unknown_if_it_is_broken(make_frame_folders, size):
    root, list_path = make_frame_folders([1, 1], size)
    records, reader = read_annotations(list_path, 4), FrameFolderReader(root, "img_{:05d}.jpg")
    dataset = VideoDataset(records=records, class_names=None, reader=reader, protocol="kinetics", num_segments=1)
    assert first_frame_size(dataset) == size
    Path(root, records[0].path, "img_00001.jpg").write_bytes(b"no picture")
    assert first_frame_size(dataset) is None


def test_the_devices_clock_waits_only_when_seconds_are_asked_for(monkeypatch):
    class Event:
        count = 0

        def __init__(self, enable_timing):
            assert enable_timing
            self.waited_for = False

        def record(self):
            Event.count += 1
            self.milliseconds = 1500.0 * Event.count

        def synchronize(self):
            self.waited_for = True

        def elapsed_time(self, other):
            assert other.waited_for and not self.waited_for
            return other.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = DeviceClock()
    first, second = clock.mark(), clock.mark()
    assert not second.waited_for
    assert clock.seconds(first, second) == 1.5


# What is advised


@pytest.mark.parametrize(
    ("workers", "waiting", "cores", "processes", "expected"),
    [
        (4, 0.5, 64, 4, "data.workers=8 instead of 4 should keep up; 64 CPU cores for 4 process(es) on this machine"),
        (4, 0.11, 64, 4, "data.workers=5 instead of 4 should keep up"),
        (0, 0.75, 8, 1, "data.workers=3 instead of 0 should keep up"),
        (0, 0.2, 2, 1, "data.workers=1 instead of 0 should keep up"),
        (4, 0.8, 64, 4, "data.workers=15 instead of 4: as many as 64 CPU cores for 4 process(es) on this machine"),
        (15, 0.5, 64, 4, "data.workers is 15, and 64 CPU cores for 4 process(es) on this machine leave room for 15: "),
        (4, 0.5, 2, 4, "data.workers is 4, and 2 CPU cores for 4 process(es) on this machine leave room for 1: more"),
    ],
)
def test_workers_follow_from_the_wait_the_cores_and_the_processes(workers, waiting, cores, processes, expected):
    assert advice(make_config(workers=workers), waiting, cores, processes)[0].startswith(expected)


def test_each_setting_that_costs_time_has_its_line_and_others_have_none():
    def text(frame=None, **data):
        return "\n".join(advice(make_config(**data), 0.5, 64, 4, frame))

    assert "tools/prepare_data.py extract writes frames once, best with --short_side 256" in text(modality="video")
    assert "best with --short_side 336" in text((1280, 720), modality="video", input_size=336)
    assert "data.modality" not in text() + text((1280, 720))
    wide = text((1280, 720))
    assert "frames of 1280 x 720 pixels are decoded only to become 455 x 256" in wide and "side of 256 pixels" in wide
    assert "become 400 x 250: extract them with a shorter side of 250" in text((1280, 720), resize=[250, 400])
    assert "pixels" not in text((340, 256)) + text((256, 340)) + text((427, 240), dataset="something") + text()
    assert "data.rand_aug=False" in text(rand_aug=True) and "rand_aug" not in text()
    assert "data.num_sample=2 with data.batch_size=8" in text() and "num_sample" not in text(num_sample=2)
    more = 4 * 2 * 16 * 8 * 3 * 224**2 / 1e6  # workers, batches, clips, frames
    assert "data.prefetch=4 instead of 2 helps where" in text() and f", for {math.ceil(more)} MB more in each" in text()
    assert "prefetch" not in text(workers=0)


@pytest.mark.parametrize("modality", ["RGB", "video"])
def test_the_advice_names_keys_that_there_are_and_values_that_they_take(modality):
    lines = advice(make_config(modality=modality, rand_aug=True), 0.5, 64, 4, (1280, 720))
    named = [key for line in lines for key in re.findall(r"\b(?:data|network|solver|test|logging)\.\w+", line)]
    assert len(set(named)) >= (6 if modality == "video" else 5) and set(named) <= FIELDS.keys()
    for key, value in re.findall(r"(\w+\.\w+)=(\w+)", "\n".join(lines)):
        FIELDS[key].read({"False": False}.get(value, int(value) if value.isdigit() else value))
