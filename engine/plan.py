"""What a run needs, before it runs: memory of a training step and of a test, the batch that fits, steps, and time.

Memory is counted in a dry run of the real loops (engine/dry_run.py), not by a formula for each layer. Times are
arithmetic: the roofline of a card's published figures, which no kernel exceeds and few reach.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from dotmap import DotMap
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine.configuration import AUTO, resolve_config
from engine.dry_run import MemoryCount, as_with_gpu, dry_run
from engine.loops import train_one_epoch, view_outputs
from engine.optim import build_optimizer, update_videos
from engine.run import Run
from modules import build_model
from modules.side4video import Side4Video
from utils.precision import Precision

# Held back on a GPU for what the count does not see: the CUDA context and the workspaces of libraries, and the gaps
# between tensors in the allocator. Both numbers are assumptions; a run on a GPU logs its real peak beside the plan.
CONTEXT_BYTES = 1 << 30
GAPS = 0.05

# Frames that one core makes ready in a second (benchmarks/results/data_engine.txt: 340 x 256, one thread).
FRAME_RATES = {"frames": 1400, "frames, RandAugment": 950, "video files": 150}


MOST_VIDEOS = 65536  # as utils/config_schema.py allows
aten = torch.ops.aten
NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view, aten.detach}
OVERWRITING = {aten.copy_, aten.zero_, aten.fill_}  # they do not read their first argument


@dataclass(frozen=True)
class Card:
    """Published figures of a GPU: dense products in half precision, TF32 and float32, and memory.

    half, tf32, single: floating-point operations a second
    bandwidth: bytes a second
    memory: bytes
    """

    half: float
    tf32: float
    single: float
    bandwidth: float
    memory: float


CARDS = {
    "H100": Card(989e12, 495e12, 67e12, 3.35e12, 80e9),
    "A100": Card(312e12, 156e12, 19.5e12, 2.04e12, 80e9),
    "4090": Card(165e12, 82.6e12, 82.6e12, 1.01e12, 24e9),
    "T4": Card(65e12, 8.1e12, 8.1e12, 0.32e12, 16e9),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on its device.

    parameters: of each (part, type), buffers included; the parts are tower, side network and head
    optimizer, gradients: of everything that is trained
    kept: what lies between the forward and the backward pass beyond parameters and optimizer, the batch included
    peak: the most that is held at once in a training step, everything included
    block: parameters of the tower's largest block
    """

    parameters: dict[tuple[str, str], int]
    optimizer: int
    gradients: int
    kept: int
    peak: int
    block: int

    @property
    def tower(self) -> int:
        return sum(size for (part, _), size in self.parameters.items() if part == "tower")

    def saved_by_sharding(self, config: DotMap, gpus: int) -> int:
        """Bytes that splitting the tower over the GPUs takes off a process."""
        return saved_by_sharding(config, gpus, self.tower, self.block)

    def process_peak(self, config: DotMap, gpus: int) -> int:
        """The peak of one of several processes. Buckets of DistributedDataParallel hold every gradient once more."""
        return self.peak + (self.gradients if gpus > 1 else 0) - self.saved_by_sharding(config, gpus)


