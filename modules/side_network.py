"""The spatial-temporal side network: what Side4Video trains (paper section 3.2, docs/protocol.md section 2).

It runs beside a frozen image tower. Each side block takes the tokens that one block of the tower gives for every frame,
mixes them into its own narrow stream and looks over time, inside the frame, and at each token:

    stem -> [ fuse tower tokens -> temporal convolution -> spatial attention -> feed-forward ] x layers -> mean

The variants `pre` and `post` of the protocol differ in where the norms stand, which is an argument here.

Shapes, one letter one meaning in the whole project:
    B clips   T frames of a clip   P patch size   N patches of a frame, row-major
    D width of the tower   S width of the side network   K classes
All streams are channels-last, (B, T, N, S) contiguous: pointwise convolutions are matrix products, BatchNorm sees rows,
and nothing is ever transposed. tests/textbook.py holds the plain nn.Conv3d form that this one must equal.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.autograd import FrozenLinear, Pass, PatchLinear, SyncedNorm, ThreeTaps, UnseenLinear, recomputed
from utils.distributed import all_reduce, get_world_size

HEAD_WIDTH = 64
NormPlacement = Literal["pre", "post"]


class TubeletStem(nn.Conv3d):
    """Conv3d(3 -> S, kernel (3, P, P), stride (1, P, P), padding (1, 0, 0)) on clips, giving tokens.

    One product of every patch with the three temporal slices of the kernel, then a sum over neighbouring frames: no
    patch is copied three times.
    """

    def __init__(self, side_width: int, patch_size: int):
        super().__init__(3, side_width, (3, patch_size, patch_size), (1, patch_size, patch_size), (1, 0, 0))

    def forward(self, clips: Tensor) -> Tensor:
        """(B, T, 3, H, W) -> (B, T, N, S)."""
        weight = self.weight.permute(2, 0, 1, 3, 4).flatten(0, 1).flatten(1)  # (3S, 3PP)
        before, now, after = PatchLinear.apply(clips, weight, self.kernel_size[-1]).split(self.out_channels, dim=-1)
        x = now + self.bias.to(now.dtype)
        x[:, 1:] += before[:, :-1]
        x[:, :-1] += after[:, 1:]
        return x


class PointwiseConv(nn.Conv3d):
    """Conv3d 1x1x1 on channels-last tokens: a matrix product. The weight keeps Conv3d's shape (S, S, 1, 1, 1)."""

    def __init__(self, width: int):
        super().__init__(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., S) -> (..., S)."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class TemporalConv(nn.Conv3d):
    """Depthwise Conv3d (3, 1, 1), padding (1, 0, 0), on channels-last tokens without changing their layout."""

    def __init__(self, width: int):
        super().__init__(width, width, (3, 1, 1), padding=(1, 0, 0), groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, N, S) -> (B, T, N, S)."""
        return ThreeTaps.apply(x, self.weight.view(-1, 3).t().contiguous(), self.bias)


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm3d (eps 1e-5, momentum 0.1) on channels-last tokens: statistics over B, T and space, the rows.

    Attributes:
        synced: take them over the rows of all processes.
    """

    synced = False

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """(B, T, N, S) -> (B, T, N, S)."""
        rows = x.flatten(0, -2)
        if run.training and self.synced and get_world_size() > 1:
            y = SyncedNorm.apply(rows, self.weight, self.bias, *self._shared_statistics(rows, run), self.eps)
        elif run.training and run.again:
            y = F.batch_norm(rows, None, None, self.weight, self.bias, True, 0.0, self.eps)
        elif run.training:
            self.num_batches_tracked += 1
            statistics = self.running_mean, self.running_var
            y = F.batch_norm(rows, *statistics, self.weight, self.bias, True, self.momentum, self.eps)
        else:
            y = F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return y.view_as(x)

    @torch.no_grad()
    def _shared_statistics(self, rows: Tensor, run: Pass) -> tuple[Tensor, Tensor, float]:
        """Mean and biased variance of the rows of all processes, and their number."""
        if run.again:
            return run.shared.pop(0)
        var, mean = (t.double() for t in torch.var_mean(rows.to(self.weight.dtype), dim=0, correction=0))
        count = mean.new_full((1,), len(rows))
        # Square sums lose all digits where a mean is large, but for the 53 bits of double.
        sums = all_reduce(torch.cat([mean * count, (var + mean * mean) * count, count]))
        total, squares, count = sums.split([len(mean), len(mean), 1])
        mean = total / count
        var = squares / count - mean * mean
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = var * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        run.shared.append((mean.to(self.weight.dtype), var.to(self.weight.dtype), count))
        return run.shared[-1]


