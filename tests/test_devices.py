"""The device of a process, the switches of CUDA, and the forms of the optimizer; no test needs a GPU."""

import copy
import logging
import os
from pathlib import Path

import pytest
import torch
from tiny import TOWER, free_port, tiny_config
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from datasets.transforms import normalize_clips
from engine import device_copy
from engine.configuration import default_config
from engine.device_copy import DeviceCopy
from engine.optim import build_optimizer, load_optimizer, scaled_lr
from engine.training_state import changed_values
from modules import build_model
from modules.side4video import warn_of_old_card
from utils import precision as precision_module
from utils.distributed import close_distributed, device_type, init_distributed
from utils.errors import ConfigError
from utils.precision import attention_kernel, describe_switches, prepare_precision, resolve_precision

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, usable) puts GPUs where torch.cuda is asked; returns the devices that were made current."""
    current = []

    def put(count, usable=True, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
        return current

    for name in ("DEVICE", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return put


# ---------------------------------------------------------------- which device


def test_gpus_that_pytorch_cannot_use_are_one_line_and_never_a_silent_cpu(gpus, monkeypatch):
    gpus(8, usable=False)
    for call in (init_distributed, device_type, default_config):
        with pytest.raises(ConfigError, match=r"8 GPU\(s\) are here, but .* driver .* or set DEVICE=cpu") as caught:
            call()
        assert "\n" not in caught.value.line
    monkeypatch.setenv("DEVICE", "cpu")
    assert init_distributed() == torch.device("cpu") and default_config().network.backbone_dtype == "float32"


@pytest.mark.parametrize(
    "count, wish, expected",
    [(0, None, "cpu"), (0, "auto", "cpu"), (2, None, "cuda"), (2, "cpu", "cpu"), (2, "cuda", "cuda")],
)
def test_the_device_is_the_gpu_unless_the_user_insists(gpus, monkeypatch, count, wish, expected):
    current = gpus(count, usable=count > 0)
    if wish:
        monkeypatch.setenv("DEVICE", wish)
    assert init_distributed().type == device_type() == expected
    assert current == ([GPU] if expected == "cuda" else [])


@pytest.mark.parametrize(
    "count, environment, line",
    [
        (0, {"DEVICE": "cuda"}, "DEVICE: is cuda, but PyTorch finds no GPU here"),
        (1, {"DEVICE": "gpu"}, "DEVICE: is 'gpu', must be auto, cpu or cuda"),
        (2, {"LOCAL_RANK": "2"}, "process 2 of this machine has no GPU: PyTorch finds 2"),
        (2, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is set, but LOCAL_RANK is"),
    ],
)
def test_a_device_that_cannot_be_is_one_line(gpus, monkeypatch, count, environment, line):
    current = gpus(count, usable=count > 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=line):
        init_distributed()
    assert current == []  # nobody takes cuda:0 before that


@pytest.mark.parametrize("usable, backend, device_id", [(True, "nccl", torch.device("cuda", 1)), (False, "gloo", None)])
def test_the_process_group_knows_its_device_and_its_timeout(gpus, monkeypatch, usable, backend, device_id):
    gpus(2 if usable else 0, usable)
    calls = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: calls.append((args, kwargs)))
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    init_distributed(timeout_minutes=3)
    (args, kwargs), *others = calls
    assert not others and args == (backend,) and kwargs["device_id"] == device_id
    assert kwargs["timeout"].total_seconds() == 180


# ---------------------------------------------------------------- switches


@pytest.fixture
def switches():
    """Puts every switch back."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(cuda, name) for name in names}, (cudnn.allow_tf32, cudnn.deterministic)
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    for name, value in before[0].items():
        setattr(cuda, name, value)
    cudnn.allow_tf32, cudnn.deterministic = before[1]
    torch.use_deterministic_algorithms(False)
    if workspace is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_one_switch_for_products_and_convolutions(switches, tf32):
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = not tf32, not tf32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    prepare_precision(default_config(solver={"tf32": tf32}).solver, torch.device("cpu"))
    matmul = torch.backends.cuda.matmul
    assert matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
    assert not matmul.allow_fp16_reduced_precision_reduction and not matmul.allow_bf16_reduced_precision_reduction
    assert describe_switches().startswith(f"TF32 {'on' if tf32 else 'off'}, deterministic operators not asked for")


