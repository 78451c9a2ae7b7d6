"""Batches on their way to the device, beside the computation."""

import torch
from torch import Tensor


def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies to a GPU; None for a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class DeviceCopy:
    """Copies tensors to a device, on a GPU in a stream of their own.

    The host runs ahead of the GPU, so the copy of a batch in pinned memory runs while the GPU computes the step before.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, copy_stream(device)

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; what is launched after this call finds it complete."""
        if self._stream is None:
            return tensor.to(self._device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            copied = tensor.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        copied.record_stream(computing)  # its memory is not used again before the computation is through with it
        return copied
