"""Videos -> folders of frames; official annotation files -> the lists that train.py and test.py read.

    python tools/prepare_data.py extract VIDEOS OUT [--short_side 256] [--quality 90] [--workers N]
    python tools/prepare_data.py list SOURCE ROOT OUT ... [--modality video]

`extract` writes every frame of every video below the folder VIDEOS, or of the videos that a list of lines `path label`
names, to OUT/<path without suffix>/img_00001.jpg ...: in the order in which they are shown, upright, the shorter side
at most --short_side. Smaller frames keep their size. A folder appears when it is complete, and the same command run
again skips it. Videos that cannot be decoded to their end are left out and named in OUT/failures.json.

`list` writes OUT/train.txt and OUT/val.txt, for video files train_videos.txt and val_videos.txt, and OUT/classes.csv.
SOURCE is kinetics, something-v1, something-v2, ucf101 or hmdb51 with the official files, or `folders`: one folder per
class. ROOT holds the videos, as files or as folders of frames, in any depth.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import av
import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import numbered_lines, parse_line, split_line
from datasets.frame_files import frame_pattern
from datasets.video_files import VIDEO_SUFFIXES
from tools import official_lists
from tools.official_lists import Annotation
from utils.atomic import write_atomically
from utils.config_schema import FIELDS
from utils.errors import DataError, UserError, run_program
from utils.parallel import parallel_map, usable_cores

IMAGE_TMPL = FIELDS["data.image_tmpl"].default
SETTINGS, FAILURES, MISSING, CLASSES = "extract.json", "failures.json", "missing.txt", "classes.csv"


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        raise UserError("interrupted; what is complete stays, and the same command goes on") from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Videos to folders of frames, official annotation files to lists.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("extract", help="write the frames of videos as JPEG files")
    command.add_argument("videos", metavar="VIDEOS", type=Path, help="folder, or list of lines 'path label'")
    command.add_argument("out", metavar="OUT", type=Path, help="folder for the folders of frames")
    command.add_argument("--root", type=Path, help="where the paths of a list start; its own folder if not given")
    command.add_argument("--short_side", type=int, default=256, help="a larger frame is resized to it, in pixels")
    command.add_argument("--quality", type=int, default=90, help="of the JPEG files, 1 to 95")
    command.add_argument("--image_tmpl", default=IMAGE_TMPL, help="file name of a frame, as data.image_tmpl")
    command.add_argument("--workers", type=int, default=usable_cores(), help="processes; 0 works in this one")
    command.set_defaults(run=run_extract)

    command = commands.add_parser("list", help="write lists and class names from a data set's annotation files")
    sources = command.add_subparsers(required=True, metavar="SOURCE", dest="source")
    for name, read in SOURCES.items():
        source = sources.add_parser(name, help=read.__doc__)
        source.add_argument("root", metavar="ROOT", type=Path, help="folder of the videos")
        source.add_argument("out", metavar="OUT", type=Path, help="folder for the lists")
        source.add_argument("--val_root", type=Path, help="folder of the videos for validation, if not ROOT")
        if name == "hmdb51":
            source.add_argument("--splits", type=Path, required=True, help="folder of <class>_test_split1.txt ...")
            source.add_argument("--split", type=int, choices=(1, 2, 3), default=1)
        elif name == "folders":
            source.add_argument("--val_share", type=float, help="part of each class to hold out for validation")
            source.add_argument("--seed", type=int, default=0, help="which videos are held out")
        else:
            source.add_argument("--train", type=Path, help="official file of the videos for training")
            source.add_argument("--val", type=Path, help="official file of the videos for validation")
            if name != "kinetics":
                source.add_argument("--labels", type=Path, required=True, help="official file of the class names")
        source.add_argument("--modality", choices=("RGB", "video"), default="RGB", help="folders of frames, or files")
        source.add_argument("--image_tmpl", default=IMAGE_TMPL, help="file name of a frame, as data.image_tmpl")
        source.add_argument("--leave_out_missing", action="store_true", help="write the lists without missing videos")
        source.set_defaults(run=run_list)
    return parser


# extract


@dataclass(frozen=True)
class Extraction:
    """What is the same for all videos of one folder of results."""

    videos: str
    short_side: int
    quality: int
    image_tmpl: str


@dataclass(frozen=True)
class Job:
    """A video file and the folder that its frames go to."""

    video: Path
    folder: Path


def run_extract(args: argparse.Namespace) -> None:
    for name, value, low, high in (
        ("short_side", args.short_side, 1, None),
        ("quality", args.quality, 1, 95),
        ("workers", args.workers, 0, None),
    ):
        if value < low or (high is not None and value > high):
            raise UserError(f"--{name}: must be {low} {f'to {high}' if high else 'or more'}, got {value}")
    check_template(args.image_tmpl)
    if Path(args.image_tmpl).suffix.lower() not in (".jpg", ".jpeg") or os.path.dirname(args.image_tmpl):
        raise UserError(f"--image_tmpl: must be the name of a JPEG file like {IMAGE_TMPL}, got {args.image_tmpl!r}")
    root, paths = named_videos(args.videos, args.root)
    settings = Extraction(str(root.resolve()), args.short_side, args.quality, args.image_tmpl)
    extract(root, paths, args.out, settings, args.workers)


def extract(root: Path, paths: list[str], out: Path, settings: Extraction, workers: int) -> None:
    """Write the frames of the videos `paths` below `root` to `out`.

    Raises:
        DataError: two videos would share a folder, or `out` holds something else or frames of other settings, all
            before anything is written; `out` cannot be written; some videos could not be decoded (the others are
            there).
    """
    jobs = [Job(root / path, out / os.path.splitext(path)[0]) for path in paths]
    refuse_shared_folders(jobs)
    claim(out, settings)
    todo = [job for job in jobs if not job.folder.is_dir()]
    finished, failures = 0, []
    results = parallel_map(
        functools.partial(extract_video, settings=settings),
        todo,
        workers,
        died=lambda job: "the process that decoded it ended: a crash in the decoder, or not enough memory",
    )
    there = len(jobs) - len(todo)
    try:
        with (
            contextlib.closing(results),
            tqdm(results, desc="videos", unit="video", disable=None, initial=there, total=len(jobs)) as progress,
        ):
            for job, reason in progress:
                finished += 1
                if reason is not None:
                    failures.append({"video": str(job.video), "reason": reason})
    finally:
        for job in todo[finished:]:
            shutil.rmtree(unfinished(job.folder), ignore_errors=True)
    report = out / FAILURES
    with writing(out):
        report.unlink(missing_ok=True)
        if failures:
            write_text(report, as_json({"videos": len(jobs), "failed": failures}))
    print(f"{out}: {finished - len(failures)} videos extracted, {there} were there already, {len(failures)} failed")
    if failures:
        raise DataError(f"{report}: {len(failures)} of {len(jobs)} videos could not be extracted; it says why")


def named_videos(videos: Path, root: Path | None) -> tuple[Path, list[str]]:
    """The root and the paths below it, each once; DataError if there are none or one leads out of the root."""
    if videos.is_dir():
        if root is not None:
            raise DataError(f"{videos}: is a folder, whose videos are all taken; --root goes with a list")
        paths = sorted(found.path for found in video_files(videos))
        if not paths:
            raise DataError(f"{videos}: no videos in it (files named {', '.join(VIDEO_SUFFIXES)})")
        return videos, paths
    lines = [(source, line) for source, line in numbered_lines(videos) if line]
    paths = {}
    for source, line in lines:
        path = split_line(source, line, "video")[0]
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise DataError(f"{source}: {path}: must lie below the root; give --root and paths relative to it")
        paths[path] = source
    if not paths:
        raise DataError(f"{videos}: the list is empty; write one line 'path label' per video")
    return root or videos.parent, list(paths)


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
    """Make `out`, or find that it was made with these settings; else DataError."""
    path, wanted = out / SETTINGS, asdict(settings)
    with writing(out):
        if not path.exists():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise DataError(f"{out}: exists and was not made by this program; name another folder")
            write_text(path, as_json(wanted))
            return
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            differing = [f"{key} {made[key]!r}, now {value!r}" for key, value in wanted.items() if made[key] != value]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path}: is not a file of this program; name another folder") from error
    if differing:
        raise DataError(f"{path}: the frames there were made with {'; '.join(differing)}; name another folder")


def extract_video(job: Job, settings: Extraction) -> str | None:
    """Why the video could not be extracted, or None; DataError if the folder cannot be written."""
    if job.folder.is_dir():  # done already, by a process whose answer was lost as another died
        return None
    partial_folder = unfinished(job.folder)
    number = 0
    try:
        with writing(job.folder):
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
        for number, pixels in enumerate(upright_frames(job.video, settings.short_side), 1):
            with writing(job.folder):
                Image.fromarray(pixels).save(
                    partial_folder / settings.image_tmpl.format(number), quality=settings.quality
                )
        if number == 0:
            return "no frame can be decoded"
        with writing(job.folder):
            partial_folder.rename(job.folder)
    except UserError:
        raise
    except Exception as error:  # what a decoder raises is its own affair
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"after {number} frames: {reason}" if number else reason
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return None


def upright_frames(path: Path, short_side: int) -> Iterator[np.ndarray]:
    """Every frame of a video as uint8 (H, W, 3), in the order of presentation, its shorter side at most `short_side`.

    Raises whatever PyAV does when something in the file cannot be read or decoded.
    """
    for frame in decode(path):
        width, height = frame.width, frame.height
        if min(width, height) > short_side:
            width, height = (size * short_side // min(width, height) for size in (width, height))
        resized = frame.reformat(width, height, format="rgb24", interpolation="BICUBIC")
        yield np.ascontiguousarray(np.rot90(resized.to_ndarray(), round(frame.rotation / 90)))


def decode(path: Path) -> Iterator[av.VideoFrame]:
    """Every frame of a video; unlike the reader's pass (datasets/readers.py), this one ends at damage with an error."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("it holds no video")
        stream.codec_context.thread_count = 1
        yield from container.decode(stream)


