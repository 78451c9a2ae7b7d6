"""EVA towers and other timm models: their tokens, files and released checkpoints, and the blocks that are read."""

import logging
from pathlib import Path

import pytest
import timm
import torch
from tiny import pixel_batch, score_run, train_run, train_steps

from engine.configuration import default_config, read_config
from engine.summary import describe_model
from modules import build_model, pretrained
from modules.backbones import FrozenTower, choose_layers, find_architecture
from modules.checkpoint import load_weights, save_released
from modules.hashing import hash_tensors
from modules.pretrained import load_tower_weights
from modules.released import from_released, to_released
from modules.side4video import Side4Video
from tools import list_architectures
from utils.errors import CheckpointError, ConfigError

TINY = {"embed_dim": 64, "depth": 4, "num_heads": 2}
# timm's name -> pixels of a frame, mean of the first channel
TOWERS = {
    "vit_base_patch16_clip_224": (32, 0.48145466),
    "vit_base_patch16_siglip_224.v2_webli": (32, 0.5),
    "vit_base_patch16_siglip_gap_224.v2_webli": (32, 0.5),
    "vit_base_patch14_dinov2": (28, 0.485),
    "vit_base_patch14_reg4_dinov2": (28, 0.485),
    "vit_base_patch16_dinov3": (32, 0.485),
    "vit_small_plus_patch16_dinov3_qkvb": (32, 0.485),
    "eva02_base_patch14_224": (28, 0.48145466),
    "eva02_large_patch14_clip_224": (28, 0.48145466),
    "eva02_enormous_patch14_clip_224": (28, 0.48145466),
    "vit_pe_core_base_patch16_224": (32, 0.5),
    "vit_base_patch16_rope_mixed_ape_224": (32, 0.485),
    "deit_base_distilled_patch16_224": (32, 0.485),
}
EVA = {"EVA02-CLIP-L-14": True, "EVA02-CLIP-L-14-336": True, "EVA02-CLIP-bigE-14": False}  # name -> has rope and SwiGLU


def tower_config(arch, size, kwargs=None, **network):
    network = {"arch": arch, "backbone_kwargs": {**TINY, **(kwargs or {})}, **network}
    return default_config(data={"input_size": size}, network=network)


def eva_model(arch="EVA02-CLIP-L-14", seed=0, **network):
    """A tiny model in which no tensor is all zeros or all ones."""
    torch.manual_seed(seed)
    model = build_model(tower_config(arch, 28, **network))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def eva_clip_name(name):
    """EVA-CLIP's name of a tensor of a timm tower, independent of modules/released.py."""
    swaps = [("attn.q_proj.bias", "attn.q_bias"), ("attn.v_proj.bias", "attn.v_bias")]
    swaps += [("attn.norm.", "attn.inner_attn_ln."), ("mlp.norm.", "mlp.ffn_ln.")]
    if "fc1_g" in name or "fc1_x" in name:
        swaps += [("fc1_g", "w1"), ("fc1_x", "w2")]
    for ours, theirs in swaps:
        name = name.replace(ours, theirs)
    return f"visual.{name}"


def eva_file(tower):
    """A file as BAAI publishes it: tower, final norm, projection, rope tables, text tower."""
    names = tower.vit.state_dict()
    swiglu = "blocks.0.mlp.fc1_g.weight" in names
    state = {eva_clip_name(name): tensor for name, tensor in names.items()}
    if swiglu:
        state = {name.replace("mlp.fc2.", "mlp.w3."): tensor for name, tensor in state.items()}
    table = torch.ones(4, 32)
    state |= {"visual.norm.weight": torch.ones(64), "visual.norm.bias": torch.ones(64)}
    state |= {"visual.head.weight": torch.ones(8, 64), "visual.head.bias": torch.ones(8)}
    state |= {"visual.rope.freqs_cos": table, "visual.blocks.0.attn.rope.freqs_sin": table}
    return state | {"text.token_embedding.weight": torch.ones(5, 8), "logit_scale": torch.ones(())}


