"""The numbers of a run as a file: one JSON object a line, in step with the checkpoint that a run goes on from."""

import json
import math
from pathlib import Path
from typing import Any

from engine.sinks import Row, Sink
from utils.atomic import write_atomically

METRICS = "metrics.jsonl"


class MetricsFile(Sink):
    """Appends rows to a file, each at once, so that a killed run keeps all rows of its steps.

    A row that the disk has no room for stays in memory and is written with the next one.
    """

    def __init__(self, path: Path):
        self._path = path
        self._waiting = b""

    def write(self, row: Row, text: str) -> None:
        self._waiting += (json.dumps(plain(row)) + "\n").encode()
        size = self._path.stat().st_size if self._path.exists() else 0
        with open(self._path, "ab", buffering=0) as file:
            try:
                written = file.write(self._waiting)
                complete = written == len(self._waiting)
            except OSError:
                complete = False
                file.truncate(size)
                raise
            if not complete:
                file.truncate(size)
                raise OSError(28, "No space left on device", str(self._path))
        self._waiting = b""


def plain(row: Row) -> Row:
    """The row with null for numbers that JSON does not have."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; [] if there is none. A line that is not complete is left out."""
    rows: list[Any] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and {"kind", "epoch", "step"} <= row.keys()]


def keep_rows(source: Path, target: Path, epoch: int, step: int) -> None:
    """Write to `target` the rows of `source` that a checkpoint has behind it, and no others.

    A run that goes on makes the later rows again. Both paths may be the same file.

    Args:
        epoch, step: epochs that were finished, and iterations of the next one, as in a checkpoint.
    """
    kept = [row for row in read_rows(source) if is_behind(row, epoch, step)]
    if kept:
        content = "".join(json.dumps(row) + "\n" for row in kept).encode()
        if source != target or content != target.read_bytes():
            write_atomically(target, lambda file: file.write(content))
    else:
        target.unlink(missing_ok=True)


def is_behind(row: Row, epoch: int, step: int) -> bool:
    """Whether a row belongs to what was done before (epoch, step). An evaluation ends its epoch."""
    return row["epoch"] < epoch or (row["epoch"] == epoch and row["kind"] == "train" and row["step"] <= step)
