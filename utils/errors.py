"""Errors in what the user gave. Each ends the program with one line: the file, line or key, and the remedy."""

import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

CLOSED_PIPE = 141  # 128 + SIGPIPE


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

    If nobody reads the output any more, as after `| head`, the program ends without a message and with the status that
    the signal SIGPIPE gives. Parts of file names that are not UTF-8 are printed with a backslash.

    The line is also appended to the file that SIDE4VIDEO_ERROR_FILE names. scripts/launch.sh repeats it below the long
    report of torch.distributed.run.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # at the end of the process, Python would report a broken pipe
    except BrokenPipeError:
        if not _is_closed_pipe(sys.stdout):
            raise
        _discard(sys.stdout)
        sys.exit(CLOSED_PIPE)
    except UserError as error:
        sys.stderr.write(f"error: {error.line}\n")
        if path := os.environ.get("SIDE4VIDEO_ERROR_FILE"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"error: {error.line}\n")
        if _is_closed_pipe(sys.stdout):
            _discard(sys.stdout)
        sys.exit(1)


def _discard(stream: TextIO) -> None:
    """Send what is still buffered to nowhere, so that the end of the process does not report the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_closed_pipe(stream: TextIO) -> bool:
    """Whether the reader of a pipe has closed its end."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file of the operating system
        return False
