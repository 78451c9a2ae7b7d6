"""Annotation lists -> VideoRecord, class lists -> names; every error carries file and line."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass

from utils.errors import DataError

COLUMNS = ("path", "num_frames", "label")


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """One line of an annotation list.

    path: folder of the video below the data root, may contain spaces
    num_frames: number of frame files
    label: class, zero-based
    source: "FILE:LINE" of the list, for error messages
    """

    path: str
    num_frames: int
    label: int
    source: str


def read_annotations(list_path: str, num_classes: int) -> list[VideoRecord]:
    """Records of a list with lines `path num_frames label` in file order; blank lines are skipped.

    Columns are split from the right at spaces or tabs. Raises DataError for a file that cannot be read or has no
    lines, a wrong number of columns, num_frames below 1 and labels outside 0..num_classes-1.
    """
    records = []
    for source, line in _lines(list_path):
        if not line:
            continue
        values = line.rsplit(maxsplit=len(COLUMNS) - 1)
        if len(values) != len(COLUMNS):
            raise DataError(f"{source}: a line must read '{' '.join(COLUMNS)}', got {line!r}")
        path, num_frames, label = values
        records.append(
            VideoRecord(
                path=path,
                num_frames=_integer(num_frames, f"{source}: num_frames", 1, None, line),
                label=_integer(label, f"{source}: label (data.num_classes is {num_classes})", 0, num_classes - 1, line),
                source=source,
            )
        )
    if not records:
        raise DataError(f"{list_path}: the list is empty; write one line '{' '.join(COLUMNS)}' per video")
    return records


def read_class_names(csv_path: str, num_classes: int) -> list[str]:
    """Names in label order from a csv file with header `id,name`, whose ids are 0..num_classes-1 in any order.

    Raises DataError for another header, a wrong number of columns, an id that is missing, outside or there twice,
    and a name that is empty or there twice.
    """
    rows = csv.reader(line for _, line in _lines(csv_path))
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


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """("FILE:LINE", stripped line) of a UTF-8 text file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _integer(text: str, name: str, low: int, high: int | None, line: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"in {low}..{high}"
        raise DataError(f"{name} must be an integer {allowed}, got {text!r} in the line {line!r}")
    return value
