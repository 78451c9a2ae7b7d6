"""Tests that need a GPU. `sh scripts/run_tests.sh -m gpu` runs only these; without a GPU they are skipped.

Where one process is enough, the same bodies also run on the CPU, in every check, so that they keep working.
"""

import os
from pathlib import Path

import pytest
import torch
from tiny import SHARED_TOWER, free_port, make_shared_model, make_side, shared_batches
from torch import multiprocessing

import train as train_program
from benchmarks.allocations import measure_memory
from benchmarks.gpu_sections import build, training_peak
from engine.configuration import default_config, read_config
from engine.plan import rehearsing, training_batches, update_once
from modules.backbones import FrozenTower
from modules.side4video import Side4Video, SideClassifier
from utils.distributed import close_distributed, init_distributed
from utils.precision import prepare_precision, set_switches

GPUS = torch.cuda.device_count()
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="torch.cuda finds no GPU on this machine"),
]
needs_two = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, torch.cuda finds {GPUS}")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
PLACEMENTS = ["pre", "post"]
# (device, whether the tower is compiled): the compiler takes too long on a CPU.
COMPILED = [("cpu", False), *(pytest.param("cuda", compiled, marks=needs_gpu) for compiled in (False, True))]


@pytest.fixture(autouse=True)
def switches(monkeypatch, request):
    """Those of a run without TF32. A program that is to run on the CPU leaves the GPUs alone."""
    if "cpu" in getattr(getattr(request.node, "callspec", None), "params", {}).values():
        monkeypatch.setenv("DEVICE", "cpu")
    set_switches()
    yield
    set_switches()


def first(device):
    """The first device of a type."""
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def small_model(placement="pre", tower_dtype=torch.float32, recompute=True):
    """A ViT of three blocks, or for `post` an EVA tower with rope of which every second of four blocks is read."""
    torch.manual_seed(0)
    sizes = dict(backbone_width=192, side_width=128, num_layers=3, patch_size=8, num_patches=144)
    kwargs = {**SHARED_TOWER, "embed_dim": 192, "num_heads": 3}
    if placement == "pre":
        tower = FrozenTower("vit_tiny_patch16_224", 96, kwargs)
    else:
        tower = FrozenTower("eva02_tiny_patch14_224", 96, {**kwargs, "depth": 4}, "every2")
        sizes["num_layers"] = 2
    tower.convert(tower_dtype)
    side = make_side(placement, torch.float32, **sizes, recompute=recompute)
    return Side4Video(tower, SideClassifier(side, 5)).train()


