"""Video files as files: which of a folder's files are videos, and whether a file is as long as its header states."""

import os
from collections.abc import Iterator
from typing import BinaryIO

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)

MOST_BOXES = 10_000  # that are looked at; a fragmented file has two for each fragment


def missing_bytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes of a file are missing at its end, as its header states its length.

    0 for a whole file, and for formats and headers that state no length: mp4 and mov state the length of each box, avi
    of its RIFF chunk, mkv and webm of their segment.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        return max(0, max(_stated_ends(file, size), default=0) - size)


def _stated_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """The offsets at which the outermost parts of a file end, as far as they state it."""
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
        if length := int.from_bytes(head[4:8], "little"):  # 0: a recording that was never finished
            yield 8 + length
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        file.seek(4)
        file.seek(_ebml_size(file) or 0, os.SEEK_CUR)
        if file.read(4) == b"\x18\x53\x80\x67" and (segment := _ebml_size(file)) is not None:
            yield file.tell() + segment
    elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        start = 0
        for _ in range(MOST_BOXES):
            file.seek(start)
            box = file.read(16)
            length = int.from_bytes(box[:4], "big")
            if length == 1:
                length = int.from_bytes(box[8:16], "big")
            if length < 8 or not box[4:8].isalnum():  # 0: to the end of the file; and bytes that are no box
                break
            start += length
            yield start
            if start >= size:
                break


def _ebml_size(file: BinaryIO) -> int | None:
    """Read a size of Matroska: leading zeros say how many bytes follow. None if it is stated as unknown."""
    first = file.read(1)
    if not first or first == b"\0":
        return None
    width = 8 - first[0].bit_length() + 1
    value = int.from_bytes(first + file.read(width - 1), "big") & ((1 << 7 * width) - 1)
    return None if value == (1 << 7 * width) - 1 else value
