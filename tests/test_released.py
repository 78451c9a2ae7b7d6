"""Released checkpoints: their names, exact round trips, what is refused, and a textbook model with these names."""

import logging
import os
from collections import OrderedDict

import numpy as np
import pytest
import torch
from textbook import TextbookBlock
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn
from tiny import TOWER, checkpoint_of, published_form, score_run, train_run
from torch import nn

from engine.configuration import default_config, read_config
from modules import build_model, released
from modules.checkpoint import (
    holds_tower,
    load_weights,
    model_state,
    read_checkpoint,
    save_checkpoint,
    save_released,
)
from modules.released import to_released
from tools.motion_demo import CLASSES
from utils.errors import CheckpointError, UserError

NAMES = """
fc.weight fc.bias visual.class_embedding visual.positional_embedding visual.conv1.weight
visual.ln_pre.weight visual.ln_pre.bias visual.side_conv1.weight visual.side_conv1.bias
visual.side_pre_bn3d.weight visual.side_pre_bn3d.bias visual.side_pre_bn3d.running_mean
visual.side_pre_bn3d.running_var visual.side_pre_bn3d.num_batches_tracked
visual.side_post_bn.weight visual.side_post_bn.bias visual.side_post_bn.running_mean
visual.side_post_bn.running_var visual.side_post_bn.num_batches_tracked
visual.transformer.side_spatial_position_embeddings
"""
LAYER_NAMES = """
resblocks.K.ln_1.weight resblocks.K.ln_1.bias resblocks.K.ln_2.weight resblocks.K.ln_2.bias
resblocks.K.attn.in_proj_weight resblocks.K.attn.in_proj_bias
resblocks.K.attn.out_proj.weight resblocks.K.attn.out_proj.bias
resblocks.K.mlp.c_fc.weight resblocks.K.mlp.c_fc.bias resblocks.K.mlp.c_proj.weight resblocks.K.mlp.c_proj.bias
side_lns.K.weight side_lns.K.bias side_linears.K.weight side_linears.K.bias
side_transformer.K.bn_1.weight side_transformer.K.bn_1.bias side_transformer.K.bn_1.running_mean
side_transformer.K.bn_1.running_var side_transformer.K.bn_1.num_batches_tracked
side_transformer.K.bn_2.weight side_transformer.K.bn_2.bias side_transformer.K.bn_2.running_mean
side_transformer.K.bn_2.running_var side_transformer.K.bn_2.num_batches_tracked
side_transformer.K.conv.0.weight side_transformer.K.conv.0.bias side_transformer.K.conv.1.weight
side_transformer.K.conv.1.bias side_transformer.K.conv.2.weight side_transformer.K.conv.2.bias
side_transformer.K.ln_1.weight side_transformer.K.ln_1.bias
side_transformer.K.attn.in_proj_weight side_transformer.K.attn.in_proj_bias
side_transformer.K.attn.out_proj.weight side_transformer.K.attn.out_proj.bias
side_transformer.K.mlp.fc1.weight side_transformer.K.mlp.fc1.bias
side_transformer.K.mlp.fc2.weight side_transformer.K.mlp.fc2.bias
"""


def make_model(seed=0, num_classes=5, input_size=32, arch="ViT-B/16", init=False, weights=None, **kwargs):
    """A tower of two blocks of width 32, side width 64, 2 x 2 patches; running statistics after one batch."""
    network = {"arch": arch, "init": init, "weights": weights}
    network["backbone_kwargs"] = {**TOWER, "depth": 2, **kwargs}
    config = default_config(data={"num_classes": num_classes, "input_size": input_size}, network=network)
    torch.manual_seed(seed)
    model = build_model(config)
    model.train()(torch.randn(2, 3, 3, input_size, input_size))
    return model.eval()


def logits(model, input_size=32):
    clips = torch.randn(2, 3, 3, input_size, input_size, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return model.eval()(clips)


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, 2, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(D, 4 * D), gelu=QuickGelu(), c_proj=nn.Linear(4 * D, D)),
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class SideBlock(TextbookBlock):
    def __init__(self, S):
        super().__init__(S, "pre")
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(S, 4 * S), gelu=nn.GELU(), fc2=nn.Linear(4 * S, S)))