def as_json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.unfinished")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error


# list


@dataclass(frozen=True)
class Found:
    """A video on disk: its path below the root; for a folder of frames, how many, and the first and last number."""

    path: str
    num_frames: int | None = None
    first: int | None = None
    last: int | None = None


def video_files(root: Path) -> Iterator[Found]:
    for folder, folders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith("."):
                yield Found(Path(folder, name).relative_to(root).as_posix())


def frame_folders(root: Path, image_tmpl: str) -> Iterator[Found]:
    """The folders that hold a frame; what is below them is not looked at."""
    pattern = frame_pattern(image_tmpl)
    for folder, folders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        numbers = [int(match[1]) for match in map(pattern.fullmatch, files) if match]
        folders[:] = [] if numbers else [name for name in folders if not name.startswith(".")]
        if numbers:
            yield Found(Path(folder).relative_to(root).as_posix(), len(numbers), min(numbers), max(numbers))


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def check_template(image_tmpl: str) -> None:
    if not FIELDS["data.image_tmpl"].rule.holds(image_tmpl) or os.path.dirname(image_tmpl):
        raise UserError(f"--image_tmpl: must be a file name with a field for the number, got {image_tmpl!r}")


def without_suffix(path: str, modality: str) -> str:
    return os.path.splitext(path)[0] if modality == "video" else path


