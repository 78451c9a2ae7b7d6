"""Multi-view test of a checkpoint: every video of `data.val_list` once, exact top-1 and top-5.

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

from datasets.loaders import build_eval_loader
from modules import build_model
from utils.checkpoint import load_model_state, read_checkpoint, write_atomically
from utils.config import load_config
from utils.distributed import close_distributed, get_rank, get_world_size, init_distributed
from utils.engine import evaluate
from utils.errors import run_program
from utils.logger import setup_logging
from utils.metrics import topk_accuracy
from utils.precision import resolve_precision
from utils.seeding import seed_everything
from utils.summary import describe_model

log = logging.getLogger("test")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="test.py", description="Multi-view test of a checkpoint.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see docs/configuration.md")
    parser.add_argument(
        "--weights", required=True, metavar="CHECKPOINT", help="model_best.pt or last_model.pt of a run"
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
    config = load_config(args.config, overrides, purpose="test")

    device = init_distributed()
    setup_logging()
    seed_everything(config.seed)
    checkpoint = read_checkpoint(args.weights)
    model = build_model(config, load_tower=checkpoint["tower"] is None)
    load_model_state(model, checkpoint, args.weights)
    model.to(device)
    precision = resolve_precision(config.solver.precision, device)
    loader = build_eval_loader(config, get_rank(), get_world_size(), clips=args.test_clips, crops=args.test_crops)
    for line in describe_model(config, model):
        log.info(line)

    started = time.perf_counter()
    scores = evaluate(model, loader, precision, config)
    seconds = time.perf_counter() - started
    labels = loader.dataset.labels
    top1, top5 = (topk_accuracy(scores, labels, k) for k in (1, 5))
    views = f"{config.data.num_segments} frames x {args.test_crops} crops x {args.test_clips} clips"
    log.info(
        "%s%s on %d videos: top-1 %.2f, top-5 %.2f, %.3f s a video",
        *(views, " (dense)" if config.data.dense else "", len(scores), top1, top5, seconds / len(scores)),
    )
    if args.save_scores and get_rank() == 0:
        protocol = {
            "dataset": config.data.dataset,
            "num_segments": config.data.num_segments,
            "input_size": config.data.input_size,
            "test_crops": args.test_crops,
            "test_clips": args.test_clips,
            "dense": config.data.dense,
            "precision": precision.name,
            "checkpoint": str(args.weights),
            "list": config.data.val_list,
        }
        save_scores(Path(args.save_scores), [r.path for r in loader.dataset.records], labels, scores, protocol)
        log.info("scores: %s", args.save_scores)
    close_distributed()


def save_scores(path: Path, paths: list[str], labels: np.ndarray, scores: np.ndarray, protocol: dict) -> None:
    """Write an npz atomically: `paths` (str), `labels` (int64), `scores` (float32, videos x K), `protocol` (JSON)."""
    arrays = {
        "paths": np.array(paths, dtype=str),
        "labels": np.asarray(labels, dtype=np.int64),
        "scores": np.asarray(scores, dtype=np.float32),
        "protocol": np.array(json.dumps(protocol)),
    }
    write_atomically(path, lambda file: np.savez(file, **arrays))


if __name__ == "__main__":
    run_program(main)
