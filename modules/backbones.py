"""Frozen image towers and the tokens they give (docs/protocol.md section 1).

Letters: B clips, T frames of a clip, P patch size, N patches of a frame, D tower width, H and W pixel height and
width.
"""

import difflib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from timm.layers import Mlp, QuickGELU
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn import functional as F
from torch.nn.modules.module import register_module_parameter_registration_hook

from modules.side_network import NormPlacement
from utils.errors import ConfigError
from utils.published_weights import BAAI, OPENAI

TIMM_PREFIX = "timm/"


@dataclass(frozen=True)
class Architecture:
    """An entry of `network.arch`.

    Attributes:
        timm_name: name of the timm model.
        weight_file: the published file with its weights, or None.
        publisher: who publishes that file, or None.
        side_variant: variant of the side network that is used beside it, unless `network.side_variant` is set.
    """

    timm_name: str
    weight_file: str | None = None
    publisher: str | None = None
    side_variant: NormPlacement = "pre"


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
    """Return the entry of `network.arch`: a name in ARCHITECTURES, or `timm/<name>` for any other timm model.

    Raises:
        ConfigError: unknown name, with the nearest known one.
    """
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
    """Return `input_size`, `mean` and `std` that timm states for the tower's weights, each None if timm states none."""
    stated = timm.get_pretrained_cfg(architecture.timm_name)
    if stated is None:
        return {"input_size": None, "mean": None, "std": None}
    return {"input_size": stated.input_size[-1], "mean": list(stated.mean), "std": list(stated.std)}


def choose_layers(side_layers: str | list[int], depth: int) -> list[int]:
    """Return the numbers, from 0, of the tower blocks that the side network reads.

    Args:
        side_layers: `all`, `every2` (1, 3, 5, ...), `last:<number>`, or a list of numbers in rising order.
        depth: number of blocks of the tower.

    Raises:
        ConfigError: `side_layers` is none of these, or names blocks that the tower does not have.
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


# What a tower may be built with: the arguments of timm's two classes that are numbers, switches and names. Arguments of
# timm's factory, such as `checkpoint_path` and `pretrained`, would load a file behind the project's back.
ARCHITECTURE_ARGUMENTS = {
    name
    for family in (VisionTransformer, Eva)
    for name in inspect.signature(family.__init__).parameters
    if name not in ("self", "args", "kwargs", "device", "dtype", "embed_layer", "mlp_layer", "attn_layer", "block_fn")
}


def refuse_other_arguments(kwargs: dict[str, Any]) -> None:
    """Raise ConfigError for a key of `network.backbone_kwargs` that is no argument of the tower's architecture."""
    for name in kwargs:
        if name not in ARCHITECTURE_ARGUMENTS:
            nearest = difflib.get_close_matches(str(name), ARCHITECTURE_ARGUMENTS, n=1, cutoff=0)[0]
            raise ConfigError(
                f"network.backbone_kwargs.{name}: no argument of the tower's architecture; did you mean {nearest}?"
            )


