"""Operators of a training step and the bytes that they move, counted without running them.

    python -m benchmarks.traffic [--arch ViT-B/16 ...] [--clips 32] [--compile] [--by_operator]

The model runs forward and backward on fake tensors, under autocast in bfloat16 with the tower in bfloat16, so nothing
is computed and no memory is needed. Autocast's rules are those of CUDA: CUDA runs layer_norm in float32. Each operator
is taken to read its inputs and write its results once. Matrix products, convolutions and attention are counted apart.
The times of a roofline are arithmetic.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.allocations import NO_KERNEL, PRODUCTS


class Traffic(TorchDispatchMode):
    """Counts the operators that run inside and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.product_bytes = 0
        self.other_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "prim" and not (func.is_view or func.overloadpacket in NO_KERNEL):
            self.operators += 1
            moved = sum(_bytes(t) for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            self.calls[func.name()] += 1
            if func.overloadpacket in PRODUCTS:
                self.product_bytes += moved
            else:
                self.other_bytes[func.name()] += moved
        return result


def _bytes(t: Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded dimension count once."""
    n = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        n *= size if stride else 1
    return n


@contextmanager
def cuda_rules() -> Iterator[None]:
    """Autocast on a CPU treats layer_norm as on CUDA: in float32."""
    layer_norm = F.layer_norm

    def in_float32(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return layer_norm(x.float(), *args, **kwargs)
        return layer_norm(x, *args, **kwargs)

    F.layer_norm = in_float32
    try:
        yield
    finally:
        F.layer_norm = layer_norm
