"""Weights that people have: names of other libraries, prefixes, entries, forms; and the activation they belong to."""

import argparse
import json
import logging

import pytest
import safetensors.torch
import timm
import torch
from tiny import TOWER, published_form, tiny_tower
from torch.nn import functional

from modules.activations import CLIP_WIDTHS, fitting_arch, sibling, tower_activation
from modules.backbones import ARCHITECTURES, FrozenTower, find_architecture
from modules.hashing import hash_tensors
from modules.pretrained import is_safetensors, load_tower_weights, read_state_dict
from utils import published_weights
from utils.errors import CheckpointError
from utils.published_weights import OPENAI, PUBLISHED_FILES

WIDTH, DEPTH, PATCH = TOWER["embed_dim"], TOWER["depth"], 16
GELU_ARCH, QUICK_ARCH = "timm/vit_base_patch16_clip_224", "timm/vit_base_patch16_clip_quickgelu_224"


@pytest.fixture(scope="module")
def openai():
    """Tensors of a small CLIP under OpenAI's names, without the numbers that only OpenAI's files hold."""
    tower = tiny_tower()
    torch.manual_seed(1)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = published_form(tower)
    del state["input_resolution"]
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def hugging_face(openai, prefix="vision_model."):
    """The same tower as transformers names it, written out name by name."""
    v = {name.removeprefix("visual."): tensor for name, tensor in openai.items() if name.startswith("visual.")}
    state = {
        f"{prefix}embeddings.class_embedding": v["class_embedding"],
        f"{prefix}embeddings.position_ids": torch.arange(5)[None],
        f"{prefix}embeddings.patch_embedding.weight": v["conv1.weight"],
        f"{prefix}embeddings.position_embedding.weight": v["positional_embedding"],
        "visual_projection.weight": v["proj"].T.contiguous(),
        "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(8, 8),
        "text_model.embeddings.position_ids": torch.arange(9)[None],
        "logit_scale": torch.tensor(4.6),
    }
    for kind in ("weight", "bias"):
        state[f"{prefix}pre_layrnorm.{kind}"] = v[f"ln_pre.{kind}"]
        state[f"{prefix}post_layernorm.{kind}"] = v[f"ln_post.{kind}"]
        for i in range(DEPTH):
            theirs, ours = f"{prefix}encoder.layers.{i}", f"transformer.resblocks.{i}"
            joint = v[f"{ours}.attn.in_proj_{kind}"]
            state[f"{theirs}.self_attn.q_proj.{kind}"] = joint[:WIDTH].clone()
            state[f"{theirs}.self_attn.k_proj.{kind}"] = joint[WIDTH : 2 * WIDTH].clone()
            state[f"{theirs}.self_attn.v_proj.{kind}"] = joint[2 * WIDTH :].clone()
            state[f"{theirs}.self_attn.out_proj.{kind}"] = v[f"{ours}.attn.out_proj.{kind}"]
            state[f"{theirs}.layer_norm1.{kind}"] = v[f"{ours}.ln_1.{kind}"]
            state[f"{theirs}.layer_norm2.{kind}"] = v[f"{ours}.ln_2.{kind}"]
            state[f"{theirs}.mlp.fc1.{kind}"] = v[f"{ours}.mlp.c_fc.{kind}"]
            state[f"{theirs}.mlp.fc2.{kind}"] = v[f"{ours}.mlp.c_proj.{kind}"]
    return state