class TextbookSide4Video(nn.Module):
    """CLIP and the side network in plain PyTorch; attributes have the released names."""

    def __init__(self, D=32, S=64, P=16, N=4, K=5):
        super().__init__()
        self.visual = v = nn.Module()
        v.conv1 = nn.Conv2d(3, D, P, stride=P, bias=False)
        v.class_embedding = nn.Parameter(torch.randn(D))
        v.positional_embedding = nn.Parameter(torch.randn(1 + N, D))
        v.ln_pre = nn.LayerNorm(D)
        v.side_conv1 = nn.Conv3d(3, S, (3, P, P), stride=(1, P, P), padding=(1, 0, 0))
        v.side_pre_bn3d, v.side_post_bn = nn.BatchNorm3d(S), nn.BatchNorm3d(S)
        v.transformer = t = nn.Module()
        t.resblocks = nn.ModuleList(ClipBlock(D) for _ in range(2))
        t.side_lns = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        t.side_linears = nn.ModuleList(nn.Linear(D, S) for _ in range(2))
        t.side_transformer = nn.ModuleList(SideBlock(S) for _ in range(2))
        t.side_spatial_position_embeddings = nn.Parameter(torch.randn(N, S))
        self.fc = nn.Linear(S, K)

    def forward(self, clips):
        v, t, (B, T) = self.visual, self.visual.transformer, clips.shape[:2]
        side = v.side_pre_bn3d(v.side_conv1(clips.transpose(1, 2)))
        x = v.conv1(clips.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = v.ln_pre(torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding)
        for k in range(2):
            x = t.resblocks[k](x)
            z = t.side_linears[k](t.side_lns[k](x)).unflatten(0, (B, T))
            patches = z[:, :, 1:].permute(0, 3, 1, 2).reshape(side.shape)
            side = t.side_transformer[k](0.5 * side + 0.5 * patches, z[:, :, 0], t.side_spatial_position_embeddings)
        return self.fc(v.side_post_bn(side).mean(dim=(2, 3, 4)))


def released_file(path, prefix="module."):
    """Write a file in the form of the authors' training, from a textbook model; returns the model and the content."""
    torch.manual_seed(4)
    textbook = TextbookSide4Video()
    optimizer = torch.optim.AdamW(textbook.parameters(), lr=1e-3)
    textbook(torch.randn(2, 3, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    state = {prefix + name: tensor for name, tensor in textbook.state_dict().items()}
    content = {"epoch": 29, "model_state_dict": state, "optimizer_state_dict": optimizer.state_dict()}
    torch.save(content, path)
    return textbook, content


# Names and values


def test_the_names_are_the_released_ones():
    expected = NAMES.split()
    for k in "01":
        expected += [f"visual.transformer.{name}" for name in LAYER_NAMES.replace("K", k).split()]
    assert sorted(to_released(make_model())) == sorted(expected)


def test_the_tower_of_an_export_reads_as_openai_wrote_it():
    model = make_model()
    tower = {name: tensor for name, tensor in to_released(model).items() if "side_" not in name}
    converted = checkpoint_filter_fn(tower, model.backbone.vit)
    own = model.backbone.vit.state_dict()
    assert set(converted) == set(own) and all(converted[name].equal(own[name]) for name in own)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_file_gives_the_textbook_models_logits(tmp_path, prefix):
    textbook, _ = released_file(tmp_path / "released.pt", prefix)
    model = make_model()
    load_weights(model, tmp_path / "released.pt")
    clips = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    expected = textbook.double().eval()(clips)
    assert (model.double().eval()(clips) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_our_model_in_released_form_fills_the_textbook_strictly():
    """Every name and shape is that of plain PyTorch modules, such as Conv3d."""
    model, textbook = make_model().double(), TextbookSide4Video().double()
    textbook.load_state_dict(to_released(model))
    clips = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    expected = textbook.eval()(clips)
    assert (model(clips) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_a_released_file_is_written_back_to_the_bit(tmp_path):
    _, content = released_file(tmp_path / "released.pt", prefix="")
    model = make_model()
    read = load_weights(model, tmp_path / "released.pt")
    save_released(tmp_path / "again.pt", model, read["epoch"], read["optimizer_state_dict"])
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert set(again) == set(content) and again["epoch"] == 29
    for name, tensor in content["model_state_dict"].items():
        written = again["model_state_dict"].pop(name)
        assert written.dtype == tensor.dtype and written.equal(tensor), name
    assert not again["model_state_dict"]
    moments, expected = again["optimizer_state_dict"]["state"], content["optimizer_state_dict"]["state"]
    assert all(moments[i][key].equal(expected[i][key]) for i in expected for key in expected[i])


def test_our_model_comes_back_from_the_released_form_to_the_bit(tmp_path):
    model, other = make_model(0), make_model(1)
    save_released(tmp_path / "m.pt", model)
    assert not logits(model).equal(logits(other))
    load_weights(other, tmp_path / "m.pt")
    own, back = model.state_dict(), other.state_dict()
    assert set(own) == set(back) and all(own[name].equal(back[name]) for name in own)
    assert logits(model).equal(logits(other))


def test_a_table_may_split_a_tensor_into_several(monkeypatch, tmp_path):
    start = "visual.transformer.side_transformer.*.attn."
    parted = {"trained.side.blocks.*.attn.qkv.": tuple(f"{start}{part}_proj." for part in "qkv")}
    monkeypatch.setitem(released.RELEASED_NAMES, "pre", released.RELEASED_NAMES["pre"] | parted)
    model, other = make_model(0), make_model(1)
    state = to_released(model)
    qkv = model.trained.side.blocks[1].attn.qkv.weight
    assert state["visual.transformer.side_transformer.1.attn.k_proj.weight"].equal(qkv[64:128])
    save_released(tmp_path / "m.pt", model)
    load_weights(other, tmp_path / "m.pt")
    assert logits(model).equal(logits(other))


def test_both_forms_load_by_the_same_call_and_say_whether_they_hold_the_tower(tmp_path):
    torch.save(published_form(make_model().backbone), tmp_path / "clip.pt")
    model = make_model(init=True, weights=str(tmp_path / "clip.pt"))
    save_released(tmp_path / "released.pt", model)
    save_checkpoint(tmp_path / "ours.pt", checkpoint_of(model))
    assert holds_tower(read_checkpoint(tmp_path / "released.pt"))
    assert not holds_tower(read_checkpoint(tmp_path / "ours.pt"))
    from_released, from_ours = make_model(2), make_model(3, init=True, weights=str(tmp_path / "clip.pt"))
    load_weights(from_released, tmp_path / "released.pt")
    load_weights(from_ours, tmp_path / "ours.pt")
    assert logits(from_released).equal(logits(model)) and logits(from_ours).equal(logits(model))
    # the next checkpoint must hold the tower, because no published file has it
    assert model_state(from_released)["tower_file"] is None and model_state(from_released)["tower"] is not None


# What does not fit


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s: s.pop("visual.side_post_bn.running_var"), "1 missing: visual.side_post_bn.running_var"),
        (lambda s: s.pop("visual.positional_embedding"), "1 missing: visual.positional_embedding"),
        (lambda s: s.update({"visual.proj": torch.ones(1)}), "1 unknown: visual.proj"),
        (lambda s: s.update({"logit_scale": torch.ones(1)}), "1 unknown: logit_scale"),
        (
            lambda s: s.update({"visual.ln_pre.bias": torch.ones(7)}),
            r"1 of another shape: vit.norm_pre.bias \(7,\) instead of \(32,\)",
        ),
        (
            lambda s: s.update({"visual.side_conv1.bias": torch.ones(7)}),
            r"1 of another shape: side.stem.bias \(7,\) instead of \(64,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_in_one_line(tmp_path, change, complaint):
    state = to_released(make_model())
    change(state)
    torch.save({"model_state_dict": state}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=f"m.pt.*tensors do not fit; {complaint}") as caught:
        load_weights(make_model(1), tmp_path / "m.pt")
    assert "\n" not in str(caught.value)


def test_a_tower_without_released_names_is_refused_by_tensor():
    model = make_model(arch="timm/deit3_small_patch16_224", init_values=1e-4)
    with pytest.raises(CheckpointError, match=r"backbone.vit.blocks.0.ls1.gamma: .*no name for"):
        to_released(model)


class Hostile:
    def __reduce__(self):
        return os.system, ("echo > hacked",)


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"model_state_dict": {"fc.weight": Hostile()}}, "not a readable checkpoint: .*system"),
        ({"model_state_dict": {"fc.weight": 3}}, "not a checkpoint of this project .*nor a released one"),
        ({"state_dict": {}}, "not a checkpoint of this project .*nor a released one"),
    ],
)
def test_other_content_is_refused_in_one_line(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "m.pt")
    with pytest.raises(CheckpointError, match=f"m.pt: {reason}") as caught:
        load_weights(make_model(), "m.pt")
    assert "\n" not in str(caught.value) and os.listdir() == ["m.pt"]


def test_a_file_from_before_torch_wrote_zip_archives_is_read_too(tmp_path):
    model, other = make_model(0), make_model(1)
    torch.save({"model_state_dict": to_released(model)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    load_weights(other, tmp_path / "m.pt")
    assert logits(model).equal(logits(other))


@pytest.mark.parametrize("form", ["released", "ours"])
def test_a_head_of_other_classes_is_made_anew_only_when_asked(tmp_path, caplog, form):
    model, other = make_model(0), make_model(1, num_classes=7)
    save_as(form, model, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="m.pt: its head has 5 classes, data.num_classes is 7"):
        load_weights(other, tmp_path / "m.pt")
    head = other.trained.head.weight.clone()
    caplog.set_level(logging.INFO)
    load_weights(other, tmp_path / "m.pt", new_head=True)
    assert caplog.messages == [f"head: made anew for 7 classes; that of {tmp_path / 'm.pt'} has 5"]
    assert other.trained.head.weight.equal(head)
    assert all(a.equal(b) for a, b in zip(*(m.trained.side.parameters() for m in (model, other)), strict=True))


def save_as(form, model, path):
    if form == "released":
        save_released(path, model)
    else:
        save_checkpoint(path, checkpoint_of(model))


@pytest.mark.parametrize("form", ["released", "ours"])
def test_another_input_size_resamples_both_position_tables_in_one_logged_line(tmp_path, caplog, form):
    model, other = make_model(0, patch_size=8), make_model(1, patch_size=8, input_size=64)
    pos = model.trained.side.pos.data.view(4, 4, -1)  # rows and columns of patches
    pos[..., 0], pos[..., 1], pos[..., 2] = 3.0, torch.arange(4.0), torch.arange(4.0)[:, None]
    save_as(form, model, tmp_path / "m.pt")
    caplog.set_level(logging.INFO)
    load_weights(other, tmp_path / "m.pt")
    assert caplog.messages == [f"positions: 4 x 4 patches of {tmp_path / 'm.pt'} resampled to 8 x 8"]
    constant, along_row, along_column = other.trained.side.pos.view(8, 8, -1)[..., :3].unbind(-1)
    assert (constant - 3).abs().max() < 1e-5
    assert along_row.allclose(along_row[:1].expand(8, 8), atol=1e-5) and along_column.allclose(along_row.T, atol=1e-5)
    assert along_row[0].allclose(torch.arange(8) / 2 - 0.25, atol=0.3) and along_row[0].diff().gt(0).all()
    assert along_row[0, 3:5].allclose(torch.tensor([1.25, 1.75]), atol=1e-5)
    table, old = other.backbone.vit.pos_embed, model.backbone.vit.pos_embed
    assert table.equal(resample_abs_pos_embed(old, [8, 8])) and table[:, 0].equal(old[:, 0])
    assert logits(other, 64).isfinite().all()


def test_another_input_size_is_refused_where_a_run_goes_on(tmp_path):
    save_released(tmp_path / "m.pt", make_model(0))
    with pytest.raises(CheckpointError, match=r"vit.pos_embed \(1, 5, 32\) instead of \(1, 17, 32\)"):
        load_weights(make_model(1, input_size=64), tmp_path / "m.pt", new_size=False)


@pytest.mark.parametrize("form", ["released", "ours"])
def test_a_position_table_without_a_class_position_is_resampled_whole(tmp_path, form):
    arch = {"arch": "timm/vit_base_patch16_224", "patch_size": 8, "no_embed_class": True}
    arch |= {"pre_norm": True, "norm_layer": "layernorm"}
    model, other = make_model(0, **arch), make_model(1, input_size=64, **arch)
    save_as(form, model, tmp_path / "m.pt")
    load_weights(other, tmp_path / "m.pt")
    old, table = model.backbone.vit.pos_embed, other.backbone.vit.pos_embed
    assert old.shape[1] == 16 and table.equal(resample_abs_pos_embed(old, [8, 8], num_prefix_tokens=0))


def test_a_named_tower_is_proven_at_another_input_size_too(tmp_path):
    torch.save(published_form(make_model().backbone), tmp_path / "clip.pt")
    named = {"init": True, "weights": str(tmp_path / "clip.pt")}
    save_as("ours", make_model(0, **named), tmp_path / "m.pt")
    load_weights(make_model(1, input_size=64, **named), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m.pt: was trained beside another frozen tower \(clip.pt"):
        load_weights(make_model(1, input_size=64), tmp_path / "m.pt")


# The programs


def test_the_programs_take_a_released_checkpoint_as_they_take_ours(config, tmp_path):
    train_run(config, tmp_path / "run", "solver.epochs=1")
    ours, released = tmp_path / "run" / "last_model.pt", tmp_path / "released.pt"
    model = build_model(read_config(config))
    load_weights(model, ours)
    save_released(released, model, epoch=1)
    # network.init would need a weight file if the checkpoint did not hold the tower
    scores = [score_run(config, path, tmp_path / "s.npz", "network.init=True")["scores"] for path in (ours, released)]
    assert np.array_equal(*scores)

    short = ["solver.epochs=1", "logging.skip_epoch=[0]"]
    tuned = train_run(config, tmp_path / "tuned", f"pretrain={released}", "network.init=True", *short)
    loaded = f"weights: {released} (released, epoch 1) loaded; it holds the frozen tower"
    assert loaded in (tmp_path / "tuned" / "train.log").read_text()
    assert tuned["tower_file"] is None and tuned["tower_sha256"] == torch.load(ours, weights_only=True)["tower_sha256"]
    with pytest.raises(UserError, match="released.pt: a released checkpoint can only be started from, by pretrain"):
        train_run(config, tmp_path / "resumed", f"resume={released}")

    more = len(CLASSES) + 1
    other_classes = [f"data.num_classes={more}", "data.label_list=None"]
    own = train_run(config, tmp_path / "own", f"pretrain={released}", *short, *other_classes)
    assert own["trained"]["head.weight"].shape == (more, 64)
    assert f"head: made anew for {more} classes" in (tmp_path / "own" / "train.log").read_text()
    refusal = f"its head has {more - 1} classes, data.num_classes is {more}"
    with pytest.raises(UserError, match=refusal):
        score_run(config, released, tmp_path / "s.npz", *other_classes)
    with pytest.raises(UserError, match=refusal):  # an evaluation cannot train a new head
        train_run(config, tmp_path / "eval", f"pretrain={released}", "solver.evaluate=True", *other_classes)
    with pytest.raises(UserError, match=refusal):
        train_run(config, tmp_path / "more", f"resume={ours}", *other_classes)
