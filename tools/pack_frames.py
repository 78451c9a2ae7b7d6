"""Pack the frames of each video into one zip file (the command `pack` of tools/prepare_data.py)."""

import contextlib
import errno
import functools
import os
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from datasets.frame_archives import NO_FILE, SUFFIX, FrameArchive
from datasets.frame_files import frame_pattern
from tools.find_videos import frame_folders
from utils.atomic import write_atomically, write_json, writing
from utils.errors import DataError, UserError
from utils.parallel import parallel_map

FAILURES = "pack_failures.json"
PERMISSIONS = 0o644 << 16  # as a zip file stores them


@dataclass(frozen=True)
class Job:
    """A folder of frames and the zip file for them."""

    folder: Path
    archive: Path

    @property
    def unfinished(self) -> Path:
        """The hidden file that collects the frames until they are complete."""
        return self.archive.with_name(f".{self.archive.name}.unfinished")


@dataclass(frozen=True)
class Packed:
    """What became of a job.

    frames, size: number of files in the zip file, and their bytes
    there: whether the zip file was complete before
    reason: why the frames could not be packed, or None
    """

    frames: int = 0
    size: int = 0
    there: bool = False
    reason: str | None = None


def pack(frames: Path, out: Path, image_tmpl: str, workers: int) -> None:
    """Pack every folder of frames below `frames` into `out`/<path>.zip. Complete zip files are skipped.

    With `workers` 0 everything runs in this process.

    Raises:
        DataError: there are no frames; `out` cannot be written; or some folders could not be read, and the others are
            complete.
    """
    if not frames.is_dir():
        raise DataError(f"{frames}: no such folder")
    paths = sorted(found.path for found in frame_folders(frames, image_tmpl) if not found.packed)
    if paths == ["."]:
        raise DataError(f"{frames}: holds the frames of one video; give the folder above it, whose folders are videos")
    if not paths:
        raise DataError(f"{frames}: no folders with files like {image_tmpl} in it; check --image_tmpl")
    jobs = [Job(frames / path, out / f"{path}{SUFFIX}") for path in paths]
    results = parallel_map(
        functools.partial(pack_folder, image_tmpl=image_tmpl),
        jobs,
        workers,
        died=lambda job: Packed(reason="the process that packed it ended; is there enough memory?"),
    )
    done: list[Packed] = []
    try:
        with contextlib.closing(results), tqdm(results, desc="videos", disable=None, total=len(jobs)) as progress:
            done += (result for _, result in progress)
    finally:
        for job in jobs[len(done) :]:  # terminated workers leave unfinished files
            job.unfinished.unlink(missing_ok=True)
    failures = [
        {"video": str(job.folder), "reason": result.reason}
        for job, result in zip(jobs, done, strict=True)
        if result.reason is not None
    ]
    report = out / FAILURES
    with writing(report):
        report.unlink(missing_ok=True)
    if failures:
        write_json(report, {"videos": len(jobs), "failed": failures})
    there = sum(result.there for result in done)
    count, size = (sum(getattr(result, name) for result in done if not result.there) for name in ("frames", "size"))
    print(
        f"{out}: {len(done) - there - len(failures)} videos packed ({count} frames, {size / 1e6:.1f} MB), {there} were "
        f"there already, {len(failures)} failed"
    )
    if failures:
        raise DataError(f"{report}: {len(failures)} of {len(jobs)} videos could not be packed; it says why")


def pack_folder(job: Job, image_tmpl: str) -> Packed:
    """Pack one folder, unless a complete zip file of it is there.

    The new file is read back and compared with the folder, byte by byte, before it gets its name.

    Raises:
        DataError: the zip file cannot be written, or is not what was written.
    """
    try:
        sizes, newest = frame_files(job.folder, image_tmpl)
        if is_complete(job.archive, sizes, newest):
            return Packed(len(sizes), sum(sizes.values()), there=True)
    except OSError as error:
        return Packed(reason=f"{error.filename or job.folder}: {error.strerror or error}")
    try:
        with writing(job.archive):
            write_atomically(job.archive, lambda file: write_archive(file, job, list(sizes)), job.unfinished)
    except UnreadableFrame as error:
        return Packed(reason=error.line)
    return Packed(len(sizes), sum(sizes.values()))


def frame_files(folder: Path, image_tmpl: str) -> tuple[dict[str, int], float]:
    """Return ({name: bytes} of the frames, sorted by name, and the latest time that one of them was changed).

    Raises:
        OSError: one of them is no file, or a broken link.
    """
    pattern = frame_pattern(image_tmpl)
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat() for entry in entries if pattern.fullmatch(entry.name)}
    for name, status in found.items():
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, NO_FILE, str(folder / name))
    sizes = {name: found[name].st_size for name in sorted(found)}
    return sizes, max((status.st_mtime for status in found.values()), default=0.0)


def is_complete(archive: Path, sizes: dict[str, int], newest: float) -> bool:
    """Whether the zip file holds files of these names and sizes and is not older than the newest of them.

    The contents were compared when it was written, and it got its name only then.
    """
    try:
        if archive.stat().st_mtime < newest:
            return False
        with FrameArchive(str(archive)) as packed:
            return packed.sizes() == sizes
    except (FileNotFoundError, DataError):
        return False


class UnreadableFrame(UserError):
    """A frame file cannot be read. The other videos can be packed."""


def write_archive(file: IO[bytes], job: Job, names: list[str]) -> None:
    """Write the frames to an open file and compare what it holds with the folder."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name)  # with a constant date, so that the same frames give the same file
            entry.external_attr = PERMISSIONS
            archive.writestr(entry, read_frame(job.folder / name))
    file.flush()
    with FrameArchive(str(job.unfinished)) as packed:
        same = list(packed.sizes()) == names and all(packed.read(n) == read_frame(job.folder / n) for n in names)
    if not same:
        raise DataError(
            f"{job.archive}: is not what was written; run the command again if the frames were changed meanwhile, "
            "otherwise check the disk"
        )


def read_frame(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableFrame(f"{path}: {error.strerror or error}") from error
