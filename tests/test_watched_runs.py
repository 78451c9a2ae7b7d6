"""Runs as people watch them: on a real pseudo-terminal, in a pipe, by several processes, in Weights & Biases."""

import fcntl
import importlib.util
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import REPOSITORY, free_port, train_run
from torch import multiprocessing

import train as train_program
from engine.configuration import read_config
from engine.metrics_file import read_rows
from engine.reporter import Reporter
from utils.distributed import close_distributed

ROW = ["logging.print_freq=1", "data.batch_size=2"]
COLUMNS = 120
DATED = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def on_a_terminal(command: list[str]) -> str:
    """All that a program writes to a pseudo-terminal that is COLUMNS wide."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "CUDA_VISIBLE_DEVICES": ""}
    program = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # Linux: nobody has the other side open any more
        pass
    os.close(ours)
    assert program.wait(timeout=60) == 0, written.decode()
    return written.decode()


def screens(written: str) -> list[str]:
    """The line of the cursor each time that something was written to it, and "\n" where it was left for good."""
    seen, line, place = [], "", 0
    for part in re.split(r"(\r|\n)", written):
        if part == "\n":
            seen += [line.rstrip(), "\n"]
            line, place = "", 0
        elif part == "\r":
            place = 0
        elif part:
            assert "\x1b" not in part, "a control sequence that this terminal does not know"
            line = line[:place].ljust(place) + part + line[place + len(part) :]
            place += len(part)
            seen.append(line.rstrip())
    return seen


def test_a_terminal_shows_one_living_line_and_keeps_the_dated_lines(config, tmp_path):
    command = [sys.executable, "train.py", "--config", config, "--output", str(tmp_path / "run"), *ROW]
    seen = screens(on_a_terminal(command))
    left = [line for line, after in zip(seen, seen[1:], strict=False) if after == "\n" and line != "\n"]
    assert left and all(re.match(DATED, line) for line in left), "every line that stays has a date"
    assert sum("validation: top-1" in line for line in left) == 2 and not any(" clips/s" in line for line in left)
    assert seen[-1] == "\n" and [line[20:] for line in left] == [
        line[20:] for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "clips/s" not in line
    ]
    living = [line for line in seen if line.startswith("epoch ")]
    assert max(map(len, living)) < COLUMNS, "it would wrap, and leave its upper half behind"
    pattern = (
        r"epoch \d/2 \d/8, loss \d+\.\d{4}, left \d+:\d\d:\d\d, \d+:\d\d:\d\d in all, \d+\.\d clips/s, "
        r"waiting for data \d+ %, \d+ MB, lr \d\.\de[+-]\d\d"
    )
    full = [line for line in living if re.fullmatch(pattern, line)]
    assert any(line.startswith("epoch 1/2") for line in full)  # the second epoch may be over too soon
    steps = [tuple(map(int, re.match(r"epoch (\d)/2 (\d)/8,", line).groups())) for line in full]
    assert steps == sorted(steps)


def test_a_pipe_gets_plain_lines_with_date(config, tmp_path, capfd):
    train_run(config, tmp_path / "run", *ROW)
    out, _ = capfd.readouterr()
    lines = out.splitlines()
    assert all(re.match(DATED, line) for line in lines) and "\r" not in out and "\x1b" not in out
    steps = [
        line for line in lines if re.search(r" epoch \d \[\d/8\] loss .* clips/s, .* MB, left .* of the run$", line)
    ]
    assert len(steps) == 16
    assert lines == (tmp_path / "run" / "train.log").read_text().splitlines()


class Killed(BaseException):
    pass


WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TWO = ["logging.save_minutes=1e-9", "solver.ema=0.8", "solver.patience=1", "solver.epochs=6", *ROW]


def trainings_of_two(rank: int, folder: str, config: str, ports: list[str]) -> None:
    """Process `rank` of two: an unbroken training, and one that is killed twice; notes which files it has written."""
    written = set()

    def note(event: str, arguments: tuple) -> None:
        if event in WRITES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & FOR_WRITING):
            paths = [os.fspath(path) for path in arguments[:2] if isinstance(path, str | os.PathLike)]
            written.update(path for path in paths if path.startswith(folder))

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    sys.addaudithook(note)
    whole_step = Reporter.step
    results = []
    for (name, steps), port in zip((("whole", 0), ("killed", 3), ("killed", 4), ("killed", 0)), ports, strict=True):
        os.environ["MASTER_PORT"], seen = port, []

        def step(self, iteration, loss, learning_rate, steps=steps, seen=seen):
            """The row of the last step is written, its checkpoint is not."""
            whole_step(self, iteration, loss, learning_rate)
            seen.append(iteration)
            if len(seen) == steps:
                raise Killed

        Reporter.step = step
        try:
            results.append(train_program.train(read_config(config, ["resume=auto", *TWO]), f"{folder}/{name}"))
        except Killed:
            results.append(None)
        close_distributed()
    Path(folder, f"{rank}.txt").write_text(repr((results, sorted(written))))


def test_two_processes_average_stop_and_go_on_as_one_and_only_the_first_writes(config, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    multiprocessing.spawn(trainings_of_two, (str(folder), config, [free_port() for _ in range(4)]), nprocs=2)
    (first, by_first), (second, by_second) = (eval((folder / f"{rank}.txt").read_text()) for rank in range(2))
    assert first == second and first[1] is first[2] is None and first[3] == first[0] is not None
    names = {Path(path).name for path in by_first}
    assert {"train.log", "config.yaml", "metrics.jsonl", "first_batch.png"} <= names and by_second == []

    whole, killed = (torch.load(folder / name / "last_model.pt", weights_only=True) for name in ("whole", "killed"))
    for entry in ("trained", "ema"):
        assert all(torch.equal(tensor, killed[entry][name]) for name, tensor in whole[entry].items())
    assert not all(torch.equal(tensor, whole["trained"][name]) for name, tensor in whole["ema"].items())
    counts = ("epoch", "step", "improved", "best_accuracy", "best_accuracy_ema")
    assert [whole[key] for key in counts] == [killed[key] for key in counts]
    assert whole["epoch"] == whole["improved"] + 2 < 6, "one epoch without a better validation ends the run"

    same = ("kind", "epoch", "step", "loss", "lr", "grad_norm", "top1", "mean_class")
    rows = [
        [[row.get(key) for key in same] for row in read_rows(folder / name / "metrics.jsonl")]
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == whole["epoch"] * (4 + 2)
    logs = [(folder / name / "train.log").read_text() for name in ("whole", "killed")]
    assert all(log.count("finished: no better validation in 1 epochs since epoch") == 1 for log in logs)
    best = [torch.load(folder / name / "model_best_ema.pt", weights_only=True) for name in ("whole", "killed")]
    assert all(torch.equal(tensor, best[1]["trained"][name]) for name, tensor in best[0]["trained"].items())


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a file of wandb, which is a log of LevelDB behind seven bytes: parts in blocks of 32 KiB."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the only part, or the last one
            yield whole
            whole = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is of requirements-extras.txt")
def test_wandb_without_a_network_stores_the_rows_and_goes_on_in_the_same_run(config, tmp_path):
    from wandb.proto import wandb_internal_pb2

    folder = tmp_path / "run"
    for epochs in (1, 2):
        command = [sys.executable, "train.py", "--config", config, "--output", str(folder), "resume=auto", *ROW]
        command += ["logging.wandb=tiny", f"solver.epochs={epochs}", "logging.save_minutes=None"]
        environment = {**os.environ, "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    (name,) = {path.stem.removeprefix("run-") for path in files}
    assert len(files) == 2 and (folder / "wandb_id.txt").read_text().strip() == name
    stored = []
    for path in files:
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                stored.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    rows = read_rows(folder / "metrics.jsonl")
    losses = [(row["epoch"] * 8 + row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
    assert [(values["_step"], values["train/loss"]) for values in stored if "train/loss" in values] == losses
    top1 = [row["top1"] for row in rows if row["kind"] == "validation"]
    assert [values["validation/top1"] for values in stored if "validation/top1" in values] == top1 and len(top1) == 2
    assert any("first_batch" in values for values in stored)
