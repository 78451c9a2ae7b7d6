"""Frozen image towers and their token protocol (docs/protocol.md section 1)."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import QuickGELU
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.modules.module import register_module_parameter_registration_hook

from modules.side_network import NormPlacement
from utils.errors import ConfigError

TIMM_PREFIX = "timm/"


@dataclass(frozen=True)
class Architecture:
    """A tower: which timm model it is, which published file holds its weights, and the side network's variant."""

    timm_name: str
    weight_file: str | None = None
    publisher: str | None = None
    side_variant: NormPlacement = "pre"


OPENAI = "OpenAI (CLIP)"
BAAI = "BAAI (EVA-CLIP)"
EVA_E = "eva02_enormous_patch14_clip_224"
ARCHITECTURES = {
    "ViT-B/32": Architecture("vit_base_patch32_clip_quickgelu_224", "ViT-B-32.pt", OPENAI),
    "ViT-B/16": Architecture("vit_base_patch16_clip_quickgelu_224", "ViT-B-16.pt", OPENAI),
    "ViT-L/14": Architecture("vit_large_patch14_clip_quickgelu_224", "ViT-L-14.pt", OPENAI),
    "ViT-L/14-336px": Architecture("vit_large_patch14_clip_quickgelu_336", "ViT-L-14-336px.pt", OPENAI),
    "EVA02-CLIP-L-14": Architecture("eva02_large_patch14_clip_224", "EVA02_CLIP_L_psz14_s4B.pt", BAAI, "post"),
    "EVA02-CLIP-L-14-336": Architecture("eva02_large_patch14_clip_336", "EVA02_CLIP_L_336_psz14_s6B.pt", BAAI, "post"),
    "EVA02-CLIP-bigE-14": Architecture(EVA_E, "EVA02_CLIP_E_psz14_s4B.pt", BAAI, "post"),
    "EVA02-CLIP-bigE-14-plus": Architecture(EVA_E, "EVA02_CLIP_E_psz14_plus_s9B.pt", BAAI, "post"),
}


def find_architecture(arch: str) -> Architecture:
    """The entry of `network.arch`: a name of the table, or `timm/<name>` for a timm model without a file of its own."""
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    if arch.startswith(TIMM_PREFIX):
        name = arch.removeprefix(TIMM_PREFIX)
        if timm.is_model(name):
            return Architecture(name)
        known = [TIMM_PREFIX + m for m in timm.list_models()]
    else:
        known = list(ARCHITECTURES)
    nearest = difflib.get_close_matches(arch, known, n=1, cutoff=0)[0]
    raise ConfigError(
        f"network.arch: unknown architecture {arch!r}, the nearest is {nearest!r}; "
        f"known are {', '.join(ARCHITECTURES)} and timm/<name of a timm vision transformer>"
    )


def stated_pixels(architecture: Architecture) -> dict[str, Any]:
    """`input_size`, `mean` and `std` of the pixels that timm's weights were trained with; None where timm has none."""
    stated = timm.get_pretrained_cfg(architecture.timm_name)
    if stated is None:
        return {"input_size": None, "mean": None, "std": None}
    return {"input_size": stated.input_size[-1], "mean": list(stated.mean), "std": list(stated.std)}


def choose_layers(side_layers: str | list[int], depth: int) -> list[int]:
    """Blocks that the side network reads, from 0: `all`, `every2` (1, 3, 5, ...), `last:N`, or a rising list.

    Raises:
        ConfigError: another text, or blocks that a tower of `depth` blocks has not.
    """
    blocks = list(range(depth))
    match side_layers:
        case "all":
            layers = blocks
        case "every2":
            layers = blocks[1::2]
        case str() if (last := re.fullmatch(r"last:([1-9]\d*)", side_layers)) and int(last[1]) <= depth:
            layers = blocks[-int(last[1]) :]
        case list() if set(side_layers) <= set(blocks) and side_layers == sorted(set(side_layers)):
            layers = side_layers
        case _:
            layers = []
    if not layers:
        raise ConfigError(
            f"network.side_layers: {side_layers!r} chooses no blocks of this tower, which has {depth}; it is all, "
            f"every2 (from block 1 on), last:N, or a rising list of numbers from 0 to {depth - 1}"
        )
    return layers


