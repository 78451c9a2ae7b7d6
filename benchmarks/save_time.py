"""How long a save holds the steps: written at once, and copied first and written in the background.

    python -m benchmarks.save_time

The state is that of EVA-E's side network, 183 M trained parameters with AdamW's two averages (2.2 GB), random. Writes
benchmarks/results/save_time.txt.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from engine.checkpointing import BackgroundWriter
from engine.run_folder import save_last

RESULTS = Path("benchmarks/results/save_time.txt")
PARAMETERS, ROUNDS = 183_500_000, 3


def main() -> None:
    torch.manual_seed(0)
    parts = 10
    trained = {f"w{i}": torch.randn(PARAMETERS // parts) for i in range(parts)}
    averages = {i: {"exp_avg": torch.randn(PARAMETERS // parts), "exp_avg_sq": torch.rand(PARAMETERS // parts)}
                for i in range(parts)}  # fmt: skip
    state = {"tower": None, "tower_file": "f", "tower_sha256": "0" * 64, "tower_sha256_but_positions": "0" * 64}
    state |= {"trained": trained, "optimizer": {"state": averages, "param_groups": []}, "scaler": {}}
    at_once, held, written = [], [], []
    with tempfile.TemporaryDirectory() as name:
        writer = BackgroundWriter(Path(name), 1)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            save_last(Path(name), state, 1)
            at_once.append(time.perf_counter() - start)
            start = time.perf_counter()
            writer.write(state, False)
            held.append(time.perf_counter() - start)
            writer.close()
            written.append(time.perf_counter() - start)
    size = 3 * sum(tensor.nbytes for tensor in trained.values()) / 1e9
    text = (
        f"{describe_machine()}\n"
        f"a checkpoint of {size:.2f} GB, hashed and brought to the disk; medians of {ROUNDS}\n"
        f"written at once: the step waits {statistics.median(at_once):.2f} s\n"
        f"copied, then written in the background: the step waits {statistics.median(held):.2f} s "
        f"(on the disk after {statistics.median(written):.2f} s)\n"
    )
    RESULTS.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
