"""What is to be recognised: files, frames, directories, lists -> records, and the reader that opens them all."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from dotmap import DotMap

from datasets.annotations import UNLABELLED, VideoRecord, numbered_lines
from datasets.frame_archives import SUFFIX, FrameArchive, archive_of, open_frames
from datasets.frame_files import FramePattern, frame_pattern
from datasets.readers import FrameFolderReader, VideoFileReader
from datasets.video_files import VIDEO_SUFFIXES
from utils.errors import DataError

LIST_SUFFIX = ".txt"
FRAMES_AT_ONCE = 64  # of a folder that are in memory together
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_videos(paths: Iterable[str | Path], image_tmpl: str, root: str | Path | None = None) -> list[VideoRecord]:
    """The videos behind `paths`, in their order; what is in a directory is sorted by name.

    Args:
        paths: each a video file, a folder or zip file of frames, a directory with such files and folders at any depth,
            or a list: a file `*.txt`, see `read_list`. What cannot be read becomes a record too, whose reader says why.
        image_tmpl: names of frame files, `data.image_tmpl`.
        root: folder that the paths in lists are relative to; None: the list's own folder.

    Raises:
        DataError: a list cannot be read or is empty.
    """
    records = []
    for path in map(str, paths):
        if path.lower().endswith(LIST_SUFFIX) and os.path.isfile(path):
            records += read_list(path, root)
        elif os.path.isdir(path):
            videos = _videos_in(path, image_tmpl)
            records += [_record(video, f"the directory {path}") for video in videos or [path]]
        else:
            records.append(_record(path, "the command line"))
    return records


def given_videos(paths: Sequence[str | Path]) -> list[VideoRecord]:
    """A record for each path, which is one video: a file, or frames in a folder or zip file."""
    return [_record(str(path), f"argument {number}") for number, path in enumerate(paths, 1)]


def read_list(list_path: str, root: str | Path | None = None) -> list[VideoRecord]:
    """The records of a list, in its order; blank lines are skipped.

    A line is `path`, `path label`, `path num_frames label` or, for a segment, `path first_frame num_frames label`, as
    in training lists. Paths may contain spaces: a column is split off only where the rest of the line is a path and the
    whole is none. Folders without a number of frames have as many as there are files. Labels are kept, whatever the
    classes of the model are.

    Raises:
        DataError: the list cannot be read, or is empty.
    """
    folder = os.path.dirname(list_path) if root is None else str(root)
    records = [_read_line(source, line, folder) for source, line in numbered_lines(list_path) if line]
    if not records:
        raise DataError(f"{list_path}: the list is empty; write the path of one video a line")
    return records


def _read_line(source: str, line: str, folder: str) -> VideoRecord:
    for count in (0, 1, 2, 3):
        path, *columns = line.rsplit(maxsplit=count)
        path = os.path.join(folder, path)
        if _is_there(path) and all(re.fullmatch(r"-?\d+", column) for column in columns):
            *numbers, label = [*map(int, columns)] or [UNLABELLED]
            for name, lowest, number in zip(("num_frames", "first_frame"), (1, 0), reversed(numbers), strict=False):
                if number < lowest:
                    raise DataError(f"{source}: {name} must be at least {lowest}, got {number} in the line {line!r}")
            num_frames, first_frame = (*reversed(numbers), None, None)[:2]
            return VideoRecord(path, num_frames, label, source, first_frame)
    return VideoRecord(os.path.join(folder, line), None, UNLABELLED, source)


def _videos_in(directory: str, image_tmpl: str) -> list[str]:
    try:
        return list(walk(directory, frame_pattern(image_tmpl)))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def walk(directory: str, pattern: FramePattern, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Video files, and folders and zip files of frames in a directory, sorted, at any depth; hidden ones are left out.

    A zip file is given if it holds an image, or is not complete: its reader says what is wrong. It is left out beside
    the folder of its name. A folder with nothing but images that are not named as `pattern` asks is given too. Links to
    a directory above are not followed.
    """
    status = os.stat(directory)
    above = (*above, (status.st_dev, status.st_ino))
    names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    paths = {name: os.path.join(directory, name) for name in names}
    if any(pattern.fullmatch(name) for name in names):
        yield directory
        return
    videos = [name for name in names if _suffix(name) in VIDEO_SUFFIXES and os.path.isfile(paths[name])]
    folders = [name for name in names if os.path.isdir(paths[name])]
    videos += [name for name in names if _suffix(name) == SUFFIX and _holds_frames(paths[name])]
    if not videos and not folders and any(_suffix(name) in IMAGE_SUFFIXES for name in names):
        yield directory
    for name in sorted([*videos, *folders]):
        if name in videos:
            yield paths[name]
        elif ((status := os.stat(paths[name])).st_dev, status.st_ino) not in above:
            yield from walk(paths[name], pattern, above)


