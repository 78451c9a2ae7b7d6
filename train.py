"""Train a side network beside a frozen tower.

sh scripts/run_train_vision.sh CONFIG [--output DIR] [key=value ...]
python train.py --config CONFIG [--output DIR] [key=value ...]        one device, no launcher
"""

import argparse
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from dotmap import DotMap

from datasets.decoders import describe_decoder
from datasets.loaders import (
    VideoLoader,
    build_eval_loader,
    build_train_loader,
    check_shared_memory,
    naming_lost_workers,
)
from engine.averaging import AveragedWeights
from engine.checkpointing import Saver
from engine.configuration import read_config
from engine.loops import evaluate, train_one_epoch
from engine.memory import PeakReport, explaining_memory
from engine.metrics_file import METRICS, MetricsFile, read_rows
from engine.optim import build_optimizer
from engine.reporter import Reporter
from engine.run_folder import BEST, BEST_EMA, LOG, FollowedFolder, RunFolder, find_start, open_run_folder
from engine.sinks import FOLDER, PICTURE, PictureFile, Sink, TensorBoard, TerminalSink, WeightsAndBiases
from engine.summary import describe_run
from engine.training_state import (
    Progress,
    finished,
    improved_epoch,
    is_evaluated,
    keep_global_batch,
    load_start,
    percent,
    refuse_changes,
    refuse_without_optimizer,
    restore_training,
)
from modules import build_model
from modules.checkpoint import checkpoint_bytes, checkpoint_state, holds_tower, model_state
from modules.side4video import Side4Video
from utils.distributed import (
    close_distributed,
    gather,
    get_rank,
    get_world_size,
    init_distributed,
    naming_lost_processes,
)
from utils.errors import ConfigError, run_program
from utils.logger import setup_logging
from utils.precision import Precision, prepare_precision
from utils.seeding import seed_everything

log = logging.getLogger("train")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="train.py", description="Train a side network beside a frozen tower.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see docs/configuration.md")
    parser.add_argument("--output", metavar="DIR", help="default: exp_onehot/<dataset>/<arch>/<time>")
    parser.add_argument(
        "--allow_config_change", action="store_true", help="resume although keys that change numbers have changed"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.config, args.overrides, purpose="train", complete=True)
    train(config, args.output, args.allow_config_change)
    close_distributed()


def train(config: DotMap, output: str | None = None, allow_config_change: bool = False) -> float | None:
    """Run a whole training. Returns the best validation top-1 in percent, None if nothing was evaluated.

    Args:
        config: of `read_config`.
        output: folder for checkpoints, log and the resolved configuration; None chooses one.
        allow_config_change: resume although keys have changed that change numbers.
    """
    device = init_distributed(config.solver.timeout_minutes)
    with naming_lost_processes(), open_run_folder(config, output) as folder:
        return train_in(folder, config, device, allow_config_change)


