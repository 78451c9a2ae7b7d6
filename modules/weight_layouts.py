"""The image tower in a weight file, whoever named its tensors, under names that timm's converters read.

A file may hold the tower alone, or a whole CLIP with the tower under a prefix: `visual.`, `vision_model.`,
`model.visual.`, `module.visual.trunk.` or any other. Letters: D tower width, P patch size, N patches of an image.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import CheckpointError

OPENAI_NAMES = "OpenAI"  # those of open_clip too
HUGGING_FACE_NAMES = "Hugging Face"
TIMM_NAMES = "timm"  # those of EVA-CLIP too; every file of no other layout

# Names of Hugging Face's CLIPVisionModel -> OpenAI's. A dot at the end stands for a whole module. Queries, keys and
# values are three layers there, and one here.
FROM_HUGGING_FACE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
}
BLOCKS_OF_HUGGING_FACE = "encoder.layers."
FROM_HUGGING_FACE_BLOCKS = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.out_proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
NOT_WEIGHTS = "embeddings.position_ids"  # 0..N, which older versions of transformers stored


class TowerPart(NamedTuple):
    """The image tower of a file.

    tensors: under OpenAI's names with `visual.` before them, or under those of timm or EVA-CLIP without a prefix.
    layout: OPENAI_NAMES, HUGGING_FACE_NAMES or TIMM_NAMES: who named the tensors in the file.
    others: number of the tensors in the file that are not in the tower, such as those of a text tower.
    """

    tensors: dict[str, Tensor]
    layout: str
    others: int


class TowerSize(NamedTuple):
    """width: D; depth: number of blocks; patch_size: P; num_patches: N."""

    width: int
    depth: int
    patch_size: int
    num_patches: int


def find_tower_part(state: dict[str, Tensor], source: str) -> TowerPart:
    """Return the image tower of a file's state dict. Names of no known layout are left to timm's converters.

    Args:
        state: all tensors of the file.
        source: the file, for errors.

    Raises:
        CheckpointError: the file holds several image towers.
    """
    for layout, anchor in (
        (HUGGING_FACE_NAMES, "embeddings.patch_embedding.weight"),
        (OPENAI_NAMES, "conv1.weight"),
        (TIMM_NAMES, "patch_embed.proj.weight"),
    ):
        prefixes = [prefix for prefix in _prefixes(state, anchor) if _is_tower(state, prefix, layout)]
        if not prefixes:
            continue
        prefix = _only(prefixes, source)
        tower = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        others = len(state) - len(tower)
        if layout == HUGGING_FACE_NAMES:
            others += NOT_WEIGHTS in tower
            tower = _from_hugging_face(tower)
        start = "" if layout == TIMM_NAMES else "visual."
        return TowerPart({start + name: tensor for name, tensor in tower.items()}, layout, others)
    return TowerPart(state, TIMM_NAMES, 0)


def tower_size(part: TowerPart) -> TowerSize | None:
    """Sizes of a tower with OpenAI's or Hugging Face's names; None for other ones."""
    tensors = part.tensors
    patches, positions = tensors.get("visual.conv1.weight"), tensors.get("visual.positional_embedding")
    if patches is None or positions is None:
        return None
    blocks = {name.split(".")[3] for name in tensors if name.startswith("visual.transformer.resblocks.")}
    classes = "visual.class_embedding" in tensors
    return TowerSize(patches.shape[0], len(blocks), patches.shape[-1], positions.shape[0] - classes)


def _prefixes(state: dict[str, Tensor], anchor: str) -> Iterator[str]:
    for name in state:
        if name == anchor or name.endswith(f".{anchor}"):
            yield name.removesuffix(anchor)


def _is_tower(state: dict[str, Tensor], prefix: str, layout: str) -> bool:
    """Tell a transformer from a ResNet, whose first layer is called conv1 too, and a CLIP from a SigLIP."""
    if layout == HUGGING_FACE_NAMES:
        return f"{prefix}embeddings.class_embedding" in state
    return layout == TIMM_NAMES or any(name.startswith(f"{prefix}transformer.resblocks.") for name in state)


def _only(prefixes: list[str], source: str) -> str:
    """The prefix of the tower; where there are several, one that a published layout has."""
    known = [prefix for prefix in prefixes if prefix in ("", "visual.", "vision_model.", "visual.trunk.")]
    if len(prefixes) == 1 or len(known) == 1:
        return (known if known else prefixes)[0]
    names = ", ".join(prefix or "no prefix" for prefix in prefixes)
    raise CheckpointError(f"{source}: holds {len(prefixes)} image towers ({names}); save one of them alone")


def _from_hugging_face(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a CLIPVisionModel to OpenAI's names. Unknown names stay, so that they are refused later."""
    renamed: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}  # name of the joint layer -> its three parts
    for name, tensor in tower.items():
        if name == NOT_WEIGHTS:
            continue
        start, table = "", FROM_HUGGING_FACE
        if name.startswith(BLOCKS_OF_HUGGING_FACE):
            number, _, name = name.removeprefix(BLOCKS_OF_HUGGING_FACE).partition(".")
            start, table = f"transformer.resblocks.{number}.", FROM_HUGGING_FACE_BLOCKS
            if name.startswith(("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")):
                _, layer, kind = name.split(".")
                attention.setdefault(f"{start}attn.in_proj_{kind}", {})[layer] = tensor
                continue
        theirs = next((key for key in table if name == key or (key.endswith(".") and name.startswith(key))), "")
        renamed[start + table.get(theirs, "") + name.removeprefix(theirs)] = tensor
    for name, layers in attention.items():
        if len(layers) == 3:
            renamed[name] = torch.cat([layers[layer] for layer in ("q_proj", "k_proj", "v_proj")])
    return renamed
