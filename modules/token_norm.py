"""Norms of channels-last tokens: BatchNorm, with statistics of this process or of all processes, and LayerNorm.

Letters: S side width. Rows are the tokens of all clips, frames and patches.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modules.autograd import ChannelSums, FoldedNorm, cast_together, normalized
from modules.recompute import from_first_run, in_second_run
from utils.distributed import all_reduce, get_world_size


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm3d (eps 1e-5, momentum 0.1) on channels-last tokens: statistics over clips, frames and patches.

    `num_batches_tracked` is left to `count_batch`, which counts for all norms of a network together.

    Args:
        width: S, the number of channels.
        synced: in training, take the statistics over the tokens of all processes.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, width: int, synced: bool = False):
        super().__init__(width)
        self.synced = synced

    def forward(self, x: Tensor) -> Tensor:
        """(..., S) -> (..., S)."""
        rows = x.flatten(0, -2)
        if not from_first_run(lambda: self.training):  # the mode may have changed before the backward pass
            y = F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        elif self.synced and get_world_size() > 1:
            mean, var, count = from_first_run(lambda: self._shared_statistics(rows))
            y = SyncedNorm.apply(rows, self.weight, self.bias, mean, var, count, self.eps)
        elif in_second_run():
            y = F.batch_norm(rows, None, None, self.weight, self.bias, True, 0.0, self.eps)
        else:
            running = self.running_mean, self.running_var
            y = F.batch_norm(rows, *running, self.weight, self.bias, True, self.momentum, self.eps)
        return y.view_as(x)

    @property
    def shared_bytes(self) -> int:
        """Bytes that this layer hands to all-reduce in a step: float64 forward, the weight's dtype backward."""
        return 8 * (2 * self.num_features + 1) + 2 * self.weight.nbytes if self.synced else 0

    @torch.compiler.disable  # a compiler would have to know the processes
    @torch.no_grad()
    def _shared_statistics(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update the running statistics; return mean (S), biased variance (S) and number (1) of all processes' rows."""
        var, mean = (t.double() for t in torch.var_mean(rows.to(self.weight.dtype), dim=0, correction=0))
        count = mean.new_full((1,), len(rows))
        # Where a mean is large, the variance is a small difference of large sums, which float32 cannot resolve.
        sums = all_reduce(torch.cat([mean * count, (var + mean * mean) * count, count]))
        total, squares, count = sums.split([len(mean), len(mean), 1])
        mean = total / count
        var = squares / count - mean * mean
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = var * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean.to(self.weight.dtype), var.to(self.weight.dtype), count


def count_batch(norms: Iterable[TokenBatchNorm]) -> None:
    """Add 1 to `num_batches_tracked` of the norms that are in training mode, by one operator."""
    if counts := [norm.num_batches_tracked for norm in norms if norm.training]:
        torch._foreach_add_(counts, 1)


class TokenLayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of the tokens, also where autocast would compute and return float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., S) -> (..., S)."""
        weight, bias = cast_together([self.weight, self.bias], x.dtype)
        return NormAndAffine.apply(x, weight, bias, self.eps)

    def folded_into(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of a Linear on `normalized` tokens that gives what `linear` gives after this norm."""
        return FoldedNorm.apply(linear.weight, linear.bias, self.weight, self.bias)


class NormAndAffine(torch.autograd.Function):
    """LayerNorm with scale and shift, whose gradients are sums in float32; only the input is saved.

    PyTorch's own on a CPU adds them up in bfloat16, which is percents off.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x (..., S), weight and bias (S), all of one dtype -> (..., S)."""
        with torch.autocast(x.device.type, enabled=False):
            y, mean, rstd = torch.ops.aten.native_layer_norm(x, [len(weight)], weight, bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        rows = normalized(x, ctx.eps).view(-1, len(weight))
        grad_weight, grad_bias = ChannelSums(x)(grad.reshape(rows.shape), rows)
        shape, none = [len(weight)], None
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * weight, x, shape, mean, rstd, none, none, [True, False, False]
        )
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None


class SyncedNorm(torch.autograd.Function):
    """BatchNorm with given statistics of the rows of all processes; the backward pass sums over all processes too.

    The gradients of weight and bias are those of this process: DistributedDataParallel averages them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: Tensor, eps: float
    ) -> Tensor:
        """x (rows, S); weight, bias, mean, biased var (S); count (1) of the rows of all processes -> (rows, S)."""
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.count = count
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        normalized = (x - mean) * rstd
        grad_bias, grad_weight = grad.sum(0, dtype=mean.dtype), (grad * normalized).sum(0)
        shared = all_reduce(torch.stack([grad_bias, grad_weight])) / ctx.count
        grad_x = (grad - shared[0] - normalized * shared[1]) * (weight * rstd)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None
