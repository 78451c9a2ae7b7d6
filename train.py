"""Train a side network beside a frozen tower.

sh scripts/run_train_vision.sh CONFIG [--output DIR] [key=value ...]
python train.py --config CONFIG [--output DIR] [key=value ...]        one device, no launcher
"""

import argparse
import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from dotmap import DotMap

from datasets.loaders import (
    VideoLoader,
    build_eval_loader,
    build_train_loader,
    check_shared_memory,
    naming_lost_workers,
)
from engine.checkpointing import Saver
from engine.configuration import read_config
from engine.loops import evaluate, train_one_epoch
from engine.memory import PeakReport, explaining_memory, settle_recompute
from engine.metrics_file import METRICS, MetricsFile, read_rows
from engine.plan import planned_training_peak
from engine.run import Run
from engine.run_folder import LOG, TABLE, Folder, open_run_folders
from engine.runs_table import table_lines, write_table
from engine.sinks import FOLDER, PICTURE, PictureFile, Sink, TensorBoard, TerminalSink, WeightsAndBiases
from engine.starts import Start, as_started, build_models, find_starts
from engine.summary import describe_runs
from engine.throughput import Throughput
from engine.training_state import is_evaluated
from modules.checkpoint import checkpoint_bytes
from modules.side4video import SharedTower, Side4Video
from modules.side_network import SideNetwork
from utils.distributed import (
    close_distributed,
    gather,
    get_rank,
    get_world_size,
    init_distributed,
    naming_lost_processes,
)
from utils.errors import ConfigError, run_program
from utils.logger import log_as, setup_logging
from utils.precision import prepare_precision

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
    """Run a whole training, or several beside one tower (`runs`).

    Returns the best validation top-1 in percent, of the best run, or None if nothing was evaluated.

    Args:
        config: of `read_config`.
        output: folder for checkpoints, log and the resolved configuration; None chooses one.
        allow_config_change: resume although keys have changed that change numbers.
    """
    device = init_distributed(config.solver.timeout_minutes)
    with naming_lost_processes(), open_run_folders(config, output) as (folder, folders):
        return train_in(folder, folders, config, device, allow_config_change)


def train_in(
    folder: Folder, folders: dict[str, Folder], config: DotMap, device: torch.device, allow_config_change: bool
) -> float | None:
    """`train` in the folders that this training has locked: that of all, and that of each run by name."""
    setup_logging(folder.path / LOG, {name: own.path / LOG for name, own in folders.items() if name})
    log.info("output: %s", folder.path)
    precision = prepare_precision(config.solver, device)

    # Where to start. It comes before the data: another number of processes changes the batch.
    starts = find_starts(config, {name: own.path for name, own in folders.items()}, allow_config_change)
    if all(start.done for start in starts):
        return best_of([start.checkpoint["best_accuracy"] for start in starts if start.checkpoint])
    for start, settled in zip(starts, settle_recompute([start.config for start in starts], device), strict=True):
        start.config = settled
    everyone, config = as_started(config, starts), starts[0].config  # of which only what all runs share is read

    # Data. It comes before the model: class names decide whether a checkpoint's head is kept.
    val_loader = build_eval_loader(config, get_rank(), get_world_size())
    class_names = val_loader.dataset.class_names

    # Models. They share a tower, and come from `build_models` as if each were alone.
    models, model_parts = build_models(starts, class_names)
    for model in models:
        model.place(device, config.network.shard_backbone, config.solver.compile)
        if get_world_size() > 1:
            model.parallelize()
    if config.solver.evaluate:
        alone = [Run(s.config, model, precision, name=s.name) for s, model in zip(starts, models, strict=True)]
        return best_of(validate(alone, val_loader, 0, 0).values())

    # Runs. Optimizers take the tensors where `place` has put them, and their state comes after the model's weights.
    train_loader = build_train_loader(config, get_rank(), get_world_size())
    check_shared_memory(train_loader, val_loader)
    dataset, throughput = train_loader.dataset, Throughput(config, device, train_loader.dataset)
    runs = []
    for start, model, model_part in zip(starts, models, model_parts, strict=True):
        check_batch(start.config, model)
        run = Run(start.config, model, precision, dataset, throughput, start.name)
        run.folder, run.model_part, run.class_names = folders[run.name].path, model_part, class_names
        runs.append(run)
    for name, line in describe_runs(runs, train_loader, val_loader):
        with log_as(name):
            log.info(line)
    peak = PeakReport(device, "a training step", partial(planned_training_peak, [run.config for run in runs]))
    for run, start in zip(runs, starts, strict=True):
        with log_as(run.name):
            begin(run, start, folders[run.name], len(train_loader), is_first=run is runs[0])
    folder.keep(everyone)

    # Epochs.
    with ExitStack() as ends, Saver(folder.path, config, runs, train_loader) as saver:
        for run in runs:
            ends.callback(run.reporter.close)
        for epoch in range(min(run.start for run in runs)[0], config.solver.epochs):
            for run in runs:
                run.end_if_finished(epoch)
            active = [run for run in runs if run.is_trained_in(epoch)]
            if not active:
                continue
            last = min(active, key=lambda run: run.first_step(epoch))
            train_loader.sampler.set_epoch(epoch, last.first_step(epoch) * config.data.batch_size)
            train_loader.carried = last.carried
            with (
                naming_lost_workers(train_loader),
                explaining_memory(config, device, training=True),
                saver.epoch(epoch) as after_update,
            ):
                train_one_epoch(active, train_loader, epoch, after_update)
            peak.done()
            report_videos(train_loader, epoch)
            for run in active:
                run.model.broadcast_buffers()

            if is_evaluated(epoch, config):
                saver.save(epoch, len(train_loader))  # a signal stops an evaluation at once
                validate_and_compare(active, val_loader, epoch, len(train_loader))
            for run in active:
                run.end_epoch(epoch)
            log.info("epoch %d: %s", epoch, runs[0].reporter.epoch_memory())
            saver.save(epoch + 1)
            if everyone.runs and get_rank() == 0:
                write_table(folder.path / TABLE, runs, everyone)
    if everyone.runs:
        for line in table_lines(runs, everyone):
            log.info(line)
    return best_of([run.progress.best for run in runs])


