"""Logging of the programs: process 0 to stdout and to a file, the others only what is a warning."""

import logging
import sys
from pathlib import Path

from utils.distributed import get_rank


def setup_logging(log_file: Path | None = None) -> None:
    """Route all loggers of this process. Calling it again replaces what an earlier call set up."""
    rank = get_rank()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if rank == 0 and log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s [process {rank}] %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
