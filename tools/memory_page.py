"""Print docs/memory.md: what every shipped configuration needs, by the plan.

python -m tools.memory_page > docs/memory.md
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from dotmap import DotMap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.plan import CONTEXT_BYTES, GAPS, Memory, rehearsing, resolve_for_gpu
from engine.summary import PAPER_GPUS
from utils.config import load_config

HEAD = f"""# Memory

Printed by `python -m tools.memory_page > docs/memory.md`. No GPU has run for this page: the numbers are counted in a
dry run of the real training step and test, on tensors without values, under the rules of CUDA's autocast in bf16.
`benchmarks/results/plan_check.txt` compares the same count on the CPU with the allocator of real steps.

```
python tools/plan.py configs/k400/vitb16.yaml --gpu 24GB --gpus 4
```

plans one run: memory by part, whether it fits, the largest batch and `test.view_batch`, the accumulation that keeps the
recipe's batch, steps, and GPU hours as arithmetic. `--videos N` gives the length of a list that is not on this machine.
`key=value` changes the configuration.

What the count sees: every tensor, from the operator that makes it until it is freed. What is kept for the backward pass
is what PyTorch and the functions of `modules/` save while the model's own code runs. What it does not see: the CUDA
context, workspaces inside kernels and libraries, and gaps between tensors. `tools/plan.py` holds back
{CONTEXT_BYTES / 1e9:.2f} GB and {100 * GAPS:.0f} % for them, which is an assumption. A run on a GPU logs the real peak
beside the planned one.

Each process with the batch of the file, on {PAPER_GPUS} GPUs (GB are 10^9 bytes):

- model: parameters and buffers; state: gradients, the optimizer's averages, and the buckets that average gradients.
- kept: between forward and backward pass, with and without `solver.recompute`.
- peak: the most at once in a training step, with and without `solver.recompute`.
- test: the peak with `test.view_batch` views at once (by default, the batch size).
- card: memory of the smallest GPU that trains it with `solver.recompute`, with what is held back.

"""
COLUMNS = ("configuration", "batch", "model", "state", "kept", "peak", "test", "card")


def main() -> None:
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(path) for path in configurations())]
    sys.stdout.write(HEAD + table(rows))


def configurations() -> list[Path]:
    """The shipped configurations that are runs, and not only bases of others."""
    return sorted(path for path in Path("configs").rglob("*.yaml") if path.name != "base.yaml")


def table(rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def row(path: Path) -> tuple[str, ...]:
    """The table's row of a configuration."""
    config = resolve_for_gpu(load_config(path, purpose="model"))
    with rehearsing(config) as rehearsal:
        on, off = (rehearsal.train(config.data.batch_size, recompute) for recompute in (True, False))
        test = rehearsal.test(config.test.view_batch)
    peaks = [memory.process_peak(config, PAPER_GPUS) for memory in (on, off)]
    return (
        f"`{path}`",
        describe_batch(config),
        _gb(sum(on.parameters.values())),
        _gb(state_bytes(on)),
        f"{_gb(on.kept)}, {_gb(off.kept)}",
        ", ".join(map(_gb, peaks)),
        _gb(test),
        _gb(peaks[0] * (1 + GAPS) + CONTEXT_BYTES),
    )


def describe_batch(config: DotMap) -> str:
    """Videos, and clips of each if there are several, by frames."""
    data = config.data
    videos = f"{data.batch_size} x {data.num_sample}" if data.num_sample > 1 else str(data.batch_size)
    return f"{videos} clips of {data.num_segments}"


def state_bytes(memory: Memory) -> int:
    """What training adds to the model in each of several processes."""
    return 2 * memory.gradients + memory.optimizer


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 9.95e9 else f"{size / 1e9:.1f}"


if __name__ == "__main__":
    main()
