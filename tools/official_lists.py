"""Read the official annotation files of data sets: which video belongs to which class.

A file in another format raises a DataError that names the file and, if possible, the line.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.annotations import csv_rows, numbered_lines
from utils.errors import DataError

KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
HMDB51_SPLITS = {"0": None, "1": "train", "2": "val"}


@dataclass(frozen=True, slots=True)
class Annotation:
    """A video and its class.

    name: path of the video file without suffix, or of the folder of frames; on disk its folder may be another one
    class_name: as in the class list
    source: "FILE:LINE" for error messages
    """

    name: str
    class_name: str
    source: str


def read_kinetics(path: Path) -> list[Annotation]:
    """A csv file with columns label, youtube_id, time_start, time_end, and others. Names are <id>_<start>_<end>."""
    rows = csv_rows(str(path))
    _, header = next(rows, ("", []))
    if missing := [name for name in KINETICS_COLUMNS if name not in header]:
        raise DataError(f"{path}:1: the header must name {', '.join(KINETICS_COLUMNS)}, but {missing[0]} is missing")
    places = [header.index(name) for name in KINETICS_COLUMNS]
    annotations = []
    for source, row in rows:
        if not row:
            continue
        try:
            label, video, *times = (row[place] for place in places)
            start, end = (round(float(time)) for time in times)
        except (IndexError, ValueError) as error:
            raise DataError(f"{source}: times in seconds and {len(header)} columns expected, got {row}") from error
        annotations.append(Annotation(f"{video}_{start:06d}_{end:06d}", label, source))
    return annotations


def read_something_v1(path: Path) -> list[Annotation]:
    """Lines `id;class`."""
    annotations = []
    for source, line in _lines(path):
        video, semicolon, name = line.partition(";")
        if not semicolon:
            raise DataError(f"{source}: a line must read 'id;class', got {line!r}")
        annotations.append(Annotation(video, name, source))
    return annotations


def read_something_v1_classes(path: Path) -> list[str]:
    """One class name per line."""
    return [line for _, line in _lines(path)]


def read_something_v2(path: Path) -> list[Annotation]:
    """A JSON list of {"id", "template", ...}. The class name is the template without its brackets."""
    annotations = []
    for number, entry in enumerate(_json(path, list), 1):
        source = f"{path}: entry {number}"
        try:
            name = entry["template"].replace("[", "").replace("]", "")
            annotations.append(Annotation(str(entry["id"]), name, source))
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{source}: must have an id and a template, got {entry!r}") from error
    return annotations


def read_something_v2_classes(path: Path) -> list[str]:
    """The names of a JSON object {"name": "index", ...}, sorted by index."""
    indices = _json(path, dict)
    try:
        numbers = {name: int(index) for name, index in indices.items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: must hold {{name: index, ...}} with whole numbers ({error})") from error
    return sorted(numbers, key=numbers.__getitem__)


def read_ucf101(path: Path, classes: list[str]) -> list[Annotation]:
    """Lines `Class/video.avi 1`. The number is the position in `classes`, from 1; test files have no number."""
    annotations = []
    for source, line in _lines(path):
        video, _, number = line.rpartition(" ")
        if not number.isdigit():
            video, number = line, ""
        name = os.path.dirname(video)
        if name not in classes:
            raise DataError(f"{source}: 'Class/video.avi' with a class of the label file expected, got {line!r}")
        if number not in ("", str(classes.index(name) + 1)):
            raise DataError(f"{source}: {name} is number {classes.index(name) + 1} in the label file, got {line!r}")
        annotations.append(Annotation(os.path.splitext(video)[0], name, source))
    return annotations


def read_ucf101_classes(path: Path) -> list[str]:
    """Lines `1 Class`, numbered from 1 in order."""
    names: list[str] = []
    for source, line in _lines(path):
        number, _, name = line.partition(" ")
        if number != str(len(names) + 1) or not name:
            raise DataError(f"{source}: a line must read '{len(names) + 1} Class', got {line!r}")
        names.append(name)
    return names


def read_hmdb51(folder: Path, split: int) -> dict[str, list[Annotation]]:
    """The "train" and "val" videos of split 1, 2 or 3, from files <class>_test_split<N>.txt.

    Lines read `video.avi 1`: 1 is training, 2 is testing, 0 is neither.
    """
    ending = f"_test_split{split}.txt"
    files = sorted(folder.glob(f"*{ending}"))
    if not files:
        raise DataError(f"{folder}: no file like brush_hair{ending}; name the folder of HMDB51's split files")
    parts: dict[str, list[Annotation]] = {"train": [], "val": []}
    for path in files:
        class_name = path.name.removesuffix(ending)
        for source, line in _lines(path):
            video, _, number = line.rpartition(" ")
            if number not in HMDB51_SPLITS or not video:
                raise DataError(f"{source}: a line must read 'video.avi' and 0, 1 or 2, got {line!r}")
            if part := HMDB51_SPLITS[number]:
                parts[part].append(Annotation(f"{class_name}/{os.path.splitext(video.strip())[0]}", class_name, source))
    return parts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    return ((source, line) for source, line in numbered_lines(str(path)) if line)


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads("\n".join(line for _, line in numbered_lines(str(path))))
    except ValueError as error:
        raise DataError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, kind):
        raise DataError(f"{path}: must hold a JSON {'list' if kind is list else 'object'}")
    return content
