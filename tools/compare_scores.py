"""Compare the scores of tests video by video, say where they depart from each other, and fuse them.

    python tools/compare_scores.py A.npz B.npz ... [--list N] [--csv FILE] [--weights W W ... --fused OUT.npz]

Each file is one of `test.py --save_scores`. Every file is compared with the first one, over the videos whose path both
have. With --weights or --fused, the weighted mean of all scores is compared with the first file too, and written.
docs/report.md explains the output.
"""

import argparse
import csv
import io
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.report import printable, ranks
from engine.scores import Scores, load_scores, save_scores
from engine.statistics import mcnemar_p, paired_difference, wilson_interval
from utils.atomic import probe, write_text
from utils.errors import DataError, run_program

FRAME_KEYS = ("num_segments", "protocol", "dense", "index_base", "count_frames", "test_clips")
PIXEL_KEYS = ("resize", "input_size", "mean", "std", "test_crops", "decoder")
SHAPE_KEYS = ("resize", "input_size", "test_crops")  # of PIXEL_KEYS
ROUNDING = 2e-3  # of a score: what another machine or a fast form changes
SAME_GREY = 0.01  # grey levels of a thumbnail
ENOUGH = 0.05  # p below which a difference is no chance


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="compare_scores.py", description="Compare, explain and fuse scores of tests.")
    parser.add_argument(
        "files", metavar="FILE.npz", nargs="+", help="of test.py --save_scores; the first is compared to"
    )
    parser.add_argument(
        "--list", type=int, default=10, metavar="N", help="changed videos and classes shown (default 10)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every changed video")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of each file in the fused scores")
    parser.add_argument("--fused", type=Path, metavar="OUT.npz", help="write the fused scores")
    args = parser.parse_args(argv)
    if len(args.files) < 2:
        parser.error("name at least two files")
    fuse = args.weights is not None or args.fused is not None
    weights = args.weights or [1.0] * len(args.files)
    if len(weights) != len(args.files):
        parser.error(f"--weights: {len(weights)} weights for {len(args.files)} files")
    if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
        parser.error("--weights: each must be a number of at least 0, and one of them larger")
    for path in (args.csv, args.fused):
        if path is not None:
            probe(path)

    first, *others = [load_scores(file) for file in args.files]
    changed: list[list[Any]] = [["file", "path", "class", "before", "after", "change"]]
    matched = [first]
    for name, other in zip(args.files[1:], others, strict=True):
        a, b, lines = match(first, other, args.files[0], name)
        print(f"{name} against {args.files[0]}\n" + "\n".join(lines))
        changed += compare(a, b, name, args.list)
        print("\n".join(f"  {line}" for line in departures(a, b)) + "\n")
        matched.append(other)
    if fuse:
        fused = fuse_scores(args.files, matched, weights)
        a, b, lines = match(first, fused, args.files[0], "fused")
        print(f"fused with weights {', '.join(f'{weight:g}' for weight in weights)} against {args.files[0]}")
        print("\n".join(lines))
        changed += compare(a, b, "fused", args.list)
        if args.fused:
            save_scores(args.fused, fused)
            print(f"  written: {args.fused}")
    if args.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(changed)
        write_text(args.csv, printable(text.getvalue()))