def _holds_frames(archive: str) -> bool:
    """Whether a zip file may hold the frames of a video."""
    if archive_of(archive.removesuffix(SUFFIX)) != archive:
        return False
    try:
        with FrameArchive(archive) as frames:
            return any(_suffix(name) in IMAGE_SUFFIXES for name in frames.names())
    except DataError:
        return True


def is_video_file(path: str) -> bool:
    """Whether a path leads to a video file, not to frames."""
    return archive_of(path) is None and not os.path.isdir(path)


def _is_there(path: str) -> bool:
    return os.path.exists(path) or archive_of(path) is not None


class PathReader:
    """Video files, and folders and zip files of frames, side by side, told apart by what is on the disk.

    Frames are as many as the record says or, where it says nothing or with `data.count_frames`, as there are files
    that are named as `data.image_tmpl` says.
    """

    def __init__(self, data: DotMap):
        self._files = VideoFileReader("", data.decoder)
        self._folders = FrameFolderReader("", data.image_tmpl, data.count_frames, data.index_base)
        self._counted = FrameFolderReader("", data.image_tmpl, True, data.index_base)
        self._image_tmpl = data.image_tmpl
        self._index_base = data.index_base

    def open(self, record: VideoRecord):
        """The opened video, as of the readers of datasets/readers.py.

        Raises:
            DataError: there is nothing at the path, no frame in the folder, or the file cannot be read.
        """
        if not _is_there(record.path):
            raise DataError(
                f"{record.path}: no such file or folder; named by {record.source}; paths in a list start at its root"
            )
        if is_video_file(record.path):
            return self._files.open(record)
        counted = record.num_frames is None or (self._folders.count_frames and record.first_frame is None)
        with open_frames(record.path) as frames:
            names = frames.names()
        if problem := self._wrong_frames(names, counted):
            raise DataError(f"{frames.path}: {problem}")
        return (self._counted if counted else self._folders).open(record)

    def _wrong_frames(self, names: set[str], counted: bool) -> str | None:
        """What is wrong with the files of a video; without this, numbers from 0 would silently be read from 1 on."""
        numbers = sorted(n for n in map(frame_pattern(self._image_tmpl).number, names) if n is not None)
        if not numbers:
            return self._no_frames(names)
        first, expected = numbers[0], self._index_base
        if first != expected:
            return (
                f"its first frame has the number {first}, but data.index_base is {expected}; set "
                f"data.index_base={first}"
            )
        if counted and numbers != list(range(first, first + len(numbers))):
            gap = next(number for place, number in enumerate(numbers, first) if number != place)
            return f"frames are missing or twice there before {self._image_tmpl.format(gap)}; extract them again"
        return None

    def _no_frames(self, names: set[str]) -> str:
        images = sorted(name for name in names if _suffix(name) in IMAGE_SUFFIXES)
        if not images:
            return f"holds neither frames nor videos; frames are files like {self._image_tmpl} (data.image_tmpl)"
        fitting = template_of(images[0])
        remedy = f"set data.image_tmpl={fitting}" if fitting else "name frames by their number"
        return f"its files are named like {images[0]}, but frames like {self._image_tmpl} are expected; {remedy}"


def folder_frames(record: VideoRecord, data: DotMap) -> Iterator[np.ndarray]:
    """Every frame of a folder or packed file, uint8 (H, W, 3), in order and in bounded memory. Raises DataError."""
    reader = PathReader(data)
    num_frames = reader.open(record).num_frames
    for start in range(0, num_frames, FRAMES_AT_ONCE):
        yield from reader.open(record).read(range(start, min(start + FRAMES_AT_ONCE, num_frames)))


def template_of(name: str) -> str | None:
    """The template that makes this file name of its last number: img_00001.jpg -> img_{:05d}.jpg; None without one."""
    stem, suffix = os.path.splitext(name)
    found = re.search(r"(\d+)(?=\D*$)", stem)
    if found is None:
        return None
    digits = found[1]
    # A number without a leading zero may be padded or not; one of a single digit is not.
    field = f"{{:0{len(digits)}d}}" if len(digits) > 1 else "{:d}"
    before, after = (
        text.replace("{", "{{").replace("}", "}}") for text in (stem[: found.start()], stem[found.end() :])
    )
    return f"{before}{field}{after}{suffix}"


def _record(path: str, source: str) -> VideoRecord:
    return VideoRecord(path, None, UNLABELLED, source)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
