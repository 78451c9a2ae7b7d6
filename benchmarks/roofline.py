"""What a device does at most, measured: operations of products, and bytes of copies and of sums over processes."""

import torch
import torch.distributed as dist

from benchmarks.timing import steady_seconds
from utils.precision import set_switches

PRODUCTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def product_rate(kind: str, size: int, device: torch.device) -> float:
    """Floating-point operations a second of the product of two square matrices.

    Args:
        kind: of PRODUCTS. The switches of this process stay as it needs them.
        size: rows and columns.
    """
    set_switches(tf32=kind == "tf32")
    a, b = (torch.randn(size, size, device=device).to(PRODUCTS[kind]) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / steady_seconds(lambda: torch.mm(a, b, out=out), device)


def copy_rate(size: int, device: torch.device) -> float:
    """Bytes a second that are read and written when `size` bytes are copied inside the device's memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / steady_seconds(lambda: target.copy_(source), device)


def host_rate(size: int, device: torch.device, pinned: bool) -> float:
    """Bytes a second from main memory to the device.

    Args:
        pinned: the source lies in pinned memory, as the batches of the loaders on a GPU.
    """
    source = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / steady_seconds(lambda: target.copy_(source, non_blocking=pinned), device)


def all_reduce_rate(size: int, device: torch.device) -> float:
    """Bytes a second that each process sends while `size` bytes are summed over all processes of the default group.

    A ring sends 2 (n - 1) / n of them. All processes must call this together.
    """
    tensor, processes = torch.zeros(size // 4, device=device), dist.get_world_size()
    seconds = steady_seconds(lambda: dist.all_reduce(tensor), device, times=20)
    return 2 * (processes - 1) / processes * size / seconds