def test_tf32_is_off_unless_asked_for():
    assert default_config().solver.tf32 is False and default_config().solver.deterministic is False


def test_deterministic_is_for_cuda(switches, gpus):
    gpus(1)
    solver = default_config(solver={"deterministic": True}).solver
    prepare_precision(solver, torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    prepare_precision(solver, GPU)
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] and "operators only" in describe_switches()


@pytest.mark.parametrize(
    "capability, setting, expected", [((9, 0), "amp", "bf16"), ((9, 0), "bf16", "bf16"), ((7, 5), "amp", "fp16")]
)
def test_amp_takes_what_the_card_has(gpus, capability, setting, expected):
    gpus(1, capability=capability)
    assert resolve_precision(setting, GPU).name == expected


def test_bf16_on_a_card_without_it_is_refused(gpus):
    gpus(1, capability=(7, 5))
    with pytest.raises(ConfigError, match="solver.precision: bf16, and this GPU has no units .* solver.precision=amp"):
        resolve_precision("bf16", GPU)
    assert resolve_precision("fp16", GPU).name == "fp16"


@pytest.mark.parametrize("capability, lines", [((7, 5), 1), ((8, 0), 0), ((12, 0), 0)])
def test_compiling_for_a_card_below_8_0_is_said(gpus, caplog, capability, lines):
    gpus(1, capability=capability)
    caplog.set_level(logging.INFO)
    warn_of_old_card(GPU)
    warn_of_old_card(torch.device("cpu"))
    assert len(caplog.messages) == lines and all("capability 7.5" in message for message in caplog.messages)


def test_the_kernel_of_attention_is_the_one_that_pytorch_chooses(monkeypatch):
    cpu = torch.device("cpu")
    assert attention_kernel(cpu, torch.float32, 64, 50) == "flash_attention"
    with torch.nn.attention.sdpa_kernel(precision_module.SDPBackend.MATH):
        assert attention_kernel(cpu, torch.float32, 64, 50) == "math"


# ---------------------------------------------------------------- copies


