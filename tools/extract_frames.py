"""Write the frames of videos as folders of JPEG files (the command `extract` of tools/prepare_data.py)."""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.annotations import numbered_lines, split_line
from datasets.decoders import Converter, Damage, decode_all, describe_damage
from datasets.resample import Resample, bicubic
from datasets.video_files import VIDEO_SUFFIXES
from tools.find_videos import LeftOut, video_files
from utils.atomic import write_json, writing
from utils.errors import DataError, UserError
from utils.parallel import parallel_map

SETTINGS, FAILURES = "extract.json", "failures.json"


@dataclass(frozen=True)
class Extraction:
    """Settings of one output folder, written to its SETTINGS file.

    videos: absolute path of the root
    short_side: larger frames are resized to this shorter side, in pixels
    quality: JPEG quality, 1 to 95
    image_tmpl: file name of a frame
    """

    videos: str
    short_side: int
    quality: int
    image_tmpl: str


@dataclass(frozen=True)
class Job:
    """A video file and the folder for its frames."""

    video: Path
    folder: Path


def named_videos(videos: Path, root: Path | None) -> tuple[Path, list[str]]:
    """The root and the distinct paths of the videos below it.

    Args:
        videos: a folder, which is then the root, or a list of lines `path label`.
        root: folder that the paths of a list are relative to; None for the list's own folder.

    Raises:
        DataError: there are no videos, a path leads out of the root, or `root` is given with a folder.
    """
    if videos.is_dir():
        if root is not None:
            raise DataError(f"{videos}: is a folder, whose videos are all taken; --root goes with a list")
        left_out = LeftOut()
        paths = sorted(found.path for found in video_files(videos, left_out))
        for line in left_out.lines(videos):
            print(line)
        if not paths:
            raise DataError(f"{videos}: no videos in it (files named {', '.join(VIDEO_SUFFIXES)})")
        return videos, paths
    listed = []
    for source, line in numbered_lines(str(videos)):
        if not line:
            continue
        path = split_line(source, line, "video")[0]
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise DataError(f"{source}: {path}: must lie below the root; give --root and paths relative to it")
        listed.append(path)
    if not listed:
        raise DataError(f"{videos}: the list is empty; write one line 'path label' per video")
    return root or videos.parent, list(dict.fromkeys(listed))


def extract(root: Path, paths: list[str], out: Path, settings: Extraction, workers: int) -> None:
    """Write the frames of the videos `paths`, relative to `root`, to folders below `out`.

    Folders that exist already are skipped. With `workers` 0 everything runs in this process.

    Raises:
        DataError: two videos would share a folder; `out` holds something else or frames of other settings; `out`
            cannot be written; some videos could not be decoded. Nothing is written in the first two cases; in the
            last one, the other videos are complete.
    """
    jobs = [Job(root / path, out / os.path.splitext(path)[0]) for path in paths]
    refuse_shared_folders(jobs)
    claim(out, settings)
    todo = [job for job in jobs if not job.folder.is_dir()]
    finished: int = 0
    reports: dict[str, list[dict[str, str]]] = {"failed": [], "damaged": []}
    results = parallel_map(
        functools.partial(extract_video, settings=settings),
        todo,
        workers,
        died=lambda job: ("failed", "the process that decoded it ended: a crash in the decoder, or not enough memory"),
    )
    there = len(jobs) - len(todo)
    try:
        with (
            contextlib.closing(results),
            tqdm(results, desc="videos", unit="video", disable=None, initial=there, total=len(jobs)) as progress,
        ):
            for job, report in progress:
                finished += 1
                if report is not None:
                    reports[report[0]].append({"video": str(job.video), "reason": report[1]})
    finally:
        for job in todo[finished:]:  # terminated workers leave unfinished folders
            shutil.rmtree(unfinished(job.folder), ignore_errors=True)
    file, failed = out / FAILURES, len(reports["failed"])
    with writing(out):
        reports["damaged"] += [video for video in damaged_before(file) if video not in reports["damaged"]]
        file.unlink(missing_ok=True)
        if any(reports.values()):
            write_json(file, {"videos": len(jobs), **reports})
    print(f"{out}: {finished - failed} videos extracted, {there} were there already, {failed} failed")
    if damaged := len(reports["damaged"]):
        print(f"{file}: {damaged} of the videos are damaged; what can be decoded of them was extracted")
    if failed:
        raise DataError(f"{file}: {failed} of {len(jobs)} videos could not be extracted; it says why")


