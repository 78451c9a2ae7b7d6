"""The plan of a run: what a dry run counts against what a real step takes, and what fits."""

import copy
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, TOWER, make_inputs, make_side
from torch.nn import functional as F

from benchmarks.many_runs import counted_runs
from benchmarks.plan_check import peak_of, scoring, training
from engine import loops
from engine.configuration import default_config
from engine.dry_run import MemoryCount, dry_run, runs_without_gpu, walked_backward
from engine.loops import train_one_epoch
from engine.memory import PeakReport, advise_batch, advise_views, settle_recompute
from engine.plan import (
    CARDS,
    Work,
    blank_batch,
    choose_batch,
    choose_recompute,
    largest_fitting,
    make_plan,
    planned_test_peak,
    planned_training_peak,
    rehearsing,
    share_batch,
    usable,
    with_values,
)
from modules import build_model
from tools import plan as plan_program
from utils.errors import ConfigError

on_a_planned_gpu = pytest.mark.skipif(not runs_without_gpu(), reason="this PyTorch plans for a GPU only where one is")
CONFIGS = sorted(path for path in Path("configs").rglob("*.yaml") if path.name != "base.yaml")
TOWERS = {"pre": "ViT-B/16", "post": "EVA02-CLIP-L-14"}


def small_config(variant="pre", **solver):
    network = {"arch": TOWERS[variant], "backbone_kwargs": {**TOWER, "patch_size": 8, "depth": 2}, "init": False}
    data = {"num_segments": 4, "input_size": 64, "batch_size": 4, "num_classes": 11}
    return default_config(data=data, network=network, solver=solver, test={"view_batch": 6})


# ---------------------------------------------------------------- the walk of the graph


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_walked_backward_pass_has_the_gradients_of_autograd(placement, recompute):
    sizes = dict(backbone_width=24, side_width=64, num_layers=3, patch_size=4, num_patches=6)
    side = make_side(placement, torch.float32, **sizes, recompute=recompute)
    other = copy.deepcopy(side)
    clips, tokens = make_inputs(torch.float32, sizes, (8, 12))
    side(clips, tokens).square().sum().backward()
    with walked_backward():
        loss = other(clips, tokens).square().sum()
        loss.backward()
    for (name, ours), theirs in zip(other.named_parameters(), side.parameters(), strict=True):
        assert ours.grad.allclose(theirs.grad, rtol=1e-5, atol=1e-6), name


def test_the_walk_frees_what_a_node_saved_when_it_has_run():
    freed = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, number):
            ctx.save_for_backward(x * 2)
            ctx.number = number
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            freed.append((ctx.number, count.live))
            return grad * ctx.saved_tensors[0] * 0, None

    x = torch.ones(1000, requires_grad=True)
    count = MemoryCount("cpu")
    with walked_backward(), count:
        loss = Watched.apply(Watched.apply(x, 1), 2).sum()
        held = count.live
        loss.backward()
    assert [number for number, _ in freed] == [2, 1]
    assert held == 8004  # what both nodes have saved, and the loss
    assert freed[1][1] < 12000  # when the first one runs, its own tensor and a gradient are there


# ---------------------------------------------------------------- counted against measured


@pytest.mark.parametrize(
    "variant, solver",
    [
        ("pre", {}),
        ("pre", {"recompute": False, "grad_accumulation_steps": 2, "clip_grad": 1.0}),
        ("post", {"precision": "bf16", "mixup": True}),
    ],
)
def test_planned_peaks_are_those_of_the_allocator(variant, solver):
    config = small_config(variant, **solver)
    with rehearsing(config, "cpu") as rehearsal:
        step = rehearsal.train(config.data.batch_size, config.solver.recompute)
        test = rehearsal.test(config.test.view_batch)
    training(config, build_model(config))  # what PyTorch allocates once, at the first call, is no part of a step
    assert step.peak == pytest.approx(peak_of(training, config), rel=0.05)
    assert test == pytest.approx(peak_of(scoring, config), rel=0.05)


def test_a_rehearsal_gives_every_batch_the_same_peak_whatever_ran_before():
    config = small_config()
    with rehearsing(config, "cpu") as rehearsal:
        first = rehearsal.train(2, True)
        rehearsal.train(8, False)
        rehearsal.test(5)
        again = rehearsal.train(2, True)
    assert first.peak == again.peak
    assert first.kept == pytest.approx(again.kept, rel=1e-4)  # the first one makes the constants of normalisation


