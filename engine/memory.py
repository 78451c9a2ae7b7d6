"""Peaks of memory, and what to change when a GPU has too little of it."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from dotmap import DotMap

from utils.errors import UserError


class DeviceMemoryError(UserError):
    """The device has too little memory for a batch."""


@contextmanager
def explaining_memory(config: DotMap, device: torch.device, training: bool) -> Iterator[None]:
    """Turn torch's OutOfMemoryError into one line with the sizes that decide the memory, and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        data, solver = config.data, config.solver
        peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
        if not training:
            raise DeviceMemoryError(
                f"{device}: out of memory with {config.test.view_batch} views at once{peak}; set "
                f"test.view_batch={max(1, config.test.view_batch // 2)}"
            ) from error
        advice = [] if solver.recompute else ["solver.recompute=True keeps a seventh"]
        if data.batch_size > 1:
            half, twice = data.batch_size // 2, 2 * solver.grad_accumulation_steps
            advice.append(
                f"data.batch_size={half} solver.grad_accumulation_steps={twice} keeps the effective batch"
                if data.batch_size % 2 == 0
                else f"data.batch_size={half} is smaller"
            )
        advice.append("network.backbone_dtype=bfloat16 halves the tower")
        raise DeviceMemoryError(
            f"{device}: out of memory with {data.batch_size} videos of {data.num_sample} clip(s) and "
            f"{data.num_segments} frames{peak}; {', or '.join(advice)}"
        ) from error


def peak_device_bytes(device: torch.device) -> int | None:
    """The most bytes of tensors that this process has had on its GPU; None without one."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def peak_process_bytes() -> int:
    """The most bytes of main memory that this process has had, without its loader processes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the program that has started this one
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
