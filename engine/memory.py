"""Memory of the device: what was planned, what it came to, and what to change when it is too little."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from dotmap import DotMap

from engine.optim import update_videos
from engine.plan import choose_batch, choose_recompute, largest_fitting, rehearsing, usable
from utils.distributed import gather, get_world_size
from utils.errors import UserError

log = logging.getLogger(__name__)


class DeviceMemoryError(UserError):
    """The device has too little memory for a batch."""


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory


def settle_recompute(configs: Sequence[DotMap], device: torch.device) -> list[DotMap]:
    """`choose_recompute` for this device; the same choice on all processes. It is logged.

    Args:
        configs: of the runs that share the step.
    """
    room = usable(total_memory(device)) if device.type == "cuda" else None
    if room is not None:
        room = min(gather([room]))  # GPUs may differ
    settled, peak = choose_recompute(configs, get_world_size(), room)
    for before, after in zip(configs, settled, strict=True):
        if before.solver.recompute != after.solver.recompute:
            why = "memory is planned on a GPU only"
            if room is not None and peak is not None:
                why = f"without it, the planned peak is {_gib(peak)}, on a GPU with {_gib(room)} for tensors"
            log.info(f"solver.recompute: {before.solver.recompute} becomes {after.solver.recompute}: {why}")
            break
    return settled


class PeakReport:
    """Logs the planned peak of a GPU's memory before something runs, and the real one afterwards; silent on a CPU."""

    def __init__(self, device: torch.device, what: str, plan: Callable[[int], int]):
        """
        Args:
            what: has the peak, for the log.
            plan: number of processes -> planned bytes of one.
        """
        self._device, self._planned = device, 0
        self._is_due = device.type == "cuda"
        if self._is_due:
            self._planned = plan(get_world_size())
            room = usable(total_memory(device))
            log.info(
                f"memory: planned peak {_gib(self._planned)} of {what}, on a GPU with {_gib(room)} for tensors"
                + ("" if self._planned <= room else "; it does not fit: tools/plan.py says what does")
            )

    def done(self) -> None:
        """Log the real peak of the allocator, once."""
        if self._is_due:
            peak = torch.cuda.max_memory_allocated(self._device)
            log.info(
                f"memory: real peak {_gib(peak)}, planned {_gib(self._planned)} ({self._planned / peak:.2f} of it), "
                f"{_gib(torch.cuda.max_memory_reserved(self._device))} reserved"
            )
            self._is_due = False


@contextmanager
def explaining_memory(config: DotMap, device: torch.device, training: bool) -> Iterator[None]:
    """Turn torch's OutOfMemoryError into one line with the sizes that decide the memory, and what the plan says."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        data = config.data
        peak = f", peak {_gib(torch.cuda.max_memory_allocated(device))}" if device.type == "cuda" else ""
        room = usable(total_memory(device)) if device.type == "cuda" else None
        if not training:
            raise DeviceMemoryError(
                f"{device}: out of memory with {config.test.view_batch} views at once{peak}; "
                f"{advise_views(config, room)}"
            ) from error
        raise DeviceMemoryError(
            f"{device}: out of memory with {data.batch_size} videos of {data.num_sample} clip(s) and "
            f"{data.num_segments} frames{peak}; {advise_batch(config, room)}"
        ) from error


def advise_batch(config: DotMap, room: int | None) -> str:
    """What to set so that training fits and each update sees as many videos as now.

    Args:
        room: bytes for tensors, of `engine.plan.usable`; None if they are not known, as on a CPU.
    """
    data, solver, world = config.data, config.solver, get_world_size()
    total = update_videos(config, world)
    # With recomputation, the present batch has just failed, whatever the plan says: something else is on the card.
    most = data.batch_size // 2 if solver.recompute else data.batch_size
    if room is not None:
        with rehearsing(config) as rehearsal:
            planned = largest_fitting(
                lambda batch: rehearsal.train(batch, recompute=True).process_peak(config, world), room, data.batch_size
            )
        most = min(planned, data.batch_size - 1 if solver.recompute else data.batch_size)
    choice = choose_batch(config, world, total, {True: most, False: 0})
    if choice is None:
        return (
            "no smaller batch keeps the videos of an update; network.backbone_dtype=bfloat16 halves a float32 tower, "
            "and network.shard_backbone=True splits the tower over processes"
        )
    _, batch, accumulation = choice
    recompute = "" if solver.recompute else "solver.recompute=True "
    return (
        f"set {recompute}data.batch_size={batch} solver.grad_accumulation_steps={accumulation}, which keeps {total} "
        "videos an update"
    )


def advise_views(config: DotMap, room: int | None) -> str:
    """What to set so that a test fits; `room` as of `advise_batch`."""
    half = max(1, config.test.view_batch // 2)
    if room is None:
        return f"set test.view_batch={half}"
    with rehearsing(config) as rehearsal:
        fitting = largest_fitting(partial(rehearsal.test, gpus=get_world_size()), room, half)
    return f"set test.view_batch={max(1, min(fitting, half))}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
