"""The most memory that a process has had, on its device and in main memory."""

import resource
import sys
from pathlib import Path

import torch


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
