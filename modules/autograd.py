"""What autograd would keep too much for, or compute too slowly: functions with their own backward pass.

Autocast reaches forward passes only, so each function casts by hand, to the type of the tokens it works on. Weights
keep their type, and sums over tokens are taken in it. B clips, T frames, N patches, S side width, D tower width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from utils.distributed import all_reduce


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type that matrix products of this tensor run in: autocast's, or its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class ThreeTaps(torch.autograd.Function):
    """y_t = w_0 x_{t-1} + w_1 x_t + w_2 x_{t+1} + b per channel, zeros beyond the ends.

    x (B, T, N, S), weight (3, S), bias (S). Written out because the library's depthwise Conv3d takes several times as
    long on a CPU (benchmarks/fast_form.py).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        w0, w1, w2 = weight.to(x.dtype).unbind(0)
        y = torch.addcmul(bias.to(x.dtype), x, w1)
        y[:, 1:].addcmul_(x[:, :-1], w0)
        y[:, :-1].addcmul_(x[:, 1:], w2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        w0, w1, w2 = weight.to(grad.dtype).unbind(0)
        grad_x = grad * w1
        grad_x[:, :-1].addcmul_(grad[:, 1:], w0)
        grad_x[:, 1:].addcmul_(grad[:, :-1], w2)
        products = (grad[:, 1:] * x[:, :-1], grad * x, grad[:, :-1] * x[:, 1:])
        grad_weight = torch.stack([p.flatten(0, 2).sum(0, dtype=weight.dtype) for p in products])
        return grad_x, grad_weight, grad.flatten(0, 2).sum(0, dtype=weight.dtype)


class FrozenLinear(torch.autograd.Function):
    """Linear(tokens), or Linear(LayerNorm(tokens)), of tokens that need no gradient.

    It keeps one copy of the tokens, in their own type, and two numbers a row. With n the normalised tokens before the
    norm's scale and shift, G = grad^T n gives the gradients of the Linear's weight and of the norm's alike, so no
    product as large as the tokens is needed.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """tokens (..., D), weight (S, D), bias (S), the norm's (D) -> (..., S) of the compute type."""
        dtype = compute_dtype(weight)
        mean = rstd = None
        x = tokens
        if norm_weight is not None:
            x, mean, rstd = torch.native_layer_norm(x.to(weight.dtype), x.shape[-1:], norm_weight, norm_bias, eps)
        ctx.save_for_backward(tokens, weight, norm_weight, norm_bias, mean, rstd)
        return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, norm_weight, norm_bias, mean, rstd = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_bias = grad.sum(0, dtype=weight.dtype)
        if norm_weight is None:
            x = tokens.flatten(0, -2).to(grad.dtype)
            return None, _grad_weight(grad, x, weight.dtype), grad_bias, None, None, None
        x = (tokens - mean).mul_(rstd).to(grad.dtype).flatten(0, -2)
        common = _grad_weight(grad, x, weight.dtype)  # (S, D)
        grad_weight = torch.addcmul(torch.outer(grad_bias, norm_bias), common, norm_weight)
        return None, grad_weight, grad_bias, (common * weight).sum(0), grad_bias @ weight, None


class PatchLinear(torch.autograd.Function):
    """Linear of every patch of clips that need no gradient; the clips are kept, not a copy cut into patches."""

    @staticmethod
    def forward(ctx: FunctionCtx, clips: Tensor, weight: Tensor, patch_size: int) -> Tensor:
        """clips (B, T, 3, H, W), weight (S, 3PP) -> (B, T, N, S) of the compute type."""
        ctx.save_for_backward(clips)
        ctx.patch_size, ctx.weight_dtype = patch_size, weight.dtype
        dtype = compute_dtype(weight)
        return F.linear(_patches(clips, patch_size).to(dtype), weight.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, Tensor, None]:
        (clips,) = ctx.saved_tensors
        patches = _patches(clips, ctx.patch_size).flatten(0, -2).to(grad.dtype)
        return None, _grad_weight(grad.flatten(0, -2), patches, ctx.weight_dtype), None


def _patches(clips: Tensor, P: int) -> Tensor:
    """(B, T, 3, H, W) -> (B, T, N, 3PP), row-major."""
    B, T, C, H, W = clips.shape
    return clips.view(B, T, C, H // P, P, W // P, P).permute(0, 1, 3, 5, 2, 4, 6).reshape(B, T, -1, C * P * P)


class UnseenLinear(torch.autograd.Function):
    """A Linear for a pass that is run only for the gradients: the product is left out, its place holds zeros."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        rows = grad.flatten(0, -2)
        grad_weight = _grad_weight(rows, x.flatten(0, -2), weight.dtype)
        return grad @ weight.to(x.dtype), grad_weight, rows.sum(0, dtype=weight.dtype)


def _grad_weight(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad (rows, S), x (rows, D) -> grad^T x, taking the faster of the two orders."""
    wide = x.shape[1] > grad.shape[1]
    return ((x.t() @ grad).t() if wide else grad.t() @ x).to(dtype)


class SyncedNorm(torch.autograd.Function):
    """BatchNorm of rows with statistics that all processes share; its backward sums over all of them, too.

    The gradients of weight and bias stay this process's own, since DistributedDataParallel averages them.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: float, eps: float
    ) -> Tensor:
        """x (rows, S); weight, bias, mean and biased var (S); count of the rows of all processes."""
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.count = count
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        normalized = (x - mean) * rstd
        grad_bias, grad_weight = grad.sum(0, dtype=mean.dtype), (grad * normalized).sum(0)
        shared = all_reduce(torch.stack([grad_bias, grad_weight])) / ctx.count
        grad_x = (grad - shared[0] - normalized * shared[1]) * (weight * rstd)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None


@dataclass
class Pass:
    """One run of a part of the network.

    Attributes:
        training: whether BatchNorm takes the statistics of the batch.
        again: this is the run that the backward pass makes: statistics are not counted again, and a product that only
            the output needs is left out.
        shared: statistics over all processes, in the order in which the first run asked for them.
    """

    training: bool
    again: bool = False
    shared: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)


class Recomputed(torch.autograd.Function):
    """Runs `part(*inputs, run)` and keeps its inputs alone; the backward pass runs it again with a graph.

    Like torch.modules.checkpoint, but running statistics move once, shared ones are fetched once, and the second run
    may leave out what no gradient needs.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, part: Callable[..., Tensor], training: bool, num_inputs: int, *tensors: Tensor
    ) -> Tensor:
        """`tensors` are the inputs of `part`, and behind these `num_inputs` all parameters that it uses."""
        ctx.part, ctx.num_inputs, ctx.run = part, num_inputs, Pass(training)
        kind = tensors[0].device.type
        # Weights cast while there is no graph must not be found in autocast's cache by a run that needs one.
        ctx.autocast = dict(
            device_type=kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        ctx.save_for_backward(*tensors)
        with torch.autocast(**ctx.autocast):
            return part(*tensors[:num_inputs], ctx.run)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3:]
        tensors = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(w) for t, w in zip(tensors[: ctx.num_inputs], wanted, strict=False)]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            output = ctx.part(*inputs, Pass(ctx.run.training, again=True, shared=list(ctx.run.shared)))
        sources = [*inputs, *tensors[ctx.num_inputs :]]
        grads = iter(torch.autograd.grad(output, [t for t, w in zip(sources, wanted, strict=True) if w], grad))
        return None, None, None, *(next(grads) if w else None for w in wanted)


def recomputed(
    part: Callable[..., Tensor], training: bool, inputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """`part(*inputs, run)`, of which autograd keeps the inputs alone."""
    return Recomputed.apply(part, training, len(inputs), *inputs, *parameters)
