"""Train a side network beside a frozen tower.

sh scripts/run_train_vision.sh CONFIG [--output DIR] [key=value ...]
python train.py --config CONFIG [--output DIR] [key=value ...]        one device, no launcher
"""

import argparse
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from dotmap import DotMap

from datasets.decoders import describe_decoder
from datasets.loaders import VideoLoader, build_eval_loader, build_train_loader
from engine.class_names import class_order, names_differ
from engine.configuration import read_config
from engine.loops import evaluate, train_one_epoch
from engine.metrics import topk_accuracy
from engine.optim import build_optimizer
from engine.summary import describe_run
from engine.throughput import Throughput
from modules import build_model
from modules.checkpoint import (
    checkpoint_state,
    describe_checkpoint,
    holds_tower,
    is_released,
    load_model_state,
    model_state,
    read_checkpoint,
    save_checkpoint,
)
from modules.side4video import Side4Video
from utils.atomic import write_atomically
from utils.distributed import close_distributed, from_first, gather, get_rank, get_world_size, init_distributed
from utils.errors import CheckpointError, ConfigError, run_program
from utils.logger import setup_logging
from utils.precision import resolve_precision
from utils.seeding import seed_everything

LAST, BEST = "last_model.pt", "model_best.pt"

log = logging.getLogger("train")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="train.py", description="Train a side network beside a frozen tower.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see docs/configuration.md")
    parser.add_argument("--output", metavar="DIR", help="default: exp_onehot/<dataset>/<arch>/<time>")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.config, args.overrides, purpose="train")
    train(config, args.output)
    close_distributed()


def train(config: DotMap, output: str | None = None, build: Callable[..., Side4Video] = build_model) -> float | None:
    """Run the whole training and return the best validation top-1 in percent, None if nothing was evaluated.

    Args:
        config: of `load_config`.
        output: folder for checkpoints, log and the resolved configuration.
        build: what makes the model of a configuration; experiments pass their own.
    """
    device = init_distributed()
    output = from_first(prepare_output(config, output) if get_rank() == 0 else None)
    setup_logging(output / "train.log")
    log.info("output: %s", output)

    val_loader = build_eval_loader(config, get_rank(), get_world_size())
    class_names = val_loader.dataset.class_names
    seed_everything(config.seed)
    source = config.resume or config.pretrain
    start = read_checkpoint(source) if source else None
    model = build(config, load_tower=start is None or not holds_tower(start))
    if start is not None:
        load_start(model, start, source, config, class_names)
    frozen = {} if config.solver.evaluate or get_rank() > 0 else model_state(model)
    model.place(device, config.network.shard_backbone, config.solver.compile)
    if get_world_size() > 1:
        model.parallelize()

    precision = resolve_precision(config.solver.precision, device)
    if config.solver.evaluate:
        return validate(model, val_loader, precision, config)
    check_batch(config, model)
    train_loader = build_train_loader(config, get_rank(), get_world_size())
    optimizer, scaler = build_optimizer(model, config), precision.grad_scaler()
    for line in describe_run(config, model, train_loader, val_loader, precision):
        log.info(line)

    first_epoch, best = config.solver.start_epoch, None
    if config.resume:
        first_epoch, best = resume(start, optimizer, scaler, config)
    throughput = Throughput(config, device, train_loader.dataset)
    for epoch in range(first_epoch, config.solver.epochs):
        seed_everything(config.seed, epoch, get_rank())
        train_loader.sampler.set_epoch(epoch)
        loss = train_one_epoch(model, train_loader, optimizer, scaler, precision, epoch, config, throughput)
        report_replaced(train_loader, epoch)
        model.broadcast_buffers()

        accuracy = validate(model, val_loader, precision, config) if is_evaluated(epoch, config) else None
        improved = accuracy is not None and (best is None or accuracy > best)
        best = accuracy if improved else best
        log.info("epoch %d done: loss %.4f, best top-1 %s", epoch, loss, percent(best))
        if get_rank() == 0:
            state = checkpoint_state(
                frozen,
                model.trained.state_dict(),
                config.toDict(),
                class_names,
                epoch=epoch + 1,
                best_accuracy=best,
                decoder=describe_decoder(config.data),
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
            )
            save_checkpoint(output / LAST, state)
            if improved:
                write_atomically(output / BEST, lambda file: copy_into(output / LAST, file))
    return best


