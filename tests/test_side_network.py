import pytest
import torch
from textbook import textbook_name, textbook_of
from tiny import SIDE, B, make_inputs, make_side, relative

from modules.autograd import ThreeTaps, cast_together, normalized
from modules.side_network import SideNetwork, shift_class_token
from modules.token_norm import TokenLayerNorm

# (end of a name, third of the tensor or None for all of it) of tensors whose true gradient is zero.
KEYS = ("attn.qkv.bias", 1)  # in both modes: it adds the same number to all attention scores of a query
ZERO_IN_TRAINING = {  # a norm over the batch subtracts the constant that these add to a channel
    # before stem_bn; after the last attention, where only bn_2 and post_bn follow
    "pre": [("stem.bias", None), ("LAST.mlp.fc2.bias", None), ("LAST.attn.proj.bias", None), ("LAST.attn.qkv.bias", 2)],
    # before stem_bn, bn_1 or bn_2
    "post": [(name, None) for name in ("stem.bias", "conv.1.bias", "conv.2.bias", "mlp.fc2.bias")],
}


def zero_part(name, grad, placement, side):
    """True where the true gradient of tensor `name` is zero."""
    mask = torch.zeros_like(grad, dtype=torch.bool)
    for suffix, third in [KEYS, *(ZERO_IN_TRAINING[placement] if side.training else [])]:
        if name.endswith(suffix.replace("LAST", f"blocks.{len(side.blocks) - 1}")):
            (mask if third is None else mask.chunk(3)[third]).fill_(True)
    return mask


def assert_gradients_equal(side, textbook, placement, tolerance):
    """Compare with each tensor's largest gradient, or with the largest of all tensors where the true one is zero."""
    theirs = dict(textbook.named_parameters())
    scale = max(p.grad.abs().max() for p in theirs.values())
    for name, parameter in side.named_parameters():
        grad, reference = parameter.grad, theirs[textbook_name(name)].grad.view_as(parameter.grad)
        zero = zero_part(name, grad, placement, side)
        assert (grad[zero].abs() < tolerance * scale).all() and (reference[zero].abs() < tolerance * scale).all(), name
        if not zero.all():
            assert relative(grad[~zero], reference[~zero]) < tolerance, name


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_fast_equals_textbook_in_float64(placement, recompute):
    side = make_side(placement, **SIDE, recompute=recompute)
    textbook = textbook_of(side, **SIDE, norm_placement=placement)
    clips, tokens = make_inputs(torch.float64, SIDE, (8, 12))
    weight = torch.randn(B, SIDE["side_width"], dtype=torch.float64)

    for mode in (True, False):
        out, expected = side.train(mode)(clips, iter(tokens)), textbook.train(mode)(clips, tokens)
        assert relative(out, expected) < 1e-9
        side.zero_grad(), textbook.zero_grad()
        (out * weight).sum().backward(), (expected * weight).sum().backward()
        assert_gradients_equal(side, textbook, placement, 1e-9)
        buffers = dict(textbook.named_buffers())
        for name, buffer in side.named_buffers():
            assert relative(buffer.double(), buffers[textbook_name(name)].double()) < 1e-9, name