def match(first: Scores, second: Scores, a: str, b: str) -> tuple[Scores, Scores, list[str]]:
    """The videos that both have, in the order of the first, with columns in its order; and lines about the rest.

    A path that a file lists several times is matched with the same occurrence in the other file.

    Raises:
        DataError: the numbers or names of classes differ, or no video is in both.
    """
    if first.scores.shape[1] != second.scores.shape[1]:
        raise DataError(f"{b}: scores of {second.scores.shape[1]} classes, but {a} has {first.scores.shape[1]}")
    lines = []
    if first.class_names and second.class_names and first.class_names != second.class_names:
        if sorted(first.class_names) != sorted(second.class_names) or len(set(first.class_names)) < len(
            first.class_names
        ):
            pairs = zip(first.class_names, second.class_names, strict=True)
            label, (x, y) = next((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
            raise DataError(f"{b}: class {label} is {y!r}, but in {a} it is {x!r}; these are other classes")
        order = [second.class_names.index(name) for name in first.class_names]
        place = np.argsort(order)
        labels = np.where(second.labels < 0, second.labels, place[second.labels])
        second = replace(second, scores=second.scores[:, order], labels=labels, class_names=first.class_names)
        moved = sum(k != label for k, label in enumerate(order))
        lines.append(f"  classes: {moved} have another label there; its columns are put into the order of {a}")
    keys_a, keys_b = _keys(first.paths), _keys(second.paths)
    there = {key: place for place, key in enumerate(keys_b)}
    both = [(place, there[key]) for place, key in enumerate(keys_a) if key in there]
    if not both:
        raise DataError(f"{b}: no video of {a} in it; paths start with {second.paths[0]!r} and {first.paths[0]!r}")
    rows_a, rows_b = (list(rows) for rows in zip(*both, strict=True))
    alone = [f"{len(keys) - len(both)} only in {name}" for keys, name in ((keys_a, a), (keys_b, b))]
    lines.insert(0, f"  {len(both)} videos in both, {', '.join(alone)}")
    return take(first, rows_a), take(second, rows_b), lines


def _keys(paths: list[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    keys = []
    for path in paths:
        keys.append((path, seen[path]))
        seen[path] += 1
    return keys


def take(scores: Scores, rows: list[int]) -> Scores:
    """The scores of some videos."""

    def chosen(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[rows]

    return replace(
        scores,
        paths=[scores.paths[row] for row in rows],
        labels=scores.labels[rows],
        scores=scores.scores[rows],
        damaged=scores.damaged[rows],
        num_frames=chosen(scores.num_frames),
        thumbnails=chosen(scores.thumbnails),
    )


def answers(scores: Scores) -> np.ndarray:
    """Predicted class of each video, int64; -1 where it could not be read."""
    unread = np.isnan(scores.scores).any(axis=1)
    return np.where(unread, -1, np.argsort(-np.nan_to_num(scores.scores), axis=1, kind="stable")[:, 0])


def compare(a: Scores, b: Scores, name: str, shown: int) -> list[list[Any]]:
    """Print how the second differs from the first over the same videos; returns a row for each changed video."""
    n, num_classes = a.scores.shape
    before, after = answers(a), answers(b)
    for label, scores in (("the first", before), (name, after)):
        if missing := int((scores < 0).sum()):
            print(f"  {missing} without scores in {label}{', counted as wrong' if a.labelled else ''}")
    if a.damaged.any() or b.damaged.any():
        print(f"  damaged: {int(a.damaged.sum())} in the first, {int(b.damaged.sum())} in {name}")
    print(f"  same answer: {100 * (before == after).mean():.2f} % of the videos")
    names = a.class_names or b.class_names or [f"class {label}" for label in range(num_classes)]
    if not (a.labelled and b.labelled):
        return [
            [name, a.paths[i], "", _name(names, before[i]), _name(names, after[i]), "other"]
            for i in np.nonzero(before != after)[0]
        ]
    rank_a, rank_b = ranks(a.scores, a.labels), ranks(b.scores, b.labels)
    for k in (1, 5):
        if k == 1 or num_classes > 5:
            _print_difference(f"top-{k}", rank_a <= k, rank_b <= k)
    right_a, right_b = rank_a == 1, rank_b == 1
    _print_classes(a.labels, right_a, right_b, names, shown)
    rows = []
    for title, change, chosen in (
        ("right only here", "gained", right_b & ~right_a),
        ("right only in the first", "lost", right_a & ~right_b),
    ):
        places = np.nonzero(chosen)[0]
        for i in places:
            answer = _name(names, before[i]), _name(names, after[i])
            rows.append([name, a.paths[i], names[a.labels[i]], *answer, change])
        if len(places) and shown:
            print(f"  {title}: {len(places)} videos" + (f", the first {shown}" if len(places) > shown else ""))
            for i in places[:shown]:
                print(f"    {a.paths[i]}: {_name(names, before[i])} -> {_name(names, after[i])}")
    return rows


def _name(names: list[str], label: int) -> str:
    return names[label] if label >= 0 else "not read"


def _print_difference(title: str, right_a: np.ndarray, right_b: np.ndarray) -> None:
    n, lost, gained = len(right_a), int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    shares = []
    for right in (right_a, right_b):
        low, high = wilson_interval(int(right.sum()), n)
        shares.append(f"{100 * right.mean():.2f} ({100 * low:.1f} to {100 * high:.1f})")
    low, high = paired_difference(lost, gained, n)
    print(
        f"  {title}: {shares[0]} -> {shares[1]}, difference {100 * (gained - lost) / n:+.2f} ({100 * low:+.2f} to "
        f"{100 * high:+.2f}); {gained} gained, {lost} lost, McNemar p = {mcnemar_p(lost, gained):.2g}"
    )


def _print_classes(labels: np.ndarray, right_a: np.ndarray, right_b: np.ndarray, names: list[str], shown: int) -> None:
    changes = []
    for label in np.unique(labels).tolist():
        own = labels == label
        lost, gained = int((right_a & ~right_b & own).sum()), int((right_b & ~right_a & own).sum())
        if lost or gained:
            changes.append((mcnemar_p(lost, gained), -abs(gained - lost), label, gained, lost, int(own.sum())))
    if not changes or not shown:
        return
    changes.sort()
    print(f"  classes with changed videos: {len(changes)}" + (f", the first {shown}" if len(changes) > shown else ""))
    for p, _, label, gained, lost, videos in changes[:shown]:
        sure = " *" if p * len(changes) < ENOUGH else ""
        before, after = (int((right & (labels == label)).sum()) for right in (right_a, right_b))
        print(f"    {names[label]}: {before} -> {after} of {videos} ({gained} gained, {lost} lost, p = {p:.2g}){sure}")
    if any(p * len(changes) < ENOUGH for p, *_ in changes[:shown]):
        print("    * more than chance, also among so many classes (Bonferroni)")


def departures(a: Scores, b: Scores) -> list[str]:
    """Where the second departs from the first: classes, frames, pixels, weights, rounding, chance; a line each."""
    before, after = answers(a), answers(b)
    read = (before >= 0) & (after >= 0)
    lines = [*_classes(a, b, before, after, read), *_frames_and_pixels(a, b, read)]
    own, other = (scores.protocol.get("model_sha256") for scores in (a, b))
    same_weights = own == other if own and other else None
    if same_weights is False:
        lines.append("weights: the trained weights differ (model_sha256)")
    if (x := a.protocol.get("precision")) != (y := b.protocol.get("precision")) and x and y:
        lines.append(f"arithmetic: precision {x} -> {y}")
    gap = np.abs(a.scores[read] - b.scores[read]).max(axis=1) if read.any() else np.zeros(0)
    if len(gap):
        lines.append(
            f"scores: the largest difference of a score is {gap.max():.2g}, in the median video {np.median(gap):.2g}"
        )
    departs = any(line.startswith(("classes", "frames", "pixels", "weights")) for line in lines)
    if len(gap) and gap.max() <= ROUNDING and not departs:
        lines.append("verdict: equal up to rounding")
    elif not departs and same_weights:
        lines.append(
            "verdict: the weights and all that the files say of frames and pixels agree, but the scores do not: other "
            "frames or pixels inside the files that were read, or coarser arithmetic"
        )
    elif a.labelled and b.labelled:
        right_a, right_b = (ranks(scores.scores, scores.labels) == 1 for scores in (a, b))
        p = mcnemar_p(int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum()))
        found = [kind for kind in ("classes", "frames", "pixels", "weights") if any(x.startswith(kind) for x in lines)]
        what = f"what differs: {', '.join(found)}" if found else "nothing in the files says why"
        size = f"p = {p:.2g}"
        lines.append(
            f"verdict: {what}; the difference in top-1 is more than chance ({size})"
            if p < ENOUGH
            else f"verdict: {what}; the difference in top-1 is no more than chance ({size})"
        )
    return lines


def _classes(a: Scores, b: Scores, before: np.ndarray, after: np.ndarray, read: np.ndarray) -> list[str]:
    lines = []
    if a.labelled and b.labelled and (different := np.nonzero(a.labels != b.labels)[0]).size:
        i = different[0]
        lines.append(
            f"classes: {len(different)} videos have another label, the first {a.paths[i]}: "
            f"{a.labels[i]} -> {b.labels[i]}"
        )
    num_classes = a.scores.shape[1]
    together = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(together, (before[read], after[read]), 1)
    used = together.sum(axis=1) > 0
    partner = together.argmax(axis=1)
    agree, renamed = together.trace(), together.max(axis=1).sum()
    if len(set(partner[used])) == used.sum() and renamed > 0.5 * read.sum() and renamed - agree > 0.3 * read.sum():
        moved = [k for k in np.nonzero(used)[0].tolist() if partner[k] != k]
        shown = ", ".join(f"{k} -> {partner[k]}" for k in moved[:5])
        lines.append(
            f"classes: the columns seem to be in another order ({shown}{', ...' if len(moved) > 5 else ''}): so "
            f"{100 * renamed / read.sum():.1f} % of the answers agree, else {100 * agree / read.sum():.1f} %"
        )
    return lines


def _frames_and_pixels(a: Scores, b: Scores, read: np.ndarray) -> list[str]:
    lines = []
    for kind, keys in (("frames", FRAME_KEYS), ("pixels", PIXEL_KEYS)):
        if (
            a.protocol
            and b.protocol
            and (
                changed := [
                    f"{key} {a.protocol.get(key)} -> {b.protocol.get(key)}"
                    for key in keys
                    if a.protocol.get(key) != b.protocol.get(key)
                ]
            )
        ):
            lines.append(f"{kind}: {', '.join(changed)}")
    if a.num_frames is not None and b.num_frames is not None:
        different = np.nonzero(read & (a.num_frames != b.num_frames))[0]
        if len(different):
            i = different[0]
            lines.append(
                f"frames: {len(different)} videos have another number of frames, the first {a.paths[i]}: "
                f"{a.num_frames[i]} -> {b.num_frames[i]}"
            )
    if any(a.protocol.get(key) != b.protocol.get(key) for key in SHAPE_KEYS):
        pass  # another part of the picture: thumbnails cannot be compared
    elif a.thumbnails is not None and b.thumbnails is not None and a.thumbnails.shape == b.thumbnails.shape:
        lines += seen_difference(a.thumbnails[read], b.thumbnails[read])
    elif a.thumbnails is None or b.thumbnails is None:
        lines.append("seen: a file has no thumbnails of the frames; test.py of this version writes them")
    return lines


def seen_difference(a: np.ndarray, b: np.ndarray) -> list[str]:
    """Whether two models saw the same frames with the same pixels, by thumbnails (videos, T, 4, 4) of the frames.

    Other frames change a grey level along with its course in time. Another treatment of pixels does not, except that
    more or less contrast scales the course.
    """
    change = (b - a).reshape(*a.shape[:2], -1)
    a = a.reshape(change.shape)
    different = np.abs(change).max(axis=(1, 2)) > SAME_GREY
    if not different.any():
        return ["seen: the same frames with the same pixels, by thumbnails of every frame"]
    many = f"{different.sum()} of {len(a)} videos look different, by {np.abs(change[different]).mean():.2g} grey levels"
    change, a = change[different], a[different]
    change = change - change.mean(axis=1, keepdims=True)
    steps = np.diff(a, axis=1, append=a[:, -1:])
    if not steps.any():
        return [f"pixels: {many}; the frames of a video look alike, so other frames would not show"]
    course = a - a.mean(axis=1, keepdims=True)
    before = np.diff(a, axis=1, prepend=a[:, :1])
    time = np.linspace(-1, 1, a.shape[1])[None, :, None]
    unexplained = _rest(change, [course])
    explained = 1 - _rest(change, [course, steps, before, steps * time, before * time]) / max(unexplained, 1e-12)
    if explained > 0.1 or unexplained > 0.5 * (steps**2).sum():
        return [f"frames: {many}, along with the motion: other frames (or another crop)"]
    return [f"pixels: {many}, not along with the motion: the same frames, other pixels"]


def _rest(values: np.ndarray, basis: list[np.ndarray]) -> float:
    """Sum of squares that a linear combination of the basis leaves of the values, all of one shape."""
    columns = np.stack([column.ravel() for column in basis], axis=1).astype(float)
    return float(((values.ravel() - columns @ np.linalg.lstsq(columns, values.ravel(), rcond=None)[0]) ** 2).sum())


def fuse_scores(files: list[str], scores: list[Scores], weights: list[float]) -> Scores:
    """The weighted mean of all scores, over the videos that all files have.

    Raises:
        DataError: labels differ.
    """
    first = scores[0]
    total = first.scores * np.float32(weights[0] / sum(weights))
    for file, other, weight in zip(files[1:], scores[1:], weights[1:], strict=True):
        kept, matched, _ = match(replace(first, scores=total), other, files[0], file)
        if (kept.labels != matched.labels).any():
            i = int((kept.labels != matched.labels).argmax())
            raise DataError(
                f"{file}: {kept.paths[i]} has label {matched.labels[i]}, but {kept.labels[i]} in {files[0]}"
            )
        first, total = kept, kept.scores + matched.scores * np.float32(weight / sum(weights))
    same = {
        key: value
        for key, value in first.protocol.items()
        if key != "fused" and all(other.protocol.get(key) == value for other in scores)
    }
    parts = [
        {"file": file, "weight": weight, "protocol": other.protocol}
        for file, other, weight in zip(files, scores, weights, strict=True)
    ]
    return replace(first, scores=total, protocol={**same, "fused": parts}, thumbnails=None)


if __name__ == "__main__":
    run_program(main)