def test_a_copy_runs_in_its_own_stream_and_the_computation_waits_for_it(monkeypatch):
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    class Tensor:
        def to(self, device, non_blocking):
            events.append(f"copied in {inside[-1]}, non_blocking {non_blocking}")
            return self

        def record_stream(self, stream):
            events.append(f"kept for {stream.name}")

    class Inside:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            inside.append(self.stream.name)

        def __exit__(self, *_):
            inside.pop()

    inside = ["computing"]
    monkeypatch.setattr(device_copy, "copy_stream", lambda device: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing"))
    DeviceCopy(GPU)(Tensor())
    assert events == ["copied in copying, non_blocking True", "computing waits for copying", "kept for computing"]


def test_on_a_cpu_nothing_is_copied():
    tensor = torch.zeros(3)
    assert DeviceCopy(torch.device("cpu"))(tensor) is tensor


# ---------------------------------------------------------------- optimizer


def stepped(model, optimizer, steps):
    for step in range(steps):
        for number, parameter in enumerate(model.trained.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model


def with_form(model, config, fused):
    optimizer = build_optimizer(model, config)
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = fused, not fused
    return optimizer


@pytest.mark.parametrize("fused_first", [False, True])
def test_a_run_goes_on_with_the_other_form_of_the_optimizer(tmp_path, fused_first):
    config = tiny_config()
    torch.manual_seed(0)
    model = build_model(config)
    unbroken = copy.deepcopy(model)
    stepped(unbroken, with_form(unbroken, config, False), 5)

    first = with_form(model, config, fused_first)
    stepped(model, first, 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = with_form(model, config, not fused_first)
    load_optimizer(second, torch.load(tmp_path / "state.pt", weights_only=True))
    assert {group["fused"] for group in second.param_groups} == {not fused_first}
    for step in range(2, 5):
        for number, parameter in enumerate(model.trained.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        second.step()
    for ours, theirs in zip(model.trained.parameters(), unbroken.trained.parameters(), strict=True):
        assert ours.allclose(theirs, rtol=1e-5, atol=1e-7)


def test_the_optimizer_is_fused_on_a_gpu_only():
    model = build_model(tiny_config())
    assert not any(group["fused"] for group in build_optimizer(model, tiny_config()).param_groups)
    fused = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Parameter, "device", GPU, raising=False)
        patch.setattr(torch.optim, "AdamW", lambda groups, fused=None, **_: fused_flags.append(fused))
        fused_flags = fused
        build_optimizer(model, tiny_config())
    assert fused == [True]


@pytest.mark.parametrize(
    "scale, batch, accumulation, world, expected",
    [("none", 4, 1, 8, 1e-3), ("linear", 32, 1, 8, 1e-3), ("linear", 4, 2, 8, 2.5e-4), ("linear", 64, 1, 16, 4e-3)],
)
def test_linear_scaling_follows_the_videos_of_an_update_on_all_processes(scale, batch, accumulation, world, expected):
    solver = {"lr": 1e-3, "lr_scale": scale, "grad_accumulation_steps": accumulation}
    config = default_config(data={"batch_size": batch}, solver=solver)
    assert scaled_lr(config, world) == pytest.approx(expected)


def test_every_group_of_the_optimizer_is_scaled():
    network = {"arch": "ViT-B/16", "backbone_kwargs": TOWER}
    solver = {"lr": 1e-2, "clip_ratio": 0.5, "lr_scale": "linear", "lr_batch": 8, "grad_accumulation_steps": 4}
    config = default_config(network=network, solver=solver)  # 4 videos x 4 of 1 process
    groups = build_optimizer(build_model(config), config).param_groups
    assert {group["name"]: group["base_lr"] for group in groups} == {
        "head": 2e-2,
        "side": 1e-2,
        "side_batch_norm": 5e-3,
    }


def test_a_key_that_a_checkpoint_is_too_old_for_had_its_default():
    new = default_config().toDict()
    old = copy.deepcopy(new)
    for key in ("tf32", "deterministic", "lr_scale", "lr_batch"):
        del old["solver"][key]
    assert changed_values(old, new) == []
    new["solver"]["tf32"] = True
    assert changed_values(old, new) == [("solver.tf32", False, True)]


# ---------------------------------------------------------------- sharding


def gather_order(rank, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    init_distributed()
    tower = build_model(tiny_config()).backbone
    tower.shard(init_device_mesh("cpu", (2,)))

    def mark(number):
        with torch.profiler.record_function(f"block {number}"):
            pass

    for number, block in enumerate(tower.vit.blocks):
        block.norm1.register_forward_pre_hook(lambda *_, number=number: mark(number))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        list(tower.layer_tokens(torch.randn(1, 2, 3, 32, 32)))
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    names = [event.name.partition(" (")[0] if "FSDP" in event.name else event.name for event in events]
    order = [name for name in names if name == "FSDP::all_gather" or name.startswith("block ")]
    torch.save(order, Path(folder, f"rank{rank}.pt"))
    close_distributed()


def test_the_next_block_is_gathered_before_a_block_runs(tmp_path):
    multiprocessing.spawn(gather_order, (str(tmp_path), free_port()), nprocs=2)
    for rank in range(2):
        events = torch.load(tmp_path / f"rank{rank}.pt")
        gather = "FSDP::all_gather"  # of what stands before the blocks, then of each block
        assert events == [gather, gather, gather, "block 0", gather, "block 1", "block 2"]


def test_normalisation_is_not_left_with_constants_of_a_dry_run():
    clips = torch.full((1, 1, 3, 2, 2), 255, dtype=torch.uint8)
    assert normalize_clips(clips, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).eq(1).all()
