import math
from contextlib import contextmanager

import pytest
import torch
from tiny import pixel_batch, tiny_config, train_steps

from datasets.batch_augment import BatchAugment
from engine import loops
from engine.optim import lr_factor
from engine.reporter import LossMonitor, NonFiniteLossError
from modules import build_model
from modules.side4video import Side4Video
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
        before = real(parameters, largest)
        norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train_steps([pixel_batch(1), pixel_batch(2)], 1, clip_grad=1e-3)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_the_learning_rate_is_set_before_every_iteration(monkeypatch):
    """Warm-up over two epochs of three batches: a sixth more with each iteration."""
    rates = []
    monkeypatch.setattr(loops, "lr_factor", lambda epoch, solver: rates.append(epoch) or lr_factor(epoch, solver))
    used, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: (used.append(self.param_groups[0]["lr"]), step(self, *args))[1]
    )
    train_steps([pixel_batch(number) for number in range(3)], 1, type="cosine", lr_warmup_step=2)
    assert rates == pytest.approx([0, 1 / 3, 2 / 3])
    assert used == pytest.approx([0, 0.01 / 6, 0.02 / 6])


@pytest.mark.parametrize("rank", [0, 3])
def test_batch_augmentation_draws_by_seed_epoch_iteration_and_process(monkeypatch, rank):
    keys = []

    class Recorder(BatchAugment):
        def __call__(self, clips, labels, *key):
            keys.append(key)
            return super().__call__(clips, labels, *key)

    monkeypatch.setattr(loops, "BatchAugment", Recorder)
    monkeypatch.setattr(loops, "get_rank", lambda: rank)
    train_steps([pixel_batch(1)] * 3, 1)
    assert keys == [(0, 0, iteration, rank) for iteration in range(3)]


def test_gradients_are_clipped_at_their_true_size_in_fp16(monkeypatch):
    """fp16 scales the loss, so the norm that is clipped must be taken after the scale is removed."""
    norms = {"fp32": [], "fp16": []}
    for precision, seen in norms.items():
        clip = torch.nn.utils.clip_grad_norm_
        monkeypatch.setattr(
            torch.nn.utils,
            "clip_grad_norm_",
            lambda p, most, seen=seen, clip=clip: seen.append((norm := clip(p, most)).item()) or norm,
        )
        train_steps([pixel_batch(1)], 1, clip_grad=1e3, precision=precision)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.05) and norms["fp32"][0] > 0


def test_processes_exchange_gradients_in_the_last_batch_of_an_update_only(monkeypatch):
    events, forward = [], Side4Video.forward

    @contextmanager
    def no_sync(self):
        events.append("alone")
        yield
        events.append("end")

    monkeypatch.setattr(Side4Video, "no_sync", no_sync)
    monkeypatch.setattr(Side4Video, "forward", lambda self, clips: (events.append("forward"), forward(self, clips))[1])
    train_steps([pixel_batch(number) for number in range(4)], 2)
    assert events == ["alone", "forward", "end", "forward"] * 2


def test_the_monitor_reports_the_mean_since_the_last_report_and_the_first_bad_step():
    monitor = LossMonitor(CPU)
    for step, loss in enumerate([1.0, 2.0, 6.0]):
        monitor.update(torch.tensor(loss), step)
    assert monitor.report(3) == 3.0
    monitor.update(torch.tensor(5.0), 3)
    assert monitor.report(3) == 5.0
    for step, loss in enumerate([1.0, math.inf, 2.0, math.nan], 4):
        monitor.update(torch.tensor(loss), step)
    with pytest.raises(NonFiniteLossError, match="epoch 3, iteration 5"):
        monitor.report(3)


def test_amp_is_float32_on_a_cpu_and_only_fp16_scales():
    assert resolve_precision("amp", CPU).dtype == torch.float32
    assert resolve_precision("bf16", CPU).dtype == torch.bfloat16
    scaling = {name: resolve_precision(name, CPU).grad_scaler().is_enabled() for name in ("fp32", "bf16", "fp16")}
    assert scaling == {"fp32": False, "bf16": False, "fp16": True}
