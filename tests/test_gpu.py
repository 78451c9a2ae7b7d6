"""Tests that need a GPU. `sh scripts/run_tests.sh -m gpu` runs only these; without a GPU they are skipped."""

import copy
import os
from pathlib import Path

import pytest
import torch
from tiny import SHARED_TOWER, free_port, make_shared_model, make_side, shared_batches
from torch import multiprocessing

import train as train_program
from benchmarks.allocations import measure_memory
from engine.configuration import default_config, read_config
from engine.optim import build_optimizer
from engine.plan import rehearsing, start_optimizer, training_batches, update_once
from modules import build_model
from modules.backbones import FrozenTower
from modules.side4video import Side4Video, SideClassifier
from utils.distributed import close_distributed, init_distributed
from utils.precision import prepare_precision

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="torch.cuda finds no GPU on this machine"),
]
needs_two = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, torch.cuda finds {GPUS}")


def small_model(tower_dtype=torch.float32, recompute=True, placement="pre"):
    torch.manual_seed(0)
    tower = FrozenTower("vit_tiny_patch16_224", 96, {**SHARED_TOWER, "embed_dim": 192, "num_heads": 3})
    tower.convert(tower_dtype)
    sizes = dict(backbone_width=192, side_width=128, num_layers=3, patch_size=8, num_patches=144)
    return Side4Video(
        tower, SideClassifier(make_side(placement, torch.float32, **sizes, recompute=recompute), 5)
    ).train()