def test_a_dry_run_leaves_nothing_behind():
    config = small_config()
    with rehearsing(config, "cpu") as rehearsal:
        rehearsal.train(4, True)
    training(config, build_model(config))  # with real tensors, from the same process
    x = torch.ones(2, requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad.tolist() == [2, 2] and type(torch.zeros(1)) is torch.Tensor


# ---------------------------------------------------------------- CUDA's rules without a GPU


@on_a_planned_gpu
def test_a_gpu_that_is_not_there_casts_by_cudas_rules_and_fuses_attention():
    with dry_run("cuda"), torch.autocast("cuda", dtype=torch.bfloat16):
        x = torch.zeros(2, 3, 5, 8, device="cuda")
        assert F.linear(x, x[0, 0]).dtype == torch.bfloat16
        assert F.layer_norm(x.bfloat16(), (8,)).dtype == torch.float32  # the CPU's rules keep bfloat16
        with Work() as work:
            assert F.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16
    assert sum(times for (operations, *_), times in work.steps.items() if operations) == 1


@on_a_planned_gpu
def test_recomputing_keeps_less_and_half_types_keep_half():
    kept = {}
    for precision in ("bf16", "fp32"):
        config = with_values(small_config(), solver__precision=precision)
        with rehearsing(config) as rehearsal:
            for recompute in (True, False):
                kept[precision, recompute] = rehearsal.train(16, recompute).kept
    assert kept["bf16", True] < kept["bf16", False] / 2
    assert kept["bf16", False] < 0.7 * kept["fp32", False]


def test_operators_are_counted_with_their_bytes_and_products():
    with dry_run("cuda"), Work() as work:
        a, b = torch.zeros(4, 8, device="cuda"), torch.zeros(8, 2, device="cuda")
        a @ b
        a.add_(1)
        a.view(8, 4)
    card = CARDS["H100"]
    assert work.steps[2 * 4 * 8 * 2, torch.float32, 4 * (32 + 16 + 8)] == 1
    assert work.steps[0, torch.float32, 4 * (32 + 32)] == 1  # add_ reads and writes
    assert sum(work.steps.values()) == 4  # the two zeros too, and no view
    assert work.seconds(card, tf32=False) > 0


@on_a_planned_gpu
def test_the_largest_tower_needs_less_than_18_gb_at_8_clips_of_8_frames():
    config = plan_program.planned_config("configs/k400/eva_e14.yaml", ["data.batch_size=8"])
    assert config.data.num_segments == 8
    with rehearsing(config) as rehearsal:
        memory = rehearsal.train(8, config.solver.recompute)
    assert 12e9 < memory.peak <= 18e9 and 8.6e9 < memory.tower < 8.8e9


# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize("room, step, expected", [(1000, 1, 97), (1000, 2, 96), (31, 1, 0), (40, 1, 1), (10**9, 1, 64)])
def test_the_largest_batch_is_found_from_few_peaks(room, step, expected):
    tried = []

    def peak(batch):
        tried.append(batch)
        return max(30 + 10 * batch, 60 if batch < 2 else 0) - 20 if batch < 1 else 25 + 10 * batch

    most = 64 if room == 10**9 else 1000
    assert largest_fitting(peak, room, 8, step, most) == expected
    assert len(tried) == len(set(tried)) <= 5


def test_a_batch_stays_if_it_can_and_accumulates_if_it_cannot():
    config = with_values(small_config(), data__batch_size=32)
    assert share_batch(256, 8, 32) == 32 and share_batch(256, 8, 20) == 16 and share_batch(256, 3, 20) is None
    assert choose_batch(config, 8, 256, {True: 100, False: 40}) == (False, 32, 1)
    assert choose_batch(config, 8, 256, {True: 100, False: 31}) == (True, 32, 1)
    assert choose_batch(config, 1, 256, {True: 20, False: 3}) == (True, 16, 16)
    assert choose_batch(config, 8, 256, {True: 0, False: 0}) is None
    alone = with_values(config, data__batch_size=1)
    assert choose_batch(alone, 8, 8, {True: 9, False: 9}) is None  # a BatchNorm over one clip learns nothing
    assert choose_batch(with_values(alone, solver__sync_bn=True), 8, 8, {True: 9, False: 9}) == (False, 1, 1)


@on_a_planned_gpu
def test_sharding_takes_all_but_a_share_and_two_blocks_off():
    config = with_values(small_config(), network__shard_backbone=True)
    with rehearsing(config) as rehearsal:
        memory = rehearsal.train(4, True)
    tower = sum(p.nbytes for p in build_model(config).backbone.parameters()) // 2  # counted in bfloat16
    assert memory.tower in (tower, 2 * tower)
    assert memory.saved_by_sharding(config, 1) == 0
    assert memory.saved_by_sharding(config, 4) == max(0, memory.tower - memory.tower // 4 - 2 * memory.block)
    assert memory.process_peak(config, 1) == memory.peak
    assert memory.process_peak(config, 4) == memory.peak + memory.gradients - memory.saved_by_sharding(config, 4)


@on_a_planned_gpu
def test_a_plan_on_a_gpu_that_is_large_enough_fits_and_its_largest_batch_does_too():
    config = with_values(small_config(), solver__precision="bf16")
    plan = make_plan(config, gpus=2, gpu_memory=2e9, total=16, videos=100)
    assert plan.fits and plan.room == usable(2e9) and plan.updates() == 6
    assert plan.choice == (False, 4, 2)
    assert plan.largest[True] > plan.largest[False] > 4
    with rehearsing(config) as rehearsal:
        for recompute, batch in plan.largest.items():
            assert rehearsal.train(batch, recompute).process_peak(config, 2) <= plan.room
            assert rehearsal.train(batch + 1, recompute).process_peak(config, 2) > plan.room
        assert rehearsal.test(plan.views) <= plan.room < rehearsal.test(plan.views + 1)
    hours = plan.gpu_hours(CARDS["A100"])
    assert hours == pytest.approx(6 * 16 * plan.seconds_per_clip(CARDS["A100"]) / 3600)
    assert not make_plan(config, gpus=2, gpu_memory=1.08e9).fits


# ---------------------------------------------------------------- the program


@on_a_planned_gpu
def test_the_program_prints_each_part(config, capsys):
    plan_program.main([config, "--gpu", "24GB", "--gpus", "2", "data.batch_size=2"])
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    for part in ("parameters, tower, bfloat16", "optimizer", "gradients", "kept between forward and backward pass"):
        assert f"  {part}" in text
    assert "\nfits: " in text and "\nlargest batch: " in text
    assert "data.batch_size=2 solver.grad_accumulation_steps=8 solver.recompute=False" in text  # the file's 4 on 8 GPUs
    assert "32 videos (32 clips) an update, 0 updates an epoch" in text  # the list has 16
    assert sum("(arithmetic, roofline)" in line for line in lines) == len(CARDS)


@pytest.mark.parametrize("text, expected", [("24GB", 24e9), ("24", 24e9), ("24 gib", 24 * 2**30), ("h100", 80e9)])
def test_sizes_of_a_gpu(text, expected):
    assert plan_program.gpu_memory(text) == expected


@pytest.mark.parametrize("text", ["much", "0GB", "-3GB", "24MB", ""])
def test_a_wrong_size_is_one_line(text):
    with pytest.raises(ConfigError, match="--gpu: .* is no size; write 24GB, or one of H100, A100, 4090, T4"):
        plan_program.gpu_memory(text)


# ---------------------------------------------------------------- during a run


@pytest.fixture
def gpu_of(monkeypatch):
    """gpu_of(bytes, peak) puts a GPU of this size, whose allocator reports this peak, where torch.cuda is asked."""

    def put(size, peak=0):
        properties = SimpleNamespace(total_memory=size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peak)
        return torch.device("cuda", 0)

    return put


@on_a_planned_gpu
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("number", [1, 3])
def test_the_peak_of_several_runs_is_planned_from_each_alone(monkeypatch, number, accumulation):
    """Against a count of the step that all make together."""
    monkeypatch.setattr(loops, "same_draws", lambda device: nullcontext())  # there is no generator of a GPU
    config = small_config(precision="bf16", grad_accumulation_steps=accumulation)
    with counted_runs(config, number, "cuda") as (runs, count):
        count.restart()
        train_one_epoch(runs, [blank_batch(config) for _ in range(accumulation)], 0)
        counted = count.peak
    assert planned_training_peak([config] * number, 1) == pytest.approx(counted, rel=0.05)


@on_a_planned_gpu
def test_a_run_on_a_gpu_logs_planned_and_real_peak_once(gpu_of, caplog):
    caplog.set_level(logging.INFO)
    config = with_values(small_config(), solver__precision="bf16")
    planned = planned_training_peak([config], 1)
    plan = partial(planned_training_peak, [config])
    report = PeakReport(gpu_of(24 * 2**30, peak=2 * planned), "a training step", plan)
    report.done()
    report.done()
    before, after = caplog.messages
    assert before.startswith("memory: planned peak 0.") and "does not fit" not in before
    assert "real peak" in after and "(0.50 of it)" in after
    caplog.clear()
    PeakReport(gpu_of(2**30 + 2**20), "a training step", plan)
    assert caplog.messages[0].endswith("it does not fit: tools/plan.py says what does")
    caplog.clear()
    PeakReport(CPU, "a training step", plan).done()
    assert caplog.messages == []


@on_a_planned_gpu
def test_the_planned_peak_of_a_test_is_that_of_the_plan():
    tower = {**TOWER, "patch_size": 8, "depth": 8}  # a process gathers two blocks
    config = with_values(small_config(), solver__precision="bf16", network__backbone_kwargs=tower)
    assert planned_test_peak(config, 1) == make_plan(config, 1).test
    sharded = with_values(config, network__shard_backbone=True)
    assert planned_test_peak(sharded, 4) == make_plan(sharded, 4).test < planned_test_peak(config, 4)


@on_a_planned_gpu
def test_an_open_recompute_is_off_where_the_planned_step_fits(gpu_of, caplog):
    caplog.set_level(logging.INFO)
    config = small_config(precision="bf16", recompute="auto")
    on, off = (with_values(config, solver__recompute=recompute) for recompute in (True, False))
    peak = planned_training_peak([off], 1)
    assert peak > planned_training_peak([on], 1)
    for room, expected in ((peak, False), (peak - 1, True), (None, True)):
        (chosen,), _ = choose_recompute([config], 1, room)
        assert chosen.solver.recompute is expected
        assert chosen.toDict() == (on if expected else off).toDict()
    together, _ = choose_recompute([config, on, config], 1, planned_training_peak([off, on, off], 1) - 1)
    assert [own.solver.recompute for own in together] == [True, True, True]
    together, _ = choose_recompute([config, on, config], 1, planned_training_peak([off, on, off], 1))
    assert [own.solver.recompute for own in together] == [False, True, False]
    assert choose_recompute([on, off], 1, 0)[0] == [on, off]

    assert [own.solver.recompute for own in settle_recompute([config], gpu_of(24 * 2**30))] == [False]
    (line,) = caplog.messages
    assert line.startswith("solver.recompute: auto becomes False: without it, the planned peak is 0.")
    assert line.endswith(" GiB, on a GPU with 21.9 GiB for tensors")
    assert [own.solver.recompute for own in settle_recompute([config], gpu_of(2**30 + 2**20))] == [True]


@on_a_planned_gpu
def test_the_plan_of_a_file_settles_an_open_recompute(config, capsys):
    for size, expected in (("24GB", False), ("1.074GB", True)):
        plan_program.main([config, "--gpu", size, "--gpus", "1", "solver.recompute=auto"])
        text = capsys.readouterr().out
        assert f"solver.recompute: auto becomes {expected}\n" in text
        kept = "not recomputed" if not expected else "recomputed"
        assert f"kept between forward and backward pass, {kept}: " in text
    plan_program.main([config, "solver.recompute=auto"])
    assert "auto becomes True" in capsys.readouterr().out


@on_a_planned_gpu
def test_out_of_memory_is_answered_with_the_batch_of_the_plan(gpu_of):
    config = with_values(small_config(), solver__precision="bf16", data__batch_size=64)
    with rehearsing(config) as rehearsal:
        room = rehearsal.train(20, True).peak + 1
        views = rehearsal.test(9)
    assert advise_batch(config, room) == (
        "set data.batch_size=16 solver.grad_accumulation_steps=4, which keeps 64 videos an update"
    )
    kept = with_values(config, solver__recompute=False, data__batch_size=16)
    assert advise_batch(kept, room).startswith("set solver.recompute=True data.batch_size=16 solver.grad_accum")
    # The plan says that 16 fit, and they did not: something else is on the card.
    assert advise_batch(with_values(config, data__batch_size=16), room).startswith("set data.batch_size=8 ")
    assert advise_batch(config, 1).startswith("no smaller batch keeps the videos of an update")
    assert advise_views(with_values(config, test__view_batch=64), views) == "set test.view_batch=9"
    assert advise_views(with_values(config, test__view_batch=8), views) == "set test.view_batch=4"