def train_in(
    folder: RunFolder | FollowedFolder, config: DotMap, device: torch.device, allow_config_change: bool
) -> float | None:
    """`train` in a folder that this run has locked."""
    setup_logging(folder.path / LOG)
    log.info("output: %s", folder.path)
    precision, only_evaluate = prepare_precision(config.solver, device), config.solver.evaluate

    # Where to start. It comes before the data: another number of processes changes the batch.
    source, start = find_start(config, folder.path)
    if only_evaluate and start is None:
        raise ConfigError("solver.evaluate: there is no checkpoint to evaluate; set resume or pretrain")
    resumed = start is not None and config.resume is not None
    if resumed and not only_evaluate:
        refuse_without_optimizer(start, source)
        config = keep_global_batch(start, source, config, get_world_size())
        refuse_changes(start, source, config, allow_config_change)
        if start.get("step", 0) == 0 and (why := finished(start["epoch"], improved_epoch(start), config)):
            log.info("finished: %s", why)
            return start["best_accuracy"]

    # Data. It comes before the model: class names decide whether a checkpoint's head is kept.
    val_loader = build_eval_loader(config, get_rank(), get_world_size())
    class_names = val_loader.dataset.class_names

    # Model. Seeded here, so that its weights do not depend on anything drawn before.
    seed_everything(config.seed)
    model = build_model(config, load_tower=start is None or not holds_tower(start))
    if start is not None:
        load_start(model, start, source, class_names, new_head=not resumed and not only_evaluate, new_size=not resumed)
    # Hashes need whole tensors, so they are taken before `place` shards the tower.
    model_part = model_state(model) if get_rank() == 0 and not only_evaluate else {}
    model.place(device, config.network.shard_backbone, config.solver.compile)
    if get_world_size() > 1:
        model.parallelize()
    if only_evaluate:
        return validate(model, val_loader, precision, config, Reporter(config, device), 0, 0)

    # Optimizer. It takes the tensors where `place` has put them, and its state comes after the model's weights.
    check_batch(config, model)
    train_loader = build_train_loader(config, get_rank(), get_world_size())
    check_shared_memory(train_loader, val_loader)
    optimizer, scaler = build_optimizer(model, config), precision.grad_scaler()
    average = None if config.solver.ema is None else AveragedWeights(model.trained, config.solver.ema)
    reporter = Reporter(config, device, train_loader.dataset)
    for line in describe_run(config, model, train_loader, val_loader, precision, folder.path):
        log.info(line)
    peak = PeakReport(config, device)
    progress = Progress(epoch=config.solver.start_epoch)
    if resumed:
        progress = restore_training(start, source, optimizer, scaler, reporter, train_loader, config, average)
        folder.carry_best(source, progress)
    sinks = open_sinks(folder.path, config, len(train_loader)) if get_rank() == 0 else []
    size = checkpoint_bytes(model, model_part, average is not None)
    folder.begin(config, size, source if resumed else None, start if resumed else None)
    reporter.attach(sinks, wants_batch=not resumed or not (folder.path / PICTURE).exists())

    def state(epoch: int, step: int, reports: list[dict[str, Any]]) -> dict[str, Any]:
        return checkpoint_state(
            model_part,
            model.trained.state_dict(),
            config.toDict(),
            class_names,
            epoch=epoch,
            step=step,
            progress=reports,
            world_size=get_world_size(),
            best_accuracy=progress.best,
            decoder=describe_decoder(config.data),
            ema=None if average is None else average.state_dict(),
            best_accuracy_ema=progress.best_ema,
            improved=progress.improved,
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
        )

    # Epochs.
    with closing(reporter), Saver(folder.path, config, state, reporter, train_loader) as saver:
        for epoch in range(progress.epoch, config.solver.epochs):
            if why := finished(epoch, progress.improved, config) if progress.step == 0 else None:
                log.info("finished: %s", why)
                break
            first, progress.step = progress.step, 0
            train_loader.sampler.set_epoch(epoch, first * config.data.batch_size)
            with (
                naming_lost_workers(train_loader),
                explaining_memory(config, device, training=True),
                saver.epoch(epoch) as after_update,
            ):
                loss = train_one_epoch(
                    model,
                    train_loader,
                    optimizer,
                    scaler,
                    precision,
                    epoch,
                    config,
                    reporter,
                    first,
                    after_update,
                    average,
                )
            peak.epoch_done()
            report_videos(train_loader, epoch)
            model.broadcast_buffers()

            best_files = []
            if is_evaluated(epoch, config):
                place = (reporter, epoch, len(train_loader))
                saver.save(epoch, len(train_loader))  # a signal stops an evaluation at once
                if progress.take(epoch, validate(model, val_loader, precision, config, *place)):
                    best_files.append(BEST)
                if average is not None:
                    with average.in_place_of(model.trained):
                        model.broadcast_buffers()
                        top1 = validate(model, val_loader, precision, config, *place, averaged=True)
                    if progress.take(epoch, top1, averaged=True):
                        best_files.append(BEST_EMA)
            of_average = "" if average is None else f", of the average {percent(progress.best_ema)}"
            log.info("epoch %d done: loss %.4f, best top-1 %s%s", epoch, loss, percent(progress.best), of_average)
            log.info("epoch %d: %s", epoch, reporter.epoch_memory())
            saver.save(epoch + 1, best_files=best_files)
    return progress.best


def check_batch(config: DotMap, model: Side4Video) -> None:
    """Refuse a batch of one clip where the last BatchNorm would make every clip's mean feature the same."""
    shared = get_world_size() if config.solver.sync_bn else 1
    if config.data.batch_size * config.data.num_sample * shared == 1 and model.trained.side.norm_placement == "pre":
        raise ConfigError(
            "data.batch_size: a process needs at least 2 clips in a batch, or solver.sync_bn and other processes: over "
            "a single clip, the BatchNorm after the last side block leaves the same mean feature whatever the clip "
            "shows, and nothing is learnt"
        )


def report_videos(loader: VideoLoader, epoch: int) -> None:
    """Log the videos of all processes that `data.on_error: skip` replaced, and the damaged ones."""
    for videos, what in (
        (loader.unreadable, "could not be read and were replaced"),
        (loader.damaged, "are damaged, and what can be decoded of them was used"),
    ):
        if met := dict(sorted(gather(videos))):
            first = "; ".join(list(met.values())[:3])
            log.info("epoch %d: %d training videos %s: %s", epoch, len(met), what, first)


def validate(
    model: Side4Video,
    loader: VideoLoader,
    precision: Precision,
    config: DotMap,
    reporter: Reporter,
    epoch: int,
    step: int,
    averaged: bool = False,
) -> float:
    """One view of every validation video; reports the metrics and returns top-1 in percent."""
    with naming_lost_workers(loader), explaining_memory(config, precision.device, training=False):
        scores = evaluate(model, loader, precision, config)
    return reporter.validation(epoch, step, scores, loader.dataset.labels, averaged)["top1"]


def open_sinks(folder: Path, config: DotMap, iterations: int) -> list[Sink]:
    """Where process 0 puts the rows of a training, beside the log. `iterations` are those of an epoch."""
    sinks: list[Sink] = [TerminalSink(config.solver.epochs), PictureFile(folder / PICTURE)]
    # TensorBoard reads the earlier rows of the file at the first new one, so it is told before the file.
    sinks += [TensorBoard(folder / FOLDER, iterations, lambda: read_rows(folder / METRICS), folder / PICTURE)]
    sinks += [MetricsFile(folder / METRICS)]
    if config.logging.wandb is not None:
        sinks.append(WeightsAndBiases(config, folder, iterations))
    return sinks


if __name__ == "__main__":
    run_program(main)
