"""Readers of annotation lists and class lists. Every error names the file and the line."""

import contextlib
import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from utils.errors import DataError, quoted

COLUMNS = {"RGB": ("path", "num_frames", "label"), "video": ("path", "label")}
SEGMENT_COLUMNS = ("path", "first_frame", "num_frames", "label")
UNLABELLED = -1
LONGEST_LINE = 65536  # characters
WHOLE_LINES = "; lines of whole videos need data.segments: False"
VIDEO_LINES = "; a list of video files ('path label') needs data.modality: video"


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """One line of an annotation list.

    path: folder or file of the video, relative to the data root; may contain spaces
    num_frames: number of frame files, or of frames of the segment; None for a whole video file
    label: zero-based class, or UNLABELLED
    source: "FILE:LINE" of the list, for error messages
    first_frame: zero-based index of the first frame of a segment; None for a whole video
    """

    path: str
    num_frames: int | None
    label: int
    source: str
    first_frame: int | None = None

    @property
    def name(self) -> str:
        """The path or, of a segment, `path first_frame num_frames`: unique in a list."""
        return self.path if self.first_frame is None else f"{self.path} {self.first_frame} {self.num_frames}"


def read_annotations(
    list_path: str, num_classes: int, modality: str = "RGB", unlabelled: bool = False, segments: bool = False
) -> list[VideoRecord]:
    """Return the records of a list in file order. Blank lines are skipped.

    A line is `path num_frames label`, or `path label` if `modality` is "video". Columns are separated by spaces or
    tabs and split from the right, because a path may contain spaces.

    Args:
        unlabelled: accept a list in which every label is -1.
        segments: a line is `path first_frame num_frames label`, whatever the modality.

    Raises:
        DataError: the file cannot be read or has no lines, a line has too few columns, num_frames is below 1,
            first_frame is below 0, a label is outside 0..num_classes-1, or some lines have labels and others do not.
    """
    records = []
    for source, line in numbered_lines(list_path):
        if not line:
            continue
        records.append(parse_line(source, line, num_classes, modality, segments))
        check_labelled(records[-1], records[0], unlabelled)
    if not records:
        line = " ".join(SEGMENT_COLUMNS if segments else COLUMNS[modality])
        raise DataError(f"{list_path}: the list is empty; write one line '{line}' per video")
    return records