def test_fast_equals_textbook_in_float32_at_the_size_of_vit_b_32():
    sizes = dict(backbone_width=768, side_width=320, num_layers=12, patch_size=32, num_patches=49)
    side = make_side("pre", torch.float32, **sizes).train()
    textbook = textbook_of(side, **sizes, norm_placement="pre")
    clips, tokens = make_inputs(torch.float32, sizes, (224, 224), batch=2, frames=8)
    out, expected = side(clips, tokens), textbook(clips, tokens)
    assert relative(out, expected) < 1e-4
    weight = torch.randn_like(out)
    (out * weight).sum().backward(), (expected * weight).sum().backward()
    assert_gradients_equal(side, textbook, "pre", 2e-3)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_frame_changes_only_frames_within_reach(placement):
    """The stem, the temporal convolution and the token shift each reach one frame in both directions."""
    sizes = {**SIDE, "num_layers": 1}
    side = make_side(placement, **sizes).eval()
    clips, tokens = make_inputs(torch.float64, sizes, (8, 12), batch=1, frames=9)
    captured = []
    side.blocks[-1].register_forward_hook(lambda module, inputs, output: captured.append(output))
    side(clips, tokens)
    changed_clips, changed_tokens = clips.clone(), [t.clone() for t in tokens]
    changed_clips[:, 4] += 1
    side(changed_clips, tokens)
    changed_tokens[0][:, 4] += 1 + torch.randn(sizes["backbone_width"], dtype=torch.float64)
    side(clips, changed_tokens)
    plain, pixels, features = captured
    frames_differ = [
        (plain != other).flatten(2).any(-1)[0].nonzero().flatten().tolist() for other in (pixels, features)
    ]
    assert frames_differ == [[2, 3, 4, 5, 6], [3, 4, 5]]


@pytest.mark.parametrize("batch, frames", [(1, 1), (1, 3), (3, 1), (2, 2), (3, 4)])
def test_gradients_of_the_three_taps_are_those_of_a_depthwise_convolution(batch, frames):
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(8, 8, 3, padding=1, groups=8).double()
    x = torch.randn(batch, frames, 5, 8, dtype=torch.float64, requires_grad=True)
    expected = conv(x.permute(0, 2, 3, 1).flatten(0, 1)).unflatten(0, (batch, 5)).permute(0, 3, 1, 2)
    out = ThreeTaps.apply(x, conv.weight[:, 0], conv.bias)
    assert torch.allclose(out, expected, atol=1e-12)
    grad = torch.randn_like(out)
    inputs = [x, conv.weight, conv.bias]
    theirs, ours = (torch.autograd.grad(y, inputs, grad, retain_graph=True) for y in (expected, out))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_class_token_shift_by_hand():
    c = torch.arange(1.0, 13.0).view(1, 3, 4)
    expected = [[[5, 6, 0, 0], [9, 10, 3, 4], [0, 0, 7, 8]]]
    assert shift_class_token(c).tolist() == expected


def test_a_clip_of_one_frame_gives_the_textbooks_features():
    side = make_side("pre", **SIDE)
    clips, tokens = make_inputs(torch.float64, SIDE, (8, 12), frames=1)
    assert relative(side(clips, tokens), textbook_of(side, **SIDE)(clips, tokens)) < 1e-9


@pytest.mark.parametrize("width", [0, 63, 96])
def test_a_side_width_that_is_no_multiple_of_64_is_refused(width):
    with pytest.raises(ValueError, match="multiple of 64"):
        SideNetwork(**{**SIDE, "side_width": width})


