"""Logging of the programs: process 0 writes to stdout and to files, other processes write warnings to stdout."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from utils.distributed import get_rank
from utils.terminal import TerminalHandler, is_terminal

_of_run: ContextVar[str] = ContextVar("of_run", default="")  # the run of `runs` that speaks; empty: all of them


def setup_logging(log_file: Path | None = None, of_runs: Mapping[str, Path] | None = None) -> None:
    """Send all log records of this process to stdout, and on process 0 to files as well.

    Another call replaces the handlers of the call before.

    Args:
        log_file: gets all records, those of a run with its name before them.
        of_runs: for each run, a file for its own records and those of all.
    """
    rank = get_rank()
    handlers: list[logging.Handler] = [TerminalHandler() if is_terminal() else logging.StreamHandler(sys.stdout)]
    if rank == 0 and log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.addFilter(_name_run)
    if rank == 0:
        handlers += [_file_of(name, path) for name, path in (of_runs or {}).items()]
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(of_run)s%(message)s" if rank == 0 else f"%(asctime)s [process {rank}] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=handlers,
        force=True,
    )


@contextmanager
def log_as(run: str) -> Iterator[None]:
    """Records that this thread logs inside are those of a run; with an empty name, of all runs."""
    token = _of_run.set(run)
    try:
        yield
    finally:
        _of_run.reset(token)


def _name_run(record: logging.LogRecord) -> bool:
    record.of_run = f"[{name}] " if (name := _of_run.get()) else ""
    return True


def _file_of(run: str, path: Path) -> logging.Handler:
    """The log of a run reads as if it were alone."""

    def is_own(record: logging.LogRecord) -> bool:
        record.of_run = ""
        return _of_run.get() in ("", run)

    handler = logging.FileHandler(path, encoding="utf-8")
    handler.addFilter(is_own)
    return handler