def saved_by_sharding(config: DotMap, gpus: int, tower: int, block: int) -> int:
    """Bytes of a tower that a process of several does not hold: all but its share and two gathered blocks."""
    if not config.network.shard_backbone or gpus == 1:
        return 0
    return max(0, tower - tower // gpus - 2 * block)


class Work(TorchDispatchMode):
    """The products' operations and the bytes read and written by each operator, in all operators that run inside.

    Attributes:
        steps: (operations, their type, bytes) -> how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: Counter[tuple[int, torch.dtype, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "aten" and not (func.is_view or func.overloadpacket in NO_KERNEL):
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            operations = 0
            if func.overloadpacket in flop_registry:
                operations = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            if func.overloadpacket in OVERWRITING:
                read = read[1:]
            tensors = [*read, *written]
            moved = sum(tensor.nbytes for tensor in tensors)
            dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
            self.steps[operations, dtype, moved] += 1
        return result

    def seconds(self, card: Card, tf32: bool) -> float:
        """The roofline: each operator takes as long as its operations or its bytes at the card's full rate."""

        def rate(dtype: torch.dtype) -> float:
            return card.half if dtype in (torch.bfloat16, torch.float16) else card.tf32 if tf32 else card.single

        return sum(
            times * max(operations / rate(dtype), moved / card.bandwidth)
            for (operations, dtype, moved), times in self.steps.items()
        )


class _Silent:
    """A reporter and its throughput that report nothing: what they would say waits for values."""

    @property
    def throughput(self) -> "_Silent":
        return self

    def start_epoch(self, *_: object) -> None: ...

    def batch(self, *_: object) -> None: ...

    def update(self, *_: object) -> None: ...

    def step(self, *_: object) -> None: ...

    def phase(self, name: str) -> nullcontext[None]:
        return nullcontext()

    def end_step(self) -> None: ...


def blank_batch(config: DotMap) -> dict[str, Tensor]:
    """A training batch of one process with the right shapes: uint8 clips (B, T, 3, H, W) and labels (B,)."""
    data = config.data
    clips = data.batch_size * data.num_sample
    shape = (clips, data.num_segments, 3, data.input_size, data.input_size)
    return {"clips": torch.zeros(shape, dtype=torch.uint8), "labels": torch.zeros(clips, dtype=torch.int64)}


def resolve_for_gpu(config: DotMap) -> DotMap:
    """`resolve_config` as on a GPU that supports bf16, whatever this machine has."""
    with as_with_gpu():
        return resolve_config(config, torch.device("cuda"))


def planned_precision(config: DotMap, device: torch.device) -> Precision:
    """That of the configuration; `amp` on a GPU counts as bf16, which takes the same bytes as fp16."""
    name = config.solver.precision
    if name == "amp":
        name = "bf16" if device.type == "cuda" else "fp32"
    return Precision(name, device)


def start_optimizer(model: Side4Video, config: DotMap) -> torch.optim.Optimizer:
    """The optimizer with its state in place, as after the first update."""
    optimizer = build_optimizer(model, config)
    for parameter in model.trained.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def training_batches(config: DotMap) -> list[dict[str, Tensor]]:
    """The batches of an update, but at most two: a third finds the same tensors as the second."""
    return [blank_batch(config) for _ in range(min(2, config.solver.grad_accumulation_steps))]


def update_once(
    model: Side4Video,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Tensor]],
    config: DotMap,
    precision: Precision,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """One update of the weights, by `train_one_epoch`.

    Args:
        scaler: None for none. In a dry run it would ask for values; it holds two numbers.
    """
    run = silent_run(with_values(config, solver__grad_accumulation_steps=len(batches)), model, precision, optimizer)
    run.scaler = scaler or run.scaler
    train_one_epoch([run], batches, 0)  # type: ignore[arg-type]  # a loader is iterated


def silent_run(
    config: DotMap, model: Side4Video, precision: Precision, optimizer: torch.optim.Optimizer | None = None
) -> Run:
    """A run that reports nothing, without a scaler; with its own optimizer unless another is given."""
    run = Run(config, model, precision)
    run.optimizer, run.reporter = optimizer or run.optimizer, _Silent()  # type: ignore[assignment]
    run.scaler = torch.amp.GradScaler(precision.device.type, enabled=False)
    return run


def test_batch(config: DotMap) -> dict[str, Tensor]:
    """A video with `test.view_batch` views. How many a video has does not matter: they pass in chunks of that size."""
    data = config.data
    shape = (config.test.view_batch, data.num_segments, 3, data.input_size, data.input_size)
    return {"indices": torch.zeros(1, dtype=torch.int64), "clips": torch.zeros(shape, dtype=torch.uint8)}


def score_once(model: Side4Video, batch: dict[str, Tensor], config: DotMap, precision: Precision) -> None:
    """Run the one loop of all evaluations over the batch."""
    for _ in view_outputs(model, [batch], precision, config):  # type: ignore[arg-type]  # a loader is iterated
        pass


