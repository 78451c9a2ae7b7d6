"""Read every line and every file that a configuration names, and report what is wrong with which.

    python tools/check_data.py CONFIG [key=value ...] [--json FILE] [--clean DIR] [--workers N]

Prints `FILE:LINE: error: ...` or `FILE:LINE: warning: ...`, one a finding, and of one kind in one list only the first
few; FILE of --json holds all. The exit status is 1 if there are errors, 0 if there are none or only warnings. --clean
writes the lists without the lines that have errors, each under its own name into DIR, for you to look at and use.

An error would stop training, falsify a result or lose a class: lines that cannot be read, a path listed twice or in
both lists, frames and videos that are missing, empty or cannot be decoded to their end, a class without training
videos. A warning may be meant: frames that the list does not count, a video that ends before its file says, frames of
several sizes in a video, the same content under two names, class names in another order than a flip expects.

Every image and every video is decoded to its end. Some damage that keeps the structure of a file is noticed by no
decoder.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import os
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import av
import simplejpeg
from dotmap import DotMap
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import (
    UNLABELLED,
    VideoRecord,
    check_labelled,
    numbered_lines,
    parse_line,
    read_class_names,
)
from datasets.flips import flip_pairs, mirror_words
from datasets.frame_files import frame_pattern
from datasets.readers import JPEG_START, VideoFileReader
from engine.configuration import read_config
from tools.prepare_data import as_json, decode, write_text
from utils.errors import ConfigError, DataError, UserError, run_program
from utils.parallel import parallel_map, usable_cores

PRINTED = 20  # findings of one kind in one list
CHUNK = 1 << 20
WHOLE_SHARE = 0.9  # of the stated length; the last frame may be shown longer, or a sound last longer than the picture
PARTS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class Finding:
    """`place` is FILE:LINE, or FILE for what is wrong with a list or the configuration as a whole."""

    severity: str
    kind: str
    place: str
    message: str
    path: str | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.severity}: {self.message}"


@dataclass(frozen=True)
class Problem:
    """What is wrong with the files of one video."""

    severity: str
    kind: str
    message: str


@dataclass
class VideoReport:
    """`digest` stands for the content of all files."""

    problems: list[Problem] = field(default_factory=list)
    digest: bytes | None = None


@dataclass(frozen=True)
class Task:
    """A video to be read: its line, the list that it is in, and the root below which it lies."""

    part: str
    root: str
    record: VideoRecord


@dataclass
class AnnotationList:
    """`records` are those of the lines without errors so far; `findings` about lines or the list."""

    part: str
    path: str
    root: str
    records: list[VideoRecord] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    lines: int = 0

    def add(self, severity: str, kind: str, record: VideoRecord, message: str) -> None:
        self.findings.append(Finding(severity, kind, record.source, message, record.path))

    @property
    def bad_places(self) -> set[str]:
        return {finding.place for finding in self.findings if finding.severity == "error"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Read every line and file that a configuration names.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run, see docs/configuration.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file")
    parser.add_argument("--clean", type=Path, metavar="DIR", help="write lists without the lines that have errors")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes; 0 works in this one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    if args.workers < 0:
        raise UserError(f"--workers: must be 0 or more, got {args.workers}")
    data = read_config(args.config, args.overrides).data
    lists = [AnnotationList(part, data[f"{part}_list"], data[f"{part}_root"]) for part in PARTS if data[f"{part}_list"]]
    clean = {} if args.clean is None else clean_paths(lists, args.clean)
    try:
        general = check(args.config, data, lists, args.workers)
    except KeyboardInterrupt:
        raise UserError("interrupted; nothing was written") from None

    findings = [*general, *(finding for each in lists for finding in each.findings)]
    errors = sum(finding.severity == "error" for finding in findings)
    counts = {"errors": errors, "warnings": len(findings) - errors}
    show(findings)
    for each in lists:
        print(f"{each.path}: {each.lines} lines, {len(each.bad_places)} places with errors")
    if args.json is not None:
        report = {
            "config": args.config,
            "overrides": args.overrides,
            "lists": [{"part": each.part, "file": each.path, "root": each.root, "lines": each.lines} for each in lists],
            **counts,
            "findings": [asdict(finding) for finding in findings],
        }
        write_text(args.json, as_json(report))
    for each in lists:
        if each.part in clean:
            write_clean(each, clean[each.part])
    print(f"{errors} errors, {counts['warnings']} warnings")
    if errors:
        raise DataError(f"{args.config}: its data have {errors} errors")


def check(config_path: str, data: DotMap, lists: list[AnnotationList], workers: int) -> list[Finding]:
    """Fill the findings of `lists`; returns those about the configuration."""
    names, general = check_classes(config_path, data)
    for each in lists:
        read_list(each, data)
    refuse_shared_paths(lists)
    for each in lists:
        check_labels(each, data.num_classes, names)
    check_files(lists, data, workers)
    for each in lists:
        each.findings.sort(key=lambda finding: line_number(each, finding))
    return general


# Lines


def read_list(each: AnnotationList, data: DotMap) -> None:
    """Every line is parsed by itself, so that a bad one hides none. One line with a label shows that all need one."""

    def add(severity: str, kind: str, place: str, message: str) -> None:
        each.findings.append(Finding(severity, kind, place, message.removeprefix(f"{place}: ")))

    parsed = []
    try:
        for source, line in numbered_lines(each.path):
            if not line:
                continue
            each.lines += 1
            try:
                parsed.append(parse_line(source, line, data.num_classes, data.modality))
            except DataError as error:
                add("error", "line", source, error.line)
    except DataError as error:
        add("error", "list", each.path, error.line)
        return
    if not each.lines:
        add("error", "list", each.path, "the list is empty")
    unlabelled = each.part == "val" and all(record.label == UNLABELLED for record in parsed)
    if unlabelled and parsed:
        add("warning", "list", each.path, "no line has a label: only test.py reads such a list, with --save_scores")
    for record in parsed:
        try:
            check_labelled(record, record, unlabelled)
            each.records.append(record)
        except DataError as error:
            add("error", "line", record.source, error.line)


def refuse_shared_paths(lists: list[AnnotationList]) -> None:
    """A path that stands twice in a list, or in the training list and in that of validation too.

    Of two lines, the second has the error, and the one for training: what validation measures stays the same.
    """
    first_of: dict[str, tuple[str, VideoRecord]] = {}
    for each in validation_first(lists):
        kept = []
        for record in each.records:
            path = os.path.normpath(os.path.join(os.path.abspath(each.root), record.path))
            part, first = first_of.setdefault(path, (each.part, record))
            if first is record:
                kept.append(record)
            elif part == each.part:
                differs = "" if first.label == record.label else f" with another label, {first.label}"
                each.add("error", "duplicate", record, f"{record.path}: listed before{differs}, at {first.source}")
            else:
                each.add("error", "overlap", record, f"{record.path}: is a validation video too, at {first.source}")
        each.records = kept


def validation_first(lists: list[AnnotationList]) -> list[AnnotationList]:
    return sorted(lists, key=lambda each: each.part != "val")


# Classes


def check_classes(config_path: str, data: DotMap) -> tuple[list[str] | None, list[Finding]]:
    """The names of `data.label_list`, or None, and what is wrong with them or with the swap of labels in a flip."""
    names, findings = None, []

    def add(severity: str, kind: str, message: str) -> None:
        findings.append(Finding(severity, kind, data.label_list or config_path, message))

    if data.label_list:
        try:
            names = read_class_names(data.label_list, data.num_classes)
        except DataError as error:
            return None, [Finding("error", "names", *error.line.split(": ", 1))]
    if not data.flip:
        return names, findings
    try:
        pairs = flip_pairs(data.protocol, data.num_classes, names)
    except ConfigError as error:
        add("error", "flip", error.line)
        return names, findings
    if names is None:
        if pairs:
            message = "data.label_list: none, so nothing shows whether classes are in alphabetical order, as flips need"
            add("warning", "flip", message)
        return names, findings
    for label, name in enumerate(names):
        if (mirrored := mirror_words(name)) != name and label not in pairs:
            message = f"class {label}: the mirror of {name!r} is no class ({mirrored!r}), so a flip keeps its label"
            add("warning", "flip", f"{message}; see data.flip")
    if data.protocol == "something" and names != sorted(names):
        label, (name, other) = next(
            (label, pair) for label, pair in enumerate(zip(names, sorted(names), strict=True)) if len(set(pair)) > 1
        )
        message = (
            f"class {label} is {name!r}, not {other!r}: released checkpoints have their classes in alphabetical order"
        )
        add("warning", "order", message)
    return names, findings


def check_labels(each: AnnotationList, num_classes: int, names: list[str] | None) -> None:
    """Classes without videos, and videos in a folder that is called like another class."""
    label_of = {folder_name(name): label for label, name in enumerate(names or ())}
    videos = Counter(record.label for record in each.records)
    for record in each.records:
        label = label_of.get(folder_name(record.path.split("/", 1)[0]), record.label)
        if label != record.label != UNLABELLED:
            message = f"label {record.label} is {names[record.label]!r}, but the folder is named like label {label}"
            each.add("warning", "folder", record, f"{record.path}: {message}")
    if set(videos) <= {UNLABELLED}:
        return
    severity = "error" if each.part == "train" else "warning"
    for label in sorted(set(range(num_classes)) - set(videos)):
        name = f" ({names[label]!r})" if names else ""
        message = f"no {PARTS[each.part]} video is of class {label}{name}; check data.num_classes"
        each.findings.append(Finding(severity, "class", each.path, message))


def folder_name(class_name: str) -> str:
    return class_name.replace("_", " ").strip().lower()


# Files


def check_files(lists: list[AnnotationList], data: DotMap, workers: int) -> None:
    """Reads the files of every record."""
    if data.modality == "video":
        read = functools.partial(check_video_file, decoder=data.decoder)
    else:
        read = functools.partial(
            check_frame_folder,
            image_tmpl=data.image_tmpl,
            index_base=data.index_base,
            count_frames=data.count_frames,
        )
    of_part = {each.part: each for each in lists}
    tasks = (Task(each.part, each.root, record) for each in validation_first(lists) for record in each.records)
    first_of: dict[bytes, VideoRecord] = {}
    results, total = parallel_map(read, tasks, workers, died), sum(len(each.records) for each in lists)
    with (
        contextlib.closing(results),
        tqdm(results, desc="videos", unit="video", disable=None, total=total) as progress,
    ):
        for task, report in progress:
            each, record = of_part[task.part], task.record
            for problem in report.problems:
                each.add(problem.severity, problem.kind, record, problem.message)
            if report.digest is not None:
                first = first_of.setdefault(report.digest, record)
                if first is not record:
                    message = f"{record.path}: has the same content as {first.path}, at {first.source}"
                    each.add("warning", "content", record, message)


def died(task: Task) -> VideoReport:
    path = os.path.join(task.root, task.record.path)
    message = f"{path}: the process that read it ended: a crash in the decoder, or not enough memory"
    return VideoReport([Problem("error", "unreadable", message)])


def check_frame_folder(task: Task, image_tmpl: str, index_base: int, count_frames: bool) -> VideoReport:
    """The frames of one video: their numbers, and every file."""
    report, record = VideoReport(), task.record

    def add(severity: str, kind: str, message: str) -> None:
        report.problems.append(Problem(severity, kind, message))

    folder, template = os.path.split(os.path.join(task.root, record.path, image_tmpl))
    try:
        files = set(os.listdir(folder))
    except OSError as error:
        add("error", "missing", f"{folder}: {error.strerror}")
        return report
    pattern = frame_pattern(template)
    count = sum(pattern.fullmatch(file) is not None for file in files)
    if not count:
        add("error", "missing", f"{folder}: no file like {template.format(index_base)} in it; check data.image_tmpl")
        return report
    num_frames = count if count_frames else record.num_frames
    wanted = [template.format(number) for number in range(index_base, index_base + num_frames)]
    missing = [name for name in wanted if name not in files]
    listed = f"{num_frames} frames {'counted' if count_frames else 'listed'}, {count} files"
    other_base = 1 - index_base
    if index_base == 1:
        shifted = bool(missing) and template.format(0) in files
    else:
        shifted = wanted[0] in missing and template.format(num_frames) in files
    if shifted:
        message = f"numbered from {other_base}, not from {index_base}: {missing[0]} is missing; {listed}"
        add("error", "index_base", f"{folder}: {message}; see data.index_base")
    elif missing:
        kind = "gap" if set(wanted[wanted.index(missing[0]) :]) & files else "count"
        add("error", kind, f"{folder}: {and_more(missing)} missing; {listed}")
    elif count > num_frames:
        add("warning", "count", f"{folder}: {listed}: the others are never read")

    digest, sizes = hashlib.blake2b(digest_size=16), Counter()
    broken, damaged = defaultdict(list), []
    for name in (name for name in wanted if name in files):
        try:
            with open(os.path.join(folder, name), "rb") as file:
                content = file.read()
            digest.update(content)
            size, complaint = decoded(content)
            sizes[size] += 1
            if complaint is not None:
                damaged.append((name, complaint))
        except Exception as error:  # broken files make Pillow raise many kinds, SyntaxError and struct.error among them
            broken["empty" if isinstance(error, EOFError) else "unreadable"].append((name, error))
    for kind, cases in broken.items():
        reason = "" if kind == "empty" else f" ({cases[0][1]})"
        add("error", kind, f"{folder}: {and_more([name for name, _ in cases])} {kind}{reason}; extract it again")
    if damaged:
        names = and_more([name for name, _ in damaged])
        add("warning", "damaged", f"{folder}: {names} damaged, but decoded ({damaged[0][1]}); extract it again")
    if len(sizes) > 1:
        add("warning", "sizes", f"{folder}: {shown_sizes(sizes)}")
    if not report.problems:
        report.digest = digest.digest()
    return report


def decoded(content: bytes) -> tuple[tuple[int, int], str | None]:
    """((width, height), what libjpeg complains of) of an image that can be decoded to its end.

    Raises what Pillow does, EOFError for no content. Pillow takes damage inside a JPEG file in silence, simplejpeg not.
    """
    if not content:
        raise EOFError
    complaint = None
    if content.startswith(JPEG_START):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if colours not in ("CMYK", "YCCK"):
                # Every bit is still read, but most of the transforms that cannot fail are left out.
                simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1, min_factor=8)
                return (width, height), None
        except ValueError as error:
            complaint = str(error)
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return image.size, complaint


def check_video_file(task: Task, decoder: str) -> VideoReport:
    """One video, decoded to its end, and read once more in the way of the configuration if that is another."""
    report, record = VideoReport(), task.record
    path = os.path.join(task.root, record.path)

    def add(severity: str, kind: str, message: str) -> None:
        report.problems.append(Problem(severity, kind, f"{path}: {message}"))

    if not os.path.isfile(path):
        shorter = path.rpartition(" ")[0]
        too_many = os.path.isfile(shorter) and f"; {shorter} is: a line must read 'path label', with no number between"
        add("error", "missing", f"no such video{too_many or ''}")
        return report
    if os.path.getsize(path) == 0:
        add("error", "empty", "the file is empty")
        return report
    sizes, corrupt, times = Counter(), 0, []
    try:
        for frame in decode(path):
            sizes[frame.width, frame.height] += 1
            corrupt += frame.is_corrupt
            times.append(frame.time)
        stated = stated_seconds(path)
        digest = hashlib.blake2b(digest_size=16)
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except Exception as error:  # what a decoder raises is its own affair
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        add("error", "unreadable", f"cannot be decoded after {sum(sizes.values())} frames ({reason})")
        return report
    num_frames = sum(sizes.values())
    if num_frames == 0:
        add("error", "unreadable", "no frame can be decoded")
        return report
    try:  # in the way that training reads it
        video = VideoFileReader(task.root, decoder).open(record)
        if video.num_frames != num_frames:
            add("error", "unreadable", f"{decoder} counts {video.num_frames} frames, but {num_frames} can be decoded")
        video.read([video.num_frames - 1])
    except UserError as error:
        add("error", "unreadable", error.line.removeprefix(f"{path}: "))
    if corrupt:
        add("warning", "damaged", f"{corrupt} of {num_frames} frames are damaged, says the decoder")
    if stated is not None and num_frames > 1:
        shown = (times[-1] - times[0]) * num_frames / (num_frames - 1)
        if shown < WHOLE_SHARE * stated:
            add(
                "warning", "cut_off", f"the pictures end after {shown:.2f} s of the {stated:.2f} s that the file states"
            )
    if len(sizes) > 1:
        add("warning", "sizes", shown_sizes(sizes))
    report.digest = digest.digest()
    return report


def stated_seconds(path: str) -> float | None:
    """How long a Matroska or WebM file says that its pictures are: what is cut off such a file is no error in decoding.

    None where that is not known, as beside sound of unknown length, and for other formats.
    """
    with av.open(path) as container:
        if "matroska" not in container.format.name:
            return None
        stream = container.streams.best("video")
        tag = stream.metadata.get("DURATION")
        if tag is not None:
            hours, minutes, seconds = tag.split(":")
            return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        alone = len(container.streams) == 1 and container.duration is not None
        return container.duration / av.time_base if alone else None


def and_more(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def shown_sizes(sizes: Counter) -> str:
    return "frames of several sizes: " + ", ".join(f"{width}x{height} ({n})" for (width, height), n in sizes.items())


# Reports


def line_number(each: AnnotationList, finding: Finding) -> int:
    """0 for a finding about the list as a whole."""
    line = finding.place.removeprefix(each.path).removeprefix(":")
    return int(line) if line else 0


def show(findings: list[Finding]) -> None:
    """Print the findings, of one kind in one list only the first ones."""
    printed: Counter = Counter()
    for finding in findings:
        key = finding.place.rpartition(":")[0], finding.severity, finding.kind
        printed[key] += 1
        if printed[key] <= PRINTED:
            print(finding)
    for (place, severity, kind), number in printed.items():
        if number > PRINTED:
            print(f"{place}: {number - PRINTED} more {severity}s of the kind {kind!r}; --json FILE names all")


def clean_paths(lists: list[AnnotationList], folder: Path) -> dict[str, Path]:
    """Part -> path of its cleaned list; UserError if two would be one, or one the list that is read."""
    paths = {each.part: folder / os.path.basename(each.path) for each in lists}
    if len(set(paths.values())) < len(paths):
        raise UserError(f"--clean: both lists are called {os.path.basename(lists[0].path)}; rename one")
    for each in lists:
        if paths[each.part].exists() and os.path.samefile(paths[each.part], each.path):
            raise UserError(f"--clean: {paths[each.part]} is the list itself; name another folder")
    return paths


def write_clean(each: AnnotationList, path: Path) -> None:
    """The lines without errors, byte for byte; no file if there are none."""
    if any(finding.kind == "list" and finding.severity == "error" for finding in each.findings):
        print(f"{path}: not written, since {each.path} cannot be read")
        return
    bad = each.bad_places
    with open(each.path, encoding="utf-8", newline="") as file:
        kept = [line for number, line in enumerate(file, 1) if f"{each.path}:{number}" not in bad]
    videos = sum(bool(line.strip()) for line in kept)
    if not videos:
        print(f"{path}: not written, since every line has errors")
        return
    write_text(path, "".join(kept))
    print(f"{path}: {videos} of {each.lines} lines kept")


if __name__ == "__main__":
    run_program(main)
