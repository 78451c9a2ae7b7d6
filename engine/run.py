"""One training: what is trained, its optimizer, schedule, average and reporter.

Several trainings may share the tower and the batches (`runs`). Each is then one `Run`, and none depends on another: the
loop of an epoch (engine/loops.py) asks one after the other.

B clips, T frames, N patches, D tower width, H, W pixels, K classes.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dotmap import DotMap
from torch import Tensor, nn

from datasets.decoders import describe_decoder
from datasets.loaders import VideoLoader
from datasets.video_dataset import VideoDataset
from engine.averaging import AveragedWeights
from engine.class_weights import class_weights, weighted_targets
from engine.optim import build_optimizer, load_optimizer, lr_factor, set_learning_rate
from engine.reporter import Reporter
from engine.run_folder import BEST, BEST_EMA
from engine.throughput import Throughput
from engine.training_state import (
    EMPTY_REPORT,
    Progress,
    finished,
    improved_epoch,
    merged,
    percent,
    refuse_other_average,
    refuse_other_shapes,
)
from modules.checkpoint import checkpoint_state
from modules.side4video import Side4Video
from utils.distributed import get_rank, get_world_size
from utils.logger import log_as
from utils.precision import Precision

log = logging.getLogger(__name__)


class Run:
    """What one training consists of beside the data and the frozen tower.

    Attributes:
        name: in `runs`; empty for a training alone.
        config: resolved.
        model, optimizer, scaler, reporter: the parts.
        average: that of `solver.ema`, or None.
        progress: how far the training is.
        start: epochs finished, and iterations of the next one, when the training started. Where others start earlier,
            the run waits until they are there.
        ended: `solver.patience` has ended it.
        carried: after `restore` inside an epoch, for `VideoLoader.carried`.
        best_files: names of the best checkpoints that the next checkpoint is written to too.
        folder: where its files are.
        model_part: the tower's entries of a checkpoint, see `modules.checkpoint.model_state`; used on process 0.
    """

    def __init__(
        self,
        config: DotMap,
        model: Side4Video,
        precision: Precision,
        dataset: VideoDataset | None = None,
        throughput: Throughput | None = None,
        name: str = "",
    ):
        """
        Args:
            model: on its device.
            dataset: of the training, for the reporter.
            throughput: that of the steps, where several runs share them.
        """
        self.name, self.config, self.model, self.precision = name, config, model, precision
        self.optimizer = build_optimizer(model, config)
        self.scaler = precision.grad_scaler()
        ema = config.solver.ema
        self.average = None if ema is None else AveragedWeights(model.trained, ema)
        self.reporter = Reporter(config, precision.device, dataset, throughput)
        self.progress = Progress(epoch=config.solver.start_epoch)
        self.start = self.progress.epoch, self.progress.step
        self.ended = False
        self.carried: dict[str, list[tuple[int, str]]] = {}
        self.best_files: list[str] = []
        self.folder = Path()
        self.model_part: dict[str, Any] = {}
        self.class_names: list[str] | None = None

    def first_step(self, epoch: int) -> int:
        """Iterations of an epoch that are done already."""
        return self.start[1] if self.start[0] == epoch else 0

    def is_trained_in(self, epoch: int) -> bool:
        """Whether the run has something to do in an epoch: it was not beyond it at the start, and has not ended."""
        return not self.ended and self.start[0] <= epoch

    def has_moved(self, epoch: int, step: int) -> bool:
        """Whether the run was trained on its way to this point."""
        return not self.ended and self.start < (epoch, step)

    def restore(self, checkpoint: dict[str, Any], source: str | Path) -> None:
        """Go on from a checkpoint: optimizer, scaler, average, progress, and what there is to say of the epoch so far.

        The model's weights are loaded before, by `load_start`. Learning rates and weight decay stay those of `config`.

        Raises:
            CheckpointError: the optimizer's state does not fit the model.
        """
        refuse_other_shapes(checkpoint["optimizer"], self.optimizer, source)
        load_optimizer(self.optimizer, checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        old_accumulation = checkpoint["config"]["solver"]["grad_accumulation_steps"]
        updates = checkpoint.get("step", 0) // old_accumulation
        self.progress = Progress(
            epoch=checkpoint["epoch"],
            step=updates * self.config.solver.grad_accumulation_steps,
            best=checkpoint["best_accuracy"],
            best_ema=checkpoint.get("best_accuracy_ema"),
            improved=improved_epoch(checkpoint),
        )
        if self.average is not None and (averaged := checkpoint.get("ema")) is not None:
            refuse_other_average(averaged, self.average, source)
            self.average.load_state_dict(averaged)
        if self.progress.step:
            states = checkpoint["progress"]
            if len(states) == get_world_size():
                own = states[get_rank()]
            else:  # the sums of all processes are added at the next report, so process 0 may hold them all
                own = merged(states) if get_rank() == 0 else EMPTY_REPORT
            self.reporter.load_state_dict(own)
            self.carried = {name: [tuple(video) for video in own.get(name, [])] for name in ("unreadable", "damaged")}
        best = percent(self.progress.best)
        self.start = self.progress.epoch, self.progress.step
        log.info("resume: %s: epoch %d, step %d, best top-1 so far %s", source, *self.start, best)

    def start_epoch(self, epoch: int, loader: VideoLoader) -> None:
        """Call it before the first `step` of an epoch."""
        self._class_weights = class_weights(self.config, loader, self.precision.device)
        self.reporter.start_epoch(epoch, len(loader), self.first_step(epoch))
        self.model.train()

    def step(
        self, clips: Tensor, layer_tokens: Iterable[Tensor], targets: Tensor, moment: float, update: bool
    ) -> Tensor:
        """One iteration: add the gradient of a batch, and update the weights if it is the last of its update.

        Args:
            clips: normalised, float32 (B, T, 3, H, W).
            layer_tokens: of the tower for these clips, (B, T, 1 + N, D) for each layer of the model.
            targets: float32 (B, K).
            moment: epoch + iteration / iterations per epoch.

        Returns:
            the loss, without dimensions.
        """
        solver = self.config.solver
        set_learning_rate(self.optimizer, lr_factor(moment, solver))
        self.reporter.batch(clips, targets)
        if self._class_weights is not None:
            targets = weighted_targets(targets, self._class_weights, solver.smoothing)
        with nullcontext() if update else self.model.no_sync():
            with self.precision.autocast():
                logits = self.model(clips, layer_tokens)
            loss = nn.functional.cross_entropy(logits.float(), targets)
            self.scaler.scale(loss / solver.grad_accumulation_steps).backward()
        if update:
            self._update()
        return loss

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        self.reporter.update(clip_gradients(self.model.trained, self.config.solver.clip_grad))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model.trained)

    def end_step(self, iteration: int, loss: Tensor) -> None:
        """Report an iteration; raises NonFiniteLossError as `Reporter.step`."""
        with log_as(self.name):
            self.reporter.step(iteration, loss, self.optimizer.param_groups[0]["lr"])

    def end_if_finished(self, epoch: int) -> None:
        """Before an epoch: `solver.patience` may have ended the run."""
        why = finished(epoch, self.progress.improved, self.config) if self.start <= (epoch, 0) else None
        if why and not self.ended:
            with log_as(self.name):
                log.info("finished: %s", why)
        self.ended = self.ended or why is not None

    def take(self, epoch: int, top1: float, averaged: bool = False) -> None:
        """Take in a validation of the weights, or of their average; the next checkpoint may be the best one."""
        if self.progress.take(epoch, top1, averaged):
            self.best_files.append(BEST_EMA if averaged else BEST)

    @contextmanager
    def with_average(self) -> Iterator[None]:
        """Inside, the model computes with its average, on all processes with that of process 0."""
        assert self.average is not None
        with self.average.in_place_of(self.model.trained):
            self.model.broadcast_buffers()
            yield

    def end_epoch(self, epoch: int) -> None:
        """An epoch is trained and evaluated."""
        best, best_ema = percent(self.progress.best), percent(self.progress.best_ema)
        of_average = "" if self.average is None else f", of the average {best_ema}"
        with log_as(self.name):
            log.info("epoch %d done: loss %.4f, best top-1 %s%s", epoch, self.reporter.mean_loss, best, of_average)
        self.progress.epoch, self.progress.step, self.carried = epoch + 1, 0, {}

    def state(self, epoch: int, step: int, reports: list[dict[str, Any]]) -> dict[str, Any]:
        """The entries of a checkpoint.

        Args:
            epoch, step: epochs finished, and iterations of the next one.
            reports: for each process, what `restore_training` gives back to reporter and loader.
        """
        progress = self.progress
        return checkpoint_state(
            self.model_part,
            self.model.trained.state_dict(),
            self.config.toDict(),
            self.class_names,
            epoch=epoch,
            step=step,
            progress=reports,
            world_size=get_world_size(),
            best_accuracy=progress.best,
            decoder=describe_decoder(self.config.data),
            ema=None if self.average is None else self.average.state_dict(),
            best_accuracy_ema=progress.best_ema,
            improved=progress.improved,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
        )


def clip_gradients(module: nn.Module, largest: float | None) -> Tensor:
    """Scale the gradients down to the norm `largest`, if any; returns their norm before that, on the device."""
    if largest is not None:
        return nn.utils.clip_grad_norm_(module.parameters(), largest)
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
