"""What training says while it runs: one reporter is told every step, and passes rows to sinks.

A row holds plain numbers; files store it as it is:

    kind                "train"; "validation", or "validation_ema" for the averaged copy of `solver.ema`
    epoch, step         the epoch, counted from 0, and its iterations that are done, as in a checkpoint
    epochs_done         both in one number, for the axis of a plot
    time                seconds since 1970
  train:
    loss                mean over the steps since the row before, over all processes
    lr                  of the head
    grad_norm           of the last update, before it is clipped
    clips_per_second    of all processes
    waiting             share of the time that process 0 waited for data, 0 to 1
    memory_mb           peak of the run so far, in 10^6 bytes: of the GPU, or of the process without one
  validation:
    top1, top5, mean_class  percent; top5 is None with five classes or fewer
    loss                mean cross entropy of the scores; videos that could not be read do not count
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from dotmap import DotMap
from torch import Tensor

from datasets.video_dataset import VideoDataset
from engine.metrics import validation_metrics
from engine.peak_memory import peak_device_bytes, peak_process_bytes
from engine.pictures import batch_picture
from engine.sinks import LogSink, Row, Sink
from engine.throughput import Clock, Throughput
from utils.distributed import all_reduce, gather, get_rank, get_world_size
from utils.errors import UserError
from utils.launch import report_progress

log = logging.getLogger(__name__)


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite."""


