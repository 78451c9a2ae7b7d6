"""One epoch of training, and one evaluation."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from dotmap import DotMap
from torch import Tensor

from datasets.annotations import UNLABELLED
from datasets.batch_augment import BatchAugment
from datasets.loaders import VideoLoader
from datasets.transforms import normalize_clips
from datasets.video_dataset import VideoDataset
from engine.device_copy import DeviceCopy
from engine.run import Run
from engine.scores import PartialScores
from engine.view_details import VideoDetails
from modules.side4video import SharedTower, Side4Video, token_streams
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
    runs: Sequence[Run],
    loader: VideoLoader,
    epoch: int,
    after_update: Callable[[int], None] = lambda step: None,
) -> None:
    """Train for one epoch, each run from the step on that it has not done yet.

    The loss is the cross entropy with the targets of `training_input`, each class weighted by `solver.class_weights`
    as `weighted_targets` says, and the mean over the clips of a batch.

    Every random draw of an iteration is a function of (seed, epoch, iteration, process), so an epoch that goes on in
    its middle draws what an unbroken one draws, and a run draws the same whatever other runs there are.

    The tower's tokens are kept until the last run has used them. Each run goes forward and backward before the next, so
    the activations of one run at a time are in memory.

    Args:
        runs: their models share one tower, and their configurations differ in keys of `OWN_KEYS` only.
        loader: of `build_train_loader`; its length is a multiple of `solver.grad_accumulation_steps`, so no gradient
            is left over at the end. Its sampler starts behind the videos that all runs have done.
        after_update: called after each update of the weights with the number of iterations done.

    Raises:
        NonFiniteLossError: at the next report after the step that it names.
    """
    config, device, throughput = runs[0].config, runs[0].precision.device, runs[0].reporter.throughput
    data, solver = config.data, config.solver
    augment = BatchAugment(data.num_classes, solver.smoothing, data.rand_erase, solver.mixup, device)
    to_device = DeviceCopy(device)
    for run in runs:
        run.start_epoch(epoch, loader)
    batches = iter(loader)
    for iteration in range(min(run.first_step(epoch) for run in runs), len(loader)):
        active = [run for run in runs if run.first_step(epoch) <= iteration]
        update = (iteration + 1) % solver.grad_accumulation_steps == 0
        with throughput.phase("data"):
            batch = next(batches)
        with throughput.phase("copy"):
            clips, labels = to_device(batch["clips"]), to_device(batch["labels"])
        with throughput.phase("compute"):
            clips, targets = training_input(clips, labels, augment, config, epoch, iteration)
            streams = token_streams(active[0].model.backbone, clips, [run.model.layers for run in active])
            losses = []
            for run, tokens in zip(active, streams, strict=True):
                own = run.config.solver.smoothing
                targets_of_run = targets if own == solver.smoothing else augment.targets(labels, own)
                with same_draws(device) if len(active) > 1 else nullcontext():
                    losses.append(run.step(clips, tokens, targets_of_run, epoch + iteration / len(loader), update))
        throughput.end_step()
        for run, loss in zip(active, losses, strict=True):
            run.end_step(iteration, loss)
        if update:
            after_update(iteration + 1)


def same_draws(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside from PyTorch's generators, as by dropout, is drawn again afterwards."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


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
    model: Side4Video | SharedTower,
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
        float32 (videos, K) in list order, or (videos, R, K) of R models, on every process. A video that could not be
        read has NaNs, and a line in the log. Damaged videos have a line in the log too. Afterwards,
        `loader.unreadable` and `loader.damaged` hold the videos of all processes.

    Raises:
        DataError: no video at all could be read.
        NonFiniteScoresError: the scores of a video that could be read are not finite.
    """
    num_videos = len(loader.dataset)
    scores = torch.zeros(num_videos, *model.outputs, device=precision.device)
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
    bad = [
        index
        for index in (~scores.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if index not in unreadable
    ]
    if bad:
        raise NonFiniteScoresError(
            f"the scores of {len(bad)} of {len(scores) - len(unreadable)} readable videos are not finite, the first: "
            f"{dataset.records[bad[0]].name}; the weights are, or solver.precision is too coarse for them: try an "
            "earlier checkpoint, or solver.precision=fp32"
        )


@torch.no_grad()
def view_outputs(
    model: Side4Video | SharedTower,
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
    """Logits of the views of each video, (videos, V, ..., K) -> float32 (videos, ..., K), the mean of the softmax."""
    return logits.float().softmax(dim=-1).mean(dim=1)


def any_process_works(model: Side4Video | SharedTower, device: torch.device, working: bool) -> bool:
    """Whether any process still has views to score; False at once if the tower is not sharded.

    A sharded tower gathers each block from all processes in every forward pass, so all processes must run equally many.
    Every process calls this before each of its passes. One that has no views left runs passes on zeros, and ignores
    their result, until nobody works.
    """
    return model.sharded and all_reduce(torch.tensor(float(working), device=device)).item() > 0
