"""The folder of one training run: what is in it, who may write to it, and where a run goes on.

    config.yaml         the resolved configuration of the training
    train.log           the log; a resumed run appends to it
    last_model.pt       the newest checkpoint; last_model_1.pt is the one before, and so on up to `logging.keep` files
    model_best.pt       the checkpoint of the best validation top-1
    model_best_ema.pt   with `solver.ema`: the averaged copy of its own best validation top-1, without an optimizer
    metrics.jsonl       the numbers of the log, one JSON object a line (engine/reporter.py); it holds no row twice
    tensorboard/        the same as TensorBoard's event files, made anew from metrics.jsonl at each start
    first_batch.png     clips of the first batch as they enter the model
    wandb/              with `logging.wandb`: the files of that package; wandb_id.txt names the run to go on with

The best checkpoint is written before the newest one, so a run that is killed between the two evaluates that epoch again
and writes the same best checkpoint once more.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from dotmap import DotMap

from engine.metrics_file import METRICS, keep_rows
from engine.training_state import Progress, percent
from modules.checkpoint import read_checkpoint, save_checkpoint
from utils.atomic import write_atomically
from utils.distributed import from_first, get_rank
from utils.errors import CheckpointError, ConfigError

LAST, BEST, BEST_EMA = "last_model.pt", "model_best.pt", "model_best_ema.pt"
CONFIG, LOG = "config.yaml", "train.log"
AUTO = "auto"

log = logging.getLogger(__name__)


class RunFolder:
    """The folder of a run, locked for as long as this object lives. Only process 0 makes one.

    Used as a context manager, it removes what a start that fails has left behind: files that this start has made and
    folders that are empty. `begin` marks the end of the start.

    Attributes:
        path: the folder.
    """

    def __init__(self, config: DotMap, output: str | None):
        """
        Args:
            config: resolved; names the default folder exp_onehot/<dataset>/<arch>/<time>.
            output: the folder; None takes the default, with a number behind it if another run has it.

        Raises:
            ConfigError: the folder cannot be made, holds another run, or another run is writing to it.
        """
        self._made: list[Path] = []
        self._begun = False
        try:
            self.path = self._make(Path(output)) if output else self._make_default(config)
            self._lock = _lock(self.path)
            self._new_log = not (self.path / LOG).exists()
            with _output_errors(self.path), tempfile.TemporaryFile(dir=self.path):
                pass  # the folder can be written to
            self._refuse_another_run(config)
            for unfinished in [
                path for name in (LAST, BEST, METRICS) for path in self.path.glob(f".{Path(name).stem}*")
            ]:
                unfinished.unlink()  # of a run that was killed while it wrote
        except BaseException:
            self._remove_empty()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and not self._begun:
            if self._new_log:
                (self.path / LOG).unlink(missing_ok=True)
            self._remove_empty()
        os.close(self._lock)

    def begin(
        self, config: DotMap, size: int, source: Path | None = None, checkpoint: dict[str, Any] | None = None
    ) -> None:
        """The start is over: write the configuration, and keep the folder from now on.

        Rows of metrics beyond the checkpoint that the run goes on from are removed. If it is in another folder, the
        rows of that folder are taken over.

        Args:
            size: bytes of a checkpoint.
            source, checkpoint: file and content of the one that a resumed run goes on from.

        Raises:
            ConfigError: the disk has no room for the checkpoints that the folder will hold.
        """
        best = [BEST] if config.solver.ema is None else [BEST, BEST_EMA]
        files = len(best) + config.logging.keep + 1  # the best ones, the newest ones, the one that is being written
        there = sum(
            path.stat().st_size
            for path in [*checkpoints(self.path), *(self.path / name for name in best)]
            if path.exists()
        )
        free = shutil.disk_usage(self.path).free
        if free < files * size - there:
            raise ConfigError(
                f"--output {self.path}: {free / 1e6:.1f} MB are free, but {files} checkpoints of {size / 1e6:.1f} MB "
                f"need {(files * size - there) / 1e6:.1f} MB; make room, lower logging.keep, or name another folder"
            )
        text = yaml.safe_dump(config.toDict(), sort_keys=False)
        write_atomically(self.path / CONFIG, lambda file: file.write(text.encode()))
        place = (0, 0) if checkpoint is None else (checkpoint["epoch"], checkpoint.get("step", 0))
        folder = self.path if source is None or source.parent.resolve() == self.path.resolve() else source.parent
        keep_rows(folder / METRICS, self.path / METRICS, *place)
        self._begun = True

    def carry_best(self, source: Path, progress: Progress) -> None:
        """Make the best models and `progress` agree after a resume from `source`, on all processes."""
        progress.best = self._carry(source, BEST, progress.best)
        progress.best_ema = self._carry(source, BEST_EMA, progress.best_ema)
        from_first((progress.best, progress.best_ema))

    def _carry(self, source: Path, name: str, stated: float | None) -> float | None:
        """Bring a best model along; returns the accuracy that counts from now on.

        The best model is copied from the folder of `source` if the run goes on in another one. If the file that is
        there is not the best that the checkpoint speaks of, it is made from `source` where that is the best, or the
        accuracy that counts from now on is that of the file.
        """
        there = source.parent / name
        best = read_checkpoint(there)["best_accuracy"] if there.is_file() else None
        if stated is not None and (best is None or best < stated):
            log.warning(
                f"resume: the best top-1 of {source} is {percent(stated)}, but {there} has "
                f"{'no model' if best is None else percent(best)}: that model is lost; the best is {percent(best)} now"
            )
            stated = best
        if best is not None and there.resolve() != (self.path / name).resolve():
            with open(there, "rb") as file:
                write_atomically(self.path / name, lambda copy: shutil.copyfileobj(file, copy))
        return stated

    def _make(self, path: Path) -> Path:
        with _output_errors(path):
            for folder in [*reversed(path.parents), path]:
                if not folder.exists():
                    folder.mkdir()
                    self._made.append(folder)
            if not path.is_dir():
                raise NotADirectoryError(f"{path} is a file")
        return path

    def _make_default(self, config: DotMap) -> Path:
        parent = Path("exp_onehot", config.data.dataset, config.network.arch.replace("/", "-"))
        self._make(parent)
        name, number = time.strftime("%Y%m%d_%H%M%S"), 0
        while True:
            path = parent / (f"{name}_{number}" if number else name)
            try:
                path.mkdir()  # fails for all but one of the runs that start in the same second
            except FileExistsError:
                number += 1
            else:
                self._made.append(path)
                return path

    def _refuse_another_run(self, config: DotMap) -> None:
        goes_on = config.resume == AUTO or (
            config.resume and Path(config.resume).resolve().parent == self.path.resolve()
        )
        if checkpoints(self.path) and not goes_on and not config.solver.evaluate:
            raise ConfigError(
                f"--output {self.path}: holds {checkpoints(self.path)[0].name} of another run; choose another folder, "
                f"or resume=auto"
            )

    def _remove_empty(self) -> None:
        for folder in reversed(self._made):
            if not any(folder.iterdir()):
                folder.rmdir()


@dataclass(frozen=True)
class FollowedFolder:
    """The folder of the run for processes other than 0, which write nothing."""

    path: Path

    def begin(
        self, config: DotMap, size: int, source: Path | None = None, checkpoint: dict[str, Any] | None = None
    ) -> None:
        pass

    def carry_best(self, source: Path, progress: Progress) -> None:
        progress.best, progress.best_ema = from_first(None)


@contextmanager
def open_run_folder(config: DotMap, output: str | None) -> Iterator[RunFolder | FollowedFolder]:
    """The folder of a run, made and locked by process 0, on every process. Arguments and errors as of RunFolder."""
    if get_rank() == 0:
        with RunFolder(config, output) as folder:
            from_first(folder.path)
            yield folder
    else:
        yield FollowedFolder(from_first(None))


def find_start(config: DotMap, folder: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """File and content of the checkpoint that a run starts from, on every process; (None, None) for a new training.

    Raises:
        CheckpointError: it cannot be read.
    """
    if config.resume == AUTO:
        found = newest_intact(folder) if get_rank() == 0 else None
        source = from_first(found and found[0])
        log.info("resume=auto: %s", source or f"no checkpoint in {folder}; the training starts from the beginning")
        if found:
            return found
    else:
        source = config.resume or config.pretrain
    return (None, None) if source is None else (Path(source), read_checkpoint(source))


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--output {path}: cannot be made: {reason}; name a folder that can be written to") from error


def _lock(folder: Path) -> int:
    """Lock the folder itself until the returned file is closed, or this process ends in whatever way."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ConfigError(f"--output {folder}: another run is writing to it; choose another folder") from error
    return handle


