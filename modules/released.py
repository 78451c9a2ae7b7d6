"""Names of tensors in the released checkpoints of Side4Video, and conversion both ways (docs/protocol.md section 3).

A released file holds the whole model, frozen tower included, in the entry `model_state_dict`. Names may start with
`module.`. Shapes are ours, except that the tensors in LEADING_AXES have fewer axes.
"""

import re

from timm.layers import SwiGLU
from torch import Tensor, cat

from modules.pretrained import refuse_misfits
from modules.side4video import Side4Video
from utils.errors import CheckpointError

Names = dict[str, str | tuple[str, ...]]
PURPOSE = "the released form of a checkpoint"

# Norm placement -> start of a name in Side4Video.state_dict() -> start of the released name. `*` is the layer's number.
# If several starts fit a name, the longest is used. A tuple names several tensors that are concatenated to make ours.
RELEASED_NAMES: dict[str, Names] = {
    "pre": {
        "backbone.vit.patch_embed.proj.": "visual.conv1.",
        "backbone.vit.cls_token": "visual.class_embedding",
        "backbone.vit.pos_embed": "visual.positional_embedding",
        "backbone.vit.norm_pre.": "visual.ln_pre.",
        "backbone.vit.blocks.*.norm1.": "visual.transformer.resblocks.*.ln_1.",
        "backbone.vit.blocks.*.attn.qkv.": "visual.transformer.resblocks.*.attn.in_proj_",
        "backbone.vit.blocks.*.attn.proj.": "visual.transformer.resblocks.*.attn.out_proj.",
        "backbone.vit.blocks.*.norm2.": "visual.transformer.resblocks.*.ln_2.",
        "backbone.vit.blocks.*.mlp.fc1.": "visual.transformer.resblocks.*.mlp.c_fc.",
        "backbone.vit.blocks.*.mlp.fc2.": "visual.transformer.resblocks.*.mlp.c_proj.",
        "trained.side.stem.": "visual.side_conv1.",
        "trained.side.stem_bn.": "visual.side_pre_bn3d.",
        "trained.side.pos": "visual.transformer.side_spatial_position_embeddings",
        "trained.side.projections.*.norm.": "visual.transformer.side_lns.*.",
        "trained.side.projections.*.linear.": "visual.transformer.side_linears.*.",
        "trained.side.blocks.*.": "visual.transformer.side_transformer.*.",
        "trained.side.blocks.*.attn.qkv.": "visual.transformer.side_transformer.*.attn.in_proj_",
        "trained.side.blocks.*.attn.proj.": "visual.transformer.side_transformer.*.attn.out_proj.",
        "trained.side.post_bn.": "visual.side_post_bn.",
        "trained.head.": "fc.",
    },
    "post": {
        "backbone.vit.patch_embed.": "visual.patch_embed.",
        "backbone.vit.cls_token": "visual.cls_token",
        "backbone.vit.pos_embed": "visual.pos_embed",
        "backbone.vit.blocks.*.": "visual.blocks.*.",
        "backbone.vit.blocks.*.attn.q_proj.bias": "visual.blocks.*.attn.q_bias",
        "backbone.vit.blocks.*.attn.v_proj.bias": "visual.blocks.*.attn.v_bias",
        "backbone.vit.blocks.*.attn.norm.": "visual.blocks.*.attn.inner_attn_ln.",
        "trained.side.stem.": "visual.side_conv1.",
        "trained.side.stem_bn.": "visual.side_pre_bn3d.",
        "trained.side.pos": "visual.side_spatial_position_embeddings",
        "trained.side.projections.*.norm.": "visual.side_lns.*.",
        "trained.side.projections.*.linear.": "visual.side_linears.*.",
        "trained.side.blocks.*.": "visual.side_blocks.*.",
        "trained.side.blocks.*.attn.qkv.": tuple(f"visual.side_blocks.*.attn.{part}_proj." for part in "qkv"),
        "trained.side.blocks.*.mlp.fc1.": "visual.side_blocks.*.mlp.0.",
        "trained.side.blocks.*.mlp.fc2.": "visual.side_blocks.*.mlp.2.",
        "trained.head.": "fc.",
    },
}
SWIGLU_NAMES: Names = {  # in addition, for EVA towers with a SwiGLU feed-forward: all except bigE
    "backbone.vit.blocks.*.mlp.fc1_g.": "visual.blocks.*.mlp.w1.",
    "backbone.vit.blocks.*.mlp.fc1_x.": "visual.blocks.*.mlp.w2.",
    "backbone.vit.blocks.*.mlp.norm.": "visual.blocks.*.mlp.ffn_ln.",
    "backbone.vit.blocks.*.mlp.fc2.": "visual.blocks.*.mlp.w3.",
}
# Tensors in the released EVA files that are not used: final norm and projection, and rope's tables, which are computed.
NOT_READ = re.compile(r"visual\.(norm|fc_norm|head)\.|.*\brope\.")
# Number of leading axes of size 1 that our tensor has and the released one does not.
LEADING_AXES = {"visual.class_embedding": 2, "visual.positional_embedding": 1}


