"""Where the time of the training steps goes, and what to change when the data is late."""

import logging
import math
import time
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from datasets.transforms import resize_size
from datasets.video_dataset import VideoDataset
from utils.distributed import gather, get_local_world_size, get_rank, get_world_size
from utils.errors import DataError
from utils.parallel import usable_cores

STEPS = 50  # after so many the shares are logged
TOLERATED = 0.1  # share of the time that may be spent waiting for data before advice is given

log = logging.getLogger(__name__)


class Clock(Protocol):
    """Marks in time, and the seconds between two of them, which may be asked for later."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """The time of day of this process."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """Events in the stream of the current CUDA device: a mark is when the device comes to it, and nothing waits."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Waits until the device has come to `end`."""
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Throughput:
    """Seconds of every training step that go into waiting for data, copying it to the device, and computing.

    `begin()`, ask for a batch, `lap()`, copy it, `lap()`, compute, `end()`. On a GPU they are the device's seconds: it
    waits while it has nothing to do and the batch is not there; while it is busy, a host that waits costs nothing.
    What lies between two steps (reports, evaluation, checkpoints) is not counted; workers that start again with an
    epoch are, as waiting.

    After STEPS steps of this process, over as many epochs as it takes, process 0 logs the shares, once, of the process
    that waited longest, and above TOLERATED what to change. Steps that the start flatters or burdens are left out: the
    first, and those whose batches the workers had ready by then, but at most half.

    Attributes:
        begun: steps so far.
    """

    def __init__(
        self, config: Any, device: torch.device, dataset: VideoDataset | None = None, clock: Clock | None = None
    ):
        self._config, self._dataset = config, dataset
        self._clock = clock or (DeviceClock() if device.type == "cuda" else HostClock())
        self._marks: list[list[Any]] = []  # of steps whose seconds were not asked for yet
        self._stretch: list[float] = []  # seconds waited in each step since the last `waited()`
        self._first: list[list[float]] = []  # waiting, copying, computing of the first STEPS steps
        self.begun = 0

    def begin(self) -> None:
        self.begun += 1
        self._marks.append([self._clock.mark()])

    def lap(self) -> None:
        self._marks[-1].append(self._clock.mark())

    def end(self) -> None:
        """All processes together: the report after STEPS steps gathers from them."""
        self.lap()
        if self.begun == STEPS:
            self._read()
            self._report()

    def waited(self) -> float:
        """Mean seconds a step waited for data since the last call, which must be at least one step ago."""
        self._read()
        mean = sum(self._stretch) / len(self._stretch)
        self._stretch.clear()
        return mean

    def _read(self) -> None:
        for marks in self._marks:
            seconds = [self._clock.seconds(*pair) for pair in pairwise(marks)]
            self._stretch.append(seconds[0])
            if len(self._first) < STEPS:
                self._first.append(seconds)
        self._marks.clear()

    def _report(self) -> None:
        data = self._config.data
        left_out = min(max(1, data.workers * data.prefetch), STEPS // 2)
        totals = [sum(part) for part in zip(*self._first[left_out:], strict=True)]
        own = [total / sum(totals) for total in totals]
        (waiting, copying, computing), rank = max(gather([(own, get_rank())]))
        log.info(
            "throughput: steps %d to %d: %.1f %% of the time waiting for data, %.1f %% copying it, %.1f %% computing%s",
            *(left_out + 1, STEPS, 100 * waiting, 100 * copying, 100 * computing),
            f" (process {rank}, which waited longest)" if get_world_size() > 1 else "",
        )
        if waiting > TOLERATED and get_rank() == 0:
            log.info("throughput: the loader holds training up; what to change, the first things first:")
            frame = first_frame_size(self._dataset) if self._dataset else None
            for line in advice(self._config, waiting, usable_cores(), get_local_world_size(), frame):
                log.info("throughput: - %s", line)


def first_frame_size(dataset: VideoDataset) -> tuple[int, int] | None:
    """(width, height) of the first frame of the first video; None if it cannot be read."""
    try:
        (frame,) = dataset.reader.open(dataset.records[0]).read([0])
    except DataError:
        return None
    height, width, _ = np.shape(frame)
    return width, height


def advice(config: Any, waiting: float, cores: int, processes: int, frame: tuple[int, int] | None = None) -> list[str]:
    """What to change when a step waits for data for a share `waiting` of its time, below 1.

    Args:
        cores: CPU cores of the machine.
        processes: training processes that share them.
        frame: width and height of the frames that the data set holds, if known.
    """
    data = config.data
    share = cores // processes
    room = max(1, share - 1)  # one core is left to the training process
    # Where the loader is the limit, its rate grows with the workers; 0 workers do not work while others compute.
    enough = math.ceil(data.workers / (1 - waiting) if data.workers else waiting / (1 - waiting))
    place = f"{cores} CPU cores for {processes} process(es) on this machine"
    if data.workers >= room:
        lines = [
            f"data.workers is {data.workers}, and {place} leave room for {room}: more help only against a slow disk, "
            "and else more cores, or less work for each"
        ]
    elif enough <= room:
        lines = [f"data.workers={enough} instead of {data.workers} should keep up; {place} leave room for {room}"]
    else:
        lines = [
            f"data.workers={room} instead of {data.workers}: as many as {place} leave room for; "
            f"about {enough} would keep up, so each must have less work too"
        ]
    wanted = resize_size(*(frame or (1, 1)), data.resize)
    if data.modality == "video":
        lines.append(
            "data.modality=RGB: video files are decoded in every epoch anew, with frames between those that are used; "
            f"tools/prepare_data.py extract writes frames once, best with --short_side {min(wanted)}"
        )
    elif frame and min(frame) > min(wanted):
        lines.append(
            f"frames of {frame[0]} x {frame[1]} pixels are decoded only to become {wanted[0]} x {wanted[1]}: extract "
            f"them with a shorter side of {min(wanted)} pixels"
        )
    if data.workers:
        clip = data.num_segments * 3 * data.input_size**2
        megabytes = data.workers * data.prefetch * data.batch_size * data.num_sample * clip / 1e6
        lines.append(
            f"data.prefetch={2 * data.prefetch} instead of {data.prefetch} helps where a few videos take far longer "
            f"than the others, for {math.ceil(megabytes)} MB more in each process"
        )
    if data.rand_aug:
        lines.append("data.rand_aug=False takes work from every clip, but it is another training")
    if data.num_sample == 1 and data.batch_size > 1:
        lines.append(
            f"data.num_sample=2 with data.batch_size={data.batch_size // 2} makes as many clips from half as many "
            "videos, but it is another training"
        )
    return lines
