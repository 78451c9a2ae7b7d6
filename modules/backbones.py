"""Frozen image towers and their token protocol (docs/protocol.md section 1)."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from utils.errors import ConfigError

TIMM_PREFIX = "timm/"


@dataclass(frozen=True)
class Architecture:
    """A tower that has a name of its own: which timm model it is and which published file holds its weights."""

    timm_name: str
    weight_file: str | None = None
    publisher: str | None = None


OPENAI = "OpenAI (CLIP)"
ARCHITECTURES = {
    "ViT-B/32": Architecture("vit_base_patch32_clip_quickgelu_224", "ViT-B-32.pt", OPENAI),
    "ViT-B/16": Architecture("vit_base_patch16_clip_quickgelu_224", "ViT-B-16.pt", OPENAI),
    "ViT-L/14": Architecture("vit_large_patch14_clip_quickgelu_224", "ViT-L-14.pt", OPENAI),
    "ViT-L/14-336px": Architecture("vit_large_patch14_clip_quickgelu_336", "ViT-L-14-336px.pt", OPENAI),
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


class FrozenTower(nn.Module):
    """A timm vision transformer that only gives tokens: always in eval mode, never with gradients.

    The final norm, the pooling and the head are cut off, as nothing reads them.
    """

    def __init__(self, timm_name: str, input_size: int, backbone_kwargs: dict[str, Any] | None = None):
        """
        Args:
            timm_name: name of a timm VisionTransformer with a class token.
            input_size: height and width of a frame in pixels.
            backbone_kwargs: handed to timm as they are.

        Raises:
            ConfigError: timm refuses the arguments, or the model has no tokens that the side network could read.
        """
        super().__init__()
        kwargs = dict(backbone_kwargs or {})
        if kwargs.get("img_size", input_size) != input_size:
            raise ConfigError(f"network.backbone_kwargs.img_size: leave it out, data.input_size ({input_size}) decides")
        try:
            vit = timm.create_model(timm_name, pretrained=False, num_classes=0, **{**kwargs, "img_size": input_size})
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"network.arch: timm cannot build {timm_name} with {kwargs}: {reason}") from error
        if not isinstance(vit, VisionTransformer) or vit.num_prefix_tokens != 1 or vit.cls_token is None:
            raise ConfigError(
                f"network.arch: {timm_name} is no vision transformer with one class token; others are not built yet"
            )
        self.patch_size = vit.patch_embed.patch_size[0]
        if input_size % self.patch_size:
            raise ConfigError(
                f"data.input_size: {input_size} is no multiple of the patch size {self.patch_size} of {timm_name}"
            )
        vit.prune_intermediate_layers(prune_norm=True, prune_head=True)
        self.vit = vit.requires_grad_(False).eval()
        self.width = vit.embed_dim
        self.num_blocks = len(vit.blocks)
        self.num_patches = vit.patch_embed.num_patches
        self.weight_file: str | None = None

    def train(self, mode: bool = True) -> "FrozenTower":
        """Stays in eval mode, whatever its parent does."""
        return super().train(False)

    @torch.no_grad()
    def layer_tokens(self, clips: Tensor) -> Iterator[Tensor]:
        """Tokens after each block, one block at a time, class token first.

        Equal to timm's `forward_intermediates` to the bit; written as a loop so that the side network takes each
        layer when it exists, and layers that no gradient needs are freed at once.

        Args:
            clips: (B, T, 3, H, W) normalised pixels.

        Yields:
            (B, T, 1 + N, D), one tensor a block.
        """
        vit = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(clips.flatten(0, 1)))))
        for block in vit.blocks:
            x = block(x)
            yield x.unflatten(0, clips.shape[:2])