def to_released(model: Side4Video) -> dict[str, Tensor]:
    """Return the whole model under the released names. The tensors are views of the model's, except rope's tables.

    EVA's final norm and projection are left out, because this project does not keep them.

    Raises:
        CheckpointError: the tower has a tensor without a released name.
    """
    own = model.state_dict()
    state = {}
    for name, theirs in released_names(model).items():
        tensors = own[name].chunk(len(theirs)) if len(theirs) > 1 else [own[name]]
        for part, tensor in zip(theirs, tensors, strict=True):
            state[part] = tensor[(0,) * LEADING_AXES.get(part, 0)]
    return state | rope_tables(model)


def rope_tables(model: Side4Video) -> dict[str, Tensor]:
    """EVA-CLIP's tables (N, width of a head), one pair for the tower and the same pair for each block; {} without rope.

    N is the number of patches of a frame.
    """
    rope = getattr(model.backbone.vit, "rope", None)
    if rope is None:
        return {}
    sine, cosine = rope.get_embed().chunk(2, dim=-1)
    owners = ["visual.", *(f"visual.blocks.{i}.attn." for i in range(model.backbone.num_blocks))]
    return {
        f"{owner}rope.freqs_{name}": table.clone()
        for owner in owners
        for name, table in (("cos", cosine), ("sin", sine))
    }


def from_released(
    model: Side4Video, state: dict[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Convert a released `model_state_dict` to the state dicts of `model.backbone` and `model.trained`.

    Nothing is loaded, and shapes are not checked: `load_strictly` does both.

    Raises:
        CheckpointError: tensors are missing or unknown.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    names, eva = released_names(model), model.side_network(PURPOSE).norm_placement == "post"
    known = dict.fromkeys(part for theirs in names.values() for part in theirs)
    refuse_misfits(
        source,
        missing=[part for part in known if part not in state],
        unknown=[name for name in state if name not in known and not (eva and NOT_READ.match(name))],
    )
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "trained": {}}
    for name, theirs in names.items():
        tensors = [state[part][(None,) * LEADING_AXES.get(part, 0)] for part in theirs]
        root, _, rest = name.partition(".")
        parts[root][rest] = tensors[0] if len(tensors) == 1 else cat(tensors)
    return parts["backbone"], parts["trained"]


def released_names(model: Side4Video) -> dict[str, tuple[str, ...]]:
    """Name in `model.state_dict()` -> released names of the tensor, or of its parts along the first axis.

    Raises:
        CheckpointError: a tensor has no released name.
    """
    table = RELEASED_NAMES[model.side_network(PURPOSE).norm_placement]
    if any(isinstance(module, SwiGLU) for module in model.backbone.modules()):
        table = table | SWIGLU_NAMES
    names = {}
    for name in model.state_dict():
        layer = re.search(r"\.(\d+)\.", name)
        pattern = name.replace(layer[0], ".*.", 1) if layer else name
        start = max((start for start in table if pattern.startswith(start)), key=len, default=None)
        if start is None:
            raise CheckpointError(f"{name}: the released checkpoints have no name for this tensor of the model")
        released = table[start]
        theirs = (released,) if isinstance(released, str) else released
        rest = pattern.removeprefix(start)
        names[name] = tuple((part + rest).replace("*", layer[1] if layer else "") for part in theirs)
    return names
