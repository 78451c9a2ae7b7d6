"""The report of a test: report.html, and its tables as per_class.csv, confusion.csv and videos.csv.

Letters: n videos, K classes, V views, T frames of a clip.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from datasets.transforms import CENTRE_CROP
from datasets.video_dataset import EvalVideoDataset
from engine.scores import Scores
from engine.statistics import (
    Calibration,
    Interval,
    bootstrap_interval,
    calibration,
    confused_order,
    confusion_counts,
    mean_class_accuracy,
    wilson_interval,
)
from engine.view_details import VideoDetails, ViewSet
from utils.atomic import probe, write_text
from utils.errors import DataError

PAGE, TABLES = "report.html", ("per_class.csv", "confusion.csv", "videos.csv")
MOST_STRIPS, MOST_FRAMES, STRIP_HEIGHT, JPEG_QUALITY = 12, 8, 112, 80
MOST_STRIP_BYTES = 1_500_000
GAP = 2  # pixels between the frames of a strip
LENGTH_GROUPS = 5
NO_CLASS = -1  # predicted class of a video that could not be read


@dataclass(frozen=True)
class Share:
    """`right` of n videos, with the 95 % interval of Wilson."""

    right: int
    n: int

    @property
    def percent(self) -> float:
        return 100 * self.right / self.n if self.n else float("nan")

    @property
    def interval(self) -> Interval:
        return wilson_interval(self.right, self.n)


@dataclass(frozen=True)
class ClassResult:
    """What became of the videos of one class.

    top1, top5: shares of its videos; top5 is None for five classes or fewer
    predicted: number of videos that were given this class
    taken_for: (label, videos) of the class that its wrong videos got most often, or None
    """

    label: int
    top1: Share
    top5: Share | None
    predicted: int
    taken_for: tuple[int, int] | None


@dataclass(frozen=True)
class Strip:
    """Frames of one video that the model saw, side by side.

    index: of the video
    jpeg: the picture
    shown: number of frames in it
    """

    index: int
    jpeg: bytes
    shown: int


@dataclass(frozen=True)
class Findings:
    """The numbers of a test.

    names: of the K classes
    predicted: int64 (n,), NO_CLASS for a video that could not be read
    rank: int64 (n,), 1 if the true class has the highest score; K + 1 for a video that could not be read
    mean_class: (mean over classes of top-1, its bootstrap interval), shares
    views: (set, top-1) of each set of views, the smallest first and all views last
    classes: those that have videos, in label order
    confusion: int64 (K, K), a row for each true class, without the videos that could not be read
    order: of the K classes, for the picture of `confusion`
    lengths: (fewest frames, most frames, top-1) of groups of videos, by rising number of frames
    errors: indices of wrong videos, the most confident first
    """

    names: list[str]
    predicted: np.ndarray
    rank: np.ndarray
    top1: Share
    top5: Share | None
    mean_class: tuple[float, Interval]
    calibration: Calibration
    calibration_interval: Interval
    views: list[tuple[ViewSet, Share]]
    classes: list[ClassResult]
    confusion: np.ndarray
    order: list[int]
    lengths: list[tuple[int, int, Share]]
    errors: list[int]


def analyse(result: Scores, details: VideoDetails) -> Findings:
    """The numbers of a test with labels.

    Args:
        result: scores in the order of the classes.
        details: of the same videos, `set_scores` in the same order of classes.
    """
    scores, labels = result.scores, result.labels
    n, num_classes = scores.shape
    read = ~np.isnan(scores).any(axis=1)
    rank = ranks(scores, labels)
    right = rank == 1
    predicted = np.full(n, NO_CLASS)
    predicted[read] = np.argsort(-scores[read], axis=1, kind="stable")[:, 0]
    confusion = confusion_counts(labels[read], predicted[read], num_classes)
    confidence = scores[read].max(axis=1)
    protocol = result.protocol
    all_views = ViewSet(protocol["test_crops"], protocol["test_clips"], ())
    sets = [(s, ranks(details.set_scores[:, place], labels, read)) for place, s in enumerate(details.sets)]
    wrong = np.nonzero(read & ~right)[0]
    margin = scores[wrong, predicted[wrong]] - scores[wrong, labels[wrong]]

    def drawn_calibration_error(counts: np.ndarray) -> float:
        times = counts[read]
        return calibration(np.repeat(confidence, times), np.repeat(right[read], times)).error

    return Findings(
        names=result.class_names or [f"class {label}" for label in range(num_classes)],
        predicted=predicted,
        rank=rank,
        top1=_share(right),
        top5=_share(rank <= 5) if num_classes > 5 else None,
        mean_class=(
            mean_class_accuracy(right, labels),
            bootstrap_interval(lambda counts: mean_class_accuracy(right, labels, counts), n),
        ),
        calibration=calibration(confidence, right[read]),
        calibration_interval=bootstrap_interval(drawn_calibration_error, n),
        views=[*((s, _share(of_set == 1)) for s, of_set in sets), (all_views, _share(right))],
        classes=[_class_result(label, rank, labels, predicted, confusion) for label in np.unique(labels).tolist()],
        confusion=confusion,
        order=confused_order(confusion),
        lengths=list(_by_length(details.num_frames[read], right[read])),
        errors=wrong[np.argsort(-margin, kind="stable")].tolist(),
    )


def ranks(scores: np.ndarray, labels: np.ndarray, read: np.ndarray | None = None) -> np.ndarray:
    """Place of the true class among the scores (n, K), int64 (n,), from 1; of equal scores the lower label is first.

    A video with a NaN, or without `read`, has K + 1.
    """
    read = ~np.isnan(scores).any(axis=1) if read is None else read
    own = scores[np.arange(len(labels)), labels][:, None]
    before = np.arange(scores.shape[1]) < labels[:, None]
    place = 1 + ((scores > own) | ((scores == own) & before)).sum(axis=1)
    return np.where(read, place, scores.shape[1] + 1)


def _share(right: np.ndarray) -> Share:
    return Share(int(right.sum()), len(right))


def _class_result(
    label: int, rank: np.ndarray, labels: np.ndarray, predicted: np.ndarray, confusion: np.ndarray
) -> ClassResult:
    own = rank[labels == label]
    others = confusion[label].copy()
    others[label] = 0
    most = int(others.argmax())
    return ClassResult(
        label,
        _share(own == 1),
        _share(own <= 5) if len(confusion) > 5 else None,
        int((predicted == label).sum()),
        (most, int(others[most])) if others[most] else None,
    )


def _by_length(num_frames: np.ndarray, right: np.ndarray):
    """Groups of about as many videos each; videos of one length are never parted."""
    edges = np.unique(np.quantile(num_frames, np.arange(1, LENGTH_GROUPS) / LENGTH_GROUPS, method="higher"))
    group = np.searchsorted(edges, num_frames, side="left")
    for number in np.unique(group):
        frames = num_frames[group == number]
        yield int(frames.min()), int(frames.max()), _share(right[group == number])


def probe_report(folder: Path) -> None:
    """Make sure, before the test, that the report can be written. Raises DataError if not; leaves nothing behind."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--report {folder}: is a file; give the name of a folder")
    for name in (PAGE, *TABLES):
        probe(folder / name)