def test_bfloat16_autocast_trains_every_tensor_in_float32():
    side = make_side("pre", torch.float32, **SIDE)
    clips, tokens = make_inputs(torch.float32, SIDE, (8, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = side(clips, tokens)
    exact = side.float()(clips, tokens)
    assert relative(out.float(), exact) < 0.1
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in side.parameters())


@pytest.mark.parametrize("folded", [True, False])
def test_a_layer_norm_in_bfloat16_has_gradients_of_scale_and_shift_below_a_percent_off(folded):
    """PyTorch's own on a CPU adds them up in bfloat16: 3 to 19 percent off over as many rows."""
    torch.manual_seed(0)
    norm, linear = TokenLayerNorm(64), torch.nn.Linear(64, 64)
    x, grad = torch.randn(8000, 64).bfloat16(), torch.randn(8000, 64).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    found = {}
    for half in (True, False):
        norm.double(), linear.double()
        if half:
            norm.float(), linear.float()
        rows = x if half else x.double()
        norm.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            affine = cast_together(norm.folded_into(linear), rows.dtype)
            out = torch.nn.functional.linear(normalized(rows, norm.eps), *affine) if folded else norm(rows)
        out.backward(grad.to(out.dtype))
        found[half] = norm.weight.grad.double(), norm.bias.grad.double()
    for ours, exact in zip(found[True], found[False], strict=True):
        assert (ours - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_residual_stream_has_the_type_of_autocast(placement):
    side = make_side(placement, torch.float32, **SIDE)
    clips, tokens = make_inputs(torch.float32, SIDE, (8, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layers = [projection(t) for projection, t in zip(side.projections, tokens, strict=True)]
        block_inputs = []
        side.blocks[-1].register_forward_pre_hook(lambda module, inputs: block_inputs.append(inputs[0]))
        side(clips, tokens)
    assert {t.dtype for t in (*layers, *block_inputs)} == {torch.bfloat16}


# ---- initialisation, protocol section 2: standard deviation of each tensor ----
S = 320


def uniform_std(fan_in):
    return (fan_in**-0.5) / 3**0.5  # PyTorch's default for Linear and Conv: uniform within 1 / sqrt(fan_in)


PRE_RULES = {
    "pos": 0.01,
    "stem.weight": uniform_std(3 * 3 * 8 * 8),
    "stem.bias": uniform_std(3 * 3 * 8 * 8),
    "linear.weight": uniform_std(256),
    "linear.bias": uniform_std(256),
    "conv.0.weight": uniform_std(S),
    "conv.0.bias": uniform_std(S),
    "conv.1.weight": uniform_std(3),
    "conv.1.bias": uniform_std(3),
    "conv.2.weight": uniform_std(S),
    "conv.2.bias": uniform_std(S),
    "attn.qkv.weight": S**-0.5,
    "attn.qkv.bias": 0.0,
    "attn.proj.weight": S**-0.5 * 24**-0.5,
    "attn.proj.bias": 0.0,
    "mlp.fc1.weight": (2 * S) ** -0.5,
    "mlp.fc1.bias": uniform_std(S),
    "mlp.fc2.weight": S**-0.5 * 24**-0.5,
    "mlp.fc2.bias": uniform_std(4 * S),
}
POST_RULES = PRE_RULES | {
    "pos": 0.02,
    "attn.qkv.weight": uniform_std(S),
    "attn.qkv.bias": uniform_std(S),
    "attn.proj.weight": uniform_std(S),
    "attn.proj.bias": uniform_std(S),
    "mlp.fc1.weight": uniform_std(S),
    "mlp.fc2.weight": uniform_std(4 * S),
}


@pytest.mark.parametrize("placement, rules", [("pre", PRE_RULES), ("post", POST_RULES)])
def test_initial_spread_of_every_tensor(placement, rules):
    torch.manual_seed(0)
    side = SideNetwork(256, S, num_layers=3, patch_size=8, num_patches=64, norm_placement=placement)
    seen = set()
    for name, parameter in side.named_parameters():
        rule = next((r for r in rules if name.endswith(r)), None)
        if rule is None:  # a norm
            assert "norm" in name or "bn" in name or "ln" in name, name
            assert parameter.unique().tolist() == [1.0 if name.endswith("weight") else 0.0], name
            continue
        seen.add(rule)
        expected, n = rules[rule], parameter.numel()
        assert parameter.std().item() == pytest.approx(expected, rel=5 * (2 * n) ** -0.5, abs=1e-12), name
        assert abs(parameter.mean().item()) <= 5 * expected / n**0.5, name
    assert seen == set(rules)


@pytest.mark.parametrize("batch, frames", [(1, 2), (2, 3)])
def test_clips_are_independent_in_eval_mode(batch, frames):
    side = make_side("pre", **SIDE).eval()
    clips, tokens = make_inputs(torch.float64, SIDE, (8, 12), batch=batch, frames=frames)
    together = side(clips, tokens)
    alone = torch.cat([side(clips[i : i + 1], [t[i : i + 1] for t in tokens]) for i in range(batch)])
    assert relative(together, alone) < 1e-12
