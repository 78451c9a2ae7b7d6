"""One epoch of training, and one evaluation."""

import logging
import math
from contextlib import nullcontext

import numpy as np
import torch
from dotmap import DotMap
from torch import Tensor, nn
from tqdm import tqdm

from datasets.annotations import UNLABELLED
from datasets.batch_augment import BatchAugment
from datasets.loaders import VideoLoader
from datasets.transforms import normalize_clips
from engine.optim import lr_factor, set_learning_rate
from engine.reporter import Reporter
from modules.side4video import Side4Video
from utils.distributed import all_reduce, gather, get_rank, get_world_size
from utils.errors import DataError
from utils.precision import Precision

log = logging.getLogger(__name__)


def train_one_epoch(
    model: Side4Video,
    loader: VideoLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    epoch: int,
    config: DotMap,
    reporter: Reporter | None = None,
) -> float:
    """Train for one epoch and return the mean loss over its last reported stretch.

    Args:
        loader: of `build_train_loader`; its length is a multiple of `solver.grad_accumulation_steps`, so no gradient
            is left over at the end.
        reporter: that of the run; None makes one for this epoch alone.

    Raises:
        NonFiniteLossError: at the next report after the step that it names.
    """
    data, solver, accumulation = config.data, config.solver, config.solver.grad_accumulation_steps
    mean, std = tuple(data.mean), tuple(data.std)
    augment = BatchAugment(data.num_classes, solver.smoothing, data.rand_erase, solver.mixup, precision.device)
    reporter = reporter or Reporter(config, precision.device)
    reporter.start_epoch(epoch, len(loader))
    model.train()
    batches = iter(loader)
    for iteration in range(len(loader)):
        with reporter.phase("data"):
            batch = next(batches)
        with reporter.phase("copy"):
            clips = batch["clips"].to(precision.device, non_blocking=True)
            labels = batch["labels"].to(precision.device, non_blocking=True)
        with reporter.phase("compute"):
            set_learning_rate(optimizer, lr_factor(epoch + iteration / len(loader), solver))
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
        reporter.step(iteration, loss, optimizer.param_groups[0]["lr"])
    return reporter.mean_loss


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
    num_videos, num_classes = len(loader.dataset), config.data.num_classes
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    scores = torch.zeros(num_videos, num_classes, device=precision.device)
    counted = torch.zeros(num_videos, device=precision.device)
    model.eval()

    def logits_of(views: Tensor) -> Tensor:
        """uint8 (views, T, 3, H, W) -> float32 (views, K)."""
        clips = views.to(precision.device, non_blocking=True)
        any_process_works(model, precision.device, working=True)
        with precision.autocast():
            return model(normalize_clips(clips, mean, std)).float()

    total, quiet = math.ceil(num_videos / get_world_size()), None if get_rank() == 0 else True
    with tqdm(total=total, unit="video", disable=quiet) as progress:
        for batch in loader:
            if len(batch["indices"]) == 0:  # no video of the batch could be read
                continue
            logits = torch.cat([logits_of(views) for views in batch["clips"].split(config.test.view_batch)])
            indices = batch["indices"].to(precision.device, non_blocking=True)
            scores[indices] = logits.softmax(dim=-1).view(len(indices), -1, num_classes).mean(dim=1)
            counted[indices] += 1
            progress.update(len(indices))
        size = config.data.input_size
        while any_process_works(model, precision.device, working=False):
            model(torch.zeros(1, config.data.num_segments, 3, size, size, device=precision.device))

    for index, _ in loader.unreadable:
        scores[index] = math.nan
        counted[index] += 1
    all_reduce(scores)
    if not all_reduce(counted).eq(1).all():
        raise RuntimeError("a video was not counted exactly once; the evaluation loader is at fault")
    unreadable = sorted(gather(loader.unreadable))
    if len(unreadable) == num_videos:
        raise DataError(f"none of the {num_videos} videos can be read; the first: {unreadable[0][1]}")
    verdict = "no scores" if loader.dataset.labels[0] == UNLABELLED else "no scores, counted wrong"
    for _, reason in unreadable:
        log.info("%s: %s", verdict, reason)
    return scores.cpu().numpy()


def any_process_works(model: Side4Video, device: torch.device, working: bool) -> bool:
    """Whether any process still has views to score; False at once if the tower is not sharded.

    A sharded tower gathers each block from all processes in every forward pass, so all processes must run equally many.
    Every process calls this before each of its passes. One that has no views left runs passes on zeros, and ignores
    their result, until nobody works.
    """
    return model.sharded and all_reduce(torch.tensor(float(working), device=device)).item() > 0
