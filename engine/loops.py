"""One epoch of training, and one evaluation."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import torch
from dotmap import DotMap
from torch import Tensor, nn

from datasets.annotations import UNLABELLED
from datasets.batch_augment import BatchAugment
from datasets.loaders import VideoLoader
from datasets.transforms import normalize_clips
from datasets.video_dataset import VideoDataset
from engine.averaging import AveragedWeights
from engine.class_weights import class_weights, weighted_targets
from engine.device_copy import DeviceCopy
from engine.optim import lr_factor, set_learning_rate
from engine.reporter import Reporter
from engine.scores import PartialScores
from engine.view_details import VideoDetails
from modules.side4video import Side4Video
from utils.distributed import all_reduce, gather, get_rank, get_world_size
from utils.errors import DataError, UserError
from utils.launch import report_progress
from utils.precision import Precision
from utils.seeding import seed_everything
from utils.terminal import living_line

EVALUATION_LOGGED = 60.0  # seconds between lines about a long evaluation

log = logging.getLogger(__name__)


class NonFiniteScoresError(UserError):
    """The model gives NaN or infinity for a video that could be read."""


def train_one_epoch(
    model: Side4Video,
    loader: VideoLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    epoch: int,
    config: DotMap,
    reporter: Reporter | None = None,
    start: int = 0,
    after_update: Callable[[int], None] = lambda step: None,
    average: AveragedWeights | None = None,
) -> float:
    """Train for one epoch and return the mean loss over its last reported stretch.

    The loss is the cross entropy with the targets of `training_input`, each class weighted by `solver.class_weights`
    as `weighted_targets` says, and the mean over the clips of a batch.

    Every random draw of an iteration is a function of (seed, epoch, iteration, process), so an epoch that goes on in
    its middle draws what an unbroken one draws.

    Args:
        loader: of `build_train_loader`; its length is a multiple of `solver.grad_accumulation_steps`, so no gradient
            is left over at the end.
        reporter: that of the run; None makes one for this epoch alone.
        start: iterations of the epoch that are done already; the loader's sampler starts behind their videos.
        average: takes in the weights after each update.
        after_update: called after each update of the weights with the number of iterations done.

    Raises:
        NonFiniteLossError: at the next report after the step that it names.
    """
    data, solver, accumulation = config.data, config.solver, config.solver.grad_accumulation_steps
    augment = BatchAugment(data.num_classes, solver.smoothing, data.rand_erase, solver.mixup, precision.device)
    weights = class_weights(config, loader, precision.device)
    to_device = DeviceCopy(precision.device)
    reporter = reporter or Reporter(config, precision.device)
    reporter.start_epoch(epoch, len(loader), start)
    model.train()
    batches = iter(loader)
    for iteration in range(start, len(loader)):
        with reporter.phase("data"):
            batch = next(batches)
        with reporter.phase("copy"):
            clips, labels = to_device(batch["clips"]), to_device(batch["labels"])
        with reporter.phase("compute"):
            set_learning_rate(optimizer, lr_factor(epoch + iteration / len(loader), solver))
            clips, targets = training_input(clips, labels, augment, config, epoch, iteration)
            reporter.batch(clips, targets)
            if weights is not None:
                targets = weighted_targets(targets, weights, solver.smoothing)
            update = (iteration + 1) % accumulation == 0
            with nullcontext() if update else model.no_sync():
                with precision.autocast():
                    logits = model(clips)
                loss = nn.functional.cross_entropy(logits.float(), targets)
                scaler.scale(loss / accumulation).backward()
            if update:
                scaler.unscale_(optimizer)
                reporter.update(clip_gradients(model.trained, solver.clip_grad))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if average is not None:
                    average.update(model.trained)
        reporter.step(iteration, loss, optimizer.param_groups[0]["lr"])
        if update:
            after_update(iteration + 1)
    return reporter.mean_loss


def clip_gradients(module: nn.Module, largest: float | None) -> Tensor:
    """Scale the gradients down to the norm `largest`, if any; returns their norm before that, on the device."""
    if largest is not None:
        return nn.utils.clip_grad_norm_(module.parameters(), largest)
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def training_input(
    clips: Tensor, labels: Tensor, augment: BatchAugment, config: DotMap, epoch: int, iteration: int
) -> tuple[Tensor, Tensor]:
    """What enters the model in one iteration of training: normalised, erased and mixed.

    Seeds the global generators, also for what the model draws.

    Args:
        clips: uint8 (B, T, 3, H, W), as the loader gives them.
        labels: int64 (B,).

    Returns:
        clips: float32 (B, T, 3, H, W).
        targets: float32 (B, K), label-smoothed class probabilities.
    """
    seed_everything(config.seed, epoch, iteration, get_rank())
    clips = normalize_clips(clips, tuple(config.data.mean), tuple(config.data.std))
    return augment(clips, labels, config.seed, epoch, iteration, get_rank())


@torch.no_grad()
def evaluate(
    model: Side4Video,
    loader: VideoLoader,
    precision: Precision,
    config: DotMap,
    partial: PartialScores | None = None,
    details: VideoDetails | None = None,
) -> np.ndarray:
    """Mean over views of softmax(logits), for every video of the list.

    Each process scores its own videos; the rows are then put together, so every video is counted once on any number of
    processes.

    Args:
        loader: of `build_eval_loader`; `test.view_batch` of its views go through the model at once.
        partial: keeps scores on the disk while the evaluation runs. Those that it has already are taken from there;
            the loader leaves these videos out.
        details: filled with what is known of each video beside its scores.

    Returns:
        float32 (videos, K), in list order, on every process. A video that could not be read has NaNs, and a line in
        the log. Damaged videos have a line in the log too. Afterwards, `loader.unreadable` and `loader.damaged` hold
        the videos of all processes.

    Raises:
        DataError: no video at all could be read.
        NonFiniteScoresError: the scores of a video that could be read are not finite.
    """
    num_videos, num_classes = len(loader.dataset), config.data.num_classes
    scores = torch.zeros(num_videos, num_classes, device=precision.device)
    counted = torch.zeros(num_videos, device=precision.device)
    for index, row in partial.done.items() if partial and get_rank() == 0 else ():
        scores[index] = torch.from_numpy(row["scores"])
        counted[index] += 1
        if details:
            details.restore(index, row)
    total, done, said = math.ceil(num_videos / get_world_size()), 0, time.monotonic()
    with living_line(total, "evaluation: video", show=get_rank() == 0) as line:
        for batch, logits in view_outputs(model, loader, precision, config):
            indices = batch["indices"].to(precision.device, non_blocking=True)
            scores[indices] = view_scores(logits)
            counted[indices] += 1
            rows = details.add(batch, [view_scores(logits[:, list(s.views)]) for s in details.sets]) if details else {}
            if partial:
                partial.add(batch["indices"].tolist(), scores[indices].cpu().numpy(), dict(loader.damaged), rows)
            done += len(indices)
            line.update(len(indices))
            report_progress(f"evaluation, {done} videos done")
            if line.disable and time.monotonic() - said > EVALUATION_LOGGED:
                said = time.monotonic()
                log.info("evaluation: %d of %d videos of process %d done", done, total, get_rank())

    for index, _ in loader.unreadable:
        scores[index] = math.nan
        counted[index] += 1
    all_reduce(scores)
    if not all_reduce(counted).eq(1).all():
        raise RuntimeError("a video was not counted exactly once; the evaluation loader is at fault")
    loader.unreadable = unreadable = sorted(gather(loader.unreadable))
    done_before = list(partial.damaged.items()) if partial else []
    loader.damaged = sorted({*map(tuple, gather(loader.damaged)), *done_before})
    if details:
        details.finish(unreadable, loader.damaged, precision.device)
    refuse_non_finite(scores, {index for index, _ in unreadable}, loader.dataset)
    if len(unreadable) == num_videos:
        raise DataError(f"none of the {num_videos} videos can be read; the first: {unreadable[0][1]}")
    verdict = "no scores" if loader.dataset.labels[0] == UNLABELLED else "no scores, counted wrong"
    for _, reason in unreadable:
        log.info("%s: %s", verdict, reason)
    if number := len(loader.damaged):
        log.info("%d of %d videos are damaged, and what can be decoded of them is scored", number, num_videos)
    for _, reason in loader.damaged:
        log.info("scored in part: %s", reason)
    return scores.cpu().numpy()


def refuse_non_finite(scores: Tensor, unreadable: set[int], dataset: VideoDataset) -> None:
    """Raise NonFiniteScoresError if the scores of a readable video are not finite; arg-max over them means nothing."""
    bad = [index for index in (~scores.isfinite().all(dim=1)).nonzero().flatten().tolist() if index not in unreadable]
    if bad:
        raise NonFiniteScoresError(
            f"the scores of {len(bad)} of {len(scores) - len(unreadable)} readable videos are not finite, the first: "
            f"{dataset.records[bad[0]].name}; the weights are, or solver.precision is too coarse for them: try an "
            "earlier checkpoint, or solver.precision=fp32"
        )


@torch.no_grad()
def view_outputs(
    model: Side4Video,
    loader: VideoLoader,
    precision: Precision,
    config: DotMap,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """What `forward` makes of the views of this process's videos, batch by batch: the one loop of all evaluations.

    Args:
        loader: of `build_eval_loader` or `build_record_loader`; `test.view_batch` of its views go through at once.
        forward: maps normalised clips, float32 (views, T, 3, H, W), to a tensor (views, ...), under autocast; None
            takes the model, which gives logits. A model whose tower is sharded needs None.

    Yields:
        (batch, outputs): the loader's batch, and (videos, V, ...) on the device. A batch of which no video could be
        read is left out; `loader.unreadable` says why.
    """
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    forward, to_device = forward or model, DeviceCopy(precision.device)
    model.eval()

    def outputs_of(views: Tensor) -> Tensor:
        """uint8 (views, T, 3, H, W) -> (views, ...)."""
        clips = to_device(views)
        any_process_works(model, precision.device, working=True)
        with precision.autocast():
            return forward(normalize_clips(clips, mean, std))

    for batch in loader:
        if videos := len(batch["indices"]):
            outputs = torch.cat([outputs_of(views) for views in batch["clips"].split(config.test.view_batch)])
            yield batch, outputs.unflatten(0, (videos, -1))
    size = config.data.input_size
    while any_process_works(model, precision.device, working=False):
        model(torch.zeros(1, config.data.num_segments, 3, size, size, device=precision.device))


def view_scores(logits: Tensor) -> Tensor:
    """Logits of the views of each video, (videos, V, K) -> float32 (videos, K), the mean over views of the softmax."""
    return logits.float().softmax(dim=-1).mean(dim=1)


def any_process_works(model: Side4Video, device: torch.device, working: bool) -> bool:
    """Whether any process still has views to score; False at once if the tower is not sharded.

    A sharded tower gathers each block from all processes in every forward pass, so all processes must run equally many.
    Every process calls this before each of its passes. One that has no views left runs passes on zeros, and ignores
    their result, until nobody works.
    """
    return model.sharded and all_reduce(torch.tensor(float(working), device=device)).item() > 0
