import math

import pytest
import torch
from tiny import pixel_batch, tiny_config, train_steps

from engine.loops import LossMonitor, NonFiniteLossError
from modules import build_model
from modules.token_norm import TokenBatchNorm
from utils.precision import resolve_precision

CPU = torch.device("cpu")


def test_the_same_batch_twice_accumulated_is_the_batch_once():
    """Means over accumulated batches, and no gradient of theirs outlives the update."""
    # BatchNorm's own parameters have half the rate then, so a second update would start from other weights.
    once, twice = train_steps([pixel_batch(1)], 1)[0], train_steps([pixel_batch(1), pixel_batch(1)], 2)[0]
    others = dict(twice.trained.named_parameters())
    norms = {name for name, m in once.trained.named_modules() if isinstance(m, TokenBatchNorm)}
    for name, parameter in once.trained.named_parameters():
        if name.rpartition(".")[0] not in norms:
            torch.testing.assert_close(parameter, others[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None for p in twice.parameters())


def test_the_loss_is_cross_entropy_with_label_smoothing():
    model, loss = train_steps([pixel_batch(1)], 1)
    torch.manual_seed(0)
    fresh = build_model(tiny_config()).train()
    clips = pixel_batch(1)["clips"].float() / 255
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    log_probabilities = fresh((clips - mean) / std).log_softmax(-1)
    targets = torch.full((4, 5), 0.1 / 5)
    targets[torch.arange(4), pixel_batch(1)["labels"]] += 0.9
    assert loss == pytest.approx(-(targets * log_probabilities).sum(-1).mean().item(), rel=1e-4)


def test_clip_grad_bounds_the_step(monkeypatch):
    norms = []
    real = torch.nn.utils.clip_grad_norm_

    def spy(parameters, largest):
        parameters = list(parameters)
        real(parameters, largest)
        norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train_steps([pixel_batch(1), pixel_batch(2)], 1, clip_grad=1e-3)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_the_monitor_reports_the_mean_since_the_last_report_and_the_first_bad_step():
    monitor = LossMonitor(3, CPU)
    for step, loss in enumerate([1.0, 2.0, 6.0]):
        monitor.update(torch.tensor(loss), step)
    assert monitor.report() == 3.0
    monitor.update(torch.tensor(5.0), 3)
    assert monitor.report() == 5.0
    for step, loss in enumerate([1.0, math.inf, 2.0, math.nan], 4):
        monitor.update(torch.tensor(loss), step)
    with pytest.raises(NonFiniteLossError, match="epoch 3, iteration 5"):
        monitor.report()


def test_amp_is_float32_on_a_cpu_and_only_fp16_scales():
    assert resolve_precision("amp", CPU).dtype == torch.float32
    assert resolve_precision("bf16", CPU).dtype == torch.bfloat16
    scaling = {name: resolve_precision(name, CPU).grad_scaler().is_enabled() for name in ("fp32", "bf16", "fp16")}
    assert scaling == {"fp32": False, "bf16": False, "fp16": True}
