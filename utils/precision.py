"""`solver.precision` -> autocast and gradient scaling on the device at hand."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The type that matrix products run in. Weights, optimizer and statistics stay in float32."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def autocast(self) -> AbstractContextManager:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16 only; in the other types it passes everything through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def resolve_precision(setting: str, device: torch.device) -> Precision:
    """`amp` is bf16 where the GPU has it, else fp16; on a CPU it is fp32. The other settings are taken as they are."""
    if setting == "amp":
        if device.type == "cuda":
            setting = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            setting = "fp32"
    return Precision(setting, device)