def clips_of(size, frames=3):
    return torch.randn(2, frames, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TOWERS)
def test_tokens_equal_those_of_timm_before_its_norm(name):
    """After each block those of forward_intermediates; after the last block also the input of the final norm."""
    size, mean = TOWERS[name]
    torch.manual_seed(0)
    tower, clips = FrozenTower(name, size, TINY), clips_of(size)
    vit = timm.create_model(name, num_classes=0, img_size=size, **TINY).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    own = tower.vit.state_dict()
    tower.vit.load_state_dict({key: tensor for key, tensor in vit.state_dict().items() if key in own})
    config = tower_config(f"timm/{name}", size)
    assert config.data.mean[0] == mean and len(config.data.std) == 3

    last = []
    vit.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    vit.forward_features(clips.flatten(0, 1))
    prefix = vit.num_prefix_tokens
    options = {"return_prefix_tokens": prefix > 0, "output_fmt": "NLC", "intermediates_only": True}
    expected = vit.forward_intermediates(clips.flatten(0, 1), **options)
    tokens = [t.flatten(0, 1) for t in tower.layer_tokens(clips)]
    assert len(tokens) == len(expected) == TINY["depth"]
    for ours, theirs in zip(tokens, expected, strict=True):
        patches, before = theirs if prefix else (theirs, None)
        assert ours[:, 1:].equal(patches) and not ours.requires_grad
        has_class = vit.cls_token is not None
        assert ours[:, :1].equal(before[:, :1] if has_class else patches.mean(dim=1, keepdim=True))
    assert tokens[-1][:, 1:].equal(last[0][:, prefix:])


@pytest.mark.parametrize("name", TOWERS)
def test_one_training_step_changes_the_side_tensors_only(name):
    size, _ = TOWERS[name]
    torch.manual_seed(0)
    model = build_model(tower_config(f"timm/{name}", size)).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(clips_of(size)).square().sum().backward()
    optimizer.step()
    for key, tensor in model.state_dict().items():
        assert tensor.equal(before[key]) == key.startswith("backbone."), key


def test_pixels_are_normalised_as_the_tower_was_trained(monkeypatch):
    seen, forward = [], Side4Video.forward
    monkeypatch.setattr(Side4Video, "forward", lambda self, *given: seen.append(given[0]) or forward(self, *given))
    batch = pixel_batch(1)
    train_steps([batch], 1, network={"arch": "timm/vit_base_patch16_siglip_224", "backbone_kwargs": TINY})
    torch.testing.assert_close(seen[0], batch["clips"].float() / 255 * 2 - 1)


@pytest.mark.parametrize("arch", EVA)
def test_eva_towers_get_the_post_variant_beside_every_second_block(arch):
    model = build_model(tower_config(arch, 28))
    assert model.trained.side.norm_placement == "post" and model.backbone.layers == [1, 3]
    assert len(model.trained.side.blocks) == 2 and model.trained.side.projections[0].norm.normalized_shape == (64,)
    assert model(clips_of(28)).shape == (2, 5)


def test_the_variant_can_be_chosen():
    model = build_model(tower_config("EVA02-CLIP-L-14", 28, side_variant="pre"))
    assert model.trained.side.norm_placement == "pre" and model.backbone.layers == [0, 1, 2, 3]
    model = build_model(tower_config("ViT-B/16", 32, side_variant="post"))
    assert model.trained.side.norm_placement == "post" and model.backbone.layers == [1, 3]


@pytest.mark.parametrize(
    "side_layers, layers",
    [("all", [0, 1, 2, 3]), ("every2", [1, 3]), ("last:1", [3]), ("last:3", [1, 2, 3]), ([0, 2], [0, 2])],
)
def test_blocks_to_read(side_layers, layers):
    assert choose_layers(side_layers, 4) == layers


