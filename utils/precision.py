"""Precision of training and evaluation: autocast, gradient scaling, and the switches of PyTorch that change sums."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from dotmap import DotMap
from torch.nn.attention import SDPBackend

from utils.errors import ConfigError

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

    Raises:
        ConfigError: bf16 on a GPU that has no units for it.
    """
    if device.type == "cuda" and setting in ("amp", "bf16"):
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if setting == "bf16" and not supported:
            raise ConfigError(
                "solver.precision: bf16, and this GPU has no units for it, so PyTorch would emulate it slowly; set "
                "solver.precision=amp, which takes fp16 here, or fp32"
            )
        setting = "bf16" if supported else "fp16"
    elif setting == "amp":
        setting = "fp32"
    return Precision(setting, device)


def prepare_precision(solver: DotMap, device: torch.device) -> Precision:
    """The precision of a run, with the switches of this process set for it. Call it before the first product.

    Args:
        solver: section of a configuration; `precision`, `tf32` and `deterministic` are read.

    Raises:
        ConfigError: as from `resolve_precision`.
    """
    set_switches(solver.tf32, solver.deterministic and device.type == "cuda")
    return resolve_precision(solver.precision, device)


def set_switches(tf32: bool = False, deterministic: bool = False) -> None:
    """Set what decides how CUDA adds up products, for this process.

    Sums that are split over parts of a GPU are never added in bf16 or fp16: a weight's gradient is a sum over tens of
    thousands of rows, and in fp16 it can overflow.

    Args:
        tf32: float32 products and convolutions take TF32, which keeps 10 bits of the mantissa.
        deterministic: operators that have a deterministic form take it, and the others end the run with an error.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only costs time


def describe_switches() -> str:
    """A line for the log: TF32 and deterministic operators, as they are set in this process."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    names = {(True, True): "on", (False, False): "off"}
    only = torch.are_deterministic_algorithms_enabled()
    return f"TF32 {names.get(tf32, 'for a part only')}, deterministic operators {'only' if only else 'not asked for'}"


def attention_kernel(device: torch.device, dtype: torch.dtype, head_width: int, tokens: int) -> str:
    """The kernel that PyTorch chooses for attention without a mask, in lower case, such as flash_attention.

    Args:
        tokens: of a frame.
    """
    query = torch.empty(1, 1, tokens, head_width, dtype=dtype, device=device)
    return SDPBackend(torch._fused_sdp_choice(query, query, query)).name.lower()
