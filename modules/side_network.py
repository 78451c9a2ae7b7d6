"""The spatial-temporal side network: the part that Side4Video trains (paper section 3.2, docs/protocol.md section 2).

It runs beside a frozen image tower. Each side block receives the tokens of one tower block, adds them to its own,
narrower tokens, and then mixes these over time, inside each frame, and over channels:

    stem -> [ fuse tower tokens -> temporal convolution -> spatial attention -> feed-forward ] x layers -> mean

The two variants of the protocol, `pre` and `post`, differ in where the norms stand (argument `norm_placement`).

Letters, with the same meaning in the whole project:
    B clips   T frames of a clip   P patch size   N patches of a frame, row-major   H, W pixel height and width
    D width of the tower   S width of the side network   L blocks of the tower   K classes

Tokens are channels-last and contiguous, (B, T, N, S): pointwise convolutions are matrix products, BatchNorm takes rows,
and nothing is transposed. tests/textbook.py has the plain nn.Conv3d form, which gives the same results.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.autograd import (
    FrameTokens,
    FrozenLinear,
    Fuse,
    NeighbourSum,
    PatchLinear,
    ShiftClassToken,
    SplitHeads,
    ThreeTaps,
    cast_together,
    normalized,
)
from modules.cpu_attention import attention
from modules.recompute import recomputed, residual_linear
from modules.token_norm import TokenBatchNorm, TokenLayerNorm, count_batch

HEAD_WIDTH = 64
NormPlacement = Literal["pre", "post"]
Affine = tuple[Tensor, Tensor]  # weight and bias


class TubeletStem(nn.Conv3d):
    """Conv3d(3 -> S, kernel (3, P, P), stride (1, P, P), padding (1, 0, 0)) on clips, giving tokens.

    One product of every patch with the three temporal slices of the kernel, then a sum over neighbouring frames, so no
    patch is copied three times.
    """

    bias: Tensor

    def __init__(self, side_width: int, patch_size: int):
        super().__init__(3, side_width, (3, patch_size, patch_size), (1, patch_size, patch_size), (1, 0, 0))

    def forward(self, clips: Tensor) -> Tensor:
        """(B, T, 3, H, W) -> (B, T, N, S)."""
        return self.sum_of_neighbours(self.frame_products(clips))

    def frame_products(self, clips: Tensor) -> Tensor:
        """What each frame gives by itself: (B, T, 3, H, W) -> (B, T, N, 3S)."""
        weight = self.weight.permute(2, 0, 1, 3, 4).flatten(0, 1).flatten(1)  # (3S, 3PP)
        return PatchLinear.apply(clips, weight, self.kernel_size[-1])

    def sum_of_neighbours(self, products: Tensor) -> Tensor:
        """Products of consecutive frames (B, T, N, 3S) -> (B, T, N, S)."""
        return NeighbourSum.apply(products, self.bias)


class PointwiseConv(nn.Conv3d):
    """Weights of a Conv3d 1x1x1, (S, S, 1, 1, 1). On channels-last tokens it is a matrix product."""

    bias: Tensor

    def __init__(self, width: int):
        super().__init__(width, width, 1)

    def as_matrix(self) -> Tensor:
        """(S, S)."""
        return self.weight.flatten(1)


class TemporalConv(nn.Conv3d):
    """Weights of a depthwise Conv3d (3, 1, 1), padding (1, 0, 0), (S, 1, 3, 1, 1). `ThreeTaps` computes it."""

    bias: Tensor

    def __init__(self, width: int):
        super().__init__(width, width, (3, 1, 1), padding=(1, 0, 0), groups=width)

    def taps(self) -> Tensor:
        """(S, 3)."""
        return self.weight.view(-1, 3)


def shift_class_token(class_tokens: Tensor) -> Tensor:
    """(B, T, S) -> (B, T, S): channels below S // 2 come from frame t + 1, the others from t - 1; zeros at the ends."""
    return ShiftClassToken.apply(class_tokens)


