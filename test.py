"""Multi-view test of a checkpoint: every video of `data.val_list` once, exact top-1 and top-5.

A list whose labels are all -1 gets scores only. A video that cannot be read has NaN scores and counts as wrong (frame
folders: with data.on_error=skip, else it ends the run).

sh scripts/run_test_vision.sh CONFIG CHECKPOINT [--test_crops 1|3|5|10] [--test_clips N] [--dense]
                              [--save_scores FILE] [--precision P] [key=value ...]
python test.py --config CONFIG --weights CHECKPOINT [...]             one device, no launcher
"""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np

from datasets.annotations import UNLABELLED
from datasets.decoders import describe_decoder
from datasets.loaders import build_eval_loader
from engine.class_names import class_order
from engine.configuration import read_config
from engine.loops import evaluate
from engine.metrics import class_accuracy, topk_accuracy
from engine.summary import describe_model
from modules import build_model
from modules.checkpoint import describe_checkpoint, holds_tower, load_model_state, read_checkpoint
from utils.atomic import write_atomically
from utils.distributed import close_distributed, get_rank, get_world_size, init_distributed
from utils.errors import DataError, run_program
from utils.logger import setup_logging
from utils.precision import resolve_precision
from utils.seeding import seed_everything

log = logging.getLogger("test")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="test.py", description="Multi-view test of a checkpoint.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see docs/configuration.md")
    parser.add_argument(
        "--weights", required=True, metavar="CHECKPOINT", help="model_best.pt of a run, or a released checkpoint"
    )
    parser.add_argument("--test_crops", type=int, choices=(1, 3, 5, 10), default=1, help="crops of a clip")
    parser.add_argument("--test_clips", type=int, default=1, metavar="N", help="clips of a video")
    parser.add_argument("--dense", action="store_true", help="dense sampling, as data.dense=True")
    parser.add_argument("--save_scores", metavar="FILE.npz", help="write paths, labels, scores and the protocol")
    parser.add_argument("--precision", choices=("amp", "bf16", "fp16", "fp32"), help="instead of solver.precision")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    if args.test_clips < 1:
        parser.error(f"--test_clips: {args.test_clips} is less than 1")
    overrides = [*args.overrides, *(["data.dense=True"] if args.dense else [])]
    if args.precision:
        overrides.append(f"solver.precision={args.precision}")
    config = read_config(args.config, overrides, purpose="test")

    device = init_distributed()
    setup_logging()
    seed_everything(config.seed)
    checkpoint = read_checkpoint(args.weights)
    model = build_model(config, load_tower=not holds_tower(checkpoint))
    load_model_state(model, checkpoint, args.weights)
    log.info(describe_checkpoint(checkpoint, args.weights))
    model.place(device, config.network.shard_backbone, config.solver.compile)
    precision = resolve_precision(config.solver.precision, device)
    loader = build_eval_loader(
        config, get_rank(), get_world_size(), clips=args.test_clips, crops=args.test_crops, unlabelled=True
    )
    labels = loader.dataset.labels
    labelled = labels[0] != UNLABELLED
    if not labelled and not args.save_scores:
        raise DataError(f"{config.data.val_list}: no labels, so only scores can come out: add --save_scores FILE.npz")
    class_names, trained_names = loader.dataset.class_names, checkpoint.get("class_names")
    columns = class_order(class_names, trained_names, args.weights, config.test.remap_labels)
    for line in describe_model(config, model):
        log.info(line)

    started = time.perf_counter()
    scores = evaluate(model, loader, precision, config)[:, columns]
    seconds = time.perf_counter() - started
    accuracy = "no labels"
    if labelled:
        accuracy = "top-1 {:.2f}, top-5 {:.2f}".format(*(topk_accuracy(scores, labels, k) for k in (1, 5)))
    views = f"{config.data.num_segments} frames x {args.test_crops} crops x {args.test_clips} clips"
    log.info(
        "%s%s on %d videos: %s, %.3f s a video",
        *(views, " (dense)" if config.data.dense else "", len(scores), accuracy, seconds / len(scores)),
    )
    names = class_names or trained_names
    if labelled and names:
        lowest = list(class_accuracy(scores, labels).items())[:5]
        log.info("lowest top-1: %s", ", ".join(f"{names[label]} {top1:.2f}" for label, top1 in lowest))
    if args.save_scores and get_rank() == 0:
        protocol = {
            "dataset": config.data.dataset,
            "protocol": loader.dataset.protocol,
            "num_segments": config.data.num_segments,
            "index_base": config.data.index_base,
            "resize": config.data.resize,
            "input_size": config.data.input_size,
            "mean": config.data.mean,
            "std": config.data.std,
            "test_crops": args.test_crops,
            "test_clips": args.test_clips,
            "dense": config.data.dense,
            "precision": precision.name,
            "checkpoint": str(args.weights),
            "list": config.data.val_list,
            "decoder": describe_decoder(config.data),
        }
        paths = [record.path for record in loader.dataset.records]
        save_scores(Path(args.save_scores), paths, labels, scores, protocol, names)
        log.info("scores: %s", args.save_scores)
    close_distributed()


def save_scores(
    path: Path,
    paths: list[str],
    labels: np.ndarray,
    scores: np.ndarray,
    protocol: dict,
    class_names: list[str] | None = None,
) -> None:
    """Write an npz atomically: `paths` (str), `labels` (int64), `scores` (float32, videos x K), `protocol` (JSON).

    If the names of the K classes are known, they are `class_names` (str).
    """
    arrays = {
        "paths": np.array(paths, dtype=str),
        "labels": np.asarray(labels, dtype=np.int64),
        "scores": np.asarray(scores, dtype=np.float32),
        "protocol": np.array(json.dumps(protocol)),
    }
    if class_names:
        arrays["class_names"] = np.array(class_names, dtype=str)
    write_atomically(path, lambda file: np.savez(file, **arrays))


if __name__ == "__main__":
    run_program(main)