def damaged_before(file: Path) -> list[dict[str, str]]:
    """The damaged videos of an earlier call, whose frames are there already."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["damaged"]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def refuse_shared_folders(jobs: list[Job]) -> None:
    owner: dict[Path, Job] = {}
    for job in jobs:
        if (other := owner.setdefault(job.folder, job)) is not job:
            raise DataError(f"{job.folder}: both {other.video} and {job.video} would be extracted there; rename one")
    for job in jobs:
        for folder in job.folder.parents:
            if folder in owner:
                raise DataError(
                    f"{job.folder}: {job.video} would be extracted into the frames of {owner[folder].video}; rename one"
                )


def claim(out: Path, settings: Extraction) -> None:
    """Create `out` with its SETTINGS file. Raises DataError if `out` exists and was made with other settings."""
    path, wanted = out / SETTINGS, asdict(settings)
    with writing(out):
        if not path.exists():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise DataError(f"{out}: exists and was not made by this program; name another folder")
            write_json(path, wanted)
            return
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            differing = [f"{key} {made[key]!r}, now {value!r}" for key, value in wanted.items() if made[key] != value]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path}: is not a file of this program; name another folder") from error
    if differing:
        raise DataError(f"{path}: the frames there were made with {'; '.join(differing)}; name another folder")


def extract_video(job: Job, settings: Extraction) -> tuple[str, str] | None:
    """Extract one video. Return ("failed" or "damaged", why), or None for an intact video.

    Raises DataError if it cannot be written.
    """
    if job.folder.is_dir():  # done, but the result was lost: the pool broke and the video was handed out again
        return None
    partial_folder = unfinished(job.folder)
    number, damage = 0, Damage()
    try:
        with writing(job.folder):
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
        for number, pixels in enumerate(upright_frames(job.video, settings.short_side, damage), 1):
            with writing(job.folder):
                Image.fromarray(pixels).save(
                    partial_folder / settings.image_tmpl.format(number), quality=settings.quality
                )
        if number == 0:
            return "failed", "no frame can be decoded"
        with writing(job.folder):
            partial_folder.rename(job.folder)
    except UserError:
        raise
    except Exception as error:  # decoders raise many exception types
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return "failed", f"after {number} frames: {reason}" if number else reason
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    found = describe_damage(job.video, damage)
    return None if found is None else ("damaged", f"{found}; {number} frames were extracted")


def upright_frames(path: Path, short_side: int, damage: Damage | None = None) -> Iterator[np.ndarray]:
    """Every frame of a video as uint8 (H, W, 3), in display order, its shorter side at most `short_side` pixels.

    `damage` counts what cannot be decoded; without it, what `decode_all` raises at damage is raised.
    """
    convert = Converter()
    for frame in decode_all(path, damage):
        pixels = convert(frame)
        height, width = pixels.shape[:2]
        if min(width, height) <= short_side:
            yield pixels
            continue
        new_width, new_height = (size * short_side // min(width, height) for size in (width, height))
        resized = np.empty((3, new_height, new_width), np.uint8)
        Resample(bicubic(width, new_width), bicubic(height, new_height))(pixels, resized)
        yield np.ascontiguousarray(resized.transpose(1, 2, 0))


def unfinished(folder: Path) -> Path:
    """The hidden folder that collects the frames of a video until they are complete."""
    return folder.with_name(f".{folder.name}.unfinished")
