"""Find videos below a folder, at any depth: video files, or folders of frames."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets.frame_files import frame_pattern
from datasets.video_files import VIDEO_SUFFIXES
from utils.errors import DataError


@dataclass(frozen=True)
class Found:
    """A video on disk.

    path: relative to the root
    num_frames, first, last: of a folder of frames, the number of files and the lowest and highest frame number
    """

    path: str
    num_frames: int | None = None
    first: int | None = None
    last: int | None = None


def video_files(root: Path) -> Iterator[Found]:
    """Files with a suffix of VIDEO_SUFFIXES, except hidden ones. Raises DataError for an unreadable folder."""
    for folder, folders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith("."):
                yield Found(Path(folder, name).relative_to(root).as_posix())


def frame_folders(root: Path, image_tmpl: str) -> Iterator[Found]:
    """Folders that hold a frame. Their subfolders are not searched. Raises DataError for an unreadable folder."""
    pattern = frame_pattern(image_tmpl)
    for folder, folders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        numbers = [int(match[1]) for match in map(pattern.fullmatch, files) if match]
        folders[:] = [] if numbers else [name for name in folders if not name.startswith(".")]
        if numbers:
            yield Found(Path(folder).relative_to(root).as_posix(), len(numbers), min(numbers), max(numbers))


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