@pytest.mark.parametrize("side_layers", ["last:5", "last:0", "every3", [], [4], [-1], [2, 1], [1, 1]])
def test_blocks_that_are_not_there_are_refused(side_layers):
    with pytest.raises(ConfigError, match="network.side_layers: .* which has 4"):
        choose_layers(side_layers, 4)


def test_blocks_after_the_last_one_read_are_not_there(tmp_path, caplog):
    whole = FrozenTower("eva02_large_patch14_clip_224", 28, TINY)
    torch.save(eva_file(whole), tmp_path / "eva.pt")
    network = {"init": True, "weights": str(tmp_path / "eva.pt"), "side_layers": [0, 2]}
    config = tower_config("EVA02-CLIP-L-14", 28, **network)
    model = build_model(config)
    assert len(model.backbone.vit.blocks) == 3 and len(model.trained.side.blocks) == 2
    tokens = list(whole.layer_tokens(clips_of(28)))
    for ours, block in zip(model.backbone.layer_tokens(clips_of(28)), (0, 2), strict=True):
        assert ours.equal(tokens[block])
    config.data.modality = "RGB"
    lines = "\n".join(describe_model(config, model))
    assert "3 of 4 blocks" in lines and "after its blocks 0, 2 (from 0)" in lines and "variant post" in lines


@pytest.mark.parametrize("arch", EVA)
@pytest.mark.parametrize("nest", [None, "module", "model", "state_dict"])
def test_eva_files_fill_the_tower_in_every_form(tmp_path, arch, nest):
    source = eva_model(arch).backbone
    state = eva_file(source)
    torch.save({nest: state} if nest else state, tmp_path / "eva.pt")
    config = tower_config(arch, 28, init=True, weights=str(tmp_path / "eva.pt"))
    tower = build_model(config).backbone
    assert hash_tensors(tower.state_dict()) == hash_tensors(source.state_dict()) and tower.weight_file == "eva.pt"
    for ours, theirs in zip(tower.layer_tokens(clips_of(28)), source.layer_tokens(clips_of(28)), strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s: s.pop("visual.blocks.1.attn.q_bias"), "1 missing: blocks.1.attn.q_proj.bias"),
        (lambda s: s.update({"visual.extra": torch.ones(1)}), "1 unknown: extra"),
        (lambda s: s.update({"visual.cls_token": torch.ones(1, 1, 7)}), r"cls_token \(1, 1, 7\) instead"),
    ],
)
def test_eva_files_that_do_not_fit_are_refused(tmp_path, change, complaint):
    state = eva_file(eva_model().backbone)
    change(state)
    torch.save(state, tmp_path / "eva.pt")
    with pytest.raises(CheckpointError, match=f"eva.pt.*{complaint}"):
        build_model(tower_config("EVA02-CLIP-L-14", 28, init=True, weights=str(tmp_path / "eva.pt")))


# Released checkpoints of the post variant

SIDE_NAMES = """
side_conv1.weight side_conv1.bias side_pre_bn3d.weight side_pre_bn3d.bias side_pre_bn3d.running_mean
side_pre_bn3d.running_var side_pre_bn3d.num_batches_tracked side_spatial_position_embeddings
"""
SIDE_LAYER_NAMES = """
side_linears.K.weight side_linears.K.bias side_lns.K.weight side_lns.K.bias
side_blocks.K.bn_1.weight side_blocks.K.bn_1.bias side_blocks.K.bn_1.running_mean side_blocks.K.bn_1.running_var
side_blocks.K.bn_1.num_batches_tracked side_blocks.K.bn_2.weight side_blocks.K.bn_2.bias
side_blocks.K.bn_2.running_mean side_blocks.K.bn_2.running_var side_blocks.K.bn_2.num_batches_tracked
side_blocks.K.conv.0.weight side_blocks.K.conv.0.bias side_blocks.K.conv.1.weight side_blocks.K.conv.1.bias
side_blocks.K.conv.2.weight side_blocks.K.conv.2.bias side_blocks.K.ln_1.weight side_blocks.K.ln_1.bias
side_blocks.K.attn.q_proj.weight side_blocks.K.attn.q_proj.bias side_blocks.K.attn.k_proj.weight
side_blocks.K.attn.k_proj.bias side_blocks.K.attn.v_proj.weight side_blocks.K.attn.v_proj.bias
side_blocks.K.attn.proj.weight side_blocks.K.attn.proj.bias
side_blocks.K.mlp.0.weight side_blocks.K.mlp.0.bias side_blocks.K.mlp.2.weight side_blocks.K.mlp.2.bias
"""


