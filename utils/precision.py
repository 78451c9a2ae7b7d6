"""Precision of training and evaluation: autocast and gradient scaling for `solver.precision`."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The type of matrix products: `name` is bf16, fp16 or fp32.

    What is trained, the optimizer's state and BatchNorm's statistics stay in float32.
    """

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[object]:
        """The context for forward passes; it changes nothing for fp32."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A scaler of the loss for fp16. For the other types it is disabled and changes nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def resolve_precision(setting: str, device: torch.device) -> Precision:
    """Return the precision of a setting.

    `amp` means bf16 on a GPU that supports it, fp16 on other GPUs, and fp32 on a CPU.
    """
    if setting == "amp":
        if device.type == "cuda":
            setting = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            setting = "fp32"
    return Precision(setting, device)