def checkpoints(folder: Path) -> list[Path]:
    """The files of the newest checkpoints in a folder, the newest first."""
    stem, suffix = LAST.split(".")
    numbered = {}
    for path in folder.glob(f"{stem}*.{suffix}"):
        number = path.name.removeprefix(stem).removesuffix(f".{suffix}").removeprefix("_")
        if number.isdigit() or path.name == LAST:
            numbered[int(number or 0)] = path
    return [numbered[number] for number in sorted(numbered)]


def newest_intact(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """File and content of the newest checkpoint that can be read; None if the folder has none at all.

    A damaged file is named in the log, and the one before it is tried.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be read.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            log.warning("resume: %s; the checkpoint before it is used", error.line)
    if found:
        raise CheckpointError(f"{found[0]}: damaged, and no older checkpoint in the folder can be read")
    return None


def save_best(path: Path, state: dict[str, Any]) -> None:
    """Write a best checkpoint. Call it before `save_last` of the same state."""
    save_checkpoint(path, state)


def save_last(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Write the newest checkpoint; of those before it, `keep` - 1 stay."""
    stem, suffix = LAST.split(".")
    names = [folder / LAST, *(folder / f"{stem}_{number}.{suffix}" for number in range(1, keep))]
    for newer, older in reversed(list(zip(names, names[1:], strict=False))):
        if newer.exists():  # a link, so that a run killed here still has its newest checkpoint under its name
            spare = older.with_name(f".{older.name}.link")
            spare.unlink(missing_ok=True)
            os.link(newer, spare)
            os.replace(spare, older)
    save_checkpoint(folder / LAST, state)
    for path in checkpoints(folder):
        if path not in names:
            path.unlink()
