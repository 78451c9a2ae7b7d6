"""Write annotation lists and class names (the command `list` of tools/prepare_data.py)."""

import argparse
import contextlib
import csv
import hashlib
import io
import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tqdm import tqdm

from datasets.annotations import LONGEST_LINE, UNLABELLED, parse_line
from datasets.video_files import VIDEO_SUFFIXES
from tools import official_lists
from tools.find_videos import Found, Identity, LeftOut, frame_folders, some, video_files
from tools.official_lists import PARTS, Annotation, part_of
from tools.tables import read_table
from utils.atomic import write_text, writing
from utils.config_schema import FIELDS
from utils.errors import DataError, UserError

MISSING, CLASSES = "missing.txt", "classes.csv"
EMPTY = " (an empty file)"
NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
SIZE = re.compile(r"[ _-]?(set|\d+p?)$", re.IGNORECASE)  # what may follow the name of a split
LONGEST_NAME = LONGEST_LINE // 4  # characters of a class name: quotes in it are doubled, and the list adds its number


class Disk:
    """The videos below a root, indexed by path and by name."""

    def __init__(self, root: Path, modality: str, image_tmpl: str):
        """Raises DataError if there are none."""
        self.root, self.modality = root, modality
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        self.left_out = LeftOut()
        video = modality == "video"
        found = video_files(root, self.left_out) if video else frame_folders(root, image_tmpl, self.left_out)
        progress = tqdm(found, desc=str(root), unit="video", disable=None)
        self.videos = sorted(progress, key=lambda video: video.path)
        if not self.videos:
            kind = f"folders of frames like {image_tmpl.format(1)}" if modality == "RGB" else "video files"
            advice = f"check --modality{' and --image_tmpl' * (modality == 'RGB')}"
            if modality == "RGB" and any(suffix.lower() in VIDEO_SUFFIXES for suffix in self.left_out.others):
                advice += "; video files need --modality video (data.modality: video)"
            there = "".join(f"; {line.removeprefix(f'{root}: ')}" for line in self.left_out.lines(root))
            raise DataError(f"{root}: no {kind} in it; {advice}{there}")
        self._by_file = {video.path: video for video in self.videos}
        self._by_path: dict[str, list[Found]] = defaultdict(list)
        self._by_name: dict[str, list[Found]] = defaultdict(list)
        for video in self.videos:
            path = without_suffix(video.path, modality)
            self._by_path[path].append(video)
            self._by_name[os.path.basename(path)].append(video)

    def find(self, annotation: Annotation) -> Found | None:
        """The video at the annotated path, otherwise the one with its name. Raises DataError if there are several."""
        names = (annotation.name, *annotation.others)
        if exact := next((self._by_file[name] for name in names if name in self._by_file), None):
            return exact
        for name in names:
            found = self._by_path.get(name) or self._named(name, annotation.fixed)
            files = {os.path.basename(other) for other in annotation.others}
            found = [video for video in found if os.path.basename(video.path) in files] or found
            if len(found) > 1:
                raise DataError(
                    f"{annotation.source}: {name} is there {len(found)} times below {self.root}: "
                    f"{found[0].path} and {found[1].path}; remove all but one"
                )
            if found:
                return found[0]
        return None

    def _named(self, name: str, fixed: bool) -> list[Found]:
        """The videos with the last part of `name`; if `fixed`, their folders must be the last ones of the other."""
        found = self._by_name.get(os.path.basename(name), [])
        if not fixed:
            return found
        paths = [(video, f"/{without_suffix(video.path, self.modality)}") for video in found]
        return [video for video, path in paths if path.endswith(f"/{name}") or f"/{name}".endswith(path)]

    def in_class_folders(self) -> list[Annotation]:
        """An annotation for every video; the first folder of its path is its class."""
        annotations = []
        for video in self.videos:
            class_name, slash, _ = video.path.partition("/")
            if not slash:
                raise DataError(f"{self.root / video.path}: is in no class folder; ROOT must hold one folder per class")
            name = without_suffix(video.path, self.modality)
            annotations.append(Annotation(name, class_name, str(self.root), (video.path,)))
        return annotations

    def empty_classes(self) -> list[str]:
        """The folders in the root, other than links, that hold no video."""
        with os.scandir(self.root) as entries:
            folders = {e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")}
        return sorted(folders - {video.path.partition("/")[0] for video in self.videos})


def without_suffix(path: str, modality: str) -> str:
    return os.path.splitext(path)[0] if modality == "video" else path


@dataclass(frozen=True)
class Splits:
    """The annotations of a source.

    parts: the videos of one or more of "train", "val" and "test"
    classes: class names in label order; none if the files name no class
    notes: lines for the user
    """

    parts: dict[str, list[Annotation]]
    classes: list[str]
    notes: list[str] = field(default_factory=list)


# Sources. The docstrings are the help texts of the command line; `disk(part)` gives the videos of a part.


def kinetics(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """Kinetics: csv files with label, youtube_id, time_start, time_end, or json files"""
    return by_name(given_parts(args, official_lists.read_kinetics))


def something_v1(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """Something-Something v1: csv files with id;label"""
    parts = given_parts(args, official_lists.read_something_v1)
    return alphabetical(parts, official_lists.read_something_v1_classes(args.labels), args.labels)


def something_v2(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """Something-Something v2: json files, or test-answers.csv"""
    parts = given_parts(args, official_lists.read_something_v2)
    return alphabetical(parts, official_lists.read_something_v2_classes(args.labels), args.labels)


def ucf101(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """UCF101: trainlist01.txt, testlist01.txt, classInd.txt"""
    classes = official_lists.read_ucf101_classes(args.labels)
    return Splits(given_parts(args, lambda path, part: official_lists.read_ucf101(path, classes)), classes)


def hmdb51(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """HMDB51: a folder of <class>_test_split<N>.txt"""
    return by_name(official_lists.read_hmdb51(args.splits, args.split))


def folders(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """one folder per class"""
    parts = {"train": disk("train").in_class_folders()}
    like_splits = refuse_splits(args.root, {annotation.class_name or "" for annotation in parts["train"]})
    if args.val_share is not None:
        parts |= held_out(args, parts["train"])
    elif args.val_root is not None:
        parts["val"] = disk("val").in_class_folders()
    splits = by_name(parts)
    if like_splits:
        splits.notes.append(f"{args.root}: warning: taken for classes, though named like splits: {some(like_splits)}")
    if unknown := set(splits.classes) - {annotation.class_name for annotation in parts["train"]}:
        raise DataError(f"{args.val_root / min(unknown)}: no such class folder in {args.root}")
    for part in ("train", "val") if args.val_root is not None else ("train",):
        if empty := disk(part).empty_classes():
            splits.notes.append(
                f"{disk(part).root}: warning: class folders without videos ({len(empty)}): {some(empty)}"
            )
    return splits


def refuse_splits(root: Path, folders: set[str]) -> list[str]:
    """Return the folders of ROOT whose names are those of splits, such as "train" and "val_256".

    Raises:
        DataError: there are two splits of them, or nothing else, so that they are no classes.
    """
    parts = {folder: part for folder in sorted(folders) if (part := part_of(SIZE.sub("", folder)))}
    of_part = {part: folder for folder, part in parts.items()}
    if len(of_part) < 2 and set(parts) != folders:
        return list(parts)
    train, val = of_part.get("train"), of_part.get("val") or of_part.get("test")
    advice = f"give {root / train} as ROOT" if train else "give the folder of the training videos as ROOT"
    advice += f", and --val_root {root / val}" if val else ""
    raise DataError(f"{root}: holds the splits {', '.join(parts)}, not one folder per class; {advice}")


def table(args: argparse.Namespace, disk: Callable[[str], Disk]) -> Splits:
    """any csv, tsv or json file with a column of paths"""
    columns = [args.path, *(column for column in (args.label, args.split) if column is not None)]
    parts: dict[str, list[Annotation]] = defaultdict(list)
    for source, (path, *others) in read_table(args.file, columns):
        values = dict(zip(columns[1:], others, strict=True))
        part = "train" if args.label is not None else "test"
        if args.split is not None:
            word = values[args.split]
            if (known := part_of(word)) is None:
                words = ", ".join(word for words in PARTS.values() for word in words)
                raise DataError(f"{source}: {args.split} is {word!r}, but must be one of {words}")
            part = known
        if not path:
            raise DataError(f"{source}: {args.path} is empty; every row needs a video")
        names = []
        for spelling in (path, path.replace("\\", "/")):  # a table may come from Windows
            stem, suffix = os.path.splitext(spelling)
            names += [os.path.normpath(stem if suffix.lower() in VIDEO_SUFFIXES else spelling)]
            names += [os.path.normpath(spelling)]
        label = values.get(args.label)
        class_name = None if label in (None, "", str(UNLABELLED)) else label
        parts[part].append(Annotation(names[0], class_name, source, tuple(names[1:]), fixed=True))
    for part in ("val", "test"):
        if getattr(args, f"{part}_root") is not None and part not in parts:
            raise UserError(f"--{part}_root: {args.file} names no {part} videos; --split COLUMN says which they are")
    if args.val_share is not None:
        if "train" not in parts:
            raise UserError(f"--val_share: {args.file} names no training videos; a share needs --label")
        if "val" in parts:
            raise UserError(f"--val_share: not together with --split {args.split}, which names validation videos")
        parts |= held_out(args, parts["train"])
    splits = by_name({part: parts[part] for part in PARTS if parts[part]})
    if splits.classes and all(NUMBER.fullmatch(name) for name in splits.classes):
        splits.classes.sort(key=float)
        if [float(name) for name in splits.classes] != list(range(len(splits.classes))):
            splits.notes.append(
                f"{args.file}: warning: labels do not run from 0, so they are numbered anew in {CLASSES}"
            )
    return splits


SOURCES = {
    "kinetics": kinetics,
    "something-v1": something_v1,
    "something-v2": something_v2,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "folders": folders,
    "table": table,
}
WITH_TEST = ("kinetics", "something-v1", "something-v2")  # their test files may be without labels


def given_parts(args: argparse.Namespace, read: Callable[[Path, str], list[Annotation]]) -> dict[str, list[Annotation]]:
    """The annotations of the files that the command line names; `read` takes a file and its part."""
    files = {part: getattr(args, part, None) for part in PARTS}
    parts = {part: read(path, part) for part, path in files.items() if path is not None}
    if not parts:
        raise UserError("no annotation file: give --train, --val or both; both in one run number the classes alike")
    return parts


def alphabetical(parts: dict[str, list[Annotation]], classes: list[str], labels: Path) -> Splits:
    """The classes of Something-Something in alphabetical order: a flip swaps labels by number (docs/protocol.md)."""
    splits = Splits(parts, sorted(classes))
    if classes != splits.classes:
        splits.notes.append(
            f"classes are numbered in alphabetical order, as the protocol needs, not in that of {labels}"
        )
    return splits


def by_name(parts: dict[str, list[Annotation]]) -> Splits:
    """Classes in alphabetical order."""
    names = {annotation.class_name for part in parts.values() for annotation in part}
    return Splits(parts, sorted(name for name in names if name is not None))


def held_out(args: argparse.Namespace, annotations: list[Annotation]) -> dict[str, list[Annotation]]:
    """The parts "train" and "val" of --val_share."""
    if args.val_root is not None:
        raise UserError("--val_share: not together with --val_root, which holds the videos for validation")
    if not 0 < args.val_share < 1:
        raise UserError(f"--val_share: must be above 0 and below 1, got {args.val_share}")
    train, val = hold_out(annotations, args.val_share, args.seed)
    return {"train": train, "val": val}


def hold_out(annotations: list[Annotation], share: float, seed: int) -> tuple[list[Annotation], list[Annotation]]:
    """(training, validation): a random `share` of each class goes to validation, the same on every machine.

    The number is rounded, at least 1, and leaves at least one video for training. A class of one video has none in
    validation.
    """
    of_class: dict[str | None, list[Annotation]] = defaultdict(list)
    for annotation in annotations:
        of_class[annotation.class_name].append(annotation)
    held: set[Annotation] = set()
    for members in of_class.values():
        members.sort(key=lambda member: hashlib.sha256(f"{seed} {member.name}".encode()).digest())
        number = min(max(round(share * len(members)), 1), len(members) - 1)
        held |= set(members[:number])
    return [a for a in annotations if a not in held], [a for a in annotations if a in held]


# Lists


def write_lists(args: argparse.Namespace) -> None:
    """Write the lists and the class names, and print the configuration that uses them.

    Raises:
        UserError: wrong arguments, wrong files, videos that are missing, or a list that the product would refuse.
            Then nothing is written except MISSING, which names the missing videos.
    """
    disks: dict[Path, Disk] = {}
    notes: list[str] = []

    def disk(part: str) -> Disk:
        root = root_of(args, part)
        if root not in disks:
            disks[root] = Disk(root, args.modality, args.image_tmpl)
            notes.extend(disks[root].left_out.lines(root))
        return disks[root]

    try:
        lines = _write_lists(args, disk, notes)
    except UserError:
        with contextlib.suppress(BrokenPipeError):  # the error matters more
            print("\n".join(notes), end="\n" * bool(notes), flush=True)
        raise
    print("\n".join([*notes, *lines]))  # after the files, so that `| head` stops nothing


def _write_lists(args: argparse.Namespace, disk: Callable[[str], Disk], notes: list[str]) -> list[str]:
    """Write everything. Returns what is to be said of it; `notes` collects what is to be said in any case."""
    splits = SOURCES[args.source](args, disk)
    notes.extend(splits.notes)
    names = class_names(splits.classes)
    labels = {name: label for label, name in enumerate(splits.classes)}
    listed, missing = find_videos(args, splits.parts, labels, disk, notes)
    report = args.out / MISSING
    with writing(report):
        report.unlink(missing_ok=True)
    if missing:
        text = "".join(f"{line}\n" for line in missing)
        write_text(report, text.encode(errors="backslashreplace").decode())  # a name may hold bytes that are not UTF-8
        empty = " or empty" if any(line.endswith(EMPTY) for line in missing) else ""
        number = f"{len(missing)} of {sum(map(len, splits.parts.values()))} videos are not on disk{empty}"
        if not args.leave_out_missing:
            raise DataError(f"{report}: names what is missing: {number}; --leave_out_missing lists the others")
        notes.append(f"{report}: {number} and left out of the lists")
    for part, videos in listed.items():
        if not videos:
            raise DataError(f"{root_of(args, part)}: none of the videos for {part} is there, so no list is written")
    idle = sorted(set(labels) - {splits.classes[label] for _, label in listed.get("train", ())})
    if idle and "train" in listed:
        notes.append(f"warning: classes without a training video ({len(idle)}): {some(idle)}")
    base = first_number([video for videos in listed.values() for video, _ in videos], notes)
    texts = {part: "".join(list_line(*video, args.modality) for video in videos) for part, videos in listed.items()}

    classes = args.out / CLASSES
    with writing(classes):
        if names and classes.exists() and classes.read_bytes() != names.encode():
            raise DataError(
                f"{classes}: is there and does not number these {len(labels)} classes alike, so that lists beside it "
                "would become wrong; give --train and --val in one run, or name another folder"
            )
    config: dict[str, object] = {"modality": args.modality}
    if names:
        write_text(classes, names)
        config |= {"num_classes": len(labels), "label_list": str(classes)}
    lines, places = [], {}
    for part, text in texts.items():
        path = args.out / f"{part}{'_videos' * (args.modality == 'video')}.txt"
        write_text(path, text)
        lines.append(f"{path}: {described(listed[part])}")
        places[part] = {"root": str(root_of(args, part)), "list": str(path)}
    without_labels = "test" in places and listed["test"][0][1] == UNLABELLED
    later = places.pop("test", None) if "val" in places or ("train" in places and without_labels) else None
    for part, place in places.items():
        config |= {f"{'val' if part == 'test' else part}_{what}": value for what, value in place.items()}
    if args.modality == "RGB":
        config |= {"image_tmpl": args.image_tmpl} | ({"index_base": base} if base != 1 else {})
    lines.append("to be set in the configuration:")
    lines.append(yaml.safe_dump({"data": config}, sort_keys=False, allow_unicode=True).rstrip("\n"))
    if later:
        lines.append(f"for a test: data.val_root={later['root']} data.val_list={later['list']}")
    return lines


def find_videos(
    args: argparse.Namespace,
    parts: dict[str, list[Annotation]],
    labels: dict[str, int],
    disk: Callable[[str], Disk],
    notes: list[str],
) -> tuple[dict[str, list[tuple[Found, int]]], list[str]]:
    """Return the videos of each part with their labels, and "FILE:LINE: name" of those that are missing or empty.

    Raises:
        DataError: an unknown class; a part in which only some videos have labels; one video in training and in another
            part, or with two labels. A video that a part names twice is listed once.
    """
    listed: dict[str, list[tuple[Found, int]]] = {part: [] for part in parts}
    first_of: dict[Identity, tuple[str, Annotation, str]] = {}
    seen: set[tuple[str, str]] = set()
    missing, repeated = [], []
    for part, annotations in parts.items():
        check_labels(part, annotations)
        for annotation in annotations:
            if annotation.class_name is not None and annotation.class_name not in labels:
                raise DataError(f"{annotation.source}: {annotation.class_name!r} is no class of {args.labels}")
            video = disk(part).find(annotation)
            if video is None or video.empty:
                missing.append(f"{annotation.source}: {annotation.name}{EMPTY * (video is not None)}")
                continue
            assert video.identity is not None
            first_part, first, path = first_of.setdefault(video.identity, (part, annotation, video.path))
            at = f"at {first.source}" + f", as {path}" * (path != video.path)
            if None not in (first.class_name, annotation.class_name) and first.class_name != annotation.class_name:
                raise DataError(
                    f"{annotation.source}: {video.path} is of class {annotation.class_name!r} here, and of class "
                    f"{first.class_name!r} {at}; a video has one label: remove one of the two"
                )
            if first_part == "train" != part:
                raise DataError(
                    f"{annotation.source}: {video.path}: is a training video too, {at}; remove one of the two"
                )
            if (part, video.path) in seen:
                repeated.append(video.path)
            else:
                seen.add((part, video.path))
                listed[part].append((video, labels.get(annotation.class_name or "", UNLABELLED)))
    if repeated:
        notes.append(f"{len(repeated)} videos are named more than once and listed once: {some(repeated)}")
    return listed, missing


def check_labels(part: str, annotations: list[Annotation]) -> None:
    """Raise DataError if only some have a class, or if a training or validation video has none."""
    unlabelled = [annotation for annotation in annotations if annotation.class_name is None]
    if unlabelled and (part != "test" or len(unlabelled) < len(annotations)):
        rule = "every video needs a class" if part != "test" else "either every video has a class, or none"
        raise DataError(f"{unlabelled[0].source}: {unlabelled[0].name} has no class; in {part}, {rule}")


def class_names(classes: list[str]) -> str:
    """The text of CLASSES. Raises DataError for names that could not be read back."""
    first: dict[str, str] = {}
    for name in classes:
        if not name.strip():
            raise DataError(f"{name!r}: a class needs a name of more than spaces")
        if (other := first.setdefault(name.strip(), name)) != name:
            raise DataError(f"{other!r} and {name!r}: the names of these classes differ only in spaces; rename one")
        if len(name.splitlines()) > 1 or "\0" in name or len(name) > LONGEST_NAME or not writable(name):
            raise DataError(f"{name!r}: such a class name cannot stand in {CLASSES}; rename it")
    names = io.StringIO()
    csv.writer(names, lineterminator="\n").writerows([("id", "name"), *enumerate(classes)])
    return names.getvalue() if classes else ""


def described(videos: list[tuple[Found, int]]) -> str:
    if videos[0][1] == UNLABELLED:
        return f"{len(videos)} videos without labels; test.py --save_scores gives their scores"
    return f"{len(videos)} videos of {len({label for _, label in videos})} classes"


def writable(text: str) -> bool:
    """Whether UTF-8 can hold the text. The name of a file may have bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def root_of(args: argparse.Namespace, part: str) -> Path:
    return getattr(args, f"{part}_root", None) or args.root


def first_number(videos: list[Found], notes: list[str]) -> int:
    """The value of `data.index_base` for these folders of frames; 1 for video files.

    Adds a warning to `notes` if numbers are missing in a folder. Raises DataError if no value fits all folders.
    """
    example = {video.first: video.path for video in videos if video.first is not None}
    if not example:
        return 1
    base, rule = min(example), FIELDS["data.index_base"].rule
    if {0, 1} <= set(example) or (base > 1 and len(example) > 1) or (rule and not rule.holds(base)):
        numbers = "; ".join(f"from {number} in {path}" for number, path in sorted(example.items())[:2])
        raise DataError(f"frames are numbered {numbers}; all must start at one number, mostly 0 or 1 (data.index_base)")
    if gaps := [video for video in videos if video.last != base + (video.num_frames or 0) - 1]:
        notes.append(
            f"warning: {len(gaps)} folders lack some of their frames, such as {gaps[0].path}; see tools/check_data.py"
        )
    return base


def list_line(video: Found, label: int, modality: str) -> str:
    """The line of a video. Raises DataError for a path that a list cannot hold, found by reading the line back."""
    columns = [video.path, label] if modality == "video" else [video.path, video.num_frames, label]
    line = " ".join(map(str, columns))
    same = parse_line(video.path, line.strip().removeprefix("\ufeff"), label + 1, modality).path == video.path
    if not same or len(line.splitlines()) > 1 or not writable(line):
        raise DataError(f"{video.path!r}: such a path cannot stand in a list; rename it")
    return f"{line}\n"
