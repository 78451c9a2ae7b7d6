"""The living line of a terminal, which log lines do not tear apart."""

import logging
import os
import sys

from tqdm import tqdm

LIVING = "in_living_line"  # mark of a log record whose numbers the living line shows


def is_terminal() -> bool:
    """Whether stdout is a terminal that can write a line again."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def living_line(total: int, name: str, done: int = 0, unit: str = "step", show: bool = True) -> tqdm:
    """A line that shows `done` of `total`, and disappears when it is closed. Without a terminal it shows nothing."""
    return tqdm(
        total=total,
        desc=name,
        initial=done,
        unit=unit,
        file=sys.stdout,
        disable=not (show and is_terminal()),
        leave=False,
        dynamic_ncols=True,
        bar_format="{desc} {n_fmt}/{total_fmt} {postfix}",
    )


class TerminalHandler(logging.Handler):
    """Writes records above the living line, and leaves out those that it shows."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, LIVING, False):
            tqdm.write(self.format(record), file=sys.stdout)