def tower_only(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def timm_names(openai):
    """The tower as timm names it."""
    tower = tiny_tower()
    fill(tower, openai)
    return {name: tensor.detach().clone() for name, tensor in tower.vit.state_dict().items()}


def fill(tower, openai):
    """Fill a tower tensor by tensor, without the code under test."""
    v, vit = openai, tower.vit
    with torch.no_grad():
        vit.cls_token[0, 0] = v["visual.class_embedding"]
        vit.pos_embed[0] = v["visual.positional_embedding"]
        vit.patch_embed.proj.weight.copy_(v["visual.conv1.weight"])
        for kind in ("weight", "bias"):
            getattr(vit.norm_pre, kind).copy_(v[f"visual.ln_pre.{kind}"])
            for i, block in enumerate(vit.blocks):
                start = f"visual.transformer.resblocks.{i}"
                getattr(block.norm1, kind).copy_(v[f"{start}.ln_1.{kind}"])
                getattr(block.norm2, kind).copy_(v[f"{start}.ln_2.{kind}"])
                getattr(block.attn.qkv, kind).copy_(v[f"{start}.attn.in_proj_{kind}"])
                getattr(block.attn.proj, kind).copy_(v[f"{start}.attn.out_proj.{kind}"])
                getattr(block.mlp.fc1, kind).copy_(v[f"{start}.mlp.c_fc.{kind}"])
                getattr(block.mlp.fc2, kind).copy_(v[f"{start}.mlp.c_proj.{kind}"])


def loaded(path, arch="ViT-B/16", **kwargs):
    architecture = find_architecture(arch)
    tower = FrozenTower(architecture.timm_name, 32, {**TOWER, **kwargs}, on_meta=True)
    load_tower_weights(tower, architecture, arch, str(path))
    return tower


def plain_tokens(v, clips, activation):
    """Tokens after each block by the formulas of CLIP, from tensors with OpenAI's names; activation: x -> x."""
    x = functional.conv2d(clips.flatten(0, 1), v["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([v["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1) + v["visual.positional_embedding"]

    def norm(x, name):
        return functional.layer_norm(x, (WIDTH,), v[f"{name}.weight"], v[f"{name}.bias"])

    x = norm(x, "visual.ln_pre")
    for i in range(DEPTH):
        p = f"visual.transformer.resblocks.{i}"
        qkv = functional.linear(norm(x, f"{p}.ln_1"), v[f"{p}.attn.in_proj_weight"], v[f"{p}.attn.in_proj_bias"])
        q, k, w = (part.unflatten(-1, (TOWER["num_heads"], -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        shares = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        y = (shares @ w).transpose(1, 2).flatten(2)
        x = x + functional.linear(y, v[f"{p}.attn.out_proj.weight"], v[f"{p}.attn.out_proj.bias"])
        y = functional.linear(norm(x, f"{p}.ln_2"), v[f"{p}.mlp.c_fc.weight"], v[f"{p}.mlp.c_fc.bias"])
        x = x + functional.linear(activation(y), v[f"{p}.mlp.c_proj.weight"], v[f"{p}.mlp.c_proj.bias"])
        yield x


LAYOUTS = {
    "OpenAI": lambda v: v,
    "bare tower of OpenAI": lambda v: tower_only(v, "visual."),
    "model.visual": lambda v: prefixed(v, "model."),
    "module.visual": lambda v: prefixed(v, "module."),
    "a prefix that nobody has heard of": lambda v: prefixed(tower_only(v, "visual."), "student.clip.tower."),
    "Hugging Face": hugging_face,
    "bare tower of Hugging Face": lambda v: tower_only(hugging_face(v), "vision_model."),
    "Hugging Face in another model": lambda v: prefixed(hugging_face(v), "model.clip."),
    "timm": timm_names,
    "timm in open_clip": lambda v: prefixed(timm_names(v), "visual.trunk.") | {"text.weight": torch.ones(3)},
    "timm in another model": lambda v: (
        prefixed(timm_names(v), "module.backbone.") | {"module.head.bias": torch.ones(3)}
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tower_of_every_layout_is_the_same_to_the_bit(openai, tmp_path, layout):
    expected = tiny_tower()
    fill(expected, openai)
    torch.save(LAYOUTS[layout](openai), tmp_path / "w.bin")
    assert hash_tensors(loaded(tmp_path / "w.bin").state_dict()) == hash_tensors(expected.state_dict())


@pytest.mark.parametrize("form", ["torch.save", "legacy torch.save", "safetensors"])
@pytest.mark.parametrize("name", ["w.bin", "w.safetensors", "w.pt", "w", "6f2c9a"])
def test_the_content_decides_the_form_not_the_name(openai, tmp_path, form, name):
    state, path = hugging_face(openai), tmp_path / name
    if form == "safetensors":
        safetensors.torch.save_file({key: tensor.clone() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "torch.save")
    assert is_safetensors(path) == (form == "safetensors")
    found = read_state_dict(path)
    assert set(found) == set(state) and all(found[key].equal(tensor) for key, tensor in state.items())


NESTS = {
    "state_dict": ({"epoch": 3, "state_dict": 0, "optimizer": {"state": {}}}, 0),
    "state_dict with the arguments of the training": ({"state_dict": 0, "args": argparse.Namespace(lr=0.1)}, 0),
    "averaged alone": ({"state_dict_ema": 0}, 0),
    "averaged beside the others, as of timm": ({"state_dict": 1, "state_dict_ema": 0, "arch": "vit"}, 0),
    "averaged beside the others, as of DeiT": ({"model": 1, "model_ema": 0}, 0),
    "two deep": ({"model": {"module": 0}}, 0),
}


@pytest.mark.parametrize("nest", NESTS)
def test_the_entry_of_a_trainings_file_that_timm_would_take_is_read(openai, tmp_path, nest, caplog):
    states = [openai, {name: tensor + 1 for name, tensor in openai.items()}]

    def place(value):
        if isinstance(value, dict):
            return {name: place(item) for name, item in value.items()}
        return states[value] if value in (0, 1) and isinstance(value, int) else value

    content, expected = NESTS[nest]
    content = {name: place(value) if name not in ("epoch",) else value for name, value in content.items()}
    torch.save(content, tmp_path / "w.pt")
    caplog.set_level(logging.INFO)
    found = read_state_dict(tmp_path / "w.pt")
    assert set(found) == set(openai) and all(found[name].equal(states[expected][name]) for name in found)
    averaged = [message for message in caplog.messages if "averaged weights" in message]
    assert len(averaged) == ("averaged" in nest)


def test_a_part_of_the_attention_that_is_missing_and_two_towers_are_refused(openai, tmp_path):
    state = hugging_face(openai)
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w.pt \(network.arch ViT-B/16\): .* 1 missing: blocks.1.attn.qkv.bias"):
        loaded(tmp_path / "w.pt")
    torch.save(prefixed(openai, "student.") | prefixed(openai, "teacher."), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds 2 image towers .student.visual., teacher.visual.*; save one"):
        loaded(tmp_path / "w.pt")


def test_a_tensor_that_no_tower_has_is_still_refused_under_every_name(openai, tmp_path):
    for state, unknown in (
        (hugging_face(openai) | {"vision_model.encoder.layers.0.extra.weight": torch.ones(1)}, "blocks.0.extra.weight"),
        (tower_only(openai, "visual.") | {"extra": torch.ones(1)}, "extra"),
    ):
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=f"1 unknown: {unknown}"):
            loaded(tmp_path / "w.pt")


# the activation


@pytest.mark.parametrize(
    "arch, activation, formula",
    [
        ("ViT-B/16", "QuickGELU", lambda x: x * torch.sigmoid(1.702 * x)),
        (QUICK_ARCH, "QuickGELU", lambda x: x * torch.sigmoid(1.702 * x)),
        (GELU_ARCH, "GELU", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
    ],
)
def test_each_architecture_computes_its_activation_and_the_log_names_it_and_the_file(
    openai, tmp_path, caplog, arch, activation, formula
):
    torch.save(hugging_face(openai), tmp_path / "pytorch_model.bin")
    caplog.set_level(logging.INFO)
    tower = loaded(tmp_path / "pytorch_model.bin", arch)
    assert f"from {tmp_path}/pytorch_model.bin, activation {activation};" in caplog.messages[0]
    clips = torch.randn(1, 2, 3, 32, 32)
    for ours, plain in zip(tower.layer_tokens(clips), plain_tokens(openai, clips, formula), strict=True):
        assert (ours[0] - plain).abs().max() < 1e-4 * plain.abs().max()


def beside(folder, state, file, config):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / file)
    for name, content in config.items():
        (folder / name).write_text(json.dumps(content))
    return folder / file


HF_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "patch_size": PATCH}
OPEN_CLIP_SIZES = {"width": WIDTH, "layers": DEPTH, "patch_size": PATCH}


def hf_config(**vision):
    return {"config.json": {"model_type": "clip", "vision_config": {**HF_SIZES, **vision}}}


def open_clip_config(sizes=OPEN_CLIP_SIZES, **model):
    return {"open_clip_config.json": {"model_cfg": {"vision_cfg": sizes, **model}}}


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    "layout, config, stated",
    [
        (hugging_face, hf_config(hidden_act="gelu"), "GELU"),
        (hugging_face, hf_config(hidden_act="quick_gelu"), "QuickGELU"),
        (hugging_face, hf_config(), "QuickGELU"),  # transformers leaves out its default
        (hugging_face, {"config.json": {"model_type": "clip_vision_model", **HF_SIZES, "hidden_act": "gelu"}}, "GELU"),
        (hugging_face, hf_config(hidden_act="gelu") | open_clip_config(quick_gelu=True), "GELU"),
        (dict, open_clip_config(), "GELU"),
        (dict, open_clip_config(quick_gelu=True), "QuickGELU"),
        (dict, open_clip_config() | hf_config(hidden_act="quick_gelu"), "GELU"),
        (lambda v: v | {"input_resolution": torch.tensor(32)}, {}, "QuickGELU"),
        (lambda v: v | {"vocab_size": torch.tensor(9)}, open_clip_config(), "QuickGELU"),
    ],
)
def test_another_activation_than_what_lies_beside_the_weights_states_is_a_warning_that_names_the_right_tower(
    openai, tmp_path, caplog, layout, config, stated
):
    path = beside(tmp_path, layout(openai), "w.bin", config)
    for arch, computes in (("ViT-B/16", "QuickGELU"), (QUICK_ARCH, "QuickGELU"), (GELU_ARCH, "GELU")):
        caplog.clear()
        loaded(path, arch)
        found = warnings_of(caplog)
        if computes != stated:
            fitting = "ViT-B/16" if stated == "QuickGELU" else GELU_ARCH
            assert len(found) == 1 and found[0].endswith(f"so its tokens will be wrong; set network.arch={fitting}")
            assert f"{arch} computes {computes}" in found[0] and str(path) in found[0]
        elif arch == "ViT-B/16":  # under OpenAI's name, and not OpenAI's file
            assert len(found) == 1 and f"too, as {QUICK_ARCH} does" in found[0]
        else:
            assert not found


@pytest.mark.parametrize(
    "layout, config",
    [
        (hugging_face, {}),
        (dict, {}),
        (hugging_face, {"config.json": {"model_type": "siglip", "vision_config": {**HF_SIZES, "hidden_act": "gelu"}}}),
        (hugging_face, {"config.json": {"name": "of another program"}}),
        (hugging_face, {"config.json": ["no object"]}),
        (hugging_face, hf_config(hidden_act="gelu", hidden_size=999)),  # beside it, but of another model
        (dict, open_clip_config({**OPEN_CLIP_SIZES, "layers": 99}, quick_gelu=True)),
        (dict, hf_config(hidden_act="gelu")),  # of the other file in that folder
    ],
)
def test_where_nothing_states_the_activation_only_openais_names_warn(openai, tmp_path, caplog, layout, config):
    path = beside(tmp_path, layout(openai), "w.bin", config)
    for arch in (QUICK_ARCH, GELU_ARCH):
        loaded(path, arch)
    assert not warnings_of(caplog)
    loaded(path, "ViT-B/16")
    (warning,) = warnings_of(caplog)
    assert f"{path}: not the file that OpenAI published for ViT-B/16 (another SHA-256)" in warning
    assert warning.endswith(f"trained with GELU, as those of LAION, set network.arch={GELU_ARCH}")


def test_the_file_that_openai_published_gives_no_warning(openai, tmp_path, caplog, monkeypatch):
    path = beside(tmp_path, openai, "ViT-B-16.pt", {})
    file = PUBLISHED_FILES["ViT-B/16"]._replace(sha256=published_weights.hash_file(path))
    monkeypatch.setitem(PUBLISHED_FILES, "ViT-B/16", file)
    loaded(path)
    assert not warnings_of(caplog)
    (tmp_path / "renamed").write_bytes(path.read_bytes())
    loaded(tmp_path / "renamed")
    assert not warnings_of(caplog)
    loaded(beside(tmp_path, openai | {"logit_scale": torch.tensor(2.0)}, "ViT-B-16.pt", {}))
    assert len(warnings_of(caplog)) == 1


def test_a_configuration_beside_the_weights_that_is_damaged_is_one_line(openai, tmp_path):
    path = beside(tmp_path, hugging_face(openai), "w.bin", {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: cannot be read, .*move it away") as caught:
        loaded(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arch, warns", [("openai", True), ("metaclip_400m", True), ("laion2b", False), ("openai_ft_in1k", False)]
)
def test_timms_own_weights_of_a_quickgelu_model_warn_in_a_gelu_tower(openai, monkeypatch, caplog, arch, warns):
    monkeypatch.setattr("modules.pretrained.load_state_dict_from_hf", lambda *_, **__: openai)
    loaded("hub", f"{GELU_ARCH}.{arch}")
    expected = f"timm lists the weights '{arch}' for {QUICK_ARCH.removeprefix('timm/')}"
    assert [expected in warning for warning in warnings_of(caplog)] == [True] * warns
    caplog.clear()
    if warns:
        loaded("hub", f"{QUICK_ARCH}.{arch}")
        assert not warnings_of(caplog)


def test_every_clip_tower_of_timm_with_quickgelu_has_a_sibling_with_gelu_and_back():
    quick = [name for name in timm.list_models("vit_*_clip_quickgelu_*")]
    assert len(quick) >= 4 and {a.timm_name for a in ARCHITECTURES.values() if a.publisher == OPENAI} <= set(quick)
    for name in quick:
        other = sibling(name, "GELU")
        assert timm.is_model(other) and other != name and sibling(other, "QuickGELU") == name
    assert sibling("vit_base_patch16_siglip_224", "QuickGELU") is None
    assert sibling("vit_base_patch32_clip_448", "QuickGELU") is None


def test_the_activation_of_a_tower_is_that_of_its_blocks():
    assert tower_activation(tiny_tower("ViT-B/16").vit) == "QuickGELU"
    assert tower_activation(tiny_tower(GELU_ARCH).vit) == "GELU"
    assert tower_activation(tiny_tower("ViT-B/16", act_layer="gelu").vit) == "GELU"


@pytest.mark.parametrize("size", CLIP_WIDTHS)
def test_the_widths_of_clip_towers_are_those_of_timm(size):
    name = timm.list_models(f"vit_{size}_patch*_clip_*")[0]
    with torch.device("meta"):
        assert timm.create_model(name, depth=1).embed_dim == CLIP_WIDTHS[size]


def test_a_file_of_another_size_names_the_architecture_that_has_it(tmp_path):
    width, positions, patch = 1024, 257, 14

    def empty(*shape):
        return torch.zeros(1).expand(shape)

    state = {
        "visual.conv1.weight": empty(width, 3, patch, patch),
        "visual.class_embedding": empty(width),
        "visual.positional_embedding": empty(positions, width),
        "visual.transformer.resblocks.0.ln_1.weight": empty(width),
    }
    for more, fitting in (
        ({}, "timm/vit_large_patch14_clip_224"),
        ({"input_resolution": torch.tensor(224)}, "ViT-L/14"),
    ):
        torch.save(state | more, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=f"do not fit.*; network.arch={fitting} has the sizes of this file$"):
            loaded(tmp_path / "w.pt", "ViT-B/16")
    assert fitting_arch("vit_large_patch14_clip_quickgelu_336") == "ViT-L/14-336px"