@pytest.mark.parametrize("arch, rope", EVA.items())
def test_released_names_of_the_post_variant(arch, rope):
    model = eva_model(arch)
    state = to_released(model)
    side = set(SIDE_NAMES.split()) | {name.replace("K", str(k)) for k in (0, 1) for name in SIDE_LAYER_NAMES.split()}
    assert {name.removeprefix("visual.") for name in state if "side_" in name} == side
    tables = {name for name in state if "rope" in name}
    owners = ["visual", *(f"visual.blocks.{i}.attn" for i in range(4))] if rope else []
    assert tables == {f"{owner}.rope.freqs_{name}" for owner in owners for name in ("cos", "sin")}
    tower = {name for name in eva_file(model.backbone) if name.startswith("visual.") and "rope" not in name}
    tower -= {"visual.norm.weight", "visual.norm.bias", "visual.head.weight", "visual.head.bias"}
    assert set(state) - tables - {f"visual.{name}" for name in side} - {"fc.weight", "fc.bias"} == tower


@pytest.mark.parametrize("arch", EVA)
def test_a_released_post_checkpoint_gives_the_same_logits_to_the_bit(tmp_path, arch):
    model, other = eva_model(arch, 0).eval(), eva_model(arch, 1).eval()
    save_released(tmp_path / "m.pt", model)
    released = torch.load(tmp_path / "m.pt", weights_only=True)
    state = released["model_state_dict"]
    state |= {"visual.norm.weight": torch.ones(64), "visual.norm.bias": torch.ones(64)}
    state |= {"visual.head.weight": torch.ones(8, 64), "visual.rope.freqs_cos": torch.ones(3)}
    released["model_state_dict"] = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(released, tmp_path / "released.pt")
    load_weights(other, tmp_path / "released.pt")
    assert other(clips_of(28)).equal(model(clips_of(28)))
    again = to_released(other)
    assert all(again[name].equal(tensor) for name, tensor in to_released(model).items())


def test_released_names_that_are_missing_or_unknown_are_refused():
    model = eva_model()
    state = to_released(model)
    state["visual.extra"] = state.pop("visual.blocks.2.mlp.w3.bias")
    with pytest.raises(CheckpointError, match="1 missing: visual.blocks.2.mlp.w3.bias; 1 unknown: visual.extra"):
        from_released(model, state, "m.pt")


def test_the_programs_take_a_released_post_checkpoint(config, tmp_path):
    eva = ["network.arch=EVA02-CLIP-L-14", "data.input_size=28", "network.backbone_kwargs.patch_size=14"]
    tiny = [*eva, "network.backbone_kwargs.embed_dim=64", "solver.epochs=1"]
    train_run(config, tmp_path / "run", *tiny)
    model = build_model(read_config(config, tiny))
    load_weights(model, tmp_path / "run" / "last_model.pt")
    save_released(tmp_path / "released.pt", model)
    paths = (tmp_path / "run" / "last_model.pt", tmp_path / "released.pt")
    scores = [score_run(config, path, tmp_path / "s.npz", *tiny)["scores"] for path in paths]
    assert (scores[0] == scores[1]).all()
    tuned = train_run(config, tmp_path / "tuned", f"pretrain={paths[1]}", *tiny)
    assert tuned["tower_sha256"] == torch.load(paths[0], weights_only=True)["tower_sha256"]


