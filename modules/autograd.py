"""Autograd functions with hand-written backward passes, where PyTorch's own save too much or run too slowly.

Autocast applies to forward passes only, so each function casts explicitly, to the dtype of the tokens that it works on.
Weights keep their dtype, and sums over tokens are returned in it.

Letters: B clips, T frames of a clip, P patch size, N patches of a frame, D tower width, S side width, H and W pixel
height and width.
"""

from collections.abc import Sequence
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


class ChannelSums:
    """Sums over rows of products of two tensors, for each channel.

    The backward pass of BatchNorm with mean 0 and deviation 1 gives them in one pass, which writes nothing else.
    """

    def __init__(self, like: Tensor):
        """`like` (..., S): sums are taken in float32, or in its dtype if that is wider."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self._zeros = like.new_zeros(like.shape[-1], dtype=dtype)
        self._ones = self._zeros + 1

    def __call__(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """grad and x (rows, S) -> sums of grad * x and of grad, (S) each; 0 without rows."""
        if not len(x):
            return self._zeros, self._zeros
        backward, none = torch.ops.aten.native_batch_norm_backward, None
        result = backward(grad, x, self._ones, none, none, self._zeros, self._ones, True, 0.0, [False, True, True])
        return result[1], result[2]


class ThreeTaps(torch.autograd.Function):
    """y_t = w_0 x_{t-1} + w_1 x_t + w_2 x_{t+1} + b for each channel, with zeros before the first and after the last t.

    PyTorch's depthwise Conv3d takes several times as long on a CPU (benchmarks/fast_form.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, N, S), weight (S, 3), bias (S), all of one dtype -> (B, T, N, S)."""
        weight = weight.t().contiguous()
        ctx.save_for_backward(x, weight)
        w0, w1, w2 = weight.unbind(0)
        y = torch.addcmul(bias, x, w1)
        y[:, 1:].addcmul_(x[:, :-1], w0)
        y[:, :-1].addcmul_(x[:, 1:], w2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        w0, w1, w2 = weight.unbind(0)
        grad_x = grad * w1
        grad_x[:, :-1].addcmul_(grad[:, 1:], w0)
        grad_x[:, 1:].addcmul_(grad[:, :-1], w2)
        frame, S = x[0, 0].numel(), x.shape[-1]
        before, after = x[:-1, -1:] * grad[1:, :1], x[1:, :1] * grad[:-1, -1:]  # of neighbours in two different clips
        rows, grads = x.flatten(), grad.flatten()
        sums = ChannelSums(x)
        now, grad_bias = sums(grads.view(-1, S), rows.view(-1, S))
        first, _ = sums(grads[frame:].view(-1, S), rows[:-frame].view(-1, S))
        last, _ = sums(grads[:-frame].view(-1, S), rows[frame:].view(-1, S))
        first = first - before.flatten(0, -2).sum(0, dtype=now.dtype)
        last = last - after.flatten(0, -2).sum(0, dtype=now.dtype)
        return grad_x, torch.stack([first, now, last], dim=1), grad_bias


class Fuse(torch.autograd.Function):
    """Splits the projected tokens of a layer; the patches are averaged with the tokens of the side network."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, N, S), tokens (B, T, 1 + N, S) -> 0.5 x + 0.5 patches (B, T, N, S), class tokens (B, T, S)."""
        return torch.lerp(x, tokens[:, :, 1:], 0.5), tokens[:, :, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_class: Tensor) -> tuple[Tensor, Tensor]:
        half = grad * 0.5
        return half, torch.cat([grad_class.unsqueeze(2), half], dim=2)


class ShiftClassToken(torch.autograd.Function):
    """Channels below S // 2 come from frame t + 1, the others from t - 1; zeros at the ends."""

    @staticmethod
    def forward(ctx: Any, class_tokens: Tensor) -> Tensor:
        """(B, T, S) -> (B, T, S)."""
        half = class_tokens.shape[-1] // 2
        shifted = torch.zeros_like(class_tokens)
        shifted[:, :-1, :half] = class_tokens[:, 1:, :half]
        shifted[:, 1:, half:] = class_tokens[:, :-1, half:]
        return shifted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        half = grad.shape[-1] // 2
        result = torch.zeros_like(grad)
        result[:, 1:, :half] = grad[:, :-1, :half]
        result[:, :-1, half:] = grad[:, 1:, half:]
        return result


class FrameTokens(torch.autograd.Function):
    """What attention reads: the shifted class token, then the patch tokens with their positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shifted: Tensor, pos: Tensor) -> Tensor:
        """x (B, T, N, S), shifted (B, T, S), pos (N, S), all of one dtype -> (B, T, 1 + N, S)."""
        if torch.compiler.is_compiling():  # it knows no `out` inside another tensor, and fuses the two by itself
            return torch.cat([shifted.unsqueeze(2), x + pos], dim=2)
        B, T, N, S = x.shape
        tokens = x.new_empty(B, T, 1 + N, S)
        torch.add(x, pos, out=tokens[:, :, 1:])
        tokens[:, :, 0] = shifted
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches = grad[:, :, 1:]
        return patches, grad[:, :, 0], patches.sum((0, 1))


class SplitHeads(torch.autograd.Function):
    """Queries of the patches, keys and values out of one product. Their gradients are written side by side."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (frames, 1 + N, 3S) -> (frames, heads, N, S / heads), and twice (frames, heads, 1 + N, S / heads)."""
        ctx.num_heads = num_heads
        query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        return query[:, :, 1:], key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        frames, heads, tokens, width = grads[1].shape
        result = grads[1].new_empty(frames, tokens, 3, heads, width)
        query, key, value = result.permute(2, 0, 3, 1, 4)
        query[:, :, 0] = 0
        for part, grad in zip((query[:, :, 1:], key, value), grads, strict=True):
            part.copy_(grad)
        return result.flatten(2), None


def normalized(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, without scale and shift, in the dtype of `x`; autocast could widen it."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], eps=eps)


class FoldedNorm(torch.autograd.Function):
    """Scale and shift of a LayerNorm, folded into the Linear that follows it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """weight (S, D), bias (S), scale and shift (D) -> weight (S, D) and bias (S) for tokens without both."""
        ctx.save_for_backward(weight, scale, shift)
        return weight * scale, torch.addmv(bias, weight, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor, ...]:
        return FoldedNorm.unfold(grad_weight, grad_bias, *ctx.saved_tensors)

    @staticmethod
    def unfold(
        grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the folded weight and bias -> those of weight, bias, scale and shift."""
        unfolded = torch.addcmul(torch.outer(grad_bias, shift), grad_weight, scale)
        return unfolded, grad_bias, (grad_weight * weight).sum(0), torch.mv(weight.t(), grad_bias)


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
        with torch.autocast(tokens.device.type, enabled=False):
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
        folded = weight_gradient(grad, x, weight.dtype)  # (S, D)
        return None, *FoldedNorm.unfold(folded, grad_bias, weight, norm_weight, norm_bias), None


class NeighbourSum(torch.autograd.Function):
    """The sum of what the frames before, at and after t give to frame t."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, bias: Tensor) -> Tensor:
        """Products of consecutive frames with three slices of a kernel (B, T, N, 3S), bias (S) -> (B, T, N, S)."""
        ctx.bias_dtype = bias.dtype
        before, now, after = products.chunk(3, dim=-1)
        x = now + bias.to(now.dtype)
        x[:, 1:].add_(before[:, :-1])
        x[:, :-1].add_(after[:, 1:])
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        result = grad.new_empty(*grad.shape[:-1], 3 * grad.shape[-1])
        before, now, after = result.chunk(3, dim=-1)
        now.copy_(grad)
        before[:, :-1], before[:, -1] = grad[:, 1:], 0
        after[:, 1:], after[:, 0] = grad[:, :-1], 0
        return result, grad.flatten(0, -2).sum(0, dtype=ctx.bias_dtype)


class PatchLinear(torch.autograd.Function):
    """Linear of every patch of clips that need no gradient. It saves the clips, not a second copy cut into patches."""

    @staticmethod
    def forward(ctx: Any, clips: Tensor, weight: Tensor, patch_size: int) -> Tensor:
        """clips (B, T, 3, H, W), weight (S, 3PP) -> (B, T, N, S) of `compute_dtype`."""
        ctx.save_for_backward(clips)
        ctx.patch_size, ctx.weight_dtype = patch_size, weight.dtype
        dtype = compute_dtype(weight)
        return F.linear(_patches(clips.to(dtype), patch_size), weight.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (clips,) = ctx.saved_tensors
        patches = _patches(clips.to(grad.dtype), ctx.patch_size).flatten(0, -2)
        return None, weight_gradient(grad.flatten(0, -2), patches, ctx.weight_dtype), None


def _patches(clips: Tensor, P: int) -> Tensor:
    """(B, T, 3, H, W) -> (B, T, N, 3PP), row-major."""
    B, T, _, H, W = clips.shape
    return clips.view(B, T, 3, H // P, P, W // P, P).permute(0, 1, 3, 5, 2, 4, 6).reshape(B, T, -1, 3 * P * P)


class GradientOnlyLinear(torch.autograd.Function):
    """residual + Linear(x) for its gradients only: it computes nothing, and the result has no meaningful values."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """residual (..., S), x (..., width in), weight (S, width in), bias (S) -> (..., S)."""
        ctx.save_for_backward(x, weight)
        return residual.view_as(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = weight_gradient(rows, x.flatten(0, -2), weight.dtype)
        return grad, grad @ weight, grad_weight, rows.sum(0, dtype=weight.dtype)


class CastTogether(torch.autograd.Function):
    """Tensors in another type, by one operator forward and one backward, however many tensors there are."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors of one type -> as many of `dtype`."""
        ctx.dtype = tensors[0].dtype
        return CastTogether.cast(tensors, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *CastTogether.cast(grads, ctx.dtype)

    @staticmethod
    def cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        results = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
        torch._foreach_copy_(results, tensors)
        return results


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors, which are of one type, in `dtype`."""
    if tensors[0].dtype == dtype:
        return list(tensors)
    if torch.compiler.is_compiling():  # it fuses the casts by itself
        return [tensor.to(dtype) for tensor in tensors]
    return list(CastTogether.apply(dtype, *tensors))
