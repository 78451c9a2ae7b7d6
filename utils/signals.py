"""Signals: those that ask a program to stop (SIGTERM and SIGUSR1 of schedulers, SIGINT of Ctrl-C), and SIGCHLD."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal has stopped the program. `run_program` ends it with `status` and one line.

    A KeyboardInterrupt, because code that clears up after Ctrl-C must do the same after the other signals.
    """

    def __init__(self, number: int, saved: str = ""):
        super().__init__(number)
        self.number, self.saved = number, saved

    @property
    def status(self) -> int:
        """What shells and schedulers expect: 130 for Ctrl-C, 143 otherwise."""
        return 130 if self.number == signal.SIGINT else 143

    @property
    def line(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}{self.saved and '; ' + self.saved}"


class StopSignals:
    """Receives STOP_SIGNALS while this context is entered.

    A signal raises Stopped at once. Inside `deferred()` it is only remembered in `received`, so that a step can end
    and be saved; a second SIGINT raises at once there too. Processes forked inside ignore SIGINT and SIGUSR1, which a
    terminal or a scheduler sends to all: their parent ends them.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, signals wait for somebody to look at `received`. One that nobody has looked at raises at the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            raise Stopped(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        again, self.received = self.received is not None and number == signal.SIGINT, number
        if again or not self._deferred:
            raise Stopped(number)


@contextmanager
def ignoring_ended_children() -> Iterator[None]:
    """Inside, the end of a child process calls no handler.

    torch's handler raises when a loader process has failed. Where it does so inside Process.join, Python has already
    taken the exit status from the system and loses it, and for Process.is_alive the process lives for ever.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run, and can be set, in the main one only
        yield
        return
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
