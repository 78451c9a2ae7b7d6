"""The table of several runs (`runs`): what each has for itself, and what it came to."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dotmap import DotMap

from engine.run import Run
from engine.run_folder import own_values
from utils.atomic import write_atomically


def table_rows(runs: Sequence[Run], config: DotMap) -> list[dict[str, Any]]:
    """A row for each run, all with the same columns.

    Args:
        config: of the training, with `runs`.

    Returns:
        run             its name
        the keys in which runs differ, each with the value of this run
        trained         number of trained parameters
        epochs          epochs done
        top1            best validation top-1 in percent, None before the first
        best_epoch      the last epoch, from 0, with a better validation than all before, of weights or average
        top1_ema        as top1, of the averaged copy; only if a run has one
    """
    changes = {run.name: own_values(config, run.config) for run in runs}
    keys = list(dict.fromkeys(key for own in changes.values() for key in own))
    rows = []
    for run in runs:
        plain, progress = run.config.toDict(), run.progress
        values = {}
        for key in keys:
            section, _, name = key.rpartition(".")
            values[key] = plain[section][name] if section else plain[name]
        row = {
            "run": run.name,
            **values,
            "trained": sum(parameter.numel() for parameter in run.model.trained.parameters()),
            "epochs": progress.epoch,
            "top1": rounded(progress.best),
            "best_epoch": progress.improved,
        }
        if any(other.average is not None for other in runs):
            row["top1_ema"] = rounded(progress.best_ema)
        rows.append(row)
    return rows


def rounded(accuracy: float | None) -> float | None:
    return None if accuracy is None else round(accuracy, 4)


def write_table(path: Path, runs: Sequence[Run], config: DotMap) -> None:
    """Write the rows of `table_rows` as a csv file, atomically; None is an empty cell."""
    rows = table_rows(runs, config)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def table_lines(runs: Sequence[Run], config: DotMap) -> list[str]:
    """The same rows in lines for the log, with columns that stand below each other."""
    rows = table_rows(runs, config)
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) and value >= 1 else str(value)
