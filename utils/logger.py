"""Logging of the programs: process 0 writes to stdout and to a file, other processes write warnings to stdout."""

import logging
import sys
from pathlib import Path

from utils.distributed import get_rank
from utils.terminal import TerminalHandler, is_terminal


def setup_logging(log_file: Path | None = None) -> None:
    """Send all log records of this process to stdout, and on process 0 to `log_file` as well.

    Another call replaces the handlers of the call before.
    """
    rank = get_rank()
    handlers: list[logging.Handler] = [TerminalHandler() if is_terminal() else logging.StreamHandler(sys.stdout)]
    if rank == 0 and log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s [process {rank}] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=handlers,
        force=True,
    )
