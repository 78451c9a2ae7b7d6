"""Write annotation lists and class names from official files (the command `list` of tools/prepare_data.py)."""

import argparse
import csv
import functools
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm

from datasets.annotations import parse_line
from tools import official_lists
from tools.find_videos import Found, frame_folders, video_files
from tools.official_lists import Annotation
from utils.atomic import write_text, writing
from utils.errors import DataError, UserError

MISSING, CLASSES = "missing.txt", "classes.csv"


class Disk:
    """The videos below a root, indexed by path and by name."""

    def __init__(self, root: Path, modality: str, image_tmpl: str):
        """Raises DataError if there are none."""
        self.root, self.modality = root, modality
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        found = video_files(root) if modality == "video" else frame_folders(root, image_tmpl)
        progress = tqdm(found, desc=str(root), unit="video", disable=None)
        self.videos = sorted(progress, key=lambda video: video.path)
        if not self.videos:
            kind = f"folders of frames like {image_tmpl.format(1)}" if modality == "RGB" else "video files"
            raise DataError(f"{root}: no {kind} in it; check --modality{' and --image_tmpl' * (modality == 'RGB')}")
        self._by_path: dict[str, list[Found]] = defaultdict(list)
        self._by_name: dict[str, list[Found]] = defaultdict(list)
        for video in self.videos:
            path = without_suffix(video.path, modality)
            self._by_path[path].append(video)
            self._by_name[os.path.basename(path)].append(video)

    def find(self, annotation: Annotation) -> Found | None:
        """The video at the annotated path, otherwise the one with its name. Raises DataError if there are several."""
        found = self._by_path.get(annotation.name) or self._by_name.get(os.path.basename(annotation.name), [])
        if len(found) > 1:
            raise DataError(
                f"{annotation.source}: {annotation.name} is there {len(found)} times below {self.root}: "
                f"{found[0].path} and {found[1].path}; remove all but one"
            )
        return found[0] if found else None

    def in_class_folders(self) -> list[Annotation]:
        """An annotation for every video; the first folder of its path is its class."""
        annotations = []
        for video in self.videos:
            class_name, slash, _ = video.path.partition("/")
            if not slash:
                raise DataError(f"{self.root / video.path}: is in no class folder; ROOT must hold one folder per class")
            annotations.append(Annotation(without_suffix(video.path, self.modality), class_name, str(self.root)))
        return annotations


def without_suffix(path: str, modality: str) -> str:
    return os.path.splitext(path)[0] if modality == "video" else path


@dataclass(frozen=True)
class Splits:
    """The annotations of a source.

    parts: the videos of "train", of "val" or of both
    classes: class names in label order
    """

    parts: dict[str, list[Annotation]]
    classes: list[str]


# Sources. The docstrings are the help texts of the command line; `disk(part)` gives the videos of a part.


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
    """The classes of Something-Something in alphabetical order: a flip swaps labels by number (docs/protocol.md)."""
    if classes != sorted(classes):
        print(f"classes are numbered in alphabetical order, as the protocol needs, not in that of {labels}")
    return sorted(classes)


def by_name(parts: dict[str, list[Annotation]]) -> Splits:
    """Classes in alphabetical order."""
    return Splits(parts, sorted({annotation.class_name for part in parts.values() for annotation in part}))


def hold_out(annotations: list[Annotation], share: float, seed: int) -> tuple[list[Annotation], list[Annotation]]:
    """(training, validation): a random `share` of each class goes to validation, the same on every machine.

    The number is rounded, at least 1, and leaves at least one video for training. A class of one video has none in
    validation.
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


# Lists


def write_lists(args: argparse.Namespace) -> None:
    """Write the lists and the class names, and print the configuration that uses them.

    Raises:
        UserError: wrong arguments, wrong files, or videos that are missing. Then nothing is written except MISSING,
            which names the missing videos.
    """

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
    """The value of `data.index_base` for these folders of frames; None for video files.

    Prints a warning if numbers are missing in a folder. Raises DataError if no value fits all folders.
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
    """The line of a video. Raises DataError for a path that a list cannot hold, found by reading the line back."""
    columns = [video.path, label] if modality == "video" else [video.path, video.num_frames, label]
    line = " ".join(map(str, columns))
    if parse_line(video.path, line.strip(), label + 1, modality).path != video.path or len(line.splitlines()) > 1:
        raise DataError(f"{video.path!r}: such a path cannot stand in a list; rename it")
    return f"{line}\n"