class InPlaceQuickGELU(nn.Module):
    """x * sigmoid(1.702 x), timm's to the bit, in a third of the time: two of its three results take no new memory."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 1.702).sigmoid_().mul_(x)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory; buffers, such as rope's tables, are computed as ever."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


class FrozenTower(nn.Module):
    """A timm vision transformer that only gives tokens: always in eval mode, never with gradients.

    Blocks after the last one that is read, the final norm, the pooling and the head are cut off, as nothing reads them.

    Attributes:
        layers: blocks whose tokens are given, from 0, rising.
        depth: blocks of the whole tower, of which `num_blocks` are left.
        timm_size: height and width that timm's weights were trained with; another one resamples position tables.
    """

    def __init__(
        self,
        timm_name: str,
        input_size: int,
        backbone_kwargs: dict[str, Any] | None = None,
        side_layers: str | list[int] = "all",
        on_meta: bool = False,
    ):
        """
        Args:
            timm_name: name of a timm VisionTransformer or Eva model.
            input_size: height and width of a frame in pixels.
            backbone_kwargs: handed to timm as they are.
            side_layers: blocks to read, as `choose_layers` takes them.
            on_meta: leave the parameters on the meta device, without memory; `load_strictly(..., assign=True)` fills them.

        Raises:
            ConfigError: timm refuses the arguments, or the model has no tokens that the side network could read.
        """
        super().__init__()
        kwargs = dict(backbone_kwargs or {})
        if kwargs.get("img_size", input_size) != input_size:
            raise ConfigError(f"network.backbone_kwargs.img_size: leave it out, data.input_size ({input_size}) decides")
        try:
            with parameters_on_meta() if on_meta else nullcontext():
                arguments = {"num_classes": 0, **kwargs, "img_size": input_size}
                vit = timm.create_model(timm_name, pretrained=False, **arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            if "'img_size'" in reason:
                raise ConfigError(_not_readable(timm_name, "it takes no img_size")) from error
            raise ConfigError(f"network.arch: timm cannot build {timm_name} with {kwargs}: {reason}") from error
        if not isinstance(vit, VisionTransformer | Eva):
            raise ConfigError(_not_readable(timm_name, f"it is a {type(vit).__name__}"))
        self.patch_size = vit.patch_embed.patch_size[0]
        if input_size % self.patch_size:
            raise ConfigError(
                f"data.input_size: {input_size} is no multiple of the patch size {self.patch_size} of {timm_name}"
            )
        self.depth = len(vit.blocks)
        self.layers = choose_layers(side_layers, self.depth)
        vit.prune_intermediate_layers(self.layers, prune_norm=True, prune_head=True)
        for block in vit.blocks:
            if isinstance(getattr(block.mlp, "act", None), QuickGELU):
                block.mlp.act = InPlaceQuickGELU()
        self.timm_size = vit.pretrained_cfg["input_size"][-1]
        self.vit = vit.requires_grad_(False).eval()
        self.width = vit.embed_dim
        self.num_blocks = len(vit.blocks)
        self.num_patches = vit.patch_embed.num_patches
        self.weight_file: str | None = None
        self.hashes: dict[str, str] | None = None  # of the tensors of weight_file, by modules.hashing.tower_hashes

    def train(self, mode: bool = True) -> "FrozenTower":
        """Stays in eval mode, whatever its parent does."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights and of the tokens, which the tower computes in, whatever autocast says."""
        return next(self.vit.parameters()).dtype

    def convert(self, dtype: torch.dtype) -> None:
        """Change the type of the parameters, one by one, and of buffers beside them, such as EVA's zero bias of keys.

        Buffers of modules without parameters, such as rope's tables, keep the precision that they were computed in.
        """
        for module in self.modules():
            if parameters := list(module.parameters(recurse=False)):
                for tensor in (*parameters, *module.buffers(recurse=False)):
                    tensor.data = tensor.data.to(dtype)

    def compile_blocks(self) -> None:
        """Let torch.compile run the blocks, with one result for all of them. To be called before `shard`."""
        for block in self.vit.blocks:
            block.compile()

    def shard(self, mesh: DeviceMesh) -> None:
        """Split every tensor over the processes of the mesh, and move it to its device.

        From then on each call of `layer_tokens` needs all processes: a block is put together when it runs, and let go
        after it. What comes before the blocks is put together for `embed`.
        """
        for block in self.vit.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(self, "embed")

    def layer_tokens(self, clips: Tensor) -> Iterator[Tensor]:
        """Tokens after each block of `layers`, one block at a time, class token first.

        Equal to timm's `forward_intermediates` to the bit; written as a loop so that the side network takes each
        layer when it exists, and layers that no gradient needs are freed at once. Register and distillation tokens
        are dropped; the mean of the patch tokens stands in for a class token that the tower has not.

        Args:
            clips: (B, T, 3, H, W) normalised pixels.

        Yields:
            (B, T, 1 + N, D) of the tower's dtype, one tensor a block.
        """
        steps = self._steps(clips)
        while True:
            with torch.no_grad(), torch.autocast(clips.device.type, enabled=False):  # not while others use the tokens
                tokens = next(steps, None)
            if tokens is None:
                return
            yield tokens

    def embed(self, clips: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T, 3, H, W) -> what the first block takes, (B * T, prefix + N, D), and rope's tables, if any."""
        vit, rope = self.vit, None
        x = vit.patch_embed(clips.flatten(0, 1).to(self.dtype))
        if isinstance(vit, Eva):
            x, rope = vit._pos_embed(x)
            return vit.norm_pre(x), rope
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(x))), rope

    def _steps(self, clips: Tensor) -> Iterator[Tensor]:
        x, rope = self.embed(clips)
        for i, block in enumerate(self.vit.blocks):
            x = block(x) if rope is None else block(x, rope=rope[i] if self.vit.rope_mixed else rope)
            if i in self.layers:
                yield self._class_first(x).unflatten(0, clips.shape[:2])

    def _class_first(self, x: Tensor) -> Tensor:
        """(frames, prefix + N, D) as timm has it -> (frames, 1 + N, D)."""
        prefix, has_class_token = self.vit.num_prefix_tokens, self.vit.cls_token is not None
        if prefix == 1 and has_class_token:
            return x
        patches = x[:, prefix:]
        return torch.cat([x[:, :1] if has_class_token else patches.mean(dim=1, keepdim=True), patches], dim=1)


def _not_readable(timm_name: str, why: str) -> str:
    return (
        f"network.arch: {timm_name} gives no token of each patch after each block, which the side network reads: "
        f"{why}, and must be one of timm's VisionTransformer or Eva models"
    )
