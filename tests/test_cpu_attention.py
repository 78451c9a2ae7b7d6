"""Attention on a CPU in bfloat16, against PyTorch's kernel and the plain form in float64."""

import pytest
import torch
from torch.nn import functional as F

from engine.configuration import default_config
from engine.summary import describe_products
from modules import build_model, cpu_attention
from modules.cpu_attention import RoundsOfHeads, attention
from utils.precision import Precision

SHAPES = [(3, 5, 196, 197), (1, 1, 7, 5), (2, 12, 49, 50)]  # frames, heads, queries, keys


def plain(query, key, value):
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1) @ value


def results(function, inputs, grad, dtype):
    """Output and gradients; the inputs are those that bfloat16 holds."""
    inputs = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.bfloat16().to(dtype))]


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_exact_as_pytorchs_kernel(shape, scale):
    frames, heads, queries, keys = shape
    torch.manual_seed(0)
    inputs = [scale * torch.randn(frames, heads, queries, 64), scale * torch.randn(frames, heads, keys, 64)]
    inputs.append(torch.randn(frames, heads, keys, 64) + 1)
    grad = torch.randn(frames, heads, queries, 64)
    exact = results(plain, inputs, grad, torch.float64)
    ours = results(RoundsOfHeads.apply, inputs, grad, torch.bfloat16)
    kernel = results(F.scaled_dot_product_attention, inputs, grad, torch.bfloat16)
    for found, theirs, right in zip(ours, kernel, exact, strict=True):
        assert found.dtype == torch.bfloat16 and found.shape == right.shape
        assert error(found, right) < max(1.4 * error(theirs, right), 2**-8)


def test_rounds_of_any_size_give_the_same(monkeypatch):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 16, 64) for _ in range(3)]
    grad, found = torch.randn(2, 5, 16, 64), []
    for scores in (1, 3 * 16 * 16, 100 * 16 * 16):
        monkeypatch.setattr(cpu_attention, "ROUND", scores)
        found.append(results(RoundsOfHeads.apply, inputs, grad, torch.bfloat16))
    for other in found[1:]:
        assert all(
            torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-3) for a, b in zip(other, found[0], strict=True)
        )


@pytest.mark.parametrize(
    ("units", "dtype", "rounds"), [(True, "bfloat16", 1), (False, "bfloat16", 0), (True, "float32", 0)]
)
def test_it_runs_where_the_cpu_has_units_for_it(monkeypatch, units, dtype, rounds):
    calls = []
    monkeypatch.setattr(cpu_attention, "_has_units", lambda: units)
    monkeypatch.setattr(RoundsOfHeads, "apply", lambda *inputs: calls.append(inputs))
    attention(*[torch.randn(1, 1, 4, 64, dtype=getattr(torch, dtype)) for _ in range(3)])
    assert len(calls) == rounds


@pytest.mark.parametrize("units", [True, False])
def test_the_log_names_the_kernel(monkeypatch, units):
    monkeypatch.setattr(cpu_attention, "_has_units", lambda: units)
    model, precision = build_model(default_config()), Precision("bf16", torch.device("cpu"))
    assert describe_products(model, precision, False).endswith("side network batched products") == units
    assert not describe_products(model, precision, True).endswith("side network batched products")
