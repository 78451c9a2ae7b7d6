"""Where the rows of a training go: a log, a line of the terminal, TensorBoard, Weights & Biases. No sink knows another.

`engine.metrics_file` is one more. A row is a flat dictionary; `engine.reporter` makes it and says what it holds.
"""

import logging
import math
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dotmap import DotMap
from PIL import Image
from tqdm import tqdm

from utils.errors import ConfigError
from utils.terminal import LIVING, living_line

FOLDER = "tensorboard"
PICTURE = "first_batch.png"
NUMBERS_LEFT_OUT = ("kind", "epoch", "step", "time", "epochs_done")
NO_WANDB = (
    "logging.wandb: the package wandb is not installed; pip install -r requirements-extras.txt, or leave the key out"
)
Row = dict[str, Any]

log = logging.getLogger("engine.reporter")


class Sink:
    """What a reporter tells; every method may be left as it is."""

    def start_epoch(self, epoch: int, num_iterations: int, done: int) -> None:
        """An epoch begins behind its first `done` iterations."""

    def step(self) -> None:
        """An iteration has ended. Nothing here may wait for the device."""

    def write(self, row: Row, text: str) -> None:
        """New numbers, and the same in words. OSError: they could not be stored."""

    def picture(self, pixels: np.ndarray) -> None:
        """The first batch, uint8 (H, W, 3)."""

    def close(self) -> None:
        """The run ends, in whatever way."""


class LogSink(Sink):
    """Lines of the log. A terminal shows those about steps in its living line instead."""

    def write(self, row: Row, text: str) -> None:
        log.info(text, extra={LIVING: row["kind"] == "train"})


class TerminalSink(Sink):
    """One line at the bottom of a terminal; nothing elsewhere."""

    def __init__(self, epochs: int):
        self._epochs = epochs
        self._line: tqdm | None = None

    def start_epoch(self, epoch: int, num_iterations: int, done: int) -> None:
        self.close()
        self._num_iterations = num_iterations
        self._line = living_line(num_iterations, f"epoch {epoch + 1}/{self._epochs}", done)

    def step(self) -> None:
        if self._line is not None:
            self._line.update()
            if self._line.n >= self._num_iterations:
                self.close()

    def write(self, row: Row, text: str) -> None:
        if self._line is not None and row["kind"] == "train":
            self._line.set_postfix_str(text.partition("] ")[2], refresh=False)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line = None


class PictureFile(Sink):
    """The first batch as a PNG file."""

    def __init__(self, path: Path):
        self._path = path

    def picture(self, pixels: np.ndarray) -> None:
        Image.fromarray(pixels).save(self._path)


class TensorBoard(Sink):
    """Scalars and the first batch as TensorBoard's event files.

    The files are made anew at the first row of each start from the rows that are behind it, so that none is in them
    twice.
    """

    def __init__(self, folder: Path, iterations: int, earlier: Callable[[], list[Row]], picture: Path):
        """
        Args:
            iterations: of an epoch; the horizontal axis counts them from the start of the run.
            earlier: gives the rows that the run has behind it; asked at the first new row.
            picture: file of the first batch, which has been told before.
        """
        self._folder, self._iterations, self._earlier = folder, iterations, earlier
        self._picture = picture
        self._writer: Any = None

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # importing it takes a second

            shutil.rmtree(self._folder, ignore_errors=True)
            self._writer = SummaryWriter(str(self._folder))
            for row in self._earlier():
                self._add(row)
            if self._picture.is_file():
                self._writer.add_image("first_batch", np.asarray(Image.open(self._picture)), 0, dataformats="HWC")
        return self._writer

    def _add(self, row: Row) -> None:
        for key, value in numbers(row).items():
            step = round(row["epochs_done"] * self._iterations)
            self._writer.add_scalar(f"{row['kind']}/{key}", value, step, walltime=row["time"])

    def write(self, row: Row, text: str) -> None:
        self._open()
        self._add(row)
        self._writer.flush()

    def picture(self, pixels: np.ndarray) -> None:
        self._open().flush()  # it takes the picture from the file

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Sink):
    """A run of the project `logging.wandb`. A resumed run goes on in the same one, which ignores rows that it has."""

    def __init__(self, config: DotMap, folder: Path, iterations: int):
        """
        Raises:
            ConfigError: the package is not installed, or the run cannot be started.
        """
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(NO_WANDB) from error
        self._iterations = iterations
        number = folder / "wandb_id.txt"
        name = number.read_text(encoding="utf-8").strip() if number.is_file() else uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=config.logging.wandb,
                id=name,
                resume="allow",
                name=folder.name,
                dir=str(folder),
                config=config.toDict(),
            )
        except Exception as error:  # its own exceptions, those of its service and of the network
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"logging.wandb: the run cannot be started ({reason}); run wandb login, or set WANDB_MODE=offline"
            ) from error
        number.write_text(name + "\n", encoding="utf-8")

    def write(self, row: Row, text: str) -> None:
        values = {f"{row['kind']}/{key}": value for key, value in numbers(row).items()}
        self._run.log(values, step=round(row["epochs_done"] * self._iterations))

    def picture(self, pixels: np.ndarray) -> None:
        import wandb

        self._run.log({"first_batch": wandb.Image(pixels)}, step=0)

    def close(self) -> None:
        self._run.finish()


def numbers(row: Row) -> dict[str, float]:
    """The measured values of a row that are finite numbers."""
    found = {key: value for key, value in row.items() if key not in NUMBERS_LEFT_OUT and value is not None}
    return {key: value for key, value in found.items() if math.isfinite(value)}