def write_report(
    folder: Path, result: Scores, details: VideoDetails, dataset: EvalVideoDataset, facts: dict[str, Any]
) -> Path:
    """Write the report of a test with labels and return the path of its page. Each file is written atomically.

    Args:
        dataset: of the test's loader; it gives the frames again that the model saw.
        facts: more lines for the table of the protocol.

    Raises:
        DataError: a file cannot be written.
    """
    from engine.report_page import page

    numbers = analyse(result, details)
    shown = numbers.errors or _least_certain(result)
    strips = make_strips(dataset, shown, details.sets[0].views[0] if details.sets else 0)
    for name, rows in zip(TABLES, tables(result, details, numbers), strict=True):
        write_text(folder / name, _as_csv(rows))
    write_text(folder / PAGE, printable(page(result, details, numbers, strips, facts)))
    return folder / PAGE


def _least_certain(result: Scores) -> list[int]:
    """Videos whose two highest scores are nearest to each other."""
    read = np.nonzero(~np.isnan(result.scores).any(axis=1))[0]
    if result.scores.shape[1] < 2:
        return []
    highest = np.sort(result.scores[read], axis=1)
    return read[np.argsort(highest[:, -1] - highest[:, -2], kind="stable")][: MOST_STRIPS // 2].tolist()


def make_strips(dataset: EvalVideoDataset, indices: Sequence[int], view: int) -> list[Strip]:
    """Pictures of the frames that the model saw of the first videos of `indices`, in one of their views.

    At most MOST_STRIPS, of MOST_FRAMES frames each, and MOST_STRIP_BYTES in all.
    """
    strips: list[Strip] = []
    room = MOST_STRIP_BYTES
    for index in indices[:MOST_STRIPS]:
        try:
            views = dataset[index]["clips"]
        except DataError:  # it could be read in the test; the report is worth more than one picture
            continue
        if len(views) == 0:
            continue
        frames = views[view]
        shown = np.unique(np.linspace(0, len(frames) - 1, min(MOST_FRAMES, len(frames))).round().astype(int))
        jpeg = simplejpeg.encode_jpeg(_side_by_side(frames[shown]), quality=JPEG_QUALITY, colorsubsampling="420")
        room -= len(jpeg)
        if room < 0:
            break
        strips.append(Strip(index, jpeg, len(shown)))
    return strips


def _side_by_side(frames: torch.Tensor) -> np.ndarray:
    """uint8 (T, 3, H, W) -> uint8 (STRIP_HEIGHT, width, 3), contiguous, with a white gap between frames."""
    sized = torch.nn.functional.interpolate(
        frames.float(), size=(STRIP_HEIGHT, STRIP_HEIGHT), mode="bilinear", antialias=True, align_corners=False
    )
    padded = torch.nn.functional.pad(sized.round().clamp(0, 255).byte(), (0, GAP), value=255)
    return np.ascontiguousarray(padded.permute(2, 0, 3, 1).flatten(1, 2)[:, :-GAP].numpy())


def tables(
    result: Scores, details: VideoDetails, numbers: Findings
) -> tuple[list[list[Any]], list[list[Any]], list[list[Any]]]:
    """The rows of per_class.csv, confusion.csv and videos.csv, each with its heading."""
    names, has_top5 = numbers.names, numbers.top5 is not None
    heading = ["label", "class", "videos", "right", "top1", "top1_low", "top1_high", *(["top5"] if has_top5 else [])]
    classes: list[list[Any]] = [[*heading, "predicted", "taken_for", "taken_for_videos"]]
    for item in numbers.classes:
        low, high = item.top1.interval
        row = [item.label, names[item.label], item.top1.n, item.top1.right]
        row += [f"{value:.2f}" for value in (item.top1.percent, 100 * low, 100 * high)]
        row += [f"{item.top5.percent:.2f}"] if item.top5 else []
        most, videos = item.taken_for or (None, 0)
        classes.append([*row, item.predicted, "" if most is None else names[most], videos])

    unread = np.bincount(result.labels[numbers.predicted == NO_CLASS], minlength=len(names))
    confusion: list[list[Any]] = [["label", "true class", *names, "not read"]]
    for label, name in enumerate(names):
        confusion.append([label, name, *numbers.confusion[label].tolist(), int(unread[label])])

    errors, damaged = dict(details.unreadable), dict(details.damaged)
    videos_table: list[list[Any]] = [
        ["path", "label", "class", "predicted_label", "predicted_class", "right", "rank", "score", "score_of_class",
         "num_frames", "error", "damage"]
    ]  # fmt: skip
    for index, path in enumerate(result.paths):
        label, predicted = int(result.labels[index]), int(numbers.predicted[index])
        if predicted == NO_CLASS:
            answer: list[Any] = ["", "", 0, "", "", "", ""]
        else:
            scores = result.scores[index]
            answer = [predicted, names[predicted], int(predicted == label), int(numbers.rank[index])]
            answer += [f"{scores[predicted]:.6f}", f"{scores[label]:.6f}", int(details.num_frames[index])]
        videos_table.append([path, label, names[label], *answer, errors.get(index, ""), damaged.get(index, "")])
    return classes, confusion, videos_table


def _as_csv(rows: list[list[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return printable(file.getvalue())


def printable(text: str) -> str:
    """The text with an escape for each byte of a file name that is not UTF-8, which no file could hold otherwise."""
    return text.encode(errors="backslashreplace").decode()


def centre_view(numbers: Findings) -> str:
    """Which view the strips show, in words."""
    crops, clips = numbers.views[-1][0].crops, numbers.views[-1][0].clips
    place = numbers.views[0][0].views[0] if len(numbers.views) > 1 else 0
    crop = "the centre crop" if crops == 1 or place // clips == CENTRE_CROP[crops] else f"crop {place // clips + 1}"
    return crop if clips == 1 else f"{crop} of clip {place % clips + 1} of {clips}"