def one_step(model, device, dtype=torch.float32, scale=1.0):
    """Loss and gradients of a step on four clips; the gradients are returned on the CPU."""
    clips = torch.randn(4, 4, 3, 96, 96, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(clips)
    loss = torch.nn.functional.cross_entropy(logits.float(), torch.arange(4, device=device))
    (loss * scale).backward()
    return loss.item(), {name: p.grad.cpu() / scale for name, p in model.trained.named_parameters()}


@pytest.fixture
def full_float32():
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_step_on_the_gpu_is_that_on_the_cpu(full_float32, recompute, compiled, placement):
    model = small_model(recompute=recompute, placement=placement)
    expected_loss, expected = one_step(copy.deepcopy(model), "cpu")
    model.place(torch.device("cuda", 0), compile_backbone=compiled)
    loss, grads = one_step(model, "cuda")
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (grads[name] - grad).abs().max() < 2e-3 * torch.maximum(grad.abs().max(), 1e-2 * largest), name


@pytest.mark.parametrize("dtype, scale, tolerance", [(torch.bfloat16, 1.0, 0.1), (torch.float16, 1024.0, 0.03)])
@pytest.mark.parametrize("tower_dtype", ["float32", "half"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_half_types_recomputed_or_not_are_near_float32(dtype, scale, tolerance, tower_dtype, placement):
    expected_loss, expected = one_step(small_model(placement=placement), "cpu")
    largest = max(grad.abs().max() for grad in expected.values())
    for recompute in (True, False):
        model = small_model(torch.float32 if tower_dtype == "float32" else dtype, recompute, placement)
        model.place(torch.device("cuda", 0))
        loss, grads = one_step(model, "cuda", dtype, scale)
        assert loss == pytest.approx(expected_loss, abs=tolerance)
        for name, grad in expected.items():
            assert grads[name].isfinite().all(), name
            assert (grads[name] - grad).abs().max() < 3 * tolerance * largest, name


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_residual_stream_has_one_type_on_the_cpu_and_the_gpu(placement):
    types = []
    for device in ("cpu", "cuda"):
        model = small_model(placement=placement).to(device)
        for block in model.trained.side.blocks:
            block.register_forward_hook(lambda module, inputs, output: types.extend([inputs[0].dtype, output.dtype]))
        with torch.autocast(device, dtype=torch.bfloat16):
            model(torch.randn(2, 2, 3, 96, 96, device=device))
    assert len(types) == 12 and set(types) == {torch.bfloat16}


@pytest.mark.parametrize("compiled", [True, False])
def test_recomputing_keeps_less_than_a_third(compiled):
    clips = torch.randn(4, 4, 3, 96, 96, device="cuda")
    kept = []
    for recompute in (True, False):
        model = small_model(recompute=recompute)
        model.place(torch.device("cuda", 0), compile_backbone=compiled)
        model(clips)
        kept.append(measure_memory(lambda model=model: model(clips))[0])
    assert kept[0] < kept[1] / 3


@pytest.mark.parametrize("overrides", [["solver.precision=bf16"], ["solver.precision=fp16"], ["solver.compile=True"]])
def test_training_runs_and_resumes_on_the_gpu(config, tmp_path, overrides):
    """fp16 uses the gradient scaler; a resumed run restores its state."""
    for epochs, output, resumed in ((1, "first", []), (2, "second", [f"resume={tmp_path}/first/last_model.pt"])):
        run = read_config(config, [f"solver.epochs={epochs}", *overrides, *resumed])
        train_program.train(run, str(tmp_path / output))
    state = torch.load(tmp_path / "second" / "last_model.pt", map_location="cpu", weights_only=True)
    assert state["epoch"] == 2 and all(t.isfinite().all() for t in state["trained"].values())
    if "solver.precision=fp16" in overrides:
        assert state["scaler"]["scale"] > 0


@pytest.mark.parametrize("recompute", [True, False])
def test_the_planned_peak_is_within_a_tenth_of_the_real_one(recompute):
    network = {"arch": "ViT-B/32", "init": False, "side_dim": 320, "backbone_kwargs": {"depth": 4}}
    data = {"input_size": 224, "num_segments": 8, "batch_size": 8}
    device = torch.device("cuda", 0)
    config = default_config(data=data, network=network, solver={"recompute": recompute, "precision": "amp"})
    with rehearsing(config) as rehearsal:
        planned = rehearsal.train(config.data.batch_size, recompute).peak
    model, precision = build_model(config), prepare_precision(config.solver, device)
    model.place(device)
    optimizer = start_optimizer(model, config)
    torch.cuda.reset_peak_memory_stats(device)
    update_once(model, optimizer, training_batches(config), config, precision)
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(device), rel=0.1)


def test_a_step_with_the_fused_optimizer_never_waits_for_the_gpu():
    model = small_model()
    model.place(torch.device("cuda", 0))
    optimizer = build_optimizer(model, default_config())
    for _ in range(2):
        one_step(model, "cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(group["fused"] for group in optimizer.param_groups)


def train_on_gpus(rank, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device = init_distributed()
    model = make_shared_model("pre", sync_bn=True)
    model.place(device)
    model.parallelize()
    for clips in shared_batches():
        labels = torch.arange(2 * rank, 2 * rank + 2, device=device)
        torch.nn.functional.cross_entropy(model(clips[2 * rank : 2 * rank + 2].to(device)), labels).backward()
    torch.save({name: p.grad.cpu() for name, p in model.trained.named_parameters()}, Path(folder, f"rank{rank}.pt"))
    close_distributed()


@needs_two
def test_synced_statistics_over_nccl(tmp_path):
    multiprocessing.spawn(train_on_gpus, (free_port(), str(tmp_path)), nprocs=2)
    model = make_shared_model("pre")
    for clips in shared_batches():
        torch.nn.functional.cross_entropy(model(clips), torch.arange(4)).backward()
    largest = max(p.grad.abs().max() for p in model.trained.parameters())
    for rank in range(2):
        grads = torch.load(tmp_path / f"rank{rank}.pt")
        for name, parameter in model.trained.named_parameters():
            assert (grads[name] - parameter.grad).abs().max() < 1e-8 * largest, name


def shard_on_gpus(rank, port, config, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for shard in (False, True):
        train_program.train(read_config(config, [f"network.shard_backbone={shard}"]), f"{folder}/{shard}")
    close_distributed()


@needs_two
def test_a_sharded_tower_trains_over_nccl(config, tmp_path):
    multiprocessing.spawn(shard_on_gpus, (free_port(), config, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / str(shard) / "last_model.pt", map_location="cpu") for shard in (False, True))
    assert all(torch.allclose(t, b["trained"][name], atol=1e-3) for name, t in a["trained"].items())
