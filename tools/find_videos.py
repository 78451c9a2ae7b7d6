"""Find videos below a folder, at any depth: video files, or frames in folders and in zip files."""

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from datasets.frame_archives import SUFFIX, FrameArchive
from datasets.frame_files import FramePattern, frame_pattern
from datasets.video_files import VIDEO_SUFFIXES
from utils.errors import DataError

NAMED = 3  # examples in a line

Identity = tuple[int, int]  # device and inode: equal for all paths that lead to one file or folder


@dataclass(frozen=True)
class Found:
    """A video on disk.

    path: relative to the root; of packed frames, without the suffix of the zip file
    num_frames, first, last: of frames, the number of files and the lowest and highest frame number
    identity: equal for two paths that lead to the same file or folder
    empty: whether it is a file of 0 bytes
    packed: whether it is a zip file of frames
    """

    path: str
    num_frames: int | None = None
    first: int | None = None
    last: int | None = None
    identity: Identity | None = None
    empty: bool = False
    packed: bool = False


class Tally:
    """The number of the paths that were added, and the first few in alphabetical order."""

    def __init__(self) -> None:
        self.number = 0
        self.examples: list[str] = []

    def add(self, path: str) -> None:
        self.number += 1
        self.examples = sorted([*self.examples, path])[:NAMED]

    def __str__(self) -> str:
        return ", ".join(self.examples) + ", ..." * (self.number > NAMED)


def some(paths: list[str]) -> str:
    """The first few of the paths, in alphabetical order."""
    return ", ".join(sorted(paths)[:NAMED]) + ", ..." * (len(paths) > NAMED)


@dataclass
class LeftOut:
    """What a search passed over. Paths are relative to the root.

    links: links to a folder that contains them, which are not entered
    again: links below another link, to a folder that a link has led to before, which are not entered either
    broken: links whose target does not exist
    special: pipes, sockets and devices
    others: suffix -> files that are not named like a video or a frame
    below_frames: folders inside a folder of frames, which are not searched
    nothing: folders without a video and without a subfolder
    damaged: zip files that are not complete
    """

    links: Tally = field(default_factory=Tally)
    again: Tally = field(default_factory=Tally)
    broken: Tally = field(default_factory=Tally)
    special: Tally = field(default_factory=Tally)
    others: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    below_frames: Tally = field(default_factory=Tally)
    nothing: Tally = field(default_factory=Tally)
    damaged: Tally = field(default_factory=Tally)

    def lines(self, root: Path) -> list[str]:
        """One line for each kind that there is: the number and a few examples."""
        kinds = [
            (self.links, "links to a folder that contains them"),
            (self.again, "links to a folder that another link has led to"),
            (self.broken, "broken links"),
            (self.special, "pipes, sockets or devices"),
            *((self.others[suffix], _files(suffix)) for suffix in sorted(self.others)),
            (self.below_frames, "folders inside a folder of frames"),
            (self.nothing, "folders that gave nothing"),
            (self.damaged, "zip files that are not complete"),
        ]
        return [f"{root}: left out: {what} ({tally.number}): {tally}" for tally, what in kinds if tally.number]


def _files(suffix: str) -> str:
    return f"{suffix} files with other names" if suffix else "files without a suffix"


def video_files(root: Path, left_out: LeftOut | None = None) -> Iterator[Found]:
    """Files with a suffix of VIDEO_SUFFIXES, except hidden ones. Raises DataError for an unreadable folder.

    A link to a folder that contains it is not entered. `left_out` collects what is passed over.
    """
    left_out = left_out or LeftOut()
    for folder in _walk(root, left_out):
        videos = {entry.name: entry for entry in folder.files if _suffix(entry.name) in VIDEO_SUFFIXES}
        _note(folder, videos, left_out)
        for name, entry in videos.items():
            try:
                status = entry.stat()
            except OSError as error:
                _unreadable(error)
            identity = status.st_dev, status.st_ino
            yield Found(folder.at(name), identity=identity, empty=status.st_size == 0)