class LossMonitor:
    """Mean loss over all processes, and the first step whose loss was not finite.

    Both live on the device, so the host waits for the device at a report only, not in every step.
    """

    def __init__(self, device: torch.device):
        self._sum = torch.zeros(2, dtype=torch.float64, device=device)  # loss, steps
        self._first_bad = torch.full((), math.inf, dtype=torch.float64, device=device)

    def update(self, loss: Tensor, step: int) -> None:
        """Add the loss of one step, a tensor without dimensions."""
        loss = loss.detach().double()
        self._sum += torch.stack([loss, torch.ones_like(loss)])
        self._first_bad = torch.where(loss.isfinite(), self._first_bad, self._first_bad.clamp(max=step))

    def state_dict(self) -> dict[str, Any]:
        """This process's sums; the host waits for the device."""
        return {"loss_sum": self._sum.tolist(), "first_bad": self._first_bad.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum.copy_(torch.tensor(state["loss_sum"], dtype=torch.float64))
        self._first_bad.fill_(state["first_bad"])

    def report(self, epoch: int) -> float:
        """Mean loss since the last report. Every process must call it at the same step.

        Raises:
            NonFiniteLossError: on all processes together; it names the first such step of any of them.
        """
        first_bad = all_reduce(self._first_bad, torch.distributed.ReduceOp.MIN).item()
        if first_bad < math.inf:
            raise NonFiniteLossError(
                f"the loss is not finite at epoch {epoch}, iteration {int(first_bad)}; last_model.pt is from "
                "before; try a lower solver.lr, solver.clip_grad, or solver.precision bf16 or fp32"
            )
        total, steps = all_reduce(self._sum).tolist()
        self._sum.zero_()
        return total / steps


class Reporter:
    """Passes a row to every sink each `logging.print_freq` iterations, at an epoch's end, and after an evaluation.

    One object serves all epochs of a run. Order of calls: `start_epoch`, then for each iteration the phases of
    `engine.throughput.PHASES` and `step`. All processes call it alike; only process 0 writes.

    Attributes:
        mean_loss: of the steps of the last report, over all processes; NaN before the first.
    """

    def __init__(
        self,
        config: DotMap,
        device: torch.device,
        dataset: VideoDataset | None = None,
        clock: Clock | None = None,
    ):
        """
        Args:
            config: resolved.
            dataset: of the training; advice about slow data looks at its frames, and pictures show its class names.
            clock: for tests; by default the device's.
        """
        self._config, self._device, self._dataset = config, device, dataset
        self._every, self._epochs = config.logging.print_freq, config.solver.epochs
        self._throughput = Throughput(config, device, dataset, clock)
        self.mean_loss = math.nan
        self._monitor = LossMonitor(device)
        self._grad_norm = torch.full((), math.nan, device=device)
        self._sinks: list[Sink] = [LogSink()]
        self._wants_batch = False
        self._ended: float | None = None  # when the steps of an epoch ended
        self._between: list[float] = []  # seconds from there to the next epoch

    def attach(self, sinks: Sequence[Sink], wants_batch: bool = False) -> None:
        """Pass rows to these sinks too, and with `wants_batch` the picture of the next batch."""
        self._sinks += sinks
        self._wants_batch = wants_batch and get_rank() == 0

    def close(self) -> None:
        """The run has ended."""
        self._tell(lambda sink: sink.close())

    def start_epoch(self, epoch: int, num_iterations: int, step: int = 0) -> None:
        """An epoch begins, or goes on behind its first `step` iterations with what `load_state_dict` has brought."""
        self._epoch, self._num_iterations = epoch, num_iterations
        self._started, self._counted_from = time.perf_counter(), step
        self._epoch_started, self._epoch_from = self._started, step
        if self._ended is not None:
            self._between.append(self._started - self._ended)
        if step == 0:
            self._monitor = LossMonitor(self._device)
        self._tell(lambda sink: sink.start_epoch(epoch, num_iterations, step))

    def state_dict(self) -> dict[str, Any]:
        """What this process has summed since the last report, in plain numbers."""
        return {**self._monitor.state_dict(), "mean_loss": self.mean_loss, "grad_norm": self._grad_norm.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums of `state_dict`."""
        self.mean_loss = state["mean_loss"]
        self._monitor.load_state_dict(state)
        self._grad_norm.fill_(state.get("grad_norm", math.nan))

    def phase(self, name: str) -> AbstractContextManager[None]:
        """The time spent inside counts as this phase of the step."""
        return self._throughput.phase(name)

    def batch(self, clips: Tensor, targets: Tensor) -> None:
        """The clips (B, T, 3, H, W) and targets (B, K) or (B,) that enter the model; a picture of the first is kept."""
        if self._wants_batch:
            self._wants_batch = False
            names = self._dataset.class_names if self._dataset else None
            data = self._config.data
            pixels = batch_picture(clips, targets, tuple(data.mean), tuple(data.std), names)
            self._tell(lambda sink: sink.picture(pixels))

    def update(self, grad_norm: Tensor) -> None:
        """An update of the weights: the norm of its gradient, a tensor without dimensions on the device."""
        self._grad_norm = grad_norm.detach()

    def step(self, iteration: int, loss: Tensor, learning_rate: float) -> None:
        """The end of an iteration, counted from 0 in its epoch.

        Raises:
            NonFiniteLossError: the loss of a step since the last report is not finite.
        """
        report_progress(f"epoch {self._epoch}, iteration {iteration}")
        self._monitor.update(loss, iteration)
        self._throughput.end_step()
        done = iteration + 1
        if done % self._every == 0 or done == self._num_iterations:
            self._report(done, learning_rate)
        self._tell(lambda sink: sink.step())
        if done == self._num_iterations:
            self._ended = time.perf_counter()

    def _report(self, done: int, learning_rate: float) -> None:
        self.mean_loss = self._monitor.report(self._epoch)
        now = time.perf_counter()
        seconds = max((now - self._started) / (done - self._counted_from), 1e-9)
        waited = self._throughput.mean_wait()
        data = self._config.data
        row = {
            **self._position("train", self._epoch, done, done / self._num_iterations),
            "loss": self.mean_loss,
            "lr": learning_rate,
            "grad_norm": self._grad_norm.item(),
            "clips_per_second": round(data.batch_size * data.num_sample * get_world_size() / seconds, 3),
            "waiting": round(min(1.0, waited / seconds), 4),
            "memory_mb": round((peak_device_bytes(self._device) or peak_process_bytes()) / 1e6, 1),
        }
        epoch_left, run_left = self._time_left(now, done)
        text = (
            f"epoch {self._epoch} [{done}/{self._num_iterations}] loss {self.mean_loss:.4f}, lr {learning_rate:.2e}, "
            f"{row['clips_per_second']:.1f} clips/s, {seconds:.3f} s a step, of which {waited:.3f} s waiting for data, "
            f"{row['memory_mb']:.0f} MB, left {duration(epoch_left)} of the epoch, {duration(run_left)} of the run"
        )
        self._started, self._counted_from = now, done
        self._tell(lambda sink: sink.write(row, text))

    def validation(self, epoch: int, step: int, scores: np.ndarray, labels: np.ndarray, averaged: bool = False) -> Row:
        """Pass on what the scores (videos, K) of an evaluation behind `step` iterations of an epoch come to."""
        values = validation_metrics(scores, labels)
        row = {**self._position("validation_ema" if averaged else "validation", epoch, step, 1.0), **values}
        top5 = "" if values["top5"] is None else f", top-5 {values['top5']:.2f}"
        text = (
            f"validation{' of the average' if averaged else ''}: top-1 {values['top1']:.2f}{top5}, mean class "
            f"{values['mean_class']:.2f}, loss {values['loss']:.4f} on {len(scores)} videos"
        )
        self._tell(lambda sink: sink.write(row, text))
        return row

    def epoch_memory(self) -> str:
        """The peaks of the run so far in words, of the process that has most. All processes must call it together."""
        own = (peak_device_bytes(self._device) or 0, peak_process_bytes())
        device, process = (max(column) / 1e6 for column in zip(*gather([own]), strict=True))
        return f"peak memory: {f'GPU {device:.0f} MB, ' if device else ''}process {process:.0f} MB"

    def _position(self, kind: str, epoch: int, step: int, share: float) -> Row:
        return {"kind": kind, "epoch": epoch, "step": step, "epochs_done": round(epoch + share, 6),
                "time": round(time.time(), 3)}  # fmt: skip

    def _time_left(self, now: float, done: int) -> tuple[float, float]:
        """Seconds to the end of the epoch's steps and to that of the run, evaluations as long as those before."""
        a_step = (now - self._epoch_started) / (done - self._epoch_from)
        between = sum(self._between) / len(self._between) if self._between else 0.0
        in_epoch, others = (self._num_iterations - done) * a_step, self._epochs - self._epoch - 1
        return in_epoch, in_epoch + others * self._num_iterations * a_step + (others + 1) * between

    def _tell(self, what: Callable[[Sink], None]) -> None:
        """A sink whose disk is full is named in the log; a training does not end for it."""
        for sink in self._sinks if get_rank() == 0 else ():
            try:
                what(sink)
            except OSError as error:
                log.error("METRICS NOT WRITTEN: %s: %s; the run goes on", type(sink).__name__, error.strerror or error)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
