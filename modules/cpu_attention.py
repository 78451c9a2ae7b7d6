"""Attention in bfloat16 on a CPU, out of PyTorch's batched products.

PyTorch's own kernel multiplies several times slower there (`python -m benchmarks.fast_form`).
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from utils.precision import has_bfloat16_units

# Scores of one round, 1.3 MB in float32. Half and five times as many were as fast; more only take more memory.
ROUND = 320_000


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(width)) value, by the fastest kernel there is.

    query (F, heads, N, width), key and value (F, heads, M, width) -> (F, heads, N, width).
    """
    if torch.compiler.is_compiling():  # it must not see a question about the CPU, which would break its graph
        return F.scaled_dot_product_attention(query, key, value)
    if runs_in_rounds(query.device, query.dtype):
        return RoundsOfHeads.apply(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


_has_units = cache(has_bfloat16_units)


def runs_in_rounds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attention` is that of RoundsOfHeads, where nothing is compiled."""
    return device.type == "cpu" and dtype == torch.bfloat16 and _has_units()


class RoundsOfHeads(torch.autograd.Function):
    """Attention of a few heads at a time. Only query, key and value are saved.

    As in PyTorch's kernel, products have bfloat16 inputs, and scores, softmax and their gradients are float32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (F, heads, N, width), key and value (F, heads, M, width) -> (F, heads, N, width)."""
        ctx.save_for_backward(query, key, value)
        result = query.new_empty(query.shape)
        rounds = _rounds(query.shape[2] * key.shape[2], result, query, key, value)
        for out, q, k, v in rounds:
            torch.bmm(_probabilities(q, k).to(v.dtype), v, out=out)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors
        results = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
        scale = query.shape[-1] ** -0.5
        rounds = _rounds(query.shape[2] * key.shape[2], *results, grad, query, key, value)
        for grad_q, grad_k, grad_v, g, q, k, v in rounds:
            p = _probabilities(q, k)
            grad_p = torch.bmm(g.float(), v.float().mT)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(scale).to(v.dtype)
            torch.bmm(grad_scores, k, out=grad_q)
            torch.bmm(grad_scores.mT, q, out=grad_k)
            torch.bmm(p.to(v.dtype).mT, g, out=grad_v)
        return results[0], results[1], results[2]


def _rounds(scores: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices (heads of a round, ..., width) of tensors (F, heads, ..., width); `scores` are those of one head."""
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    return zip(*(tensor.split(max(1, ROUND // scores)) for tensor in flat), strict=True)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """(heads, N, width), (heads, M, width) -> float32 (heads, N, M)."""
    return torch.bmm(q.float() * q.shape[-1] ** -0.5, k.float().mT).softmax(-1)