def load_start(
    model: Side4Video, start: dict[str, Any], source: str, config: DotMap, class_names: list[str] | None
) -> None:
    """Fill the model from the checkpoint of `resume` or `pretrain`.

    Only a new training may go on to another input size, or to other classes, for which the head is made anew.
    """
    new = not config.resume and not config.solver.evaluate
    head_kept = load_model_state(model, start, source, new_head=new, new_size=not config.resume)
    log.info(describe_checkpoint(start, source))
    if head_kept and new and names_differ(class_names, start.get("class_names")):
        model.trained.head.reset_parameters()
        log.info("pretrain: %s was trained on other class names; the head is made anew", source)
    elif head_kept:
        class_order(class_names, start.get("class_names"), source)


def check_batch(config: DotMap, model: Side4Video) -> None:
    """Refuse a batch of one clip where the last BatchNorm would make every clip's mean feature the same."""
    shared = get_world_size() if config.solver.sync_bn else 1
    if config.data.batch_size * config.data.num_sample * shared == 1 and model.trained.side.norm_placement == "pre":
        raise ConfigError(
            "data.batch_size: a process needs at least 2 clips in a batch, or solver.sync_bn and other processes: over "
            "a single clip, the BatchNorm after the last side block leaves the same mean feature whatever the clip "
            "shows, and nothing is learnt"
        )


def prepare_output(config: DotMap, output: str | None) -> Path:
    """Make the run's folder, with the resolved configuration in it; one with another run's checkpoint is refused."""
    architecture = config.network.arch.replace("/", "-")
    default = Path("exp_onehot", config.data.dataset, architecture, time.strftime("%Y%m%d_%H%M%S"))
    folder = Path(output) if output else default
    goes_on = config.resume and Path(config.resume).resolve().parent == folder.resolve()
    if (folder / LAST).exists() and not goes_on:
        raise ConfigError(
            f"--output {folder}: holds {LAST} of another run; choose another folder, or resume={folder / LAST}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.toDict(), sort_keys=False)
    write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
    return folder


def resume(checkpoint: dict[str, Any], optimizer: Any, scaler: Any, config: DotMap) -> tuple[int, float | None]:
    """Restore optimizer and scaler; rates and decays stay this configuration's. Returns (next epoch, best top-1)."""
    if "optimizer" not in checkpoint:
        kind = "released" if is_released(checkpoint) else "converted"
        raise CheckpointError(f"{config.resume}: a {kind} checkpoint can only be started from, by pretrain")
    for key, old, new in differences(checkpoint["config"], config.toDict()):
        log.warning("resume: %s was %s and is %s now", key, old, new)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
    scaler.load_state_dict(checkpoint["scaler"])
    log.info("resume: epoch %d, best top-1 so far %s", checkpoint["epoch"], percent(checkpoint["best_accuracy"]))
    return checkpoint["epoch"], checkpoint["best_accuracy"]


def percent(accuracy: float | None) -> str:
    return "none yet" if accuracy is None else f"{accuracy:.2f}"


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Keys whose values changed between two resolved configurations, but for `resume` itself."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.")
        elif a != b and name not in ("resume", "pretrain"):
            found.append((name, a, b))
    return found


def report_replaced(loader: VideoLoader, epoch: int) -> None:
    """Log the videos of all processes that could not be read, which `data.on_error: skip` replaced."""
    if unreadable := dict(sorted(gather(loader.unreadable))):
        first = "; ".join(list(unreadable.values())[:3])
        log.info("epoch %d: %d training videos could not be read and were replaced: %s", epoch, len(unreadable), first)


def is_evaluated(epoch: int, config: DotMap) -> bool:
    """Every `eval_freq` epochs and after the last one, but never an epoch of `skip_epoch`."""
    due = (epoch + 1) % config.logging.eval_freq == 0 or epoch + 1 == config.solver.epochs
    return due and epoch not in config.logging.skip_epoch


def validate(model: Side4Video, loader: Any, precision: Any, config: DotMap) -> float:
    """One view of every validation video; logs and returns top-1 in percent."""
    scores = evaluate(model, loader, precision, config)
    top1, top5 = (topk_accuracy(scores, loader.dataset.labels, k) for k in (1, 5))
    log.info("validation: top-1 %.2f, top-5 %.2f on %d videos", top1, top5, len(scores))
    return top1


def copy_into(path: Path, file: Any) -> None:
    with open(path, "rb") as source:
        shutil.copyfileobj(source, file)


if __name__ == "__main__":
    run_program(main)
