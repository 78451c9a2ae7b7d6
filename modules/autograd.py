"""Autograd functions with hand-written backward passes, where PyTorch's own save too much or run too slowly.

Autocast applies to forward passes only, so each function casts explicitly, to the dtype of the tokens that it works on.
Weights keep their dtype, and sums over tokens are returned in it.

Letters: B clips, T frames of a clip, P patch size, N patches of a frame, D tower width, S side width, H and W pixel
height and width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with this tensor: autocast's if it is enabled, otherwise the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad (rows, S), x (rows, D) -> grad^T x (S, D), computed in the faster of the two orders."""
    wide = x.shape[1] > grad.shape[1]
    return ((x.t() @ grad).t() if wide else grad.t() @ x).to(dtype)


class ThreeTaps(torch.autograd.Function):
    """y_t = w_0 x_{t-1} + w_1 x_t + w_2 x_{t+1} + b for each channel, with zeros before the first and after the last t.

    PyTorch's depthwise Conv3d takes several times as long on a CPU (benchmarks/fast_form.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, N, S), weight (3, S), bias (S) -> (B, T, N, S)."""
        ctx.save_for_backward(x, weight)
        w0, w1, w2 = weight.to(x.dtype).unbind(0)
        y = torch.addcmul(bias.to(x.dtype), x, w1)
        y[:, 1:].addcmul_(x[:, :-1], w0)
        y[:, :-1].addcmul_(x[:, 1:], w2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        w0, w1, w2 = weight.to(grad.dtype).unbind(0)
        grad_x = grad * w1
        grad_x[:, :-1].addcmul_(grad[:, 1:], w0)
        grad_x[:, 1:].addcmul_(grad[:, :-1], w2)
        products = (grad[:, 1:] * x[:, :-1], grad * x, grad[:, :-1] * x[:, 1:])
        grad_weight = torch.stack([p.flatten(0, 2).sum(0, dtype=weight.dtype) for p in products])
        return grad_x, grad_weight, grad.flatten(0, 2).sum(0, dtype=weight.dtype)


def normalized(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, without scale and shift, in the dtype of `x`; autocast could widen it."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], eps=eps)


class FrozenLinear(torch.autograd.Function):
    """Linear(tokens) or Linear(LayerNorm(tokens)), for tokens that need no gradient.

    It saves the tokens once, in their own dtype. Let n be the normalised tokens before the LayerNorm's scale and shift,
    which are folded into the Linear: n is all that is written, in the dtype of the product. In the backward pass n is
    computed again, and the one product grad^T n gives the gradients of the Linear's weight and of the LayerNorm's, so
    no gradient as large as the tokens is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """tokens (..., D), weight (S, D), bias (S), norm_weight and norm_bias (D) -> (..., S) of `compute_dtype`."""
        ctx.dtype, ctx.eps = compute_dtype(weight), eps
        ctx.save_for_backward(tokens, weight, norm_weight, norm_bias)
        if norm_weight is None or norm_bias is None:
            x = tokens.to(ctx.dtype)
        else:
            x = FrozenLinear.normalized_tokens(tokens, ctx.dtype, eps)
            weight, bias = weight * norm_weight, torch.addmv(bias, weight, norm_bias)
        return F.linear(x, weight.to(ctx.dtype), bias.to(ctx.dtype))

    @staticmethod
    def normalized_tokens(tokens: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
        """In `dtype`; where it is not that of the tokens, the norm is computed in float32."""
        return normalized(tokens if tokens.dtype == dtype else tokens.float(), eps).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, norm_weight, norm_bias = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_bias = grad.sum(0, dtype=weight.dtype)
        if norm_weight is None:
            x = tokens.flatten(0, -2).to(grad.dtype)
            return None, weight_gradient(grad, x, weight.dtype), grad_bias, None, None, None
        x = FrozenLinear.normalized_tokens(tokens, grad.dtype, ctx.eps).flatten(0, -2)
        common = weight_gradient(grad, x, weight.dtype)  # (S, D)
        grad_weight = torch.addcmul(torch.outer(grad_bias, norm_bias), common, norm_weight)
        return None, grad_weight, grad_bias, (common * weight).sum(0), grad_bias @ weight, None


class PatchLinear(torch.autograd.Function):
    """Linear of every patch of clips that need no gradient. It saves the clips, not a second copy cut into patches."""

    @staticmethod
    def forward(ctx: Any, clips: Tensor, weight: Tensor, patch_size: int) -> Tensor:
        """clips (B, T, 3, H, W), weight (S, 3PP) -> (B, T, N, S) of `compute_dtype`."""
        ctx.save_for_backward(clips)
        ctx.patch_size, ctx.weight_dtype = patch_size, weight.dtype
        dtype = compute_dtype(weight)
        return F.linear(_patches(clips, patch_size).to(dtype), weight.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (clips,) = ctx.saved_tensors
        patches = _patches(clips, ctx.patch_size).flatten(0, -2).to(grad.dtype)
        return None, weight_gradient(grad.flatten(0, -2), patches, ctx.weight_dtype), None


def _patches(clips: Tensor, P: int) -> Tensor:
    """(B, T, 3, H, W) -> (B, T, N, 3PP), row-major."""
    B, T, _, H, W = clips.shape
    return clips.view(B, T, 3, H // P, P, W // P, P).permute(0, 1, 3, 5, 2, 4, 6).reshape(B, T, -1, 3 * P * P)


class GradientOnlyLinear(torch.autograd.Function):
    """A Linear without its forward product: the result is zeros, the gradients are those of the Linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x (..., width in), weight (width out, width in), bias (width out) -> zeros (..., width out)."""
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        rows = grad.flatten(0, -2)
        grad_weight = weight_gradient(rows, x.flatten(0, -2), weight.dtype)
        return grad @ weight.to(x.dtype), grad_weight, rows.sum(0, dtype=weight.dtype)
