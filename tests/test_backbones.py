"""OpenAI's towers: their tokens, the weight files that fill them, and what is refused."""

import pytest
import timm
import torch
from timm.layers import Mlp, QuickGELU
from tiny import TOWER, published_form, relative, tiny_config, tiny_tower

from engine.configuration import default_config
from modules import build_model
from modules.backbones import ARCHITECTURES, FrozenTower, QuickGELUMlp, find_architecture
from modules.hashing import hash_tensors
from modules.pretrained import load_tower_weights
from modules.token_norm import TokenBatchNorm
from utils.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_named_architecture_is_a_timm_model_with_a_published_file(arch):
    architecture = find_architecture(arch)
    assert timm.is_model(architecture.timm_name)
    assert architecture.weight_file.startswith(arch[:3]) and architecture.publisher
    assert architecture.side_variant == ("post" if arch.startswith("EVA") else "pre")


@pytest.mark.parametrize(
    "arch, nearest", [("ViT-B16", "ViT-B/16"), ("timm/vit_tiny_patch16_22", "timm/vit_tiny_patch16_224")]
)
def test_an_unknown_architecture_names_the_nearest(arch, nearest):
    with pytest.raises(ConfigError, match=f"network.arch: .*'{arch}'.*nearest is '{nearest}'"):
        find_architecture(arch)