class FuseTokens(nn.Module):
    """What a side block reads: its tokens averaged with those of a layer, and the layer's shifted class tokens."""

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, N, S), projected tokens of a layer (B, T, 1 + N, S) -> (B, T, N, S), (B, T, S)."""
        x, class_tokens = Fuse.apply(x, tokens)
        return x, shift_class_token(class_tokens)


class FrameAttention(nn.Module):
    """Attention inside each frame. Queries: patch tokens. Keys and values: the shifted class token and patch tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, qkv: Affine | None = None, proj: Affine | None = None) -> Tensor:
        """(B, T, 1 + N, S), class token first -> (B, T, N, S). `qkv` and `proj` replace the layer's own weights."""
        query, key, value = self._heads(tokens, qkv)
        x = attention(query, key, value)
        x = x.transpose(1, 2).flatten(2).unflatten(0, tokens.shape[:2])
        return F.linear(x, *(proj or (self.proj.weight, self.proj.bias)))

    def weights(self, tokens: Tensor, qkv: Affine | None = None, proj: Affine | None = None) -> Tensor:
        """What each query takes of each key, (B, T, S // 64, N, 1 + N); arguments of `forward`. For pictures only."""
        query, key, _ = self._heads(tokens, qkv)
        products = query @ key.transpose(-1, -2) * HEAD_WIDTH**-0.5
        return products.softmax(dim=-1).unflatten(0, tokens.shape[:2])

    def _heads(self, tokens: Tensor, qkv: Affine | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the patches, (B * T, S // 64, N, 64), keys and values, (B * T, S // 64, 1 + N, 64) each."""
        products = F.linear(tokens.flatten(0, 1), *(qkv or (self.qkv.weight, self.qkv.bias)))
        return SplitHeads.apply(products, self.num_heads)


class Mlp(nn.Module):
    """Weights of Linear S -> 4S, exact GELU, Linear 4S -> S."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)


class LayerProjection(nn.Module):
    """Tower tokens to the side width: `pre` normalises before the Linear (over D), `post` after it (over S)."""

    def __init__(self, backbone_width: int, side_width: int, norm_placement: NormPlacement):
        super().__init__()
        self.norm_placement = norm_placement
        self.norm = TokenLayerNorm(backbone_width if norm_placement == "pre" else side_width)
        self.linear = nn.Linear(backbone_width, side_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, 1 + N, D) of any dtype, without gradient -> (B, T, 1 + N, S)."""
        norm, linear = self.norm, self.linear
        if self.norm_placement == "pre":
            return FrozenLinear.apply(tokens, linear.weight, linear.bias, norm.weight, norm.bias, norm.eps)
        return norm(FrozenLinear.apply(tokens, linear.weight, linear.bias))


class BlockWeights(NamedTuple):
    """What the products of a side block read: pairs of weight and bias in the type of the tokens, and `pos` (N, S)."""

    pos: Tensor
    conv_in: Affine
    taps: Affine
    conv_out: Affine
    qkv: Affine
    proj: Affine
    fc1: Affine
    fc2: Affine


class SideBlock(nn.Module):
    """One side layer: temporal convolution, attention inside each frame, feed-forward, each with a residual."""

    def __init__(self, width: int, norm_placement: NormPlacement, sync_bn: bool = False):
        super().__init__()
        self.norm_placement = norm_placement
        self.bn_1 = TokenBatchNorm(width, sync_bn)
        self.conv = nn.Sequential(PointwiseConv(width), TemporalConv(width), PointwiseConv(width))
        self.ln_1 = TokenLayerNorm(width)
        self.attn = FrameAttention(width)
        self.bn_2 = TokenBatchNorm(width, sync_bn)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, shifted: Tensor, pos: Tensor) -> Tensor:
        """Tokens (B, T, N, S), shifted class tokens (B, T, S), position table (N, S) -> (B, T, N, S).

        All products and norms run in the type of `x`, which the stem takes from autocast.
        """
        with torch.autocast(x.device.type, enabled=False):
            w = self.weights(pos, x.dtype)
            if self.norm_placement == "pre":
                x = x + self.temporal(self.bn_1(x), w)
                tokens = normalized(FrameTokens.apply(x, shifted, w.pos), self.ln_1.eps)  # ln_1 goes on in w.qkv
                x = x + self.attn(tokens, w.qkv, w.proj)
                return residual_linear(x, F.gelu(F.linear(self.bn_2(x), *w.fc1)), *w.fc2)
            x = x + self.bn_1(self.temporal(x, w))
            x = x + self.ln_1(self.attn(FrameTokens.apply(x, shifted, w.pos), w.qkv, w.proj))
            return x + self.bn_2(F.linear(F.gelu(F.linear(x, *w.fc1)), *w.fc2))

    @staticmethod
    def temporal(x: Tensor, w: BlockWeights) -> Tensor:
        """Pointwise convolution, three taps over time, pointwise convolution: (B, T, N, S) -> (B, T, N, S)."""
        return F.linear(ThreeTaps.apply(F.linear(x, *w.conv_in), *w.taps), *w.conv_out)

    def weights(self, pos: Tensor, dtype: torch.dtype) -> BlockWeights:
        """The weights in the type of the tokens, cast together; variant `pre` has `ln_1` folded into `qkv`."""
        conv_in, taps, conv_out = cast(tuple[PointwiseConv, TemporalConv, PointwiseConv], tuple(self.conv))
        qkv, proj, fc1, fc2 = self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2
        folded = self.ln_1.folded_into(qkv) if self.norm_placement == "pre" else (qkv.weight, qkv.bias)
        linears = [(linear.weight, linear.bias) for linear in (proj, fc1, fc2)]
        pairs = [(conv_in.as_matrix(), conv_in.bias), (taps.taps(), taps.bias), (conv_out.as_matrix(), conv_out.bias)]
        pos, *parts = cast_together([pos, *itertools.chain(*pairs, folded, *linears)], dtype)
        return BlockWeights(pos, *zip(parts[::2], parts[1::2], strict=True))


class SideNetwork(nn.Module):
    """The whole side network, from pixels and tower tokens to one feature per clip.

    Args:
        backbone_width: D, width of the tower's tokens.
        side_width: S, a multiple of 64: attention has S // 64 heads.
        num_layers: number of side blocks, one for each tower block that is read.
        patch_size: P, the tower's patch size, used by the stem.
        num_patches: N, patches of a frame.
        norm_placement: "pre" for OpenAI's CLIP towers, "post" for EVA's (docs/protocol.md section 2).
        recompute: keep only each block's input and the tower's tokens for the backward pass, and compute the rest
            again there. Same gradients, least memory.
        sync_bn: BatchNorm takes its statistics over all processes.

    Raises:
        ValueError: `side_width` is not a multiple of 64.
    """

    def __init__(
        self,
        backbone_width: int,
        side_width: int,
        num_layers: int,
        patch_size: int,
        num_patches: int,
        norm_placement: NormPlacement = "pre",
        recompute: bool = True,
        sync_bn: bool = False,
    ):
        super().__init__()
        if side_width < HEAD_WIDTH or side_width % HEAD_WIDTH:
            raise ValueError(f"side width {side_width} is no multiple of {HEAD_WIDTH}, the width of an attention head")
        self.norm_placement = norm_placement
        self.recompute = recompute
        self.stem = TubeletStem(side_width, patch_size)
        self.stem_bn = TokenBatchNorm(side_width, sync_bn)
        self.pos = nn.Parameter(torch.empty(num_patches, side_width))
        self.projections = nn.ModuleList(
            LayerProjection(backbone_width, side_width, norm_placement) for _ in range(num_layers)
        )
        self.fuse = FuseTokens()
        blocks = [SideBlock(side_width, norm_placement, sync_bn) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        if norm_placement == "pre":
            self.post_bn: nn.Module = TokenBatchNorm(side_width, sync_bn)
            self._init_pre(blocks)
        else:
            self.post_bn = nn.Identity()
            nn.init.normal_(self.pos, std=0.02)

    @property
    def width(self) -> int:
        """S."""
        return self.pos.shape[1]

    def _init_pre(self, blocks: Sequence[SideBlock]) -> None:
        """Initialise as the released code does; tensors not named here keep PyTorch's defaults."""
        side_width = self.pos.shape[1]
        nn.init.normal_(self.pos, std=0.01)
        narrow = side_width**-0.5 * 24**-0.5  # 24 is a constant of the released code, whatever the number of layers
        for block in blocks:
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * side_width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=narrow)
            nn.init.normal_(block.attn.qkv.weight, std=side_width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=narrow)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)

    def compile_blocks(self) -> None:
        """Compile each projection and block in place, and what lies between; equal ones share the compiled code."""
        for module in (*self.projections, self.fuse, *self.blocks):
            module.compile()

    def forward(self, clips: Tensor, layer_tokens: Iterable[Tensor]) -> Tensor:
        """Normalised clips (B, T, 3, H, W) and, for each layer, tower tokens (B, T, 1 + N, D) -> features (B, S).

        `layer_tokens` may be a generator. It is read one layer at a time, so that without gradients no more than one
        layer's tokens are in memory.
        """
        return self.mix_frames(*self.frame_parts(clips, layer_tokens))

    def frame_parts(self, clips: Tensor, layer_tokens: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
        """What each frame decides by itself, whatever its neighbours are; arguments of `forward`.

        Returns:
            products of the stem, (B, T, N, 3S), and an iterator over the layers' projected tokens, (B, T, 1 + N, S).
        """
        projected = (projection(tokens) for projection, tokens in zip(self.projections, layer_tokens, strict=True))
        return self.stem.frame_products(clips), projected

    def mix_frames(self, products: Tensor, projected: Iterable[Tensor]) -> Tensor:
        """The parts of consecutive frames, see `frame_parts` -> features (B, S)."""
        count_batch(module for module in self.modules() if isinstance(module, TokenBatchNorm))
        x = self.stem_bn(self.stem.sum_of_neighbours(products))
        for block, tokens in zip(self.blocks, projected, strict=True):
            x, shifted = self.fuse(x, tokens)
            x = recomputed(block, x, shifted, self.pos) if self.recompute else block(x, shifted, self.pos)
        return self.post_bn(x).mean(dim=(1, 2))
