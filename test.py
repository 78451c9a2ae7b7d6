"""Multi-view test of a checkpoint: every video of `data.val_list` once, exact top-1 and top-5.

A list whose labels are all -1 gets scores only. A video file that cannot be read has NaN scores and counts as wrong; a
frame folder that cannot be read ends the run, unless data.on_error=skip.

sh scripts/run_test_vision.sh [CONFIG] CHECKPOINT [--test_crops 1|3|5|10] [--test_clips N] [--dense]
                              [--save_scores FILE] [--report DIR] [--precision P] [--accept_changes]
                              [key=value ...]
python test.py [--config CONFIG] --weights CHECKPOINT [...]           one device, no launcher

Without CONFIG, the configuration in the checkpoint is taken. Where the configuration or the command line would give the
weights other frames, pixels or tokens than their training did, the test is refused, unless --accept_changes is given.
"""

import argparse
import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from dotmap import DotMap

from datasets.annotations import UNLABELLED
from datasets.decoders import describe_decoder
from datasets.loaders import build_eval_loader, check_shared_memory, naming_lost_workers
from engine.certificate import certificate_rows, make_certificate
from engine.class_names import class_order
from engine.configuration import TRAINED_WITH, changed_since_training, config_of_checkpoint, read_config
from engine.loops import evaluate
from engine.memory import PeakReport, explaining_memory
from engine.metrics import class_accuracy, topk_accuracy
from engine.plan import planned_test_peak
from engine.report import probe_report, write_report
from engine.scores import PartialScores, Scores, describe_views, save_scores
from engine.software import describe_software
from engine.summary import describe_model, describe_products
from engine.view_details import VideoDetails, view_sets
from modules.checkpoint import describe_checkpoint, read_checkpoint, tower_hash_of
from modules.checkpoint_places import find_checkpoint
from modules.hashing import hash_tensors
from modules.tower_files import load_whole_model
from utils.atomic import probe
from utils.distributed import close_distributed, get_rank, get_world_size, init_distributed, naming_lost_processes
from utils.errors import ConfigError, DataError, run_program
from utils.logger import setup_logging
from utils.precision import Precision, prepare_precision
from utils.published_weights import hash_file

