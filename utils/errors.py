"""Errors in what the user gave. Each ends the program with one line: the file, line or key, and the remedy."""

import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

from utils.launch import ERRORS
from utils.signals import Stopped, StopSignals

CLOSED_PIPE = 141  # 128 + SIGPIPE


class UserError(Exception):
    """A mistake in the configuration, the data or a checkpoint. The message is one line.

    The constructor takes one string, because a DataLoader rebuilds a worker's error from its message alone.
    """

    @property
    def line(self) -> str:
        """The message without the traceback that a DataLoader adds to a worker's error."""
        last = str(self).strip().rsplit("\n", 1)[-1]
        line = last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")
        return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)


class ConfigError(UserError):
    """A configuration file or an override is wrong."""


class DataError(UserError):
    """An annotation list, a frame or a video cannot be used."""


class CheckpointError(UserError):
    """A weight file or a checkpoint does not fit the model."""


def quoted(value: object) -> str:
    """A value for an error message: in quotes, control characters escaped, at most 80 characters of it."""
    text = repr(value[:80] if isinstance(value, str) else value)
    long = len(value) > 80 if isinstance(value, str) else len(text) > 80
    return f"{text if isinstance(value, str) else text[:80]}{'...' if long else ''}"


def run_program(main: Callable[[list[str]], object]) -> None:
    """Run `main(argv)`. A UserError becomes one line on stderr and exit status 1.

    If nobody reads the output any more, as after `| head`, the program ends without a message and with the status that
    the signal SIGPIPE gives. Parts of file names that are not UTF-8 are printed with a backslash.

    The line is also appended to the file that SIDE4VIDEO_ERROR_FILE names; utils/launch.py repeats it as the last one.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with StopSignals(), preferring_stop():
            main(sys.argv[1:])
            if sys.stdout is not None:  # None: the program was started without one
                sys.stdout.flush()  # at the end of the process, Python would report a closed pipe
    except UserError as error:
        _end(f"error: {error.line}", 1)
    except Stopped as stopped:
        _end(stopped.line, stopped.status)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_closed_pipe(sys.stdout):
            _discard(sys.stdout)
            sys.exit(CLOSED_PIPE)
        where = f"{error.filename}: " if error.filename else ""
        _end(f"error: {where}{error.strerror or error}", 1)
    except MemoryError:
        _end("error: not enough memory; lower data.batch_size, data.workers or data.prefetch", 1)


@contextmanager
def preferring_stop() -> Iterator[None]:
    """Raise Stopped again in place of an error that it has caused, such as that of a loader that was stopped too.

    A program that turns a stop into its own error with `raise ... from None` keeps that error.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, Stopped):
                raise cause from None
            cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        raise


def _end(line: str, status: int) -> NoReturn:
    sys.stderr.write(f"{line}\n")
    if path := os.environ.get(ERRORS):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    if _is_closed_pipe(sys.stdout):
        _discard(sys.stdout)
    sys.exit(status)


def _discard(stream: TextIO) -> None:
    """Send what is still buffered to nowhere, so that the end of the process does not report the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_closed_pipe(stream: TextIO | None) -> bool:
    """Whether the reader of a pipe has closed its end."""
    if stream is None:
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file of the operating system
        return False
