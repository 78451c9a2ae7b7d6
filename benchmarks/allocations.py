"""The memory that a call keeps, and the operators that it runs."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.convolution,
    aten.convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward,
}
NO_KERNEL = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten.detach,
}


def measure_memory(function: Callable[[], Any], device: torch.device | None = None) -> tuple[int, int]:
    """Return (bytes kept after the call, bytes at its peak) beyond those allocated before it, on the CPU or a GPU.

    PyTorch's allocator is asked, so every tensor counts, including those that a function keeps on its ctx, which
    saved-tensor hooks miss, and those of compiled code. The result of the call is alive when the kept bytes are
    counted, and with it everything that a backward pass needs.

    Args:
        device: whose memory is measured; None: the GPU if there is one.
    """
    gc.collect()  # garbage of earlier calls, freed meanwhile, would be subtracted
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        left, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        del result
        return left, peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    left = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        left += event.nbytes()
        peak = max(peak, left)
    return left, peak


class OperatorCount(TorchDispatchMode):
    """Counts the operators that run inside, each a kernel launch on a GPU, and the seconds in matrix products.

    Views and allocations are not counted, and operators inside compiled code are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.product_seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.product_seconds += time.perf_counter() - started
        self.operators += not (func.is_view or func.overloadpacket in NO_KERNEL)
        return result
