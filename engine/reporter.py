"""What training says while it runs: one reporter is told every step."""

import logging
import math
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from dotmap import DotMap
from torch import Tensor

from datasets.video_dataset import VideoDataset
from engine.throughput import Clock, Throughput
from utils.distributed import all_reduce
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
    """Logs loss, learning rate and time of a training, every `logging.print_freq` iterations and at an epoch's end.

    One object serves all epochs of a run. Order of calls: `start_epoch`, then for each iteration the phases of
    `engine.throughput.PHASES` and `step`.

    Attributes:
        mean_loss: of the steps of the last report, over all processes; NaN before the first.
    """

    def __init__(
        self, config: DotMap, device: torch.device, dataset: VideoDataset | None = None, clock: Clock | None = None
    ):
        """
        Args:
            config: resolved; `logging.print_freq` and the section `data` are read.
            dataset: of the training; advice about slow data looks at its frames.
            clock: for tests; by default the device's.
        """
        self._every, self._device = config.logging.print_freq, device
        self._throughput = Throughput(config, device, dataset, clock)
        self.mean_loss = math.nan
        self._monitor = LossMonitor(device)

    def start_epoch(self, epoch: int, num_iterations: int, step: int = 0) -> None:
        """An epoch begins, or goes on behind its first `step` iterations with what `load_state_dict` has brought."""
        self._epoch, self._num_iterations = epoch, num_iterations
        self._started, self._counted_from = time.perf_counter(), step
        if step == 0:
            self._monitor = LossMonitor(self._device)

    def state_dict(self) -> dict[str, Any]:
        """What this process has summed since the last report, in plain numbers."""
        return {**self._monitor.state_dict(), "mean_loss": self.mean_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums of `state_dict`."""
        self.mean_loss = state["mean_loss"]
        self._monitor.load_state_dict(state)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """The time spent inside counts as this phase of the step."""
        return self._throughput.phase(name)

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

    def _report(self, done: int, learning_rate: float) -> None:
        self.mean_loss = self._monitor.report(self._epoch)
        now = time.perf_counter()
        seconds = (now - self._started) / (done - self._counted_from)
        log.info(
            f"epoch {self._epoch} [{done}/{self._num_iterations}] loss {self.mean_loss:.4f}, lr {learning_rate:.2e}, "
            f"{seconds:.3f} s a step, of which {self._throughput.mean_wait():.3f} s waiting for data"
        )
        self._started, self._counted_from = now, done
