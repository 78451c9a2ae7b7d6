"""Saving a training while it runs: when, by whom, and without holding up the steps."""

import copy
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from dotmap import DotMap

from datasets.loaders import VideoLoader
from engine.reporter import Reporter
from engine.run_folder import BEST_EMA, LAST, save_best, save_last
from modules.checkpoint import averaged_state
from utils.distributed import Agreement, gather, get_rank
from utils.errors import UserError
from utils.signals import Stopped, StopSignals

PARTS = ("trained", "ema", "optimizer", "scaler")  # of a checkpoint, that training changes

log = logging.getLogger(__name__)


class BackgroundWriter:
    """Writes checkpoints in a thread of its own; one at a time.

    A write that fails because of the disk is logged, and the run goes on: the next write is the retry. Until then, a
    best checkpoint that could not be written is kept in memory.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._unwritten_best: dict[str, dict[str, Any]] = {}  # file name -> content
        self._copied: dict[str, Any] = {}

    def write(self, state: dict[str, Any], best_files: Collection[str] = ()) -> None:
        """Copy the tensors that change, and write them in the background. Waits for the write before this one.

        Args:
            best_files: BEST and BEST_EMA, where this state is the best.
        """
        self.wait()
        # Fresh memory costs more than the copy, so the tensors of the last copy are filled again, unless it is kept.
        old = {} if self._unwritten_best else self._copied
        self._copied = {part: to_cpu_copy(state[part], old.get(part)) for part in PARTS if part in state}
        copied = {**state, **self._copied}
        self._thread = threading.Thread(target=self._write, args=(copied, tuple(best_files)), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. An error that is not the disk's is raised here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error

    def close(self) -> None:
        """Wait, and raise the error of the last write, if it failed.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        self.wait()
        if self._error is not None:
            raise UserError(f"{self._folder}: the last checkpoint could not be written: {_reason(self._error)}")

    def _write(self, state: dict[str, Any], best_files: tuple[str, ...]) -> None:
        try:
            for name in best_files:
                self._unwritten_best[name] = averaged_state(state) if name == BEST_EMA else state
            for name in list(self._unwritten_best):
                save_best(self._folder / name, self._unwritten_best[name])
                del self._unwritten_best[name]
            save_last(self._folder, state, self._keep)
            self._error = None
        except OSError as error:
            self._error = error
            log.error(
                "CHECKPOINT NOT WRITTEN: %s: %s; the run goes on and tries again at the next save; make room there",
                self._folder,
                _reason(error),
            )
        except BaseException as error:
            self._error = error


class Saver:
    """Decides when a training is saved, and stops it where a signal asks for that.

    Checkpoints are written at the end of an epoch, before an evaluation, every `logging.save_minutes` after an update,
    and after the update that runs when a signal arrives; Stopped is raised behind that one.
    """

    def __init__(
        self,
        folder: Path,
        config: DotMap,
        state: Callable[[int, int, list[dict[str, Any]]], dict[str, Any]],
        reporter: Reporter,
        loader: VideoLoader,
    ):
        """
        Args:
            folder: that of the run.
            state: makes the checkpoint of (epochs finished, iterations done of the next one, reports by process).
            reporter: whose sums go into a checkpoint inside an epoch.
            loader: of the training, whose lists of unreadable and damaged videos go there too.
        """
        minutes = config.logging.save_minutes
        self._folder, self._seconds = folder, None if minutes is None else 60 * minutes
        self._state, self._reporter, self._loader = state, reporter, loader
        self._writer = BackgroundWriter(folder, config.logging.keep)
        self._agreement, self._signals = Agreement(config.solver.timeout_minutes), StopSignals()
        self._saved = time.monotonic()

    def __enter__(self) -> "Saver":
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._signals.__exit__()
        if kind is None or issubclass(kind, Stopped):
            self._writer.close()
        else:
            self._writer.wait()

    @contextmanager
    def epoch(self, epoch: int) -> Iterator[Callable[[int], None]]:
        """The training part of an epoch. Gives what `train_one_epoch` calls after each update."""

        def after_update(step: int) -> None:
            self._act(self._agreement.largest(self._wish()), epoch, step)

        with self._signals.deferred():
            yield after_update
            self._agreement.largest(self._wish())
            # This epoch's last update is behind us: what all processes wish now is known at once.
            self._act(self._agreement.largest(0), epoch, len(self._loader))

    def save(self, epoch: int, step: int = 0, best_files: Collection[str] = ()) -> None:
        """Write a checkpoint in the background. All processes must call it together."""
        reports = [{**self._reporter.state_dict(), **self._loader.met()}] if step else []
        reports = gather(reports)
        if get_rank() == 0:
            self._writer.write(self._state(epoch, step, reports), best_files)
        self._saved = time.monotonic()

    def _wish(self) -> int:
        """0 for nothing, 1 for a checkpoint, 1 + the signal's number for a checkpoint and the end."""
        if self._signals.received is not None:
            return 1 + self._signals.received
        due = get_rank() == 0 and self._seconds is not None and time.monotonic() - self._saved >= self._seconds
        return int(due)

    def _act(self, decided: int, epoch: int, step: int) -> None:
        if decided:
            self.save(epoch, step)
        if decided > 1:
            if get_rank() == 0:
                self._writer.close()
            self._signals.received = None
            raise Stopped(decided - 1, f"epoch {epoch}, step {step} are in {self._folder / LAST}; resume=auto goes on")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def to_cpu_copy(value: Any, into: Any = None) -> Any:
    """A copy on the CPU of nested dictionaries and lists of tensors, which later steps do not change.

    Tensors of `into`, an earlier copy, are filled where they have the same shape and dtype.
    """
    if isinstance(value, torch.Tensor):
        if isinstance(into, torch.Tensor) and (into.shape, into.dtype) == (value.shape, value.dtype):
            return into.copy_(value.detach())
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        old = into if isinstance(into, dict) else {}
        return {key: to_cpu_copy(item, old.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        old_items = into if isinstance(into, list) and len(into) == len(value) else [None] * len(value)
        return [to_cpu_copy(item, old_item) for item, old_item in zip(value, old_items, strict=True)]
    return copy.copy(value)
