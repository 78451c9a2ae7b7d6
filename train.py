"""Train a side network beside a frozen tower.

sh scripts/run_train_vision.sh CONFIG [--output DIR] [key=value ...]
python train.py --config CONFIG [--output DIR] [key=value ...]        one device, no launcher
"""

import argparse
import logging

from dotmap import DotMap

from datasets.decoders import describe_decoder
from datasets.loaders import VideoLoader, build_eval_loader, build_train_loader
from engine.configuration import read_config
from engine.loops import evaluate, train_one_epoch
from engine.metrics import topk_accuracy
from engine.optim import build_optimizer
from engine.reporter import Reporter
from engine.run_folder import LOG, prepare_run_folder, save_run
from engine.summary import describe_run
from engine.training_state import load_start, percent, restore_training
from modules import build_model
from modules.checkpoint import checkpoint_state, holds_tower, model_state, read_checkpoint
from modules.side4video import Side4Video
from utils.distributed import close_distributed, from_first, gather, get_rank, get_world_size, init_distributed
from utils.errors import ConfigError, run_program
from utils.logger import setup_logging
from utils.precision import Precision, resolve_precision
from utils.seeding import seed_everything

log = logging.getLogger("train")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="train.py", description="Train a side network beside a frozen tower.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see docs/configuration.md")
    parser.add_argument("--output", metavar="DIR", help="default: exp_onehot/<dataset>/<arch>/<time>")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    train(read_config(args.config, args.overrides, purpose="train"), args.output)
    close_distributed()


def train(config: DotMap, output: str | None = None) -> float | None:
    """Run a whole training. Returns the best validation top-1 in percent, None if nothing was evaluated.

    Args:
        config: of `read_config`.
        output: folder for checkpoints, log and the resolved configuration; None chooses one.
    """
    device = init_distributed()
    folder = from_first(prepare_run_folder(config, output) if get_rank() == 0 else None)
    setup_logging(folder / LOG)
    log.info("output: %s", folder)
    precision, only_evaluate = resolve_precision(config.solver.precision, device), config.solver.evaluate

    # Data. It comes before the model: class names decide whether a checkpoint's head is kept.
    val_loader = build_eval_loader(config, get_rank(), get_world_size())
    class_names = val_loader.dataset.class_names

    # Model. Seeded here, so that its weights do not depend on anything drawn before.
    seed_everything(config.seed)
    source = config.resume or config.pretrain
    start = read_checkpoint(source) if source else None
    model = build_model(config, load_tower=start is None or not holds_tower(start))
    if start is not None:
        new_head = not config.resume and not only_evaluate
        load_start(model, start, source, class_names, new_head=new_head, new_size=not config.resume)
    # Hashes need whole tensors, so they are taken before `place` shards the tower.
    model_part = model_state(model) if get_rank() == 0 and not only_evaluate else {}
    model.place(device, config.network.shard_backbone, config.solver.compile)
    if get_world_size() > 1:
        model.parallelize()
    if only_evaluate:
        return validate(model, val_loader, precision, config)

    # Optimizer. It takes the tensors where `place` has put them, and its state comes after the model's weights.
    check_batch(config, model)
    train_loader = build_train_loader(config, get_rank(), get_world_size())
    optimizer, scaler = build_optimizer(model, config), precision.grad_scaler()
    for line in describe_run(config, model, train_loader, val_loader, precision):
        log.info(line)
    first_epoch, best = config.solver.start_epoch, None
    if config.resume:
        first_epoch, best = restore_training(start, optimizer, scaler, config)

    # Epochs. Each is seeded by its number, so that a resumed run draws what an unbroken one draws.
    reporter = Reporter(config, device, train_loader.dataset)
    for epoch in range(first_epoch, config.solver.epochs):
        seed_everything(config.seed, epoch, get_rank())
        train_loader.sampler.set_epoch(epoch)
        loss = train_one_epoch(model, train_loader, optimizer, scaler, precision, epoch, config, reporter)
        report_replaced(train_loader, epoch)
        model.broadcast_buffers()

        accuracy = validate(model, val_loader, precision, config) if is_evaluated(epoch, config) else None
        is_best = accuracy is not None and (best is None or accuracy > best)
        best = accuracy if is_best else best
        log.info("epoch %d done: loss %.4f, best top-1 %s", epoch, loss, percent(best))
        if get_rank() == 0:
            state = checkpoint_state(
                model_part,
                model.trained.state_dict(),
                config.toDict(),
                class_names,
                epoch=epoch + 1,
                best_accuracy=best,
                decoder=describe_decoder(config.data),
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
            )
            save_run(folder, state, is_best)
    return best


def check_batch(config: DotMap, model: Side4Video) -> None:
    """Refuse a batch of one clip where the last BatchNorm would make every clip's mean feature the same."""
    shared = get_world_size() if config.solver.sync_bn else 1
    if config.data.batch_size * config.data.num_sample * shared == 1 and model.trained.side.norm_placement == "pre":
        raise ConfigError(
            "data.batch_size: a process needs at least 2 clips in a batch, or solver.sync_bn and other processes: over "
            "a single clip, the BatchNorm after the last side block leaves the same mean feature whatever the clip "
            "shows, and nothing is learnt"
        )


def report_replaced(loader: VideoLoader, epoch: int) -> None:
    """Log the videos of all processes that could not be read, which `data.on_error: skip` replaced."""
    if unreadable := dict(sorted(gather(loader.unreadable))):
        first = "; ".join(list(unreadable.values())[:3])
        log.info("epoch %d: %d training videos could not be read and were replaced: %s", epoch, len(unreadable), first)


def is_evaluated(epoch: int, config: DotMap) -> bool:
    """Every `eval_freq` epochs and after the last one, but never an epoch of `skip_epoch`."""
    due = (epoch + 1) % config.logging.eval_freq == 0 or epoch + 1 == config.solver.epochs
    return due and epoch not in config.logging.skip_epoch


def validate(model: Side4Video, loader: VideoLoader, precision: Precision, config: DotMap) -> float:
    """One view of every validation video; logs and returns top-1 in percent."""
    scores = evaluate(model, loader, precision, config)
    top1, top5 = (topk_accuracy(scores, loader.dataset.labels, k) for k in (1, 5))
    log.info("validation: top-1 %.2f, top-5 %.2f on %d videos", top1, top5, len(scores))
    return top1


if __name__ == "__main__":
    run_program(main)
