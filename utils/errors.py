"""Bad input ends the program with one line that names the file, line or key, and what to do about it."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from utils.signals import Stopped, StopSignals


class UserError(Exception):
    """A mistake in what the user gave: configuration, data, checkpoint. Its message is one line.

    Built from one string, so that a DataLoader can raise a worker's error again in the main process.
    """

    @property
    def line(self) -> str:
        """The message without the traceback that a DataLoader worker wraps around it."""
        last = str(self).strip().rsplit("\n", 1)[-1]
        return last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")


class ConfigError(UserError):
    """A configuration file or an override that cannot be used."""


class DataError(UserError):
    """An annotation list, a frame or a video that cannot be used."""


class CheckpointError(UserError):
    """A weight file or a checkpoint that does not fit."""


def run_program(main: Callable[[list[str]], object]) -> None:
    """Run `main(argv)`; a UserError becomes one line on stderr and exit status 1.

    The line is also appended to the file named by SIDE4VIDEO_ERROR_FILE, so that a script can repeat it below the
    report that torch.distributed.run prints about a failed process.
    """
    try:
        with StopSignals():
            main(sys.argv[1:])
    except UserError as error:
        _end(f"error: {error.line}", 1)
    except Stopped as stopped:
        _end(stopped.line, stopped.status)


def _end(line: str, status: int) -> NoReturn:
    sys.stderr.write(f"{line}\n")
    if path := os.environ.get("SIDE4VIDEO_ERROR_FILE"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    sys.exit(status)