def shift_class_token(class_tokens: Tensor) -> Tensor:
    """(B, T, S) -> (B, T, S): at frame t the first S // 2 channels of t + 1, the others of t - 1, zeros beyond."""
    half = class_tokens.shape[-1] // 2
    shifted = torch.zeros_like(class_tokens)
    shifted[:, :-1, :half] = class_tokens[:, 1:, :half]
    shifted[:, 1:, half:] = class_tokens[:, :-1, half:]
    return shifted


class FrameAttention(nn.Module):
    """Attention inside each frame: the N patch tokens ask, they and the shifted class token in front of them answer."""

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, 1 + N, S), class token first -> (B, T, N, S)."""
        B, T, M, S = tokens.shape
        qkv = self.qkv(tokens).view(B * T, M, 3, self.num_heads, HEAD_WIDTH)
        query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))
        x = F.scaled_dot_product_attention(query[:, :, 1:], key, value)
        return self.proj(x.transpose(1, 2).reshape(B, T, M - 1, S))


class Mlp(nn.Module):
    """Linear S -> 4S, exact GELU, Linear 4S -> S."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, unseen: bool = False) -> Tensor:
        """(..., S) -> (..., S); zeros that only have gradients if the result is `unseen`."""
        x = F.gelu(self.fc1(x))
        return UnseenLinear.apply(x, self.fc2.weight, self.fc2.bias) if unseen else self.fc2(x)