class Rehearsal:
    """Steps of a model in a dry run, one after the other. Use it inside `rehearsing`."""

    def __init__(self, model: Side4Video, config: DotMap, device: torch.device, count: MemoryCount):
        self._model, self._config, self._count = model, config, count
        self._precision = planned_precision(config, device)
        model.to_empty(device=device)
        self.model_bytes = count.live
        self._optimizer = start_optimizer(model, config)
        self._base = count.live
        self._after_forward = 0
        model.register_forward_hook(self._note)

    def _note(self, *_: object) -> None:
        self._after_forward = self._count.live

    def train(self, batch: int, recompute: bool, work: "Work | None" = None) -> Memory:
        """Memory of an update with batches of so many videos; `work` counts its operators."""
        model, count = self._model, self._count
        config = with_values(self._config, data__batch_size=batch)
        model.trained.side.recompute = recompute
        batches = training_batches(config)
        before = count.live  # on a CPU, the batch that the loader made counts too
        count.restart()
        with work or nullcontext():
            update_once(model, self._optimizer, batches, config, self._precision)
        return Memory(
            parameters=parameter_bytes(model),
            optimizer=self._base - self.model_bytes,
            gradients=sum(p.nbytes for p in model.trained.parameters()),
            kept=self._after_forward - before,
            peak=count.peak,
            block=largest_block(model),
        )

    def test(self, views: int, gpus: int = 1) -> int:
        """Bytes of one process of so many at the peak of a test, everything included but no optimizer.

        Args:
            views: at once, of each process.
        """
        config = with_values(self._config, test__view_batch=views)
        batch = test_batch(config)
        self._count.restart()
        score_once(self._model, batch, config, self._precision)
        tower = sum(size for (part, _), size in parameter_bytes(self._model).items() if part == "tower")
        saved = saved_by_sharding(config, gpus, tower, largest_block(self._model))
        return self._count.peak - (self._base - self.model_bytes) - saved


@contextmanager
def rehearsing(config: DotMap, device_type: str = "cuda") -> Iterator[Rehearsal]:
    """Inside, steps of the configuration's model can be tried. Nothing is allocated, and no weight file is needed.

    Args:
        config: resolved for the device type.
        device_type: cuda or cpu.
    """
    with torch.device("meta"):
        model = build_model(config, load_tower=False)
    with dry_run(device_type) as count:
        yield Rehearsal(model, config, torch.device(device_type), count)


def largest_block(model: Side4Video) -> int:
    """Bytes of the parameters of the tower's largest block."""
    return max(sum(p.nbytes for p in block.parameters()) for block in model.backbone.vit.blocks)