log = logging.getLogger("test")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="test.py", description="Multi-view test of a checkpoint.")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file, see docs/configuration.md (default: what the checkpoint holds)"
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="CHECKPOINT",
        help="model_best.pt of a run, a folder, a released one, ORG/NAME",
    )
    parser.add_argument("--test_crops", type=int, choices=(1, 3, 5, 10), default=1, help="crops of a clip")
    parser.add_argument("--test_clips", type=int, default=1, metavar="N", help="clips of a video")
    parser.add_argument("--dense", action="store_true", help="dense sampling, as data.dense=True")
    parser.add_argument("--save_scores", metavar="FILE.npz", help="write paths, labels, scores, protocol, certificate")
    parser.add_argument("--report", metavar="DIR", type=Path, help="write report.html and its tables, docs/report.md")
    parser.add_argument("--precision", choices=("amp", "bf16", "fp16", "fp32"), help="instead of solver.precision")
    parser.add_argument(
        "--accept_changes",
        action="store_true",
        help="test even if frames, pixels or tokens are others than in training; log and score file name the changes",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    if args.test_clips < 1:
        parser.error(f"--test_clips: {args.test_clips} is less than 1")
    overrides = [*args.overrides, *(["data.dense=True"] if args.dense else [])]
    if args.precision:
        overrides.append(f"solver.precision={args.precision}")
    config = read_config(args.config, overrides, purpose="test") if args.config else None
    file = Path(args.save_scores) if args.save_scores else None
    if file is not None:
        probe(file)
    if args.report is not None:
        probe_report(args.report)
    args.weights = str(find_checkpoint(args.weights))
    checkpoint = read_checkpoint(args.weights)
    if config is None:
        config = config_of_checkpoint(checkpoint, args.weights, overrides)
    result = test(
        config,
        checkpoint,
        args.weights,
        args.test_crops,
        args.test_clips,
        accept_changes=args.accept_changes,
        scores_only=file is not None,
        partial_file=file,
        report_to=args.report,
    )
    if file is not None and get_rank() == 0:
        save_scores(file, result)
        PartialScores.remove_all(file)
        log.info("scores: %s", file)
    close_distributed()


def test(
    config: DotMap,
    checkpoint: dict[str, Any],
    weights: str,
    crops: int = 1,
    clips: int = 1,
    *,
    accept_changes: bool = False,
    scores_only: bool = True,
    partial_file: Path | None = None,
    report_to: Path | None = None,
) -> Scores:
    """Score every video of `data.val_list` with V = crops x clips views.

    Args:
        config: of `read_config` or `config_of_checkpoint`.
        checkpoint: of `read_checkpoint`, ours or a released one.
        weights: its file.
        crops: 1, 3, 5 or 10 crops of a clip.
        clips: clips of a video.
        accept_changes: go on with a warning where `config` gives the weights other frames, pixels or tokens than their
            training did.
        scores_only: accept a list without labels, from which only scores can come.
        partial_file: the file that the scores will go to; beside it, those of an unfinished test are kept, and one that
            was interrupted goes on from them.
        report_to: folder of the report, which process 0 writes.

    Raises:
        CheckpointError: the checkpoint does not fit the configuration.
        ConfigError: other frames, pixels or tokens than in training, and not accepted.
        DataError: the list or a video cannot be read, or the partial scores are those of another test.
        NonFiniteScoresError: the model gives NaN or infinity.
    """
    changes = changed_since_training(checkpoint, weights, config)
    if changes and not accept_changes:
        raise ConfigError(
            f"{weights}: {'; '.join(change_lines(changes))}: the weights would get what they were not trained with; "
            "leave these keys at the checkpoint's values, or add --accept_changes"
        )
    device = init_distributed(config.solver.timeout_minutes)
    setup_logging()
    for line in change_lines(changes):
        log.warning("accepted change since the training of %s: %s", weights, line)
    precision = prepare_precision(config.solver, device)

    # Data first: a list without labels is refused before a large model is loaded.
    views = {"rank": get_rank(), "world_size": get_world_size(), "clips": clips, "crops": crops, "unlabelled": True}
    views["every_video"] = True  # scores of all, whatever data.min_frames
    loader = build_eval_loader(config, **views)
    dataset = loader.dataset
    if dataset.labels[0] == UNLABELLED and report_to is not None:
        raise DataError(f"{config.data.val_list}: no labels, which a report needs: take --save_scores FILE.npz instead")
    if dataset.labels[0] == UNLABELLED and not scores_only:
        raise DataError(f"{config.data.val_list}: no labels, so only scores can come out: add --save_scores FILE.npz")

    # Large files take a while to hash, so it is done where the hashes are used.
    certified = get_rank() == 0 and (partial_file is not None or report_to is not None)
    file_sha256 = hash_file(Path(weights)) if certified else ""
    trained_names = checkpoint.get("class_names")
    order = class_order(dataset.class_names, trained_names, weights, config.test.remap_labels)
    model = load_whole_model(config, checkpoint, weights)
    log.info(describe_checkpoint(checkpoint, weights))
    protocol = describe_test(config, precision, weights, crops, clips) | {
        "accepted_changes": changes,
        "model_sha256": hash_tensors(model.trained.state_dict()),
        "list_sha256": hashlib.sha256(Path(config.data.val_list).read_bytes()).hexdigest(),
    }
    tower_sha256 = tower_hash_of(model, checkpoint, weights) if certified else ""
    model.place(device, config.network.shard_backbone, config.solver.compile)
    for line in (*describe_model(config, model), describe_products(model, precision, config.solver.compile)):
        log.info(line)

    data = config.data
    sets = view_sets(crops, clips, first_clip=data.protocol == "kinetics" and not data.dense)
    details = VideoDetails(len(dataset), data.num_classes, data.num_segments, sets)
    software = describe_software(device)
    partial = None if partial_file is None else PartialScores(partial_file, protocol, details.NAMES, software)
    if partial and partial.done:
        log.info("scores: %d of %d videos are done, in %s.partial-*", len(partial.done), len(dataset), partial_file)
        loader = build_eval_loader(config, **views, done=partial.done)
    check_shared_memory(loader)
    peak = PeakReport(device, f"{config.test.view_batch} views at once", lambda world: planned_test_peak(config, world))
    started = time.perf_counter()
    try:
        memory = explaining_memory(config, device, training=False)
        with naming_lost_processes(), naming_lost_workers(loader), memory:
            scores = evaluate(model, loader, precision, config, partial, details)
    except BaseException:
        if partial:
            partial.write()
        raise
    peak.done()
    damaged = np.isin(np.arange(len(dataset)), [index for index, _ in loader.damaged])
    names = dataset.class_names or trained_names
    environments = [*(partial.environments if partial else ())]
    if software not in environments and not (partial and len(partial.done) == len(dataset)):
        environments.append(software)
    result = Scores(
        paths=[record.name for record in dataset.records],
        labels=dataset.labels,
        scores=scores if order is None else scores[:, order],
        damaged=damaged,
        class_names=names,
        protocol=protocol,
        num_frames=details.num_frames,
        thumbnails=details.thumbnails,
        certificate=make_certificate(file_sha256, tower_sha256, names, environments, scores, damaged)
        if certified
        else None,
    )
    seconds = time.perf_counter() - started
    report(result, seconds)
    if report_to is not None and get_rank() == 0:
        if order is not None:
            details.set_scores = details.set_scores[:, :, order]
        facts = certificate_rows(result.certificate or {}) | {
            "processes": str(get_world_size()),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "seconds a video": f"{seconds / len(scores):.3f}",
        }
        log.info("report: %s", write_report(report_to, result, details, dataset, facts))
    return result


def change_lines(changes: dict[str, dict[str, Any]]) -> list[str]:
    """`changed_since_training` in words."""
    return [f"{key} was {values['trained']} and is {values['now']} now" for key, values in changes.items()]


def describe_test(config: DotMap, precision: Precision, weights: str, crops: int, clips: int) -> dict[str, Any]:
    """What decides the scores beside the weights and the videos."""
    data = config.data
    keys = [name for section, _, name in (key.rpartition(".") for key in TRAINED_WITH) if section == "data"]
    return {
        "dataset": data.dataset,
        **{key: data[key] for key in keys},
        "test_crops": crops,
        "test_clips": clips,
        "precision": precision.name,
        "checkpoint": str(weights),
        "list": data.val_list,
        "decoder": describe_decoder(data),
        "on_damage": data.on_damage,
    }


def report(result: Scores, seconds: float) -> None:
    """Log the accuracy of a test whose evaluation took so many seconds."""
    scores, labels, protocol = result.scores, result.labels, result.protocol
    accuracy = "no labels"
    if result.labelled:
        accuracy = f"top-1 {topk_accuracy(scores, labels, 1):.2f}"
        if scores.shape[1] > 5:
            accuracy += f", top-5 {topk_accuracy(scores, labels, 5):.2f}"
    log.info(f"{describe_views(protocol)} on {len(scores)} videos: {accuracy}, {seconds / len(scores):.3f} s a video")
    if result.labelled and result.class_names:
        lowest = [(label, top1) for label, top1 in class_accuracy(scores, labels).items() if top1 < 100][:5]
        if lowest:
            named = ", ".join(f"{result.class_names[label]} {top1:.2f}" for label, top1 in lowest)
            log.info("lowest top-1: %s", named)


if __name__ == "__main__":
    run_program(main)