class LayerProjection(nn.Module):
    """Tower tokens to the side width: `pre` normalises before the Linear (over D), `post` after it (over S)."""

    def __init__(self, backbone_width: int, side_width: int, norm_placement: NormPlacement):
        super().__init__()
        self.norm_placement = norm_placement
        self.norm = nn.LayerNorm(backbone_width if norm_placement == "pre" else side_width)
        self.linear = nn.Linear(backbone_width, side_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, 1 + N, D) of any type, without gradient -> (B, T, 1 + N, S)."""
        norm, linear = self.norm, self.linear
        if self.norm_placement == "pre":
            return FrozenLinear.apply(tokens, linear.weight, linear.bias, norm.weight, norm.bias, norm.eps)
        return norm(FrozenLinear.apply(tokens, linear.weight, linear.bias))


class SideBlock(nn.Module):
    """One side layer: temporal convolution, attention inside the frame, feed-forward, each with a residual."""

    def __init__(self, width: int, norm_placement: NormPlacement):
        super().__init__()
        self.norm_placement = norm_placement
        self.bn_1 = TokenBatchNorm(width)
        self.conv = nn.Sequential(PointwiseConv(width), TemporalConv(width), PointwiseConv(width))
        self.ln_1 = nn.LayerNorm(width)
        self.attn = FrameAttention(width)
        self.bn_2 = TokenBatchNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, shifted: Tensor, pos: Tensor, run: Pass) -> Tensor:
        """(B, T, N, S), shifted class tokens (B, T, 1, S), positions (N, S) -> (B, T, N, S)."""
        if self.norm_placement == "pre":
            x = x + self.conv(self.bn_1(x, run))
            x = x + self.attn(self.ln_1(self._frame_tokens(x, shifted, pos)))
            return x + self.mlp(self.bn_2(x, run), unseen=run.again)
        x = x + self.bn_1(self.conv(x), run)
        x = x + self.ln_1(self.attn(self._frame_tokens(x, shifted, pos)))
        return x + self.bn_2(self.mlp(x), run)

    @staticmethod
    def _frame_tokens(x: Tensor, shifted: Tensor, pos: Tensor) -> Tensor:
        return torch.cat([shifted.to(x.dtype), x + pos.to(x.dtype)], dim=2)


class SideNetwork(nn.Module):
    """The whole side network, from pixels and tower tokens to one feature per clip.

    Args:
        backbone_width: D, width of the tower's tokens.
        side_width: S, a multiple of 64: attention has S // 64 heads.
        num_layers: side blocks, one for each tower block whose tokens are given.
        patch_size: P, the tower's patch size, used by the stem.
        num_patches: N, patches of a frame.
        norm_placement: "pre" for OpenAI's CLIP towers, "post" for EVA's (docs/protocol.md section 2).

    Attributes:
        recompute: training keeps, of each block, its input and the tower's tokens alone, and computes the rest again in
            the backward pass: same gradients, least memory.

    Raises:
        ValueError: `side_width` is no multiple of 64.
    """

    def __init__(
        self,
        backbone_width: int,
        side_width: int,
        num_layers: int,
        patch_size: int,
        num_patches: int,
        norm_placement: NormPlacement = "pre",
    ):
        super().__init__()
        if side_width < HEAD_WIDTH or side_width % HEAD_WIDTH:
            raise ValueError(f"side width {side_width} is no multiple of {HEAD_WIDTH}, the width of an attention head")
        self.norm_placement = norm_placement
        self.recompute = True
        self.stem = TubeletStem(side_width, patch_size)
        self.stem_bn = TokenBatchNorm(side_width)
        self.pos = nn.Parameter(torch.empty(num_patches, side_width))
        self.projections = nn.ModuleList(
            LayerProjection(backbone_width, side_width, norm_placement) for _ in range(num_layers)
        )
        self.blocks = nn.ModuleList(SideBlock(side_width, norm_placement) for _ in range(num_layers))
        if norm_placement == "pre":
            self.post_bn = TokenBatchNorm(side_width)
        if norm_placement == "pre":
            self._init_pre(side_width)
        else:
            nn.init.normal_(self.pos, std=0.02)

    def _init_pre(self, side_width: int) -> None:
        """Effective initialisation of the released code; what is not named keeps PyTorch's. 24 stands for no depth."""
        nn.init.normal_(self.pos, std=0.01)
        narrow = side_width**-0.5 * 24**-0.5
        for block in self.blocks:
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * side_width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=narrow)
            nn.init.normal_(block.attn.qkv.weight, std=side_width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=narrow)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)

    def forward(self, clips: Tensor, layer_tokens: Iterable[Tensor]) -> Tensor:
        """Clips (B, T, 3, H, W), normalised, and tower tokens (B, T, 1 + N, D) a layer -> features (B, S).

        `layer_tokens` is read one layer at a time, so a generator keeps no more than one layer's tokens alive unless
        the backward pass needs them.
        """
        x = self.stem_bn(self.stem(clips), Pass(self.training))
        for projection, block, tokens in zip(self.projections, self.blocks, layer_tokens, strict=True):
            class_tokens, patches = projection(tokens).tensor_split([1], dim=2)
            shifted = shift_class_token(class_tokens.squeeze(2)).unsqueeze(2)
            x = (x + patches).mul_(0.5)
            x = self._run(block, x, shifted)
        return (self.post_bn(x, Pass(self.training)) if self.norm_placement == "pre" else x).mean(dim=(1, 2))

    def _run(self, block: SideBlock, x: Tensor, shifted: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(block, self.training, [x, shifted, self.pos], list(block.parameters()))
        return block(x, shifted, self.pos, Pass(self.training))