def frame_folders(root: Path, image_tmpl: str, left_out: LeftOut | None = None) -> Iterator[Found]:
    """Folders and zip files that hold a frame. Raises DataError for an unreadable folder.

    The subfolders of a folder of frames are not searched. A zip file beside the folder of its name is left out, as in
    reading. A link to a folder that contains it is not entered. `left_out` collects what is passed over.
    """
    left_out = left_out or LeftOut()
    pattern = frame_pattern(image_tmpl)
    for folder in _walk(root, left_out):
        numbers = {entry.name: n for entry in folder.files if (n := pattern.number(entry.name)) is not None}
        packed = {} if numbers else _packed_frames(folder, pattern, left_out)
        _note(folder, numbers or packed, left_out)
        yield from packed.values()
        if numbers:
            for name in folder.folders:
                left_out.below_frames.add(folder.at(name))
            folder.folders.clear()
            first, last = min(numbers.values()), max(numbers.values())
            yield Found(folder.path, len(numbers), first, last, _identity(root / folder.path))


def _packed_frames(folder: "_Folder", pattern: FramePattern, left_out: LeftOut) -> dict[str, Found]:
    """The zip files of a folder that hold a frame, by their names."""
    found = {}
    for entry in folder.files:
        stem, suffix = os.path.splitext(entry.name)
        if suffix != SUFFIX or stem in folder.folders:
            continue
        try:
            with FrameArchive(entry.path) as frames:
                numbers = [n for name in frames.names() if (n := pattern.number(name)) is not None]
        except DataError:
            left_out.damaged.add(folder.at(entry.name))
            continue
        if numbers:
            ends = min(numbers), max(numbers)
            found[entry.name] = Found(folder.at(stem), len(numbers), *ends, _identity(entry.path), packed=True)
    return found


@dataclass
class _Folder:
    """One folder of a walk.

    path: relative to the root
    below_link: whether a folder that contains it is a link
    link: what it leads to, if it is a link
    files: its regular files
    folders: the subfolders to be entered, and what they lead to if they are links
    """

    path: str
    below_link: bool = False
    link: Identity | None = None
    files: list[os.DirEntry] = field(default_factory=list)
    folders: dict[str, Identity | None] = field(default_factory=dict)

    def at(self, name: str) -> str:
        return name if self.path == "." else f"{self.path}/{name}"


def _walk(root: Path, left_out: LeftOut) -> Iterator[_Folder]:
    """Yield the root and the folders below it, except hidden ones. The consumer may remove from `folders`.

    os.walk would follow a link that leads back without end. Folders that all link to each other have as many paths as
    there are orders of them, so below a link, no second link to the same folder is entered.
    """
    pending = [_Folder(".")]
    entered: set[Identity] = set()
    while pending:
        folder = pending.pop()
        if folder.link is not None:
            if folder.below_link and folder.link in entered:
                left_out.again.add(folder.path)
                continue
            entered.add(folder.link)
        try:
            _list(root, folder, left_out)
        except OSError as error:
            _unreadable(error)
        yield folder
        below_link = folder.below_link or folder.link is not None
        pending += [_Folder(folder.at(name), below_link, link) for name, link in folder.folders.items()]


def _list(root: Path, folder: _Folder, left_out: LeftOut) -> None:
    """Fill `files` and `folders`. Raises OSError."""
    containing: set[Identity] | None = None  # found out at the first link
    with os.scandir(root / folder.path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):  # the same links are entered on every machine
            path = folder.at(entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):  # also a link to itself
                left_out.broken.add(path)
            elif entry.is_file():
                folder.files.append(entry)
            elif not entry.is_dir():
                left_out.special.add(path)
            elif not entry.is_symlink():
                folder.folders[entry.name] = None
            elif (link := _identity(entry.path)) in (containing := containing or _around(root, folder)):
                left_out.links.add(path)
            else:
                folder.folders[entry.name] = link


def _around(root: Path, folder: _Folder) -> set[Identity]:
    """The folder and all folders that contain it, by its path below the root and by its real path."""
    place, real = root / folder.path, Path(os.path.realpath(root / folder.path))
    below = [place, *(root / parent for parent in Path(folder.path).parents)]
    return {_identity(path) for path in (*below, real, *real.parents)}


def _note(folder: _Folder, videos: Collection[str], left_out: LeftOut) -> None:
    """Count what is left out of a folder in which the files `videos` are taken."""
    for entry in folder.files:
        if entry.name not in videos:
            left_out.others[os.path.splitext(entry.name)[1]].add(folder.at(entry.name))
    if not videos and not folder.folders and folder.path != ".":
        left_out.nothing.add(folder.path)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _identity(path: str | Path) -> Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