@pytest.mark.parametrize("size, grid", [(224, 16), (336, 24)])
def test_rebuilt_rope_tables_are_those_of_eva_clip(size, grid):
    """Angles t * 10000^(-2i/d) for rows, then columns, each twice; t is scaled to the 16 patches of training."""
    config = tower_config("EVA02-CLIP-L-14", size, {"embed_dim": 128, "depth": 2})
    state, half = to_released(build_model(config)), 32
    t = torch.arange(grid).double() / grid * 16
    angles = t[:, None] * 10000 ** -(torch.arange(0, half, 2).double() / half)
    angles = angles.repeat_interleave(2, dim=1)
    table = torch.cat([angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)], dim=-1).flatten(0, 1)
    assert state["visual.rope.freqs_cos"].shape == (grid**2, 64)
    for name, expected in (("cos", table.cos()), ("sin", table.sin())):
        for owner in ("visual", "visual.blocks.1.attn"):
            torch.testing.assert_close(state[f"{owner}.rope.freqs_{name}"].double(), expected, atol=1e-5, rtol=0)


# Any timm model


@pytest.mark.parametrize("name", ["convnext_tiny", "resnet18", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_a_tower_that_cannot_be_read_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=f"network.arch: {name} gives no token of each patch after each block"):
        FrozenTower(name, 224)


def test_hub_takes_what_timm_publishes_only_when_asked(monkeypatch, caplog):
    asked = []
    source = FrozenTower("vit_base_patch16_siglip_224.v2_webli", 32, TINY)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)

    def fetch(model_id, **_):
        asked.append(model_id)
        return source.vit.state_dict() | {"attn_pool.latent": torch.ones(1), "norm.weight": torch.ones(64)}

    monkeypatch.setattr(pretrained, "load_state_dict_from_hf", fetch)
    arch = "timm/vit_base_patch16_siglip_224.v2_webli"
    build_model(tower_config(arch, 32))
    with pytest.raises(ConfigError, match="network.init: .*has no weight file of its own"):
        build_model(tower_config(arch, 32, init=True))
    assert not asked
    caplog.set_level(logging.INFO)
    tower = build_model(tower_config(arch, 32, init=True, weights="hub")).backbone
    assert asked == ["timm/vit_base_patch16_siglip_224.v2_webli"] and f"hub:{asked[0]}" in caplog.text
    assert tower.weight_file == f"hub:{asked[0]}"
    assert hash_tensors(tower.state_dict()) == hash_tensors(source.state_dict())


def test_hub_without_a_connection_is_one_line(monkeypatch):
    def fetch(*_, **__):
        raise OSError("no\nroute")

    monkeypatch.setattr(pretrained, "load_state_dict_from_hf", fetch)
    with pytest.raises(ConfigError, match="network.weights: hub:timm/.* could not be fetched .OSError: no route"):
        build_model(tower_config("timm/vit_base_patch16_dinov3", 32, init=True, weights="hub"))


def test_hub_is_refused_for_a_named_architecture():
    tower = FrozenTower("vit_base_patch16_clip_quickgelu_224", 32, TINY)
    with pytest.raises(ConfigError, match="hub is for timm/<name>; ViT-B/16 means the file ViT-B-16.pt"):
        load_tower_weights(tower, find_architecture("ViT-B/16"), "ViT-B/16", "hub")


@pytest.mark.parametrize("arch", ["ViT-B/32", "timm/vit_base_patch16_siglip_224.v2_webli"])
def test_the_readme_has_the_table_that_the_tool_prints(arch):
    readme = Path(__file__).resolve().parent.parent / "README.md"
    assert f"| {' | '.join(list_architectures.describe(arch))} |\n" in readme.read_text()