@pytest.mark.parametrize("arch", ["ViT-B/16", "timm/vit_tiny_patch16_224", "timm/deit3_small_patch16_224"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_tokens_equal_timms_own_up_to_the_rounding_of_quick_gelu(arch, dtype, tolerance):
    """Without QuickGELU to the bit."""
    tower = tiny_tower(arch)
    tower.convert(dtype)
    timms = timm.create_model(find_architecture(arch).timm_name, num_classes=0, img_size=32, **TOWER)
    timms = timms.eval().to(dtype)
    timms.load_state_dict(tower.vit.state_dict(), strict=False)
    clips = torch.randn(2, 3, 3, 32, 32, dtype=dtype)
    with torch.no_grad():
        expected = timms.forward_intermediates(
            clips.flatten(0, 1), output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
    tokens = list(tower.layer_tokens(clips))
    assert len(tokens) == len(expected) == TOWER["depth"]
    for ours, (patches, class_token) in zip(tokens, expected, strict=True):
        theirs = torch.cat([class_token, patches], dim=1)
        assert ours.shape == (2, 3, 5, 32) and not ours.requires_grad
        assert relative(ours.flatten(0, 1), theirs) < tolerance
        assert arch == "ViT-B/16" or ours.flatten(0, 1).equal(theirs)


def test_the_quick_gelu_of_a_tower_is_that_of_timm():
    torch.manual_seed(0)
    plain = Mlp(16, 64, act_layer=QuickGELU).double()
    x = 3 * torch.randn(2, 5, 16, dtype=torch.float64)
    assert relative(QuickGELUMlp(plain.fc1, plain.fc2)(x), plain(x)) < 1e-14
    assert not any(QuickGELUMlp.can_replace(mlp) for mlp in (Mlp(16), Mlp(16, act_layer=QuickGELU, bias=False)))


def test_tokens_are_given_one_block_at_a_time():
    tower = tiny_tower()
    ran = []
    for number, block in enumerate(tower.vit.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    next(tokens := tower.layer_tokens(torch.randn(1, 1, 3, 32, 32)))
    assert ran == [0]
    next(tokens)
    assert ran == [0, 1]


def test_the_tower_stays_bit_equal_and_in_eval_mode_after_steps():
    torch.manual_seed(0)
    model = build_model(tiny_config(proj_drop_rate=0.5))  # outside eval mode, dropout changes tokens
    before = hash_tensors(model.backbone.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    clips = torch.randn(2, 4, 3, 32, 32)
    tokens = list(model.backbone.layer_tokens(clips))
    for _ in range(3):
        model.train()
        model(clips).square().sum().backward()
        optimizer.step()
    assert not any(module.training for module in model.backbone.modules())
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert hash_tensors(model.backbone.state_dict()) == before
    assert all(a.equal(b) for a, b in zip(tokens, model.backbone.layer_tokens(clips), strict=True))
    assert all(p.grad is not None for p in model.trained.parameters())


@pytest.mark.parametrize("recompute, sync_bn", [(True, False), (False, True)])
def test_the_side_network_gets_its_choices_from_the_configuration(recompute, sync_bn):
    side = build_model(default_config(solver={"recompute": recompute, "sync_bn": sync_bn})).trained.side
    assert side.recompute == recompute
    assert {m.synced for m in side.modules() if isinstance(m, TokenBatchNorm)} == {sync_bn}


def test_parameter_counts_of_the_paper():
    def millions(arch):
        network = {"arch": arch, "side_dim": 320, "backbone_kwargs": {}}
        model = build_model(default_config(data={"input_size": 224, "num_classes": 174}, network=network))
        return [round(sum(p.numel() for p in m.parameters()) / 1e6, 2) for m in (model.trained, model.backbone)]

    assert millions("ViT-B/16") == [21.11, 85.80]
    assert millions("ViT-B/32")[0] == 23.28


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_published_weights_fill_the_tower(tmp_path, dtype, caplog):
    source, target = tiny_tower(), tiny_tower(drop_rate=0.0)
    torch.nn.init.normal_(target.vit.cls_token)
    torch.save(published_form(source, dtype), tmp_path / "clip.pt")
    caplog.set_level("INFO")
    load_tower_weights(target, find_architecture("ViT-B/16"), "ViT-B/16", str(tmp_path / "clip.pt"))
    for name, tensor in target.vit.state_dict().items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(source.vit.state_dict()[name].to(dtype).float()), name
    loaded, warning = caplog.messages  # the second, because this is not OpenAI's file
    assert "clip.pt, activation QuickGELU" in loaded and "not the file that OpenAI published" in warning
    assert target.weight_file == "clip.pt"


@pytest.mark.parametrize("side_layers, kept, of_blocks", [("all", 3, 0), ([0], 1, 24)])
def test_the_log_counts_the_tensors_that_are_not_needed(tmp_path, caplog, side_layers, kept, of_blocks):
    torch.save(published_form(tiny_tower()), tmp_path / "clip.pt")
    network = {"arch": "ViT-B/16", "init": True, "weights": str(tmp_path / "clip.pt"), "side_layers": side_layers}
    caplog.set_level("INFO")
    build_model(default_config(network={**network, "backbone_kwargs": TOWER}))
    assert caplog.messages[0] == (
        f"tower: {5 + 12 * kept} tensors from {tmp_path / 'clip.pt'}, activation QuickGELU; not needed: {of_blocks} of "
        "blocks after the last one read, 6 others (final norm, projection, text)"
    )


def test_timm_names_and_nesting_are_read_too(tmp_path):
    source, target = tiny_tower(), tiny_tower()
    torch.nn.init.normal_(source.vit.cls_token)
    torch.save({"state_dict": source.vit.state_dict()}, tmp_path / "tower.pt")
    load_tower_weights(target, find_architecture("ViT-B/16"), "ViT-B/16", str(tmp_path / "tower.pt"))
    assert hash_tensors(source.state_dict()) == hash_tensors(target.state_dict())


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s: s.pop("visual.transformer.resblocks.1.ln_1.weight"), "1 missing: blocks.1.norm1.weight"),
        (lambda s: s.update({"visual.extra": torch.ones(1)}), "1 unknown: extra"),
        (
            lambda s: s.update({"visual.ln_pre.bias": torch.ones(7)}),
            r"norm_pre.bias \(7,\) instead of \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, change, complaint):
    state = published_form(tiny_tower())
    change(state)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=f"clip.pt.*{complaint}") as caught:
        build_model(tiny_config(init=True, weights=str(tmp_path / "clip.pt")))
    assert "\n" not in str(caught.value)


def test_an_absent_weight_file_names_file_publisher_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = r"clip_pretrain/ViT-B-16.pt.*OpenAI.*clip_pretrain/.*tools/download_weights.py ViT-B/16.*network.weights"
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_config(init=True))


def test_a_timm_architecture_needs_named_weights_or_none():
    with pytest.raises(ConfigError, match="network.init: timm/vit_tiny_patch16_224.*network.weights.*init: False"):
        build_model(tiny_config("timm/vit_tiny_patch16_224", init=True))


def test_a_file_that_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "clip.pt"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="clip.pt: "):
        build_model(tiny_config(init=True, weights=str(path)))
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="clip.pt: holds no dictionary of tensors"):
        build_model(tiny_config(init=True, weights=str(path)))


@pytest.mark.parametrize(
    "arch, kwargs, message",
    [
        ("timm/resnet18", {}, "network.arch: .*resnet18"),
        ("ViT-B/16", {"no_such": 1}, "network.backbone_kwargs.no_such: no argument"),
        ("ViT-B/16", {"img_size": 64}, "backbone_kwargs.img_size: leave it out"),
        ("ViT-B/16", {"patch_size": 5}, "data.input_size: 32 is no multiple of the patch size 5"),
    ],
)
def test_towers_that_cannot_work_are_refused(arch, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        FrozenTower(find_architecture(arch).timm_name, 32, kwargs)


@pytest.mark.parametrize(
    "arch, given, size",
    [
        ("ViT-B/16", None, 224),
        ("ViT-L/14-336px", None, 336),
        ("timm/vit_base_patch16_siglip_256", None, 256),
        ("ViT-L/14-336px", 224, 224),
    ],
)
def test_the_input_size_is_the_towers_unless_given(arch, given, size):
    config = default_config(data={"input_size": given}, network={"arch": arch})
    assert config.data.input_size == size
