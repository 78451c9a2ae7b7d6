"""Read the annotation files of data sets: which video belongs to which class.

A file in another format raises a DataError that names the file and, if possible, the line.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets.annotations import csv_rows, numbered_lines
from utils.errors import DataError, quoted

KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
HMDB51_SPLITS = {"0": None, "1": "train", "2": "val"}
PARTS = {  # part -> how data sets name it
    "train": ("train", "training"),
    "val": ("val", "valid", "validate", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True, slots=True)
class Annotation:
    """A video and its class.

    name: path of the video file without suffix, or of the folder of frames; on disk its folder may be another one
    class_name: as in the class list; None if the official files do not say it
    source: "FILE:LINE" for error messages
    others: names that the video may have instead
    fixed: the folders of `name` belong to it: another folder holds another video
    """

    name: str
    class_name: str | None
    source: str
    others: tuple[str, ...] = ()
    fixed: bool = False


def part_of(word: str) -> str | None:
    """ "train", "val" or "test" for a word of PARTS, None for other words."""
    return next((part for part, words in PARTS.items() if word.strip().lower() in words), None)


def read_kinetics(path: Path, part: str = "train") -> list[Annotation]:
    """A csv file with columns label, youtube_id, time_start, time_end, and others, or the json file of a release.

    Only a test file may be without labels. If a json file holds several subsets, those of `part` are taken. Names are
    <id>_<start>_<end> with times of six digits, or without the zeros, or <id> alone.
    """
    if path.suffix.lower() == ".json":
        return _read_kinetics_json(path, part)
    rows = csv_rows(str(path))
    _, header = next(rows, ("", []))
    needed = KINETICS_COLUMNS[1:] if part == "test" else KINETICS_COLUMNS
    if missing := [name for name in needed if name not in header]:
        raise DataError(f"{path}:1: the header must name {', '.join(needed)}, but {missing[0]} is missing")
    annotations = []
    for source, row in rows:
        if not row:
            continue
        entry = dict(zip(header, row, strict=False))
        try:
            video, *times = (entry[name] for name in KINETICS_COLUMNS[1:])
            label = entry["label"] if "label" in header else None
            annotations.append(_kinetics(video, times, label or None, source))
        except (KeyError, ValueError, OverflowError) as error:
            raise DataError(
                f"{source}: times in seconds and {len(header)} columns expected, got {quoted(row)}"
            ) from error
    return annotations


def _read_kinetics_json(path: Path, part: str) -> list[Annotation]:
    """A JSON object {id: {"annotations": {"label", "segment": [start, end]}, "subset"}}. Every value may be missing."""
    content = _json(path, dict)
    entries = content["database"] if isinstance(content.get("database"), dict) else content
    annotations = []
    for video, entry in entries.items():
        source = f"{path}: entry {video}"
        try:
            details = entry.get("annotations") or {}
            times = details.get("segment") or ()
            annotation = _kinetics(video, times, details.get("label"), source)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{source}: annotations with a label and a segment of two times expected") from error
        subset = str(entry.get("subset", part))
        if part_of(subset) is None:
            raise DataError(f"{source}: the subset must be train, val or test, got {quoted(subset)}")
        annotations.append((part_of(subset), annotation))
    several = len({subset for subset, _ in annotations}) > 1
    return [annotation for subset, annotation in annotations if not several or subset == part]


def _kinetics(video: str, times: Any, label: str | None, source: str) -> Annotation:
    """Raises ValueError or OverflowError for times that are no numbers."""
    if not times:
        return Annotation(video, label, source)
    start, end = (round(float(time)) for time in times)
    return Annotation(f"{video}_{start:06d}_{end:06d}", label, source, (f"{video}_{start}_{end}", video))


def read_something_v1(path: Path, part: str) -> list[Annotation]:
    """Lines `id;class`. In a test file, lines may read `id`."""
    return _answers(path, _text(path), part)


def _answers(path: Path, text: str, part: str) -> list[Annotation]:
    annotations = []
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        video, semicolon, name = (value.strip() for value in line.partition(";"))
        if line and not semicolon and part != "test":
            raise DataError(f"{path}:{number}: a line must read 'id;class', got {quoted(line)}")
        if line:
            annotations.append(Annotation(video, name or None, f"{path}:{number}"))
    return annotations


def read_something_v1_classes(path: Path) -> list[str]:
    """One class name per line."""
    return [line for _, line in _lines(path)]


def read_something_v2(path: Path, part: str) -> list[Annotation]:
    """A JSON list of {"id", "template", ...}, or lines `id;class` as in the file of the test answers.

    The class name is the template without its brackets. Only a test file may be without templates.
    """
    text = _text(path)
    if path.suffix.lower() != ".json" and text.lstrip()[:1] not in ("[", "{"):
        return [replace(a, class_name=_plain(a.class_name)) for a in _answers(path, text, part)]
    annotations = []
    for number, entry in enumerate(_parsed(path, text, list), 1):
        source = f"{path}: entry {number}"
        try:
            template = entry.get("template") if part == "test" else entry["template"]
            annotations.append(Annotation(str(entry["id"]), _plain(template), source))
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{source}: must have an id and a template, got {quoted(entry)}") from error
    return annotations


def _plain(template: str | None) -> str | None:
    return template.replace("[", "").replace("]", "") if template else None


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
        annotations.append(Annotation(os.path.splitext(video)[0], name, source, (video,)))
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
    for file in files:
        class_name = file.name.removesuffix(ending)
        for source, line in _lines(file):
            video, _, number = line.rpartition(" ")
            if number not in HMDB51_SPLITS or not video:
                raise DataError(f"{source}: a line must read 'video.avi' and 0, 1 or 2, got {line!r}")
            if part := HMDB51_SPLITS[number]:
                path = f"{class_name}/{video.strip()}"
                parts[part].append(Annotation(os.path.splitext(path)[0], class_name, source, (path,)))
    return parts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    return ((source, line) for source, line in numbered_lines(str(path)) if line)


def _text(path: Path) -> str:
    """The whole file. A line may be of any length: JSON files often are one line."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _json(path: Path, kind: type) -> Any:
    return _parsed(path, _text(path), kind)


def _parsed(path: Path, text: str, kind: type) -> Any:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, kind):
        raise DataError(f"{path}: must hold a JSON {'list' if kind is list else 'object'}")
    return content
