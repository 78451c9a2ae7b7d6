"""Annotation lists -> VideoRecord, class lists -> names; every error carries file and line."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from utils.errors import DataError

COLUMNS = {"RGB": ("path", "num_frames", "label"), "video": ("path", "label")}
UNLABELLED = -1


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """One line of an annotation list.

    path: folder or file of the video below the data root, may contain spaces
    num_frames: number of frame files, None for a video file
    label: class, zero-based, or UNLABELLED
    source: "FILE:LINE" of the list, for error messages
    """

    path: str
    num_frames: int | None
    label: int
    source: str


def read_annotations(
    list_path: str, num_classes: int, modality: str = "RGB", unlabelled: bool = False
) -> list[VideoRecord]:
    """Records of a list in file order; blank lines are skipped.

    Lines read `path num_frames label`, those of `modality` "video" `path label`. Columns are split from the right at
    spaces or tabs. `unlabelled` accepts a list in which every label is -1. Raises DataError for a file that cannot be
    read or has no lines, a wrong number of columns, num_frames below 1 and labels outside 0..num_classes-1.
    """
    records = []
    for source, line in numbered_lines(list_path):
        if not line:
            continue
        records.append(parse_line(source, line, num_classes, modality))
        check_labelled(records[-1], records[0], unlabelled)
    if not records:
        line = " ".join(COLUMNS[modality])
        raise DataError(f"{list_path}: the list is empty; write one line '{line}' per video")
    return records


def numbered_lines(path: str) -> Iterator[tuple[str, str]]:
    """("FILE:LINE", stripped line) of every line of a UTF-8 text file, blank ones too."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def split_line(source: str, line: str, modality: str) -> list[str]:
    """The columns of one line, split from the right; DataError for a wrong number of them."""
    columns = COLUMNS[modality]
    values = line.rsplit(maxsplit=len(columns) - 1)
    if len(values) != len(columns):
        raise DataError(f"{source}: a line must read '{' '.join(columns)}', got {line!r}")
    return values


def parse_line(source: str, line: str, num_classes: int, modality: str) -> VideoRecord:
    """The record of one line, labelled or not, whatever the other lines are; DataError as for `read_annotations`."""
    path, *num_frames, label = split_line(source, line, modality)
    if label != str(UNLABELLED):
        label = _integer(label, f"{source}: label (data.num_classes is {num_classes})", 0, num_classes - 1, line)
    return VideoRecord(
        path=path,
        num_frames=_integer(num_frames[0], f"{source}: num_frames", 1, None, line) if num_frames else None,
        label=int(label),
        source=source,
    )


def check_labelled(record: VideoRecord, first: VideoRecord, unlabelled: bool) -> None:
    """DataError for label -1 unless `unlabelled`, and for a list of which only a part has labels."""
    if record.label == UNLABELLED and not unlabelled:
        raise DataError(f"{record.source}: label -1 means unlabelled, but training and validation need labels")
    if (record.label == UNLABELLED) != (first.label == UNLABELLED):
        raise DataError(
            f"{record.source}: label {record.label} in a list whose first is {first.label}; label all or none"
        )


def few_shot(
    records: list[VideoRecord], shot: int, class_names: list[str], rng: np.random.Generator
) -> list[VideoRecord]:
    """`shot` videos of each class, chosen by `rng`, in the order of `records`.

    Raises DataError naming the first class that has fewer.
    """
    of_class: list[list[int]] = [[] for _ in class_names]
    for index in rng.permutation(len(records)).tolist():
        of_class[records[index].label].append(index)
    for name, indices in zip(class_names, of_class, strict=True):
        if len(indices) < shot:
            raise DataError(f"data.shot: {shot} videos of every class, but {name} has {len(indices)}")
    return [records[index] for index in sorted(index for indices in of_class for index in indices[:shot])]


def read_class_names(csv_path: str, num_classes: int) -> list[str]:
    """Names in label order from a csv file with header `id,name`, whose ids are 0..num_classes-1 in any order.

    Raises DataError for another header, a wrong number of columns, an id that is missing, outside or there twice,
    and a name that is empty or there twice.
    """
    rows = csv.reader(line for _, line in numbered_lines(csv_path))
    header = [value.strip() for value in next(rows, [])]
    if header != ["id", "name"]:
        raise DataError(f"{csv_path}:1: the header must read 'id,name', got {','.join(header)!r}")
    names: dict[int, str] = {}
    for row in rows:
        if not row:
            continue
        source, line = f"{csv_path}:{rows.line_num}", ",".join(row)
        if len(row) != 2:
            raise DataError(f"{source}: a line must read 'id,name' (a name with commas in quotes), got {line!r}")
        label = _integer(row[0], f"{source}: id (data.num_classes is {num_classes})", 0, num_classes - 1, line)
        name = row[1].strip()
        if label in names:
            raise DataError(f"{source}: id {label} is there twice")
        if not name or name in names.values():
            raise DataError(f"{source}: every name must be given and unique, got {name!r}")
        names[label] = name
    if missing := set(range(num_classes)) - set(names):
        raise DataError(f"{csv_path}: ids must be 0..{num_classes - 1}, but {min(missing)} is missing")
    return [names[label] for label in range(num_classes)]


def _integer(text: str, name: str, low: int, high: int | None, line: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"in {low}..{high}"
        raise DataError(f"{name} must be an integer {allowed}, got {text!r} in the line {line!r}")
    return value
