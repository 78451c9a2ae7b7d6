"""The sections of the report about a GPU: each is a generator of rows, which benchmarks/gpu_report.py collects.

A row is a dictionary of plain values, with what it is about under "what". Rows come as they are measured, so a section
that fails or takes too long keeps those that it has. Everything also runs on a CPU, small, to be tested there.
"""

import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from dotmap import DotMap
from torch import multiprocessing, nn

from benchmarks.allocations import measure_memory
from benchmarks.machine import describe_machine
from benchmarks.roofline import PRODUCTS, all_reduce_rate, copy_rate, host_rate, product_rate
from benchmarks.shipped_models import untrained_config
from benchmarks.timing import in_turns, seconds_of, steady_seconds
from engine.configuration import default_config
from engine.memory import total_memory
from engine.plan import (
    rehearsing,
    score_once,
    start_optimizer,
    test_batch,
    training_batches,
    update_once,
    usable,
    with_values,
)
from modules import build_model
from modules.side4video import Side4Video
from modules.side_network import HEAD_WIDTH
from utils.distributed import barrier, close_distributed, get_rank, init_distributed
from utils.precision import Precision, attention_kernel, describe_switches, prepare_precision
from utils.version import VERSION

Row = dict[str, Any]

GPU_TESTS = ["-m", "gpu", "tests/test_gpu.py"]
# Files of configs/k400: one tower for each variant of the side network, `pre` and `post`.
MODELS = {"vitb16": "pre", "eva_l14": "post"}
MAIN_MODEL = "vitb16"
ROUNDS = 5
# Variables that change what CUDA and PyTorch compute. Others may hold names and paths.
VARIABLES = (
    *("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "NCCL_P2P_DISABLE", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)


def clip_counts(device: torch.device) -> tuple[int, ...]:
    return (1, 4, 16, 32) if device.type == "cuda" else (1, 2)


def measured_config(model: str, device: torch.device) -> DotMap:
    """The configuration of a model in MODELS; on a CPU, a tiny one with its variant of the side network."""
    if device.type == "cuda":
        return untrained_config(model, [], device)
    return default_config(network={"side_variant": MODELS[model]})


def with_clips(config: DotMap, clips: int) -> DotMap:
    """The configuration with so many clips in a training step and in a test."""
    videos = max(1, clips // config.data.num_sample)
    return with_values(config, data__batch_size=videos, test__view_batch=clips, solver__grad_accumulation_steps=1)


# ---------------------------------------------------------------- what is there


def environment(device: torch.device) -> Iterator[Row]:
    """Versions, cards and switches."""
    yield {"what": "machine", "description": describe_machine()}
    yield {
        "what": "versions",
        "Side4Video": VERSION,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else None,
    }
    if device.type == "cuda":
        yield {"what": "driver", "version": driver_version()}
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            yield {
                "what": f"GPU {number}",
                "name": card.name,
                "capability": f"{card.major}.{card.minor}",
                "GB": round(card.total_memory / 1e9, 2),
                "multiprocessors": card.multi_processor_count,
                "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
    yield {"what": "switches as PyTorch sets them", "described": describe_switches(), **attention_switches()}
    config = measured_config(MAIN_MODEL, device)
    precision = prepare_precision(config.solver, device)
    yield {"what": "switches as a run sets them", "described": describe_switches(), "amp": precision.name}
    for dtype in dict.fromkeys((precision.dtype, torch.float32)):
        yield {
            "what": f"attention in {str(dtype).removeprefix('torch.')}",
            "tower": attention_kernel(device, dtype, 64, 197),
            "side network": attention_kernel(device, dtype, HEAD_WIDTH, 197),
        }
    if given := {name: os.environ[name] for name in VARIABLES if name in os.environ}:
        yield {"what": "variables", **given}


def attention_switches() -> Row:
    """Which kernels PyTorch may choose for attention, and whether sums of products may be split in a half type."""
    cuda = torch.backends.cuda
    return {
        "attention by cuDNN": cuda.cudnn_sdp_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "sums in bf16": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "sums in fp16": cuda.matmul.allow_fp16_reduced_precision_reduction,
    }


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "not known: nvidia-smi does not answer"


# ---------------------------------------------------------------- what the card can do


def roofline(device: torch.device) -> Iterator[Row]:
    """Products, copies, and bytes from main memory, as they are measured."""
    size, megabytes = (8192, 1024) if device.type == "cuda" else (256, 4)
    for kind in PRODUCTS:
        if device.type == "cuda" and kind == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            yield {"what": "product in bf16", "result": "this card has no units for it"}
            continue
        rate = product_rate(kind, size, device)
        yield {"what": f"product in {kind}", "rows and columns": size, "TFLOP/s": digits(rate / 1e12)}
    prepare_precision(default_config().solver, device)
    yield {"what": "copy inside the memory", "GB/s": digits(copy_rate(megabytes << 20, device) / 1e9)}
    for pinned in (True, False) if device.type == "cuda" else (False,):
        rate = host_rate(megabytes << 20, device, pinned)
        yield {"what": f"host to device, {'pinned' if pinned else 'pageable'} memory", "GB/s": digits(rate / 1e9)}


# ---------------------------------------------------------------- what the tests say


def gpu_tests(device: torch.device, arguments: list[str] | None = None) -> Iterator[Row]:
    """Each test that needs a GPU and its result, then why tests failed. On a CPU all are skipped.

    Args:
        arguments: of pytest; by default those of the tests that need a GPU.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, *(arguments or GPU_TESTS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "300"},  # otherwise the reasons are cut off
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        last = line.strip() or last
        if found := re.match(r"\S*?::(.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL)", line):
            yield {"what": found[1], "result": found[2].lower()}
        elif found := re.match(r"(FAILED|ERROR) \S*?::(.+?)(?: - (.*))?$", line.strip()):
            yield {"what": f"why {found[2]} failed", "reason": found[3] or "not said"}
    yield {"what": "all", "result": last.strip("= "), "status": process.wait()}


# ---------------------------------------------------------------- time and memory


def parts(device: torch.device) -> Iterator[Row]:
    """Time by part and the peak of a training step, with the plan beside it."""
    for name in MODELS:
        config = measured_config(name, device)
        precision = prepare_precision(config.solver, device)
        with rehearsing(config, device.type) as rehearsal:
            counts = clip_counts(device)
            planned = {
                n: rehearsal.train(with_clips(config, n).data.batch_size, config.solver.recompute).peak for n in counts
            }
        model, optimizer = build(config, device)
        for clips, plan in planned.items():
            row = {"what": f"{name}, {clips} clips", "planned GB": gigabytes(plan)}
            try:
                row |= milliseconds_by_part(model, optimizer, with_clips(config, clips), precision)
                peak = training_peak(model, optimizer, with_clips(config, clips), precision)
                row |= {"measured GB": gigabytes(peak), "planned / measured": round(plan / peak, 3)}
            except torch.OutOfMemoryError:
                model.zero_grad(set_to_none=True)
                row["result"] = "out of memory"
                if device.type == "cuda":
                    row["GB for tensors"] = gigabytes(usable(total_memory(device)))
            yield row
        del model, optimizer


def build(config: DotMap, device: torch.device, **options: bool) -> tuple[Side4Video, torch.optim.Optimizer]:
    """A model with random weights on its device, and its optimizer after an update; `options` are those of `place`."""
    torch.manual_seed(0)
    model = build_model(config)
    model.place(device, **options)
    return model, start_optimizer(model, config)


def milliseconds_by_part(
    model: Side4Video, optimizer: torch.optim.Optimizer, config: DotMap, precision: Precision
) -> Row:
    """Medians: the tower, the side network forward and backward, the optimizer, and a whole step of the loop."""
    device, data, rows = precision.device, config.data, []
    clips = torch.randn(config.test.view_batch, data.num_segments, 3, data.input_size, data.input_size, device=device)
    labels = torch.zeros(len(clips), dtype=torch.int64, device=device)
    model.train()
    for _ in range(ROUNDS + 1):
        state: dict[str, Any] = {}

        def tower(state: dict[str, Any] = state) -> None:
            state["tokens"] = list(model.backbone.layer_tokens(clips))

        def forward(state: dict[str, Any] = state) -> None:
            with precision.autocast():
                logits = model.trained(clips, state.pop("tokens"))
            state["loss"] = nn.functional.cross_entropy(logits.float(), labels)

        def backward(state: dict[str, Any] = state) -> None:
            state.pop("loss").backward()

        rows.append([seconds_of(run, device) for run in (tower, forward, backward, optimizer.step)])
        optimizer.zero_grad(set_to_none=True)
    names = ("tower", "side forward", "side backward", "optimizer")
    medians = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
    whole = in_turns({"step": step_of(model, optimizer, config, precision)}, ROUNDS, device)["step"][0]
    timed = {f"{name} ms": milliseconds(seconds) for name, seconds in zip(names, medians, strict=True)}
    return {**timed, "whole step ms": milliseconds(whole), "clips/s": digits(len(clips) / whole)}


def step_of(
    model: Side4Video, optimizer: torch.optim.Optimizer, config: DotMap, precision: Precision
) -> Callable[[], None]:
    """A call that makes one update by the loop of training."""
    return partial(update_once, model, optimizer, training_batches(config), config, precision)


def training_peak(model: Side4Video, optimizer: torch.optim.Optimizer, config: DotMap, precision: Precision) -> int:
    """Bytes at the peak of a training step, model and optimizer included, as the plan counts them."""
    state = [t for entry in optimizer.state.values() for t in entry.values() if torch.is_tensor(t)]
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *state) if t.device == precision.device)
    return held + measure_memory(lambda: step_of(model, optimizer, config, precision)(), precision.device)[1]


def forms(device: torch.device) -> Iterator[Row]:
    """Recomputation and compilation in turns, of one step."""
    clips = 8 if device.type == "cuda" else 2
    config = with_clips(measured_config(MAIN_MODEL, device), clips)
    precision = prepare_precision(config.solver, device)
    plain = build(config, device)
    models = {"": plain}
    if device.type == "cuda":  # a CPU has no time for the compiler here
        models[", compiled"] = build(config, device, compiled=True)

    def step(model: Side4Video, optimizer: torch.optim.Optimizer, recompute: bool) -> None:
        model.trained.side.recompute = recompute
        step_of(model, optimizer, config, precision)()

    runs = {
        f"{'recomputed' if recompute else 'not recomputed'}{form}": partial(step, model, optimizer, recompute)
        for form, (model, optimizer) in models.items()
        for recompute in (True, False)
    }
    for name, (seconds, ratio) in in_turns(runs, ROUNDS, device).items():
        row = {"what": f"{MAIN_MODEL}, {clips} clips, {name}", "step ms": milliseconds(seconds)}
        yield {**row, "of the first": round(ratio, 3)}


def evaluation(device: torch.device) -> Iterator[Row]:
    """Views a second of a test, and its peak beside the plan."""
    for name in MODELS:
        config = measured_config(name, device)
        with rehearsing(config, device.type) as rehearsal:
            planned = {views: rehearsal.test(views) for views in clip_counts(device)}
        model = build_model(config)
        model.place(device)
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        amp = prepare_precision(config.solver, device)
        for precision in dict.fromkeys((amp, Precision("fp32", device))):
            for views, plan in planned.items():
                row = {"what": f"{name}, {views} views at once, {precision.name}"}
                try:
                    score = partial(score_views, model, with_clips(config, views), precision)
                    row["views/s"] = digits(views / steady_seconds(score, device))
                    if precision == amp:
                        peak = held + measure_memory(score, device)[1]
                        row |= {"planned GB": gigabytes(plan), "measured GB": gigabytes(peak)}
                        row["planned / measured"] = round(plan / peak, 3)
                except torch.OutOfMemoryError:
                    row["result"] = "out of memory"
                yield row
        del model


def score_views(model: Side4Video, config: DotMap, precision: Precision) -> None:
    score_once(model, test_batch(config), config, precision)


# ---------------------------------------------------------------- several GPUs


def processes(device: torch.device) -> Iterator[Row]:
    """The same batch on each of 1, 2, 4, ... GPUs, and bytes a second that are summed over them."""
    alone = None
    for count in process_counts(device):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "row.json")
            if count == 1:
                train_alone(device, file)
            else:
                multiprocessing.spawn(train_together, (count, free_port(), device.type, str(file)), nprocs=count)
            row = json.loads(file.read_text(encoding="utf-8"))
        alone = alone or row["step ms"]
        yield {"what": f"{count} process(es)", **row, "efficiency": round(alone / row["step ms"], 3)}


def process_counts(device: torch.device) -> list[int]:
    """1, 2, 4, ... up to the number of GPUs, and that number; on a CPU 1 and 2."""
    most = torch.cuda.device_count() if device.type == "cuda" else 2
    return sorted({1, most, *(2**power for power in range(1, 10) if 2**power <= most)})


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def train_alone(device: torch.device, file: Path) -> None:
    """The row of a single process, into a file."""
    config = with_clips(measured_config(MAIN_MODEL, device), 8 if device.type == "cuda" else 2)
    precision = prepare_precision(config.solver, device)
    model, optimizer = build(config, device)
    timed = in_turns({"step": step_of(model, optimizer, config, precision)}, ROUNDS, device)
    file.write_text(json.dumps({"step ms": milliseconds(timed["step"][0])}), encoding="utf-8")


def train_together(rank: int, count: int, port: str, device_type: str, file: str) -> None:
    """One of several processes; process 0 writes the row."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DEVICE": device_type}
    device = init_distributed(timeout_minutes=2)
    config = with_clips(measured_config(MAIN_MODEL, device), 8 if device.type == "cuda" else 2)
    precision = prepare_precision(config.solver, device)
    row: Row = {}
    for name, shard in (("step ms", False), ("step ms, tower sharded", True)):
        model, optimizer = build(config, device, shard_backbone=shard)
        model.parallelize()
        step = step_of(model, optimizer, config, precision)

        def together(step: Callable[[], None] = step) -> None:
            barrier()
            step()

        row[name] = milliseconds(in_turns({"step": together}, ROUNDS, device)["step"][0])
        sent = model.reduced_bytes()
        del model, optimizer, step, together
    rate = all_reduce_rate(sent // 4 * 4, device)
    row |= {"gradients MB": digits(sent / 1e6), "all-reduce GB/s sent by each": digits(rate / 1e9)}
    if get_rank() == 0:
        Path(file).write_text(json.dumps(row), encoding="utf-8")
    barrier()  # nobody leaves while another one still sends
    close_distributed()


def digits(number: float) -> float:
    """With five digits, so that the tiny models of a CPU have some."""
    return float(f"{number:.5g}")


def milliseconds(seconds: float) -> float:
    return digits(1e3 * seconds)


def gigabytes(size: float) -> float:
    return digits(size / 1e9)