class Disk:
    """The videos below a root, to be found by their names."""

    def __init__(self, root: Path, modality: str, image_tmpl: str):
        """Raises DataError if there are none."""
        self.root, self.modality = root, modality
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        found = video_files(root) if modality == "video" else frame_folders(root, image_tmpl)
        found = tqdm(found, desc=str(root), unit="video", disable=None)
        self.videos = sorted(found, key=lambda video: video.path)
        if not self.videos:
            kind = f"folders of frames like {image_tmpl.format(1)}" if modality == "RGB" else "video files"
            raise DataError(f"{root}: no {kind} in it; check --modality{' and --image_tmpl' * (modality == 'RGB')}")
        self._by_path, self._by_name = defaultdict(list), defaultdict(list)
        for video in self.videos:
            path = without_suffix(video.path, modality)
            self._by_path[path].append(video)
            self._by_name[os.path.basename(path)].append(video)

    def find(self, annotation: Annotation) -> Found | None:
        """The video at the annotated path, or else the one of its name anywhere; DataError if there are several."""
        found = self._by_path.get(annotation.name) or self._by_name.get(os.path.basename(annotation.name), [])
        if len(found) > 1:
            raise DataError(
                f"{annotation.source}: {annotation.name} is there {len(found)} times below {self.root}: "
                f"{found[0].path} and {found[1].path}; remove all but one"
            )
        return found[0] if found else None

    def in_class_folders(self) -> list[Annotation]:
        """Every video, of the class that the first folder of its path names."""
        annotations = []
        for video in self.videos:
            class_name, slash, _ = video.path.partition("/")
            if not slash:
                raise DataError(f"{self.root / video.path}: is in no class folder; ROOT must hold one folder per class")
            annotations.append(Annotation(without_suffix(video.path, self.modality), class_name, str(self.root)))
        return annotations


