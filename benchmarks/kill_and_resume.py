"""Trainings that are killed at random moments and resumed must end like one that was never interrupted, to the bit.

    python -m benchmarks.kill_and_resume [--kills N] [--seed N]

Each setting is trained once without interruption. Then it is started again and again with `resume=auto` and killed with
SIGKILL, a quarter of the times while a checkpoint is being written, until the kills are used up; the last start may
end. Weights, optimizer, best accuracy, best model and the loss and accuracy of each epoch must be equal.
Writes benchmarks/results/kill_and_resume.txt.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from modules.hashing import hash_tensors

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results/kill_and_resume.txt")
COMMON = [
    *("data.num_segments=4", "data.input_size=32", "network.backbone_kwargs={patch_size: 8, depth: 2}"),
    *("network.drop_fc=0.5", "solver.epochs=3", "solver.lr_warmup_step=1", "logging.save_minutes=0.0001"),
]
AUGMENTED = ["data.rand_aug=True", "data.rand_erase=True", "solver.mixup=True", "data.num_sample=2"]


@dataclass(frozen=True)
class Setting:
    """One training: its name, its number of processes and its values."""

    name: str
    processes: int
    overrides: list[str]


SETTINGS = [
    Setting("1 process, no workers, dropout", 1, ["data.workers=0", "data.batch_size=4"]),
    Setting(
        "1 process, 2 workers, accumulation, every augmentation",
        1,
        ["data.workers=2", "data.batch_size=4", "solver.grad_accumulation_steps=2", *AUGMENTED],
    ),
    Setting(
        "2 processes, no workers, unreadable videos skipped",
        2,
        ["data.workers=0", "data.batch_size=4", "data.on_error=skip"],
    ),
    Setting(
        "2 processes, 2 workers, every augmentation, BatchNorm over both",
        2,
        ["data.workers=2", "data.batch_size=4", "solver.sync_bn=True", *AUGMENTED],
    ),
]


def make_data(root: Path) -> list[str]:
    """48 generated training videos, two of them broken for `on_error: skip`; the keys that name them."""
    command = [sys.executable, "-m", "tools.motion_demo", str(root), "--train_videos", "48", "--val_videos", "10"]
    subprocess.run([*command, "--size", "32", "--num_frames", "6"], cwd=REPOSITORY, check=True, capture_output=True)
    lists = {}
    for part in ("train", "val"):
        lists |= {f"data.{part}_root": root / "frames", f"data.{part}_list": root / f"{part}.txt"}
    return [*(f"{key}={value}" for key, value in lists.items()), f"data.label_list={root / 'classes.csv'}"]


def break_videos(root: Path, names: list[str]) -> None:
    for name in names:
        for frame in (root / "frames" / name).iterdir():
            frame.write_bytes(b"no picture")


def start(setting: Setting, data: list[str], output: Path) -> subprocess.Popen:
    """Start the training in a process group of its own."""
    command = [sys.executable]
    if setting.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.processes)]
    command += ["train.py", "--config", "configs/demo/motion.yaml", "--output", str(output), "resume=auto"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [*command, *data, *COMMON, *setting.overrides],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def run_to_the_end(setting: Setting, data: list[str], output: Path) -> None:
    process = start(setting, data, output)
    _, errors = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"{setting.name}: the training failed:\n{errors}")


def run_killed(setting: Setting, data: list[str], output: Path, kills: int, draw: random.Random) -> tuple[int, int]:
    """Kill and resume until the training ends or `kills` are used up. Returns (kills, those that hit a write)."""
    done = during_save = 0
    while done < kills:
        process = start(setting, data, output)
        in_save = draw.random() < 0.5
        # The steps of all epochs take a second or two, so the moments are drawn from that.
        moment = draw.uniform(0.0, 1.0)
        written = newest_time(output)
        while process.poll() is None and newest_time(output) == written:  # until the first checkpoint of this start
            time.sleep(0.001)
        until = time.monotonic() + moment
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        if in_save:
            while process.poll() is None and not unfinished(output):
                pass
        if process.poll() is not None:  # it was faster; what it has done stays
            if process.returncode:
                raise RuntimeError(f"{setting.name}: the training failed:\n{process.communicate()[1]}")
            break
        os.killpg(process.pid, signal.SIGSTOP)  # so that what is counted as a write is one
        during_save += bool(unfinished(output))
        kill(process)
        done += 1
    run_to_the_end(setting, data, output)
    return done, during_save


def newest_time(output: Path) -> int:
    try:
        return (output / "last_model.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def unfinished(output: Path) -> list[Path]:
    """Files of a write that is going on."""
    return [path for name in ("last_model", "model_best") for path in output.glob(f".{name}*")]


def outcome(output: Path) -> dict[str, object]:
    """What must be equal."""
    last, best = (torch.load(output / name, weights_only=True) for name in ("last_model.pt", "model_best.pt"))
    epochs = {}
    for line in (output / "train.log").read_text(encoding="utf-8").splitlines():
        if match := re.search(r"epoch (\d+) done: (.*)|epoch (\d+): (\d+ training videos could not .*)", line):
            epochs[match[1] or f"unreadable {match[3]}"] = re.sub(r" object at 0x\w+", "", match[2] or match[4])
    return {
        "weights": hash_tensors(last["trained"]),
        "optimizer": [
            {key: hash_tensors({key: value}) for key, value in state.items()}
            for state in last["optimizer"]["state"].values()
        ],
        "epoch": (last["epoch"], last["step"]),
        "best accuracy": (last["best_accuracy"], best["best_accuracy"]),
        "best model": (best["epoch"], hash_tensors(best["trained"])),
        "metrics of each epoch": epochs,
    }


def compare(setting: Setting, folder: Path, kills: int, draw: random.Random) -> str:
    """Train unbroken and killed, and say how it went; RuntimeError if anything differs."""
    data = make_data(folder / "data")
    if "data.on_error=skip" in setting.overrides:
        break_videos(folder / "data", ["train_00003", "train_00017"])
    run_to_the_end(setting, data, folder / "whole")
    whole = outcome(folder / "whole")
    runs = done = during_save = 0
    while done < kills:
        output = folder / f"killed_{runs}"
        new, new_during_save = run_killed(setting, data, output, kills - done, draw)
        runs, done, during_save = runs + 1, done + new, during_save + new_during_save
        killed = outcome(output)
        different = [name for name in whole if whole[name] != killed[name]]
        if different:
            values = "\n".join(f"{name}: {whole[name]}\n  killed: {killed[name]}" for name in different)
            raise RuntimeError(f"{setting.name}: after {done} kills these differ:\n{values}")
    return f"{setting.name}: {done} kills in {runs} runs, {during_save} of them during a save: all equal to the bit"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_and_resume", description="Kill and resume.")
    parser.add_argument("--kills", type=int, default=20, help="in all settings together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    draw, lines = random.Random(args.seed), [describe_machine()]
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(compare(setting, Path(folder), args.kills // len(SETTINGS), draw))
        sys.stdout.write(lines[-1] + "\n")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
