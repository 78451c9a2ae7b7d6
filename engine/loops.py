"""One epoch of training, and evaluation."""

import logging
import math
import time
from contextlib import nullcontext

import numpy as np
import torch
from dotmap import DotMap
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.batch_augment import BatchAugment
from datasets.loaders import VideoLoader
from datasets.transforms import normalize_clips
from engine.optim import lr_factor, set_learning_rate
from engine.throughput import Throughput
from modules.side4video import Side4Video
from utils.distributed import all_reduce, gather, get_rank, get_world_size
from utils.errors import DataError, UserError
from utils.precision import Precision

log = logging.getLogger(__name__)


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite."""


class LossMonitor:
    """Mean loss over all processes, and the first step whose loss was not finite.

    Both live on the device, so that only a report, and not every step, waits for it.
    """

    def __init__(self, epoch: int, device: torch.device):
        self._epoch = epoch
        self._sum = torch.zeros(2, dtype=torch.float64, device=device)  # loss, steps
        self._first_bad = torch.full((), math.inf, dtype=torch.float64, device=device)

    def update(self, loss: Tensor, step: int) -> None:
        loss = loss.detach().double()
        self._sum += torch.stack([loss, torch.ones_like(loss)])
        self._first_bad = torch.where(loss.isfinite(), self._first_bad, self._first_bad.clamp(max=step))

    def report(self) -> float:
        """Mean loss since the last report. Every process must call it at the same step.

        Raises:
            NonFiniteLossError: on all processes together, naming the first such step of any of them.
        """
        first_bad = all_reduce(self._first_bad, torch.distributed.ReduceOp.MIN).item()
        if first_bad < math.inf:
            raise NonFiniteLossError(
                f"the loss is not finite at epoch {self._epoch}, iteration {int(first_bad)}; last_model.pt is that of "
                "the epoch before; try a lower solver.lr, solver.clip_grad, or solver.precision bf16 or fp32"
            )
        total, steps = all_reduce(self._sum).tolist()
        self._sum.zero_()
        return total / steps


def train_one_epoch(
    model: Side4Video,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    epoch: int,
    config: DotMap,
    throughput: Throughput | None = None,
) -> float:
    """Train for one epoch and return the mean loss over its last reported stretch.

    `len(loader)` is a multiple of `grad_accumulation_steps`, so no gradient is left over at the end. `throughput` is
    that of the run, which measures over its epochs; None measures this one alone.

    Raises:
        NonFiniteLossError: at the next report after the step that it names.
    """
    data, solver, accumulation = config.data, config.solver, config.solver.grad_accumulation_steps
    augment = BatchAugment(data.num_classes, solver.smoothing, data.rand_erase, solver.mixup, precision.device)
    mean, std = tuple(data.mean), tuple(data.std)
    monitor = LossMonitor(epoch, precision.device)
    model.train()
    throughput = throughput or Throughput(config, precision.device)
    mean_loss, started = math.nan, time.perf_counter()
    since, batches = 0, iter(loader)
    for iteration in range(len(loader)):
        throughput.begin()
        batch = next(batches)
        throughput.lap()

        set_learning_rate(optimizer, lr_factor(epoch + iteration / len(loader), solver))
        clips = batch["clips"].to(precision.device, non_blocking=True)
        labels = batch["labels"].to(precision.device, non_blocking=True)
        throughput.lap()
        clips = normalize_clips(clips, mean, std)
        clips, targets = augment(clips, labels, config.seed, epoch, iteration, get_rank())
        update = (iteration + 1) % accumulation == 0
        with nullcontext() if update else model.no_sync():
            with precision.autocast():
                logits = model(clips)
            loss = nn.functional.cross_entropy(logits.float(), targets)
            scaler.scale(loss / accumulation).backward()
        if update:
            if solver.clip_grad is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.trained.parameters(), solver.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        monitor.update(loss, iteration)
        if throughput.begun == accumulation and get_world_size() > 1:
            log.info(
                "each process hands %.1f MB to the others in a step: the gradients of %.2f M trained parameters%s",
                model.reduced_bytes(accumulation) / 1e6,
                sum(p.numel() for p in model.trained.parameters()) / 1e6,
                " and the statistics of BatchNorm" if solver.sync_bn else "",
            )
        throughput.end()
        if (iteration + 1) % config.logging.print_freq == 0 or iteration + 1 == len(loader):
            mean_loss = monitor.report()
            now, steps = time.perf_counter(), iteration + 1 - since
            log.info(
                "epoch %d [%d/%d] loss %.4f, lr %.2e, %.3f s a step, of which %.3f s waiting for data",
                *(epoch, iteration + 1, len(loader), mean_loss),
                *(optimizer.param_groups[0]["lr"], (now - started) / steps, throughput.waited()),
            )
            started, since = now, iteration + 1
    return mean_loss


def keep_step(model: Side4Video, device: torch.device, working: bool = True) -> bool:
    """True while any process has work left, if the tower is sharded, so that processes without must join in."""
    return model.sharded and all_reduce(torch.tensor(float(working), device=device)).item() > 0


@torch.no_grad()
def evaluate(model: Side4Video, loader: VideoLoader, precision: Precision, config: DotMap) -> np.ndarray:
    """Mean over views of softmax(logits), for every video of the list.

    Each process scores its own videos; the rows are then put together, so every video is counted once on any number of
    processes.

    Args:
        loader: of `build_eval_loader`; `test.view_batch` of its views go through the model at once.

    Returns:
        float32 (videos, K), in list order, on every process. A video that could not be read has NaNs, and a line in
        the log.

    Raises:
        DataError: no video at all could be read.
    """
    data, num_videos, num_classes = config.data, len(loader.dataset), config.data.num_classes
    scores = torch.zeros(num_videos, num_classes, device=precision.device)
    counted = torch.zeros(num_videos, device=precision.device)
    mean, std = tuple(data.mean), tuple(data.std)
    model.eval()
    progress = tqdm(
        total=math.ceil(num_videos / get_world_size()), unit="video", disable=None if get_rank() == 0 else True
    )
    for batch in loader:
        if len(batch["indices"]) == 0:
            continue
        chunks = []
        for views in batch["clips"].split(config.test.view_batch):
            clips = views.to(precision.device, non_blocking=True)
            keep_step(model, precision.device)
            with precision.autocast():
                chunks.append(model(normalize_clips(clips, mean, std)).float())
        probabilities = torch.cat(chunks).softmax(dim=-1)
        indices = batch["indices"].to(precision.device, non_blocking=True)
        scores[indices] = probabilities.view(len(indices), -1, num_classes).mean(dim=1)
        counted[indices] += 1
        progress.update(len(indices))
    while keep_step(model, precision.device, working=False):
        shape = (1, data.num_segments, 3, data.input_size, data.input_size)
        model(torch.zeros(shape, device=precision.device))
    progress.close()
    for index, _ in loader.unreadable:
        scores[index] = math.nan
        counted[index] += 1
    all_reduce(scores)
    if not all_reduce(counted).eq(1).all():
        raise RuntimeError("a video was not counted exactly once; the evaluation loader is at fault")
    unreadable = sorted(gather(loader.unreadable))
    if len(unreadable) == num_videos:
        raise DataError(f"none of the {num_videos} videos can be read; the first: {unreadable[0][1]}")
    for _, reason in unreadable:
        log.info("no scores, counted wrong: %s", reason)
    return scores.cpu().numpy()