@dataclass(frozen=True)
class Splits:
    """The videos of each split, "train" and "val", either of which may be absent, and the names in label order."""

    parts: dict[str, list[Annotation]]
    classes: list[str]


def kinetics(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """Kinetics: csv files with label, youtube_id, time_start, time_end"""
    return by_name(given_parts(args, official_lists.read_kinetics))


def something_v1(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """Something-Something v1: csv files with id;label"""
    parts = given_parts(args, official_lists.read_something_v1)
    return Splits(parts, alphabetical(official_lists.read_something_v1_classes(args.labels), args.labels))


def something_v2(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """Something-Something v2: json files"""
    parts = given_parts(args, official_lists.read_something_v2)
    return Splits(parts, alphabetical(official_lists.read_something_v2_classes(args.labels), args.labels))


def ucf101(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """UCF101: trainlist01.txt, testlist01.txt, classInd.txt"""
    classes = official_lists.read_ucf101_classes(args.labels)
    return Splits(given_parts(args, functools.partial(official_lists.read_ucf101, classes=classes)), classes)


def hmdb51(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """HMDB51: a folder of <class>_test_split<N>.txt"""
    return by_name(official_lists.read_hmdb51(args.splits, args.split))


def folders(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """one folder per class"""
    parts = {"train": disk("train").in_class_folders()}
    if args.val_share is not None:
        if args.val_root is not None:
            raise UserError("--val_share: not together with --val_root, which holds the videos for validation")
        if not 0 < args.val_share < 1:
            raise UserError(f"--val_share: must be above 0 and below 1, got {args.val_share}")
        parts["train"], parts["val"] = hold_out(parts["train"], args.val_share, args.seed)
    elif args.val_root is not None:
        parts["val"] = disk("val").in_class_folders()
    splits = by_name(parts)
    if unknown := set(splits.classes) - {annotation.class_name for annotation in parts["train"]}:
        raise DataError(f"{args.val_root / min(unknown)}: no such class folder in {args.root}")
    return splits


SOURCES = {
    "kinetics": kinetics,
    "something-v1": something_v1,
    "something-v2": something_v2,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "folders": folders,
}


def given_parts(args: argparse.Namespace, read: Callable[[Path], list[Annotation]]) -> dict[str, list[Annotation]]:
    parts = {part: read(path) for part, path in (("train", args.train), ("val", args.val)) if path is not None}
    if not parts:
        raise UserError("no annotation file: give --train, --val or both; both in one run number the classes alike")
    return parts


def alphabetical(classes: list[str], labels: Path) -> list[str]:
    """Something-Something's labels: a flip swaps pairs of them by number (docs/protocol.md section 5)."""
    if classes != sorted(classes):
        print(f"classes are numbered in alphabetical order, as the protocol needs, not in that of {labels}")
    return sorted(classes)


def by_name(parts: dict[str, list[Annotation]]) -> Splits:
    """Classes in alphabetical order."""
    return Splits(parts, sorted({annotation.class_name for part in parts.values() for annotation in part}))


def hold_out(annotations: list[Annotation], share: float, seed: int) -> tuple[list[Annotation], list[Annotation]]:
    """(the others, `share` of each class, rounded, but at least one and not all), the same on every machine.

    The only video of a class stays with the others.
    """
    of_class: dict[str, list[Annotation]] = defaultdict(list)
    for annotation in annotations:
        of_class[annotation.class_name].append(annotation)
    held = set()
    for members in of_class.values():
        members.sort(key=lambda member: hashlib.sha256(f"{seed} {member.name}".encode()).digest())
        number = min(max(round(share * len(members)), 1), len(members) - 1)
        held |= {member.name for member in members[:number]}
    return [a for a in annotations if a.name not in held], [a for a in annotations if a.name in held]


def run_list(args: argparse.Namespace) -> None:
    """Raises DataError, before anything but the names of missing videos is written, if there is something wrong."""
    check_template(args.image_tmpl)

    @functools.cache
    def disk_at(root: Path) -> Disk:
        return Disk(root, args.modality, args.image_tmpl)

    def disk(part: str) -> Disk:
        return disk_at(root_of(args, part))

    splits = SOURCES[args.source](args, disk)
    labels = {name: label for label, name in enumerate(splits.classes)}
    listed: dict[str, list[tuple[Found, int]]] = {part: [] for part in splits.parts}
    missing = []
    for part, annotations in splits.parts.items():
        for annotation in annotations:
            if annotation.class_name not in labels:
                raise DataError(f"{annotation.source}: {annotation.class_name!r} is no class of {args.labels}")
            if video := disk(part).find(annotation):
                listed[part].append((video, labels[annotation.class_name]))
            else:
                missing.append(f"{annotation.source}: {annotation.name}\n")
    report = args.out / MISSING
    with writing(report):
        report.unlink(missing_ok=True)
    if missing:
        write_text(report, "".join(missing))
        number = f"{len(missing)} of {sum(map(len, splits.parts.values()))} videos are not on disk"
        if not args.leave_out_missing:
            raise DataError(f"{report}: names what is missing: {number}; --leave_out_missing lists the others")
        print(f"{report}: {number} and left out of the lists")
    for part, videos in listed.items():
        if not videos:
            raise DataError(f"{root_of(args, part)}: none of the videos for {part} is there, so no list is written")
    base = first_number([video for videos in listed.values() for video, _ in videos])
    texts = {part: "".join(list_line(*video, args.modality) for video in videos) for part, videos in listed.items()}

    names = io.StringIO()
    csv.writer(names, lineterminator="\n").writerows([("id", "name"), *enumerate(splits.classes)])
    classes = args.out / CLASSES
    with writing(classes):
        if classes.exists() and classes.read_bytes() != names.getvalue().encode():
            raise DataError(
                f"{classes}: is there and does not number these {len(labels)} classes alike, so that lists beside it "
                "would become wrong; give --train and --val in one run, or name another folder"
            )
    write_text(classes, names.getvalue())
    config = {"modality": args.modality, "num_classes": len(labels), "label_list": str(classes)}
    for part, text in texts.items():
        path = args.out / f"{part}{'_videos' * (args.modality == 'video')}.txt"
        write_text(path, text)
        print(f"{path}: {len(listed[part])} videos of {len({label for _, label in listed[part]})} classes")
        config |= {f"{part}_root": str(root_of(args, part)), f"{part}_list": str(path)}
    if args.modality == "RGB":
        config |= {"image_tmpl": args.image_tmpl} | ({"index_base": 0} if base == 0 else {})
    print("to be set in the configuration:")
    print(yaml.safe_dump({"data": config}, sort_keys=False, allow_unicode=True), end="")


def root_of(args: argparse.Namespace, part: str) -> Path:
    return args.val_root if part == "val" and args.val_root is not None else args.root


def first_number(videos: list[Found]) -> int | None:
    """What `data.index_base` must be for these folders of frames; None for video files.

    Prints how many folders lack numbers; DataError if no base fits.
    """
    example = {video.first: video.path for video in videos}
    if None in example:
        return None
    if 0 in example and 1 in example or not {0, 1} & set(example):
        numbers = "; ".join(f"from {number} in {path}" for number, path in sorted(example.items())[:2])
        raise DataError(f"frames are numbered {numbers}; all must start at 0, or all at 1 (data.index_base)")
    base = 0 if 0 in example else 1
    if gaps := [video for video in videos if video.last - base + 1 != video.num_frames]:
        print(
            f"warning: {len(gaps)} folders lack some of their frames, such as {gaps[0].path}; see tools/check_data.py"
        )
    return base


def list_line(video: Found, label: int, modality: str) -> str:
    """The line of a video, which is read again to prove that the path can stand in a list."""
    columns = [video.path, label] if modality == "video" else [video.path, video.num_frames, label]
    line = " ".join(map(str, columns))
    if parse_line(video.path, line.strip(), label + 1, modality).path != video.path or len(line.splitlines()) > 1:
        raise DataError(f"{video.path!r}: such a path cannot stand in a list; rename it")
    return f"{line}\n"


def write_text(path: Path, text: str) -> None:
    with writing(path):
        write_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    run_program(main)
