import math

import pytest
import torch
from tiny import TOWER, tiny_config

from engine.configuration import default_config
from engine.optim import build_optimizer, lr_factor, set_learning_rate
from modules import build_model


def solver(**changes):
    return default_config(solver={"epochs": 12, "lr_warmup_step": 4, **changes}).solver


@pytest.mark.parametrize(
    "epoch, factor",
    [
        (0, 0.0),
        (0.5, 0.125),
        (2, 0.5),
        (3.75, 0.9375),
        (4, 1.0),
        (6, (1 + math.cos(math.pi / 4)) / 2),
        (8, 0.5),
        (12, 0.0),
    ],
)
def test_cosine_after_warm_up(epoch, factor):
    assert lr_factor(epoch, solver()) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    "epoch, steps, factor",
    [
        (1, [6, 9], 0.25),
        (5.99, [6, 9], 1.0),
        (6, [6, 9], 0.1),
        (7, [9, 6], 0.1),  # in any order
        (9.5, [9, 6], 0.01),
        (4.99, 5, 1.0),
        (5, 5, 0.1),
        (11, 5, 0.01),
    ],
)
def test_multistep_at_listed_epochs_or_every_so_many(epoch, steps, factor):
    assert lr_factor(epoch, solver(type="multistep", lr_decay_step=steps)) == pytest.approx(factor)


def test_no_warm_up_starts_at_the_peak():
    assert lr_factor(0, solver(lr_warmup_step=0)) == 1.0


def test_warm_up_as_long_as_the_training_never_divides_by_zero():
    assert lr_factor(11.99, solver(lr_warmup_step=12)) == pytest.approx(11.99 / 12)


@pytest.mark.parametrize("accumulation, sync_bn, norm_lr", [(1, False, 1e-2), (4, False, 2.5e-3), (4, True, 1e-2)])
def test_three_groups_hold_every_trained_tensor_once(accumulation, sync_bn, norm_lr):
    solver = {"sync_bn": sync_bn, "lr": 1e-2, "clip_ratio": 0.5, "betas": [0.9, 0.99], "weight_decay": 0.15}
    solver |= {"grad_accumulation_steps": accumulation}
    config = default_config(network={"arch": "ViT-B/16", "backbone_kwargs": TOWER}, solver=solver)
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "head": 1e-2,
        "side": 5e-3,
        "side_batch_norm": norm_lr,
    }
    assert all((g["weight_decay"], g["eps"], g["betas"]) == (0.15, 1e-8, (0.9, 0.99)) for g in groups.values())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.trained.parameters())
    norms = {id(p) for n, p in model.trained.side.named_parameters() if "bn" in n}
    assert {id(p) for p in groups["side_batch_norm"]["params"]} == norms and len(norms) == 2 * (2 + 2 * 3)
    set_learning_rate(optimizer, 0.1)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-3, 5e-4, norm_lr / 10])


def test_layer_norms_are_not_in_the_batch_norm_group():
    model = build_model(tiny_config())
    layer_norms = {id(p) for m in model.trained.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    optimizer = build_optimizer(model, tiny_config())
    assert not layer_norms & {id(p) for p in optimizer.param_groups[2]["params"]}
