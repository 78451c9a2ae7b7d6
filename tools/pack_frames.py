"""Pack the frames of each video into one zip file (the command `pack` of tools/prepare_data.py)."""

import contextlib
import functools
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from datasets.frame_archives import SUFFIX, FrameArchive
from datasets.frame_files import frame_pattern
from tools.find_videos import frame_folders
from utils.atomic import write_atomically
from utils.errors import DataError
from utils.parallel import parallel_map


@dataclass(frozen=True)
class Job:
    """A folder of frames and the zip file for them."""

    folder: Path
    archive: Path


def pack(frames: Path, out: Path, image_tmpl: str, workers: int) -> None:
    """Pack every folder of frames below `frames` into `out`/<path>.zip. Complete zip files are skipped.

    Raises:
        DataError: there are no frames, or some folders could not be packed; the others are complete.
    """
    paths = sorted(found.path for found in frame_folders(frames, image_tmpl))
    if not paths or paths == ["."]:
        raise DataError(f"{frames}: no folders with files like {image_tmpl} in it; check --image_tmpl")
    jobs = [Job(frames / path, out / f"{path}{SUFFIX}") for path in paths]
    results = parallel_map(
        functools.partial(pack_folder, image_tmpl=image_tmpl),
        jobs,
        workers,
        died=lambda job: f"{job.folder}: the process that packed it ended",
    )
    made, there, failures = 0, 0, []
    with contextlib.closing(results), tqdm(results, desc="videos", disable=None, total=len(jobs)) as progress:
        for _, result in progress:
            made += result is True
            there += result is False
            failures += [result] if isinstance(result, str) else []
    print(f"{out}: {made} videos packed, {there} were there already, {len(failures)} failed")
    if failures:
        raise DataError(f"{failures[0]} ({len(failures)} of {len(jobs)} videos could not be packed)")


def pack_folder(job: Job, image_tmpl: str) -> bool | str:
    """Pack one folder. Returns False if a complete zip file is there, or one line that says what failed.

    The new file is compared with the folder byte by byte before it gets its name.
    """
    pattern = frame_pattern(image_tmpl)
    try:
        names = sorted(path.name for path in job.folder.iterdir() if pattern.fullmatch(path.name))
        if job.archive.exists() and _holds(job.archive, job.folder, names):
            return False

        def write(file) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in names:
                    archive.writestr(zipfile.ZipInfo(name), (job.folder / name).read_bytes())
            file.flush()
            if not _holds(Path(file.name), job.folder, names):
                raise DataError(f"{job.archive}: differs from the frames after writing; check the disk")

        write_atomically(job.archive, write)
        return True
    except DataError as error:
        return error.line
    except OSError as error:
        return f"{job.archive}: cannot be packed: {error.strerror or error}"


def _holds(archive: Path, folder: Path, names: list[str]) -> bool:
    """Whether the zip file holds exactly these files of the folder, to the byte."""
    try:
        with FrameArchive(str(archive)) as frames:
            return frames.names() == names and all(frames.read(n) == (folder / n).read_bytes() for n in names)
    except (DataError, FileNotFoundError):
        return False