def best_of(accuracies: Iterable[float | None]) -> float | None:
    """The highest of the accuracies that there are."""
    return max((accuracy for accuracy in accuracies if accuracy is not None), default=None)


def begin(run: Run, start: Start, folder: Folder, iterations: int, is_first: bool) -> None:
    """Let a run go on from its checkpoint, if it is resumed, and open its files; `iterations` are those of an epoch.

    A terminal has one living line, that of the first run.
    """
    source, checkpoint = (start.source, start.checkpoint) if start.resumed else (None, None)
    if source is not None and checkpoint is not None:
        run.restore(checkpoint, source)
        folder.carry_best(source, run.progress)
    size = checkpoint_bytes(run.model, run.model_part, run.average is not None)
    folder.begin(run.config, size, source, checkpoint)
    sinks = open_sinks(run, iterations, is_first) if get_rank() == 0 else []
    run.reporter.attach(sinks, wants_batch=checkpoint is None or not (folder.path / PICTURE).exists())


def check_batch(config: DotMap, model: Side4Video) -> None:
    """Refuse a batch of one clip where the last BatchNorm would make every clip's mean feature the same."""
    shared = get_world_size() if config.solver.sync_bn else 1
    side = model.trained.side
    is_pre = isinstance(side, SideNetwork) and side.norm_placement == "pre"
    if config.data.batch_size * config.data.num_sample * shared == 1 and is_pre:
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


def validate_and_compare(runs: Sequence[Run], loader: VideoLoader, epoch: int, step: int) -> None:
    """Evaluate all runs in one pass of the tower, and the averages of those that have one in another."""
    for run, top1 in validate(runs, loader, epoch, step).items():
        run.take(epoch, top1)
    averaged = [run for run in runs if run.average is not None]
    if averaged:
        with ExitStack() as exchanges:
            for run in averaged:
                exchanges.enter_context(run.with_average())
            for run, top1 in validate(averaged, loader, epoch, step, averaged=True).items():
                run.take(epoch, top1, averaged=True)


def validate(
    runs: Sequence[Run], loader: VideoLoader, epoch: int, step: int, averaged: bool = False
) -> dict[Run, float]:
    """One view of every validation video; reports the metrics of each run, and returns its top-1 in percent."""
    config, precision = runs[0].config, runs[0].precision
    with naming_lost_workers(loader), explaining_memory(config, precision.device, training=False):
        scores = evaluate(SharedTower([run.model for run in runs]), loader, precision, config)
    found = {}
    for number, run in enumerate(runs):
        with log_as(run.name):
            row = run.reporter.validation(epoch, step, scores[:, number], loader.dataset.labels, averaged)
        found[run] = row["top1"]
    return found


def open_sinks(run: Run, iterations: int, living: bool) -> list[Sink]:
    """Where process 0 puts the rows of a run, beside the log; arguments as of `begin`."""
    folder, config = run.folder, run.config
    sinks: list[Sink] = [TerminalSink(config.solver.epochs)] if living else []
    sinks += [PictureFile(folder / PICTURE)]
    # TensorBoard reads the earlier rows of the file at the first new one, so it is told before the file.
    sinks += [TensorBoard(folder / FOLDER, iterations, lambda: read_rows(folder / METRICS), folder / PICTURE)]
    sinks += [MetricsFile(folder / METRICS)]
    if config.logging.wandb is not None:
        group = folder.parent.name if run.name else None
        sinks.append(WeightsAndBiases(config, folder, iterations, group))
    return sinks


if __name__ == "__main__":
    run_program(main)