def numbered_lines(path: str) -> Iterator[tuple[str, str]]:
    """Yield ("FILE:LINE", stripped line) for every line of a UTF-8 text file, including blank lines."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise DataError(f"{path}:{number}: the line is longer than {LONGEST_LINE} characters")
                yield f"{path}:{number}", line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def split_line(source: str, line: str, modality: str, segments: bool = False) -> list[str]:
    """Split one line into its columns, from the right. Raises DataError if there are too few, or a NUL character."""
    columns = SEGMENT_COLUMNS if segments else COLUMNS[modality]
    if "\0" in line:
        raise DataError(f"{source}: the line holds a NUL character; write the list again as UTF-8 text")
    values = line.rsplit(maxsplit=len(columns) - 1)
    if len(values) != len(columns):
        advice = WHOLE_LINES if segments else VIDEO_LINES if modality == "RGB" else ""
        raise DataError(f"{source}: a line must read '{' '.join(columns)}', got {quoted(line)}{advice}")
    return values


def parse_line(source: str, line: str, num_classes: int, modality: str, segments: bool = False) -> VideoRecord:
    """Return the record of one line. Label -1 is accepted; other mistakes raise DataError as in `read_annotations`."""
    path, *numbers, label = split_line(source, line, modality, segments)
    if numbers and os.path.splitext(numbers[0])[1][1:2].isalpha():  # the end of a path with spaces
        name, lowest, advice = ("first_frame", 0, WHOLE_LINES) if segments else ("num_frames", 1, VIDEO_LINES)
        raise DataError(f"{source}: {name} must be an integer of at least {lowest}, got {numbers[0]!r}{advice}")
    label_name = f"{source}: label (data.num_classes is {num_classes})"
    return VideoRecord(
        path=path,
        num_frames=_integer(numbers[-1], f"{source}: num_frames", 1, None, line) if numbers else None,
        label=UNLABELLED if label == str(UNLABELLED) else _integer(label, label_name, 0, num_classes - 1, line),
        source=source,
        first_frame=_integer(numbers[0], f"{source}: first_frame", 0, None, line) if segments else None,
    )


def check_labelled(record: VideoRecord, first: VideoRecord, unlabelled: bool) -> None:
    """Raise DataError for label -1 unless `unlabelled`, and if only one of `record` and `first` has a label."""
    if record.label == UNLABELLED and not unlabelled:
        raise DataError(f"{record.source}: label -1 means unlabelled, but training and validation need labels")
    if (record.label == UNLABELLED) != (first.label == UNLABELLED):
        raise DataError(
            f"{record.source}: label {record.label} in a list whose first is {first.label}; label all or none"
        )


def few_shot(
    records: list[VideoRecord], shot: int, class_names: list[str], rng: np.random.Generator
) -> list[VideoRecord]:
    """Choose `shot` videos of each class with `rng` and return them in the order of `records`.

    Raises:
        DataError: a class has fewer videos; the message names the first such class.
    """
    of_class: list[list[int]] = [[] for _ in class_names]
    for index in rng.permutation(len(records)).tolist():
        of_class[records[index].label].append(index)
    for name, indices in zip(class_names, of_class, strict=True):
        if len(indices) < shot:
            raise DataError(f"data.shot: {shot} videos of every class, but {name} has {len(indices)}")
    return [records[index] for index in sorted(index for indices in of_class for index in indices[:shot])]


def csv_rows(path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield ("FILE:LINE", fields) for every row of a csv file. Raises DataError if it cannot be read."""
    rows = csv.reader(line for _, line in numbered_lines(path))
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num}: not readable as csv ({error}); is a quote not closed?") from error
        yield f"{path}:{rows.line_num}", row


def read_class_names(csv_path: str, num_classes: int) -> list[str]:
    """Return the class names in label order from a csv file with the header `id,name`, in any order of rows.

    Raises:
        DataError: wrong header, wrong number of columns, an id that is missing, repeated or outside
            0..num_classes-1, or a name that is empty or repeated.
    """
    rows = csv_rows(csv_path)
    header = [value.strip() for value in next(rows, ("", []))[1]]
    if header != ["id", "name"]:
        raise DataError(f"{csv_path}:1: the header must read 'id,name', got {quoted(','.join(header))}")
    names: dict[int, str] = {}
    for source, row in rows:
        if not row:
            continue
        line = ",".join(row)
        if len(row) != 2:
            raise DataError(f"{source}: a line must read 'id,name' (a name with commas in quotes), got {quoted(line)}")
        label = _integer(row[0], f"{source}: id (data.num_classes is {num_classes})", 0, num_classes - 1, line)
        name = row[1].strip()
        if label in names:
            raise DataError(f"{source}: id {label} is there twice")
        if not name or name in names.values():
            raise DataError(f"{source}: every name must be given and unique, got {quoted(name)}")
        names[label] = name
    if missing := set(range(num_classes)) - set(names):
        raise DataError(f"{csv_path}: ids must be 0..{num_classes - 1}, but {min(missing)} is missing")
    return [names[label] for label in range(num_classes)]


def _integer(text: str, name: str, low: int, high: int | None, line: str) -> int:
    with contextlib.suppress(ValueError):
        value = int(text)
        if value >= low and (high is None or value <= high):
            return value
    allowed = f"of at least {low}" if high is None else f"in {low}..{high}"
    raise DataError(f"{name} must be an integer {allowed}, got {quoted(text)} in the line {quoted(line)}")