def one_step(model, device, dtype=torch.float32, scale=1.0):
    """Loss and gradients of a step on four clips; the gradients are returned on the CPU."""
    clips = torch.randn(4, 4, 3, 96, 96, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(clips)
    loss = torch.nn.functional.cross_entropy(logits.float(), torch.arange(4, device=device))
    (loss * scale).backward()
    return loss.item(), {name: p.grad.cpu() / scale for name, p in model.trained.named_parameters()}


@pytest.fixture(scope="module", params=PLACEMENTS)
def expected(request):
    """(placement, loss, gradients of a step on the CPU in float32, the largest of their numbers)."""
    loss, grads = one_step(small_model(request.param), "cpu")
    return request.param, loss, grads, max(grad.abs().max() for grad in grads.values())


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("device, compiled", COMPILED)
def test_a_step_in_float32_is_that_on_the_cpu(expected, device, compiled, recompute):
    placement, expected_loss, expected_grads, largest = expected
    model = small_model(placement, recompute=recompute)
    model.place(first(device), compiled=compiled)
    loss, grads = one_step(model, device)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() < 2e-3 * torch.maximum(grad.abs().max(), 1e-2 * largest), name


@pytest.mark.parametrize("dtype, scale, tolerance", [(torch.bfloat16, 1.0, 0.1), (torch.float16, 1024.0, 0.03)])
@pytest.mark.parametrize("tower_dtype", ["float32", "half"])
@pytest.mark.parametrize("device", DEVICES)
def test_half_types_recomputed_or_not_are_near_float32(expected, dtype, scale, tolerance, tower_dtype, device):
    placement, expected_loss, expected_grads, largest = expected
    for recompute in (True, False):
        model = small_model(placement, torch.float32 if tower_dtype == "float32" else dtype, recompute)
        model.place(first(device))
        loss, grads = one_step(model, device, dtype, scale)
        assert loss == pytest.approx(expected_loss, abs=tolerance)
        for name, grad in expected_grads.items():
            assert grads[name].isfinite().all(), name
            assert (grads[name] - grad).abs().max() < 3 * tolerance * largest, name


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_residual_stream_has_one_type_on_the_cpu_and_the_gpu(device, placement):
    types = []
    model = small_model(placement).to(first(device))
    for block in model.trained.side.blocks:
        block.register_forward_hook(lambda module, inputs, output: types.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast(device, dtype=torch.bfloat16):
        model(torch.randn(2, 2, 3, 96, 96, device=device))
    assert types and set(types) == {torch.bfloat16}


@pytest.mark.parametrize("device, compiled", COMPILED)
def test_recomputing_keeps_less_than_a_third(device, compiled):
    clips = torch.randn(4, 4, 3, 96, 96, device=device)
    kept = []
    for recompute in (True, False):
        model = small_model(recompute=recompute)
        model.place(first(device), compiled=compiled)
        model(clips)
        kept.append(measure_memory(lambda model=model: model(clips), first(device))[0])
    assert kept[0] < kept[1] / 3


@pytest.mark.parametrize(
    "device, overrides",
    [
        ("cpu", ["solver.precision=bf16"]),
        *(
            pytest.param("cuda", [override], marks=needs_gpu)
            for override in ("solver.precision=bf16", "solver.precision=fp16", "solver.compile=True")
        ),
    ],
)
def test_training_runs_and_resumes(config, tmp_path, device, overrides):
    """fp16 uses the gradient scaler; a resumed run restores its state."""
    for epochs, output, resumed in ((1, "first", []), (2, "second", [f"resume={tmp_path}/first/last_model.pt"])):
        run = read_config(config, [f"solver.epochs={epochs}", *overrides, *resumed])
        train_program.train(run, str(tmp_path / output))
    state = torch.load(tmp_path / "second" / "last_model.pt", map_location="cpu", weights_only=True)
    assert state["epoch"] == 2 and all(t.isfinite().all() for t in state["trained"].values())
    if "solver.precision=fp16" in overrides:
        assert state["scaler"]["scale"] > 0


@pytest.mark.parametrize(
    "device, arch, size",
    [
        ("cpu", "timm/vit_tiny_patch16_224", 32),
        *(pytest.param("cuda", arch, 224, marks=needs_gpu) for arch in ("ViT-B/32", "EVA02-CLIP-L-14")),
    ],
)
@pytest.mark.parametrize("recompute", [True, False])
def test_the_planned_peak_is_within_a_tenth_of_the_real_one(recompute, device, arch, size):
    kwargs = {"depth": 4} if device == "cuda" else {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    network = {"arch": arch, "init": False, "side_dim": 320, "backbone_kwargs": kwargs}
    data = {"input_size": size, "num_segments": 8, "batch_size": 8}
    config = default_config(data=data, network=network, solver={"recompute": recompute, "precision": "amp"})
    with rehearsing(config, device) as rehearsal:
        planned = rehearsal.train(config.data.batch_size, recompute).peak
    place = first(device)
    model, optimizer = build(config, place)
    peak = training_peak(model, optimizer, config, prepare_precision(config.solver, place))
    assert planned == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "device, precision",
    [("cpu", "fp32"), *(pytest.param("cuda", name, marks=needs_gpu) for name in ("amp", "fp16", "fp32"))],
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_of_the_loop_never_waits_for_the_gpu(device, placement, precision):
    place = first(device)
    solver = {"precision": precision, "mixup": True, "clip_grad": 1.0}
    config = default_config(network={"side_variant": placement}, data={"rand_erase": True}, solver=solver)
    model, optimizer = build(config, place)
    chosen = prepare_precision(config.solver, place)
    scaler = chosen.grad_scaler()
    batches = [{name: t.pin_memory() if device == "cuda" else t for name, t in training_batches(config)[0].items()}]
    for strict in (False, False, True):  # constants are copied in the first step
        if strict and device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            update_once(model, optimizer, batches, config, chosen, scaler)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert all(bool(group["fused"]) == (device == "cuda") for group in optimizer.param_groups)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_steps_have_the_same_bits(device, placement):
    place = first(device)
    config = default_config(network={"side_variant": placement}, solver={"deterministic": True})
    precision = prepare_precision(config.solver, place)
    trained = []
    for _ in range(2):
        model, optimizer = build(config, place)
        for _ in range(2):
            update_once(model, optimizer, training_batches(config), config, precision)
        trained.append([parameter.detach().cpu() for parameter in model.trained.parameters()])
    assert all(a.equal(b) for a, b in zip(*trained, strict=True))


def train_on_gpus(rank, port, folder, placement):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device = init_distributed()
    model = make_shared_model(placement, sync_bn=True)
    model.place(device)
    model.parallelize()
    for clips in shared_batches():
        labels = torch.arange(2 * rank, 2 * rank + 2, device=device)
        torch.nn.functional.cross_entropy(model(clips[2 * rank : 2 * rank + 2].to(device)), labels).backward()
    torch.save({name: p.grad.cpu() for name, p in model.trained.named_parameters()}, Path(folder, f"rank{rank}.pt"))
    close_distributed()


@pytest.mark.gpu
@needs_two
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_synced_statistics_over_nccl(tmp_path, placement):
    multiprocessing.spawn(train_on_gpus, (free_port(), str(tmp_path), placement), nprocs=2)
    model = make_shared_model(placement)
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


@pytest.mark.gpu
@needs_two
def test_a_sharded_tower_trains_over_nccl(config, tmp_path):
    multiprocessing.spawn(shard_on_gpus, (free_port(), config, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / str(shard) / "last_model.pt", map_location="cpu") for shard in (False, True))
    assert all(torch.allclose(t, b["trained"][name], atol=1e-3) for name, t in a["trained"].items())
