"""How much of a result is motion? Test a checkpoint on clips whose frames are reversed, shuffled, one, or fewer.

    python tools/motion_test.py CONFIG CHECKPOINT [--pairs FILE.csv] [--list N] [--csv FILE] [--seed N] [key=value ...]

Reads `data.val_list` of the configuration once, with one view a video, and puts every variant of a clip through the
model. Classes that turn into each other when a video is played backwards are found by their names, or given by
--pairs: a line holds two names or two labels. docs/report.md explains the output.
"""

import argparse
import csv
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import UNLABELLED, csv_rows
from datasets.loaders import VideoLoader, build_eval_loader, check_shared_memory
from engine.class_names import class_order
from engine.configuration import changed_since_training, read_config
from engine.loops import view_outputs, view_scores
from engine.memory import explaining_memory
from engine.motion import IN_ORDER, REVERSED, SHUFFLED, STILL, above_chance, reversal_pairs, variants
from engine.report import printable, ranks
from engine.statistics import wilson_interval
from modules.checkpoint import read_checkpoint
from modules.tower_files import load_whole_model
from utils.atomic import probe, write_text
from utils.distributed import init_distributed
from utils.errors import ConfigError, DataError, run_program
from utils.precision import resolve_precision


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="motion_test.py", description="How much of a result is motion?")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the model and the videos")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model_best.pt of a run, or a released checkpoint")
    parser.add_argument("--pairs", metavar="FILE.csv", help="classes that reverse into each other, two a line")
    parser.add_argument("--list", type=int, default=10, metavar="N", help="classes shown (default 10)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each class")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled orders (default 0)")
    parser.add_argument("--accept_changes", action="store_true", help="as of test.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.config, args.overrides, purpose="test")
    if config.data.num_segments < 2:
        raise ConfigError("data.num_segments: clips of one frame have no motion to test; it must be at least 2")
    if args.csv:
        probe(args.csv)
    checkpoint = read_checkpoint(args.checkpoint)
    changes = changed_since_training(checkpoint, args.checkpoint, config)
    if changes and not args.accept_changes:
        words = "; ".join(
            f"{key} was {values['trained']} and is {values['now']} now" for key, values in changes.items()
        )
        raise ConfigError(
            f"{args.checkpoint}: {words}: the weights would get what they were not trained with; leave these keys at "
            "the checkpoint's values, or add --accept_changes"
        )
    device = init_distributed(config.solver.timeout_minutes)
    precision = resolve_precision(config.solver.precision, device)
    loader = build_eval_loader(config, unlabelled=True, every_video=True)
    dataset = loader.dataset
    if dataset.labels[0] == UNLABELLED:
        raise DataError(f"{config.data.val_list}: no labels, which this test needs")
    trained_names = checkpoint.get("class_names")
    order = class_order(dataset.class_names, trained_names, args.checkpoint, config.test.remap_labels)
    names = dataset.class_names or trained_names or [f"class {label}" for label in range(config.data.num_classes)]
    pairs = read_pairs(args.pairs, names) if args.pairs else reversal_pairs(names)
    model = load_whole_model(config, checkpoint, args.checkpoint)
    model.place(device, compile_backbone=config.solver.compile)
    check_shared_memory(loader)

    changes = variants(config.data.num_segments, args.seed)
    with explaining_memory(config, device, training=False):
        scores = score_variants(model, loader, precision, config, list(changes.values()))
    if order is not None:
        scores = scores[:, :, order]
    by_name = dict(zip(changes, scores.swapaxes(0, 1), strict=True))
    for line in describe(by_name, dataset.labels, names, pairs, args.list):
        print(line)
    for _, reason in loader.unreadable:
        print(f"not read, counted wrong: {reason}")
    if args.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(class_rows(by_name, dataset.labels, names, pairs))
        write_text(args.csv, printable(text.getvalue()))


@torch.no_grad()
def score_variants(model, loader: VideoLoader, precision, config, changes: list) -> np.ndarray:
    """Scores of every variant of every video, float32 (videos, variants, K); NaN for a video that cannot be read.

    Every video is read once, by the loop of test.py.
    """
    scores = np.full((len(loader.dataset), len(changes), config.data.num_classes), math.nan, np.float32)

    def forward(clips: torch.Tensor) -> torch.Tensor:
        return torch.stack([model(change(clips)) for change in changes], dim=1)

    with tqdm(total=len(scores), unit="video", disable=None) as progress:
        for batch, logits in view_outputs(model, loader, precision, config, forward):
            scores[batch["indices"].numpy()] = view_scores(logits).cpu().numpy()
            progress.update(len(batch["indices"]))
    if len(loader.unreadable) == len(scores):
        raise DataError(f"none of the {len(scores)} videos can be read; the first: {loader.unreadable[0][1]}")
    return scores


def read_pairs(path: str, names: list[str]) -> dict[int, int]:
    """{label: partner} of a csv file with two class names or two labels a line.

    Raises:
        DataError: a line is neither, or names a class twice.
    """
    pairs: dict[int, int] = {}
    for source, row in csv_rows(path):
        if not row:
            continue
        labels = [_label(cell.strip(), names) for cell in row]
        if len(labels) != 2 or None in labels or labels[0] == labels[1]:
            raise DataError(f"{source}: a line must hold two class names or two labels, got {', '.join(row)!r}")
        for a, b in (labels, labels[::-1]):
            if pairs.get(a, b) != b:
                raise DataError(f"{source}: {names[a]!r} is in two pairs")
            pairs[a] = b
    return pairs


def _label(cell: str, names: list[str]) -> int | None:
    if cell in names:
        return names.index(cell)
    return int(cell) if cell.isdecimal() and int(cell) < len(names) else None


def answers(scores: np.ndarray) -> np.ndarray:
    """Predicted class of each video, -1 where it could not be read."""
    return np.where(np.isnan(scores).any(axis=1), -1, np.argsort(-np.nan_to_num(scores), axis=1, kind="stable")[:, 0])


def describe(
    by_name: dict[str, np.ndarray], labels: np.ndarray, names: list[str], pairs: dict[int, int], shown: int
) -> list[str]:
    """The lines of the output; `by_name` has the scores (videos, K) of each variant."""
    n, chance = len(labels), above_chance(labels)
    right = {name: ranks(scores, labels) == 1 for name, scores in by_name.items()}
    lines = [f"{n} videos; always answering the most frequent class gives {100 * chance:.1f} %"]
    for name, of_variant in right.items():
        low, high = wilson_interval(int(of_variant.sum()), n)
        lines.append(f"{name:>20}  top-1 {100 * of_variant.mean():6.2f}  (95 %: {100 * low:.1f} to {100 * high:.1f})")
    in_order, shuffled, still = (100 * right[name].mean() for name in (IN_ORDER, SHUFFLED, STILL))
    gained = in_order - 100 * chance
    if gained > 0:
        lines.append(
            f"of the {gained:.1f} points above that, {min(gained, in_order - shuffled):.1f} need the order of the "
            f"frames and {min(gained, in_order - still):.1f} need more than one frame"
        )
    else:
        lines.append("the model is not better than that, so this test says nothing about motion")
    lines += _describe_pairs(answers(by_name[REVERSED]), labels, names, pairs, shown)
    if shown:
        drops = [
            (float(right[IN_ORDER][own].mean() - right[SHUFFLED][own].mean()), label, own)
            for label in np.unique(labels).tolist()
            for own in [labels == label]
        ]
        drops.sort(key=lambda drop: (-drop[0], drop[1]))
        lines.append(f"classes that need the order most ({min(shown, len(drops))} of {len(drops)}): top-1 in order, ")
        lines[-1] += "reversed, shuffled, one frame; most frequent answer when reversed"
        for _, label, own in drops[:shown]:
            numbers = ", ".join(
                f"{100 * right[name][own].mean():.0f}" for name in (IN_ORDER, REVERSED, SHUFFLED, STILL)
            )
            lines.append(f"  {names[label]}: {numbers}; {_most_frequent(answers(by_name[REVERSED])[own], names)}")
    return lines


def _describe_pairs(
    answer: np.ndarray, labels: np.ndarray, names: list[str], pairs: dict[int, int], shown: int
) -> list[str]:
    """What became of reversed videos whose class has a partner."""
    if not pairs:
        return ["no two class names say that they reverse into each other; name such classes by --pairs FILE.csv"]
    partner = np.array([pairs.get(label, -2) for label in range(len(names))])[labels]
    paired = partner >= 0
    if not paired.any():
        return ["no video is of a class that reverses into another one"]
    other, own = (100 * (answer == expected)[paired].mean() for expected in (partner, labels))
    lines = [
        f"reversed videos of {len(pairs) // 2} pairs of classes ({paired.sum()} videos): {other:.1f} % get the other "
        f"class of their pair, {own:.1f} % their own",
        "  a model that sees motion gives the other class, as often as its own in order; one that sees none, its own",
    ]
    chosen = [(label, other) for label, other in sorted(pairs.items()) if (labels == label).any()]
    for label, expected in chosen[:shown]:
        of_class = answer[labels == label]
        lines.append(
            f"  {names[label]}: {100 * (of_class == expected).mean():.0f} % {names[expected]}, "
            f"{100 * (of_class == label).mean():.0f} % its own"
        )
    return lines + ([f"  and {len(chosen) - shown} more classes"] if len(chosen) > shown > 0 else [])


def _most_frequent(answer: np.ndarray, names: list[str]) -> str:
    answer = answer[answer >= 0]
    if not len(answer):
        return "none could be read"
    counts = np.bincount(answer)
    return f"{names[int(counts.argmax())]} {100 * counts.max() / len(answer):.0f} %"


def class_rows(
    by_name: dict[str, np.ndarray], labels: np.ndarray, names: list[str], pairs: dict[int, int]
) -> list[list[object]]:
    """A heading and a row for each class: top-1 of each variant, and what reversed videos are taken for."""
    answer = answers(by_name[REVERSED])
    rows: list[list[object]] = [["label", "class", "videos", *by_name, "partner", "reversed is partner"]]
    for label in np.unique(labels).tolist():
        own = labels == label
        shares = [f"{100 * (ranks(scores[own], labels[own]) == 1).mean():.2f}" for scores in by_name.values()]
        partner = pairs.get(label)
        last = ["", ""] if partner is None else [names[partner], f"{100 * (answer[own] == partner).mean():.2f}"]
        rows.append([label, names[label], int(own.sum()), *shares, *last])
    return rows


if __name__ == "__main__":
    run_program(main)
