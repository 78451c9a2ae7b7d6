"""Where the time of the training steps goes."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from dotmap import DotMap

from datasets.video_dataset import VideoDataset
from engine.advice import advice, first_frame_size
from utils.distributed import gather, get_local_world_size, get_rank, get_world_size
from utils.parallel import usable_cores

PHASES = ("data", "copy", "compute")  # of a step: waiting for a batch, copying it to the device, computing
STEPS = 50  # the shares are logged after so many steps
TOLERATED = 0.1  # share of the time that may be spent waiting for data before advice is given

log = logging.getLogger(__name__)


class Clock(Protocol):
    """Marks in time, and the seconds between two of them, which may be asked for later."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """The clock of this process."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """Events in the stream of the current CUDA device. A mark is the moment at which the device reaches it."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Blocks until the device has reached `end`."""
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Throughput:
    """Seconds of every training step that go into each of the PHASES. Runs that share their steps share one object.

    `with throughput.phase("data"): ...` and so on, then `end_step()`. On a GPU these are seconds of the device: it
    waits for data when it has nothing to compute and the batch has not arrived. Time between two steps (reports,
    evaluation, checkpoints) is not counted. The start of the workers, at the beginning of an epoch, is: as waiting.

    After STEPS steps of this process, over as many epochs as that takes, process 0 logs the shares of the process that
    waited longest, once, and above TOLERATED what to change. Warm-up steps are excluded: the first step, and the steps
    whose batches the workers had ready by then, but at most half of the steps.
    """

    def __init__(
        self, config: DotMap, device: torch.device, dataset: VideoDataset | None = None, clock: Clock | None = None
    ):
        self._config, self._dataset = config, dataset
        self._clock: Clock = clock or (DeviceClock() if device.type == "cuda" else HostClock())
        self._marks: dict[str, tuple[Any, Any]] = {}  # of the step that runs now
        self._unread: list[dict[str, tuple[Any, Any]]] = []  # steps whose seconds nobody has asked the clock for
        self._waited, self._read_steps = 0.0, 0  # seconds waited for data so far, and in how many steps
        self._first: list[dict[str, float]] = []  # seconds of each phase, of the first STEPS steps
        self._num_steps = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block inside is the phase `name` of the current step."""
        start = self._clock.mark()
        yield
        self._marks[name] = (start, self._clock.mark())

    def end_step(self) -> None:
        """Close a step. All processes must call it together, because the report gathers from them."""
        self._unread.append(self._marks)
        self._marks = {}
        self._num_steps += 1
        if self._num_steps == STEPS:
            self._read()
            self._report()

    def waited(self) -> tuple[float, int]:
        """Seconds that all steps so far waited for data, and their number."""
        self._read()
        return self._waited, self._read_steps

    def _read(self) -> None:
        for marks in self._unread:
            seconds = {name: self._clock.seconds(start, end) for name, (start, end) in marks.items()}
            self._waited += seconds["data"]
            self._read_steps += 1
            if len(self._first) < STEPS:
                self._first.append(seconds)
        self._unread.clear()

    def _report(self) -> None:
        data = self._config.data
        warm_up = min(max(1, data.workers * data.prefetch), STEPS // 2)
        totals: dict[str, float] = defaultdict(float)
        for seconds in self._first[warm_up:]:
            for name, value in seconds.items():
                totals[name] += value
        own = [totals[name] / sum(totals.values()) for name in PHASES]
        (waiting, copying, computing), rank = max(gather([(own, get_rank())]))
        which = f" (process {rank}, which waited longest)" if get_world_size() > 1 else ""
        log.info(
            f"throughput: steps {warm_up + 1} to {STEPS}: {100 * waiting:.1f} % of the time waiting for data, "
            f"{100 * copying:.1f} % copying it, {100 * computing:.1f} % computing{which}"
        )
        if waiting > TOLERATED and get_rank() == 0:
            log.info("throughput: the loader holds training up; what to change, the most useful first:")
            frame = first_frame_size(self._dataset) if self._dataset else None
            for line in advice(self._config, waiting, usable_cores(), get_local_world_size(), frame):
                log.info("throughput: - %s", line)