def parameter_bytes(model: Side4Video) -> dict[tuple[str, str], int]:
    """Bytes of parameters and buffers of each (part, type)."""
    parts = {"tower": model.backbone, "side network": model.trained.side, "head": model.trained.head}
    sizes: Counter[tuple[str, str]] = Counter()
    for name, part in parts.items():
        for tensor in (*part.parameters(), *part.buffers()):
            sizes[name, str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(sizes)


# ---------------------------------------------------------------- what fits


def usable(memory: float) -> int:
    """Bytes of a GPU's memory that the counted tensors may take."""
    return int((memory - CONTEXT_BYTES) / (1 + GAPS))


def share_batch(total: int, world_size: int, most: int, accepted: Callable[[int], bool] = bool) -> int | None:
    """The largest batch of a process, at most `most` videos, of which whole ones on all processes make `total`."""
    return next((b for b in range(most, 0, -1) if total % (world_size * b) == 0 and accepted(b)), None)


def largest_fitting(peak: Callable[[int], int], room: int, start: int, step: int = 1, most: int = MOST_VIDEOS) -> int:
    """The largest multiple of `step` whose peak is within the room, 0 if none is.

    The peak rises by the same amount with each step, except among small numbers, so few are tried: each guess lies on
    the line through the two points nearest to the room.
    """
    start = max(step, start // step * step)
    points = {n: peak(n) for n in (start, 2 * start)}
    while True:
        fitting = max((n for n, size in points.items() if size <= room), default=0)
        failing = min((n for n, size in points.items() if size > room), default=most + step)
        (n0, size0), (n1, size1) = sorted(points.items(), key=lambda point: abs(point[1] - room))[:2]
        slope = (size1 - size0) / (n1 - n0)
        guess = int(n0 + (room - size0) / slope) // step * step if slope > 0 else most
        guess = min(guess, failing - step, most)
        if guess <= fitting:
            return fitting
        points[guess] = peak(guess)


@dataclass(frozen=True)
class Plan:
    """A run of a configuration on so many GPUs.

    config: resolved for a GPU, with True or False for `solver.recompute`
    gpus: processes, one on each
    memory: of a training step with the configuration's batch
    training, test: bytes at the peak of one process
    room: bytes that the counted tensors may take, None without a GPU's size
    total: videos of an update that the recipe asks for
    largest: the largest batch of a process with recomputation and without it; None without a room
    views: the largest `test.view_batch`
    choice: (solver.recompute, data.batch_size, solver.grad_accumulation_steps) that keep the total; None if none does
    videos: of the training list, None if it is not there
    work: operators of one step, per the configuration's batch
    """

    config: DotMap
    gpus: int
    memory: Memory
    training: int
    test: int
    room: int | None
    total: int
    largest: dict[bool, int] | None
    views: int | None
    choice: tuple[bool, int, int] | None
    videos: int | None
    work: Work

    @property
    def fits(self) -> bool | None:
        return None if self.room is None else max(self.training, self.test) <= self.room

    @property
    def clips(self) -> int:
        """Clips of a step of one process."""
        return self.config.data.batch_size * self.config.data.num_sample

    def updates(self) -> int | None:
        """Updates of an epoch."""
        return None if self.videos is None else self.videos // self.total

    def seconds_per_clip(self, card: Card) -> float:
        """The roofline of a training step on a card."""
        # Accumulated batches: the dry run has run two of them.
        runs = min(2, self.config.solver.grad_accumulation_steps)
        return self.work.seconds(card, tf32=self.config.solver.tf32) / (runs * self.clips)

    def gpu_hours(self, card: Card) -> float | None:
        """Of all epochs, without evaluations."""
        if (updates := self.updates()) is None:
            return None
        clips = updates * self.total * self.config.data.num_sample * self.config.solver.epochs
        return clips * self.seconds_per_clip(card) / 3600

    def loaders(self, card: Card) -> int:
        """Loader processes of each GPU that keep up with the roofline of the card."""
        frames = self.config.data.num_segments / self.seconds_per_clip(card)
        return math.ceil(frames / FRAME_RATES[self.source])

    @property
    def source(self) -> str:
        """The key of FRAME_RATES that the configuration's data falls under."""
        data = self.config.data
        return "video files" if data.modality == "video" else "frames, RandAugment" if data.rand_aug else "frames"


def with_values(config: DotMap, **changes: object) -> DotMap:
    """A copy of the configuration with other values; `data__batch_size=4` sets data.batch_size."""
    plain = config.toDict()
    for name, value in changes.items():
        section, _, key = name.partition("__")
        plain[section][key] = value
    return DotMap(plain, _dynamic=False)


def accepts_batch(config: DotMap, gpus: int) -> Callable[[int], bool]:
    """Whether training takes a batch of so many videos: mixup pairs clips, and BatchNorm needs two."""
    shared = gpus if config.solver.sync_bn else 1

    def accepted(batch: int) -> bool:
        clips = batch * config.data.num_sample
        alone = config.network.side_variant == "pre" and clips * shared == 1
        return not (config.solver.mixup and clips % 2) and not alone

    return accepted


def planned_training_peak(configs: Sequence[DotMap], world_size: int) -> int:
    """Bytes of one process at the peak of a training step on a GPU.

    Args:
        configs: of the runs that share the step. They go forward and backward one after the other, so the peak is that
            of the largest, beside weights and optimizers of the others, and their gradients while they accumulate.
    """
    peaks, own = [], []
    for config in configs:
        with rehearsing(config) as rehearsal:
            memory = rehearsal.train(config.data.batch_size, config.solver.recompute)
        peaks.append(memory.process_peak(config, world_size))
        accumulated = config.solver.grad_accumulation_steps > 1
        own.append((1 + accumulated) * memory.gradients + memory.optimizer)  # a weight is as large as its gradient
    return max(peak - mine for peak, mine in zip(peaks, own, strict=True)) + sum(own)


def planned_test_peak(config: DotMap, world_size: int) -> int:
    """Bytes of one process at the peak of a test on a GPU."""
    with rehearsing(config) as rehearsal:
        return rehearsal.test(config.test.view_batch, world_size)


def choose_recompute(configs: Sequence[DotMap], world_size: int, room: int | None) -> tuple[list[DotMap], int | None]:
    """Replace `solver.recompute: auto` by False if a step without recomputation fits, and else by True.

    Args:
        configs: of the runs that share the step.
        room: bytes of `usable`; None: unknown, which means True.

    Returns:
        the configurations, and the planned peak with False; None where nothing was open or the room is unknown.
    """
    open_ones = [config.solver.recompute == AUTO for config in configs]
    if not any(open_ones):
        return list(configs), None

    def chosen(recompute: bool) -> list[DotMap]:
        pairs = zip(configs, open_ones, strict=True)
        return [with_values(own, solver__recompute=recompute) if is_open else own for own, is_open in pairs]

    if room is None:
        return chosen(True), None
    peak = planned_training_peak(chosen(False), world_size)
    return chosen(peak > room), peak


def make_plan(
    config: DotMap, gpus: int, gpu_memory: float | None = None, total: int | None = None, videos: int | None = None
) -> Plan:
    """Plan a run.

    Args:
        config: resolved for a GPU, see `planned_config`.
        gpus: number of processes.
        gpu_memory: bytes of each GPU; None leaves out what fits.
        total: videos of an update that the recipe asks for; None: those of the configuration on these GPUs.
        videos: of the training list.
    """
    room = None if gpu_memory is None else usable(gpu_memory)
    (config,), _ = choose_recompute([config], gpus, room)
    data, solver, work = config.data, config.solver, Work()
    total = total or update_videos(config, gpus)
    largest = views = choice = None
    with rehearsing(config) as rehearsal:
        memory = rehearsal.train(data.batch_size, solver.recompute, work)
        test = rehearsal.test(config.test.view_batch, gpus)
        if room is not None:
            step = 2 if solver.mixup and data.num_sample % 2 else 1

            def peak(batch: int, recompute: bool) -> int:
                return rehearsal.train(batch, recompute).process_peak(config, gpus)

            largest = {
                recompute: largest_fitting(partial(peak, recompute=recompute), room, data.batch_size, step)
                for recompute in (True, False)
            }
            views = largest_fitting(partial(rehearsal.test, gpus=gpus), room, config.test.view_batch)
            choice = choose_batch(config, gpus, total, largest)
    return Plan(
        config=config,
        gpus=gpus,
        memory=memory,
        training=memory.process_peak(config, gpus),
        test=test,
        room=room,
        total=total,
        largest=largest,
        views=views,
        choice=choice,
        videos=videos,
        work=work,
    )


def choose_batch(config: DotMap, gpus: int, total: int, largest: dict[bool, int]) -> tuple[bool, int, int] | None:
    """(recompute, batch, accumulation) that give `total` videos an update; None if there is none.

    The batch of the configuration stays if it can, because BatchNorm takes its statistics over it. Without
    recomputation a step is faster; it is chosen where the batch need not be smaller for it.
    """
    accepted = accepts_batch(config, gpus)
    batches = {
        recompute: share_batch(total, gpus, min(most, config.data.batch_size), accepted)
        for recompute, most in largest.items()
    }
    if (batch := batches[True]) is None:
        return None
    return batches[False] != batch, batch, total // (gpus * batch)
