"""Errors in what the user gave. Each ends the program with one line: the file, line or key, and the remedy."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the configuration, the data or a checkpoint. The message is one line.

    The constructor takes one string, because a DataLoader rebuilds a worker's error from its message alone.
    """

    @property
    def line(self) -> str:
        """The message without the traceback that a DataLoader adds to a worker's error."""
        last = str(self).strip().rsplit("\n", 1)[-1]
        return last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")


class ConfigError(UserError):
    """A configuration file or an override is wrong."""


class DataError(UserError):
    """An annotation list, a frame or a video cannot be used."""


class CheckpointError(UserError):
    """A weight file or a checkpoint does not fit the model."""


def run_program(main: Callable[[list[str]], object]) -> None:
    """Run `main(argv)`. A UserError becomes one line on stderr and exit status 1.

    The line is also appended to the file that SIDE4VIDEO_ERROR_FILE names. scripts/launch.sh repeats it below the long
    report of torch.distributed.run.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error.line}\n")
        if path := os.environ.get("SIDE4VIDEO_ERROR_FILE"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"error: {error.line}\n")
        sys.exit(1)