class QuickGELUMlp(nn.Module):
    """Linear, QuickGELU, Linear: the MLP of a block of CLIP, with the activation in one pass over the tokens.

    QuickGELU(x) = x sigmoid(1.702 x) = silu(1.702 x) / 1.702. Both factors go into the products. The bias is scaled
    apart: a factor of the bias in `addmm` would make CUDA write the bias to every row first.
    """

    FACTOR = 1.702

    def __init__(self, fc1: nn.Linear, fc2: nn.Linear):
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    @staticmethod
    def can_replace(mlp: nn.Module) -> bool:
        """True for timm's `Mlp` with QuickGELU, biases, and nothing else in between."""
        return (
            isinstance(mlp, Mlp)
            and isinstance(mlp.act, QuickGELU)
            and isinstance(mlp.norm, nn.Identity)
            and all(isinstance(fc, nn.Linear) and fc.bias is not None for fc in (mlp.fc1, mlp.fc2))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        rows, factor = x.flatten(0, -2), self.FACTOR
        rows = torch.addmm(self.fc1.bias * factor, rows, self.fc1.weight.t(), alpha=factor)
        rows = F.silu(rows, inplace=True)
        return torch.addmm(self.fc2.bias, rows, self.fc2.weight.t(), alpha=1 / factor).view_as(x)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules created inside have their parameters on the meta device. Buffers, such as rope's tables, are computed."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # may return a parameter
    try:
        yield
    finally:
        hook.remove()


class FrozenTower(nn.Module):
    """A timm vision transformer that only gives tokens: always in eval mode, never with gradients.

    The blocks after the last one that is read, the final norm, the pooling and the head are removed.

    Attributes:
        layers: numbers of the blocks whose tokens are given, from 0, in rising order.
        depth: number of blocks of the whole tower; `num_blocks` of them are kept.
        width, patch_size, num_patches: D, P and N.
        pretrained_cfg: what timm states about its own weights of this model.
        timm_size: height and width in pixels that timm's weights were trained with.
        weight_file: name of the published file that the weights came from, or None.
        hashes: `modules.hashing.tower_hashes` of the tensors in that file, or None.
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
            backbone_kwargs: passed on to timm.
            side_layers: blocks to read, see `choose_layers`.
            on_meta: leave the parameters on the meta device, for `load_strictly(..., assign=True)` to fill.

        Raises:
            ConfigError: timm cannot build the model, or the model does not give one token for each patch.
        """
        super().__init__()
        kwargs = dict(backbone_kwargs or {})
        refuse_other_arguments(kwargs)
        if kwargs.get("img_size", input_size) != input_size:
            raise ConfigError(f"network.backbone_kwargs.img_size: leave it out, data.input_size ({input_size}) decides")
        try:
            with parameters_on_meta() if on_meta else nullcontext():
                arguments = {"num_classes": 0, **kwargs, "img_size": input_size}
                vit = timm.create_model(timm_name, pretrained=False, **arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            if "'img_size'" in reason:  # the TypeError of models whose constructor has no such argument
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
            mlp = cast(Any, block.mlp)
            if QuickGELUMlp.can_replace(mlp):
                block.mlp = QuickGELUMlp(mlp.fc1, mlp.fc2)
        self.pretrained_cfg = cast(dict[str, Any], vit.pretrained_cfg)
        self.timm_size: int = self.pretrained_cfg["input_size"][-1]
        self.vit = vit.requires_grad_(False).eval()
        self.width = vit.embed_dim
        self.num_blocks = len(vit.blocks)
        self.num_patches = vit.patch_embed.num_patches
        self.weight_file: str | None = None
        self.hashes: dict[str, str] | None = None

    def train(self, mode: bool = True) -> "FrozenTower":
        """Stay in eval mode, even when the parent module is put into training mode."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, of the computation (autocast does not apply) and of the tokens."""
        return next(self.vit.parameters()).dtype

    def convert(self, dtype: torch.dtype) -> None:
        """Convert the parameters, one by one, and the buffers of modules that have parameters, as EVA's bias of keys.

        Buffers of modules without parameters, such as rope's tables, keep their dtype.
        """
        for module in self.modules():
            if parameters := list(module.parameters(recurse=False)):
                for tensor in (*parameters, *module.buffers(recurse=False)):
                    tensor.data = tensor.data.to(dtype)

    def compile_blocks(self) -> None:
        """Compile each block in place; equal blocks share the compiled code. Call it before `shard`."""
        for block in self.vit.blocks:
            block.compile()

    def shard(self, mesh: DeviceMesh) -> None:
        """Split every tensor over the processes of the mesh, and move it to the mesh's device.

        After this, all processes must call `layer_tokens` together: FSDP gathers each block before it runs, frees it
        afterwards, and does the same with everything before the blocks in `embed`. The next block is gathered while
        one runs, so two are whole at a time.
        """
        blocks = list(self.vit.blocks)
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(self, "embed")
        for module, following in zip([self, *blocks], blocks, strict=False):
            cast(FSDPModule, module).set_modules_to_forward_prefetch([cast(FSDPModule, following)])

    def layer_tokens(self, clips: Tensor) -> Iterator[Tensor]:
        """Yield the tokens after each block of `layers`, one block at a time, class token first.

        Same bits as timm's `forward_intermediates`. A generator, so that a layer's tokens are freed as soon as the
        side network has used them, unless a gradient needs them. Register and distillation tokens are dropped. For a
        tower without a class token, the mean of the patch tokens takes its place.

        Args:
            clips: normalised pixels, (B, T, 3, H, W).

        Yields:
            (B, T, 1 + N, D) of the tower's dtype, one tensor for each block.
        """
        steps = self._steps(clips)
        while True:
            with torch.no_grad(), torch.autocast(clips.device.type, enabled=False):  # left again before the yield
                tokens = next(steps, None)
            if tokens is None:
                return
            yield tokens

    def embed(self, clips: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T, 3, H, W) -> input of the first block, (B * T, prefix tokens + N, D), and rope's tables or None."""
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
        """(B * T, prefix tokens + N, D), as timm's blocks return it -> (B * T, 1 + N, D)."""
        prefix, has_class_token = self.vit.num_prefix_tokens, self.vit.cls_token is not None
        if prefix == 1 and has_class_token:
            return x
        patches = x[:, prefix:]
        return torch.cat([x[:, :1] if has_class_token else patches.mean(dim=1, keepdim=True), patches], dim=1)


def _not_readable(timm_name: str, why: str) -> str:
    """Message of a ConfigError about a model of which the tokens cannot be read."""
    return (
        f"network.arch: {timm_name} gives no token of each patch after each block, which the side network reads: "
        f"{why}, and must be one of timm's VisionTransformer or Eva models"
    )
