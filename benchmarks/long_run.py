"""Does anything grow in a long training? 2,000 steps with workers, evaluations and checkpoints, watched from outside.

    python -m benchmarks.long_run [--steps N]

Memory (PSS of all processes: shared pages count once), open files and processes are read from /proc every second, on
generated videos with a tower of two blocks. Medians of the first and of the last quarter after warm-up are compared.
Writes benchmarks/results/long_run.txt.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results/long_run.txt")
VIDEOS, BATCH = 320, 8


def family(root: int) -> list[int]:
    """A process and all of its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def measure(root: int) -> tuple[float, int, int]:
    """(MiB of memory, open files, processes) of a process and its descendants."""
    memory = files = 0
    processes = family(root)
    for process in processes:
        try:
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    memory += int(line.split()[1])
            files += len(os.listdir(f"/proc/{process}/fd"))
        except OSError:
            continue  # it has ended in between
    return memory / 1024, files, len(processes)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run", description="Does anything grow?")
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args(argv)
    epochs = max(2, args.steps * BATCH // VIDEOS)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = [sys.executable, "-m", "tools.motion_demo", str(root / "data"), "--train_videos", str(VIDEOS)]
        size = ["--val_videos", "40", "--size", "32", "--num_frames", "6"]
        subprocess.run([*data, *size], cwd=REPOSITORY, check=True, capture_output=True)
        command = [sys.executable, "train.py", "--config", "configs/demo/motion.yaml", "--output", str(root / "run")]
        for part in ("train", "val"):
            command += [f"data.{part}_root={root}/data/frames", f"data.{part}_list={root}/data/{part}.txt"]
        command += [f"data.label_list={root}/data/classes.csv", "data.num_segments=4", "data.input_size=32"]
        command += [f"data.batch_size={BATCH}", "data.workers=2", "network.backbone_kwargs.depth=2"]
        command += [f"solver.epochs={epochs}", "logging.save_minutes=0.05"]
        samples = []
        with open(root / "log", "w") as log:
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                time.sleep(1)
                samples.append(measure(process.pid))
        if process.returncode:
            raise RuntimeError((root / "log").read_text()[-2000:])
    samples = samples[10:-1]  # start-up, and the moment of the end
    quarter = len(samples) // 4
    lines = [describe_machine(), f"{epochs * VIDEOS // BATCH} steps, {epochs} evaluations, {len(samples)} samples"]
    for number, what in enumerate(("MiB of memory", "open files", "processes")):
        first, last = (
            statistics.median(sample[number] for sample in part) for part in (samples[:quarter], samples[-quarter:])
        )
        lines.append(f"{what}: median of the first quarter {first:.0f}, of the last {last:.0f}")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
