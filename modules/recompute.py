"""Recomputation: a part of the network runs once in the forward pass and a second time in the backward pass.

Between the two runs only the part's inputs are kept. torch.utils.checkpoint does the same; here, in addition,

- a value that must not be computed twice is taken from the first run (`from_first_run`), so BatchNorm updates its
  running statistics once and exchanges statistics with other processes once;
- the second run skips a `residual_linear` at the end, because no gradient depends on its result.

Layers ask for the current run with `in_second_run` and `from_first_run`. Where nothing is recomputed, every run is a
first run and nothing is kept.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modules.autograd import GradientOnlyLinear

Value = TypeVar("Value")


class _CurrentRun(threading.local):
    """The run that this thread is in. Each thread has its own: autograd runs the backward pass of CUDA in another."""

    kept: list[Any] | None = None  # first run: receives the values of `from_first_run`
    replayed: list[Any] | None = None  # second run: the values of the first
    position: int = 0  # second run: how many of them were given back


_current = _CurrentRun()


@contextmanager
def _run(kept: list[Any] | None = None, replayed: list[Any] | None = None) -> Iterator[None]:
    outer = _current.kept, _current.replayed, _current.position
    _current.kept, _current.replayed, _current.position = kept, replayed, 0
    try:
        yield
    finally:
        _current.kept, _current.replayed, _current.position = outer


def in_second_run() -> bool:
    """True while the backward pass recomputes a part, which is done for its gradients only."""
    return _current.replayed is not None


def from_first_run(compute: Callable[[], Value]) -> Value:
    """Return `compute()` in a first run, and the same value, without calling `compute`, in the second run.

    Both runs must ask for their values in the same order.
    """
    if _current.replayed is not None:
        _current.position += 1
        return _current.replayed[_current.position - 1]
    value = compute()
    if _current.kept is not None:
        _current.kept.append(value)
    return value


class Recomputed(torch.autograd.Function):
    """`part(*inputs)`, of which autograd keeps the inputs and the values of `from_first_run`."""

    @staticmethod
    def forward(ctx: Any, part: Callable[..., Tensor], num_inputs: int, *tensors: Tensor) -> Tensor:
        """`tensors` are the `num_inputs` inputs of `part`, followed by all parameters that it uses."""
        ctx.part, ctx.num_inputs, ctx.kept = part, num_inputs, []
        kind = tensors[0].device.type
        # Autocast caches the weights that it casts. Those cast here, without a graph, must not serve the second run.
        ctx.autocast = dict(
            device_type=kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        ctx.save_for_backward(*tensors)
        with torch.autocast(**ctx.autocast), _run(kept=ctx.kept):
            return part(*tensors[:num_inputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        tensors = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(w) for t, w in zip(tensors[: ctx.num_inputs], wanted, strict=False)]
        with torch.enable_grad(), torch.autocast(**ctx.autocast), _run(replayed=ctx.kept):
            output = ctx.part(*inputs)
        sources = [*inputs, *tensors[ctx.num_inputs :]]
        grads = iter(torch.autograd.grad(output, [t for t, w in zip(sources, wanted, strict=True) if w], grad))
        return None, None, *(next(grads) if w else None for w in wanted)


def recomputed(part: nn.Module, *inputs: Tensor) -> Tensor:
    """Return `part(*inputs)`; if gradients are enabled, the part is recomputed in the backward pass."""
    if not torch.is_grad_enabled():
        return part(*inputs)
    return Recomputed.apply(part, len(inputs), *inputs, *part.parameters())


def residual_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """residual + Linear(x), as at the end of a part: (..., S) + (..., width in) -> (..., S).

    No gradient of the part depends on the result, so a second run computes neither the product nor the sum.
    """
    if in_second_run():
        return GradientOnlyLinear.apply(residual, x, weight, bias)
    return residual + F.linear(x, weight, bias)
