"""Read every line and every file that a configuration names, and report what is wrong.

    python tools/check_data.py CONFIG [key=value ...] [--json FILE] [--clean DIR] [--workers N]

Prints one line per finding, `FILE:LINE: error: ...` or `FILE:LINE: warning: ...`. Of each kind only the first few
findings of a list are printed; the FILE of --json holds all of them. The exit status is 1 if there are errors,
otherwise 0. --clean writes the lists without the lines that have errors to DIR, under their own names.

An error stops training, makes a result wrong or loses a class: lines that cannot be read, a path listed twice or in
both lists, frames and videos that are missing, empty or cannot be decoded to their end, a class without training
videos. A warning may be intended: frames that the list does not count, a video that ends before its file says, frames
of several sizes in a video, the same content under two names, class names in another order than a flip expects.

Every image and every video is decoded to its end. Damage that keeps the structure of a file valid can go unnoticed.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dotmap import DotMap
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
from datasets.flips import flip_pairs, mirror_words, suggests_side
from engine.configuration import read_config
from tools.check_videos import (
    Checked,
    Finding,
    Task,
    check_each,
    check_frame_folder,
    check_segments,
    check_video_file,
    died,
)
from utils.atomic import write_json, write_text
from utils.config import Purpose, load_config
from utils.errors import ConfigError, DataError, UserError, run_program
from utils.parallel import parallel_map, usable_cores

PRINTED = 20  # findings of one kind in one list
PARTS = {"train": "training", "val": "validation"}


@dataclass
class AnnotationList:
    """One list of the configuration.

    part: "train" or "val"
    path, root: of the list, and the folder that its paths are relative to
    lines: number of lines that are not blank
    records: of the lines without errors so far
    findings: about lines of the list, or the list as a whole
    """

    part: str
    path: str
    root: str
    lines: int = 0
    records: list[VideoRecord] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def bad_places(self) -> set[str]:
        return {finding.place for finding in self.findings if finding.severity == "error"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Read every line and file that a configuration names.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run, see docs/configuration.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file")
    parser.add_argument("--clean", type=Path, metavar="DIR", help="write lists without the lines that have errors")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="number of processes; 0 starts none")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    if args.workers < 0:
        raise UserError(f"--workers: must be 0 or more, got {args.workers}")
    data = read_data(args.config, args.overrides)
    lists = [AnnotationList(part, data[f"{part}_list"], data[f"{part}_root"]) for part in PARTS if data[f"{part}_list"]]
    clean = {} if args.clean is None else clean_paths(lists, args.clean)
    try:
        general = check(args.config, data, lists, args.workers)
    except KeyboardInterrupt:
        raise UserError("interrupted; nothing was written") from None

    findings = [*general, *(finding for each in lists for finding in each.findings)]
    errors = sum(finding.severity == "error" for finding in findings)
    counts = {"errors": errors, "warnings": len(findings) - errors}
    if args.json is not None:
        report = {
            "config": args.config,
            "overrides": args.overrides,
            "lists": [{"part": each.part, "file": each.path, "root": each.root, "lines": each.lines} for each in lists],
            **counts,
            "findings": [asdict(finding) for finding in findings],
        }
        write_json(args.json, report)
    written = [write_clean(each, clean[each.part]) for each in lists if each.part in clean]

    # Printed after all files are written, so that `| head` stops nothing.
    show(findings)
    if not data.train_list:
        print(f"{args.config}: no data.train_list: checked for test.py only")
    for each in lists:
        print(f"{each.path}: {each.lines} lines, {len(each.bad_places)} places with errors")
    for line in written:
        print(line)
    print(f"{errors} errors, {counts['warnings']} warnings")
    if errors:
        raise DataError(f"{args.config}: its data have {errors} errors")


def read_data(path: str, overrides: list[str]) -> DotMap:
    """The section `data` of a configuration for training or, without training videos, for test.py."""
    data = load_config(path, overrides, purpose="model").data
    purpose: Purpose = "train" if data.train_list or data.train_root else "test"
    return read_config(path, overrides, purpose).data


def check(config_path: str, data: DotMap, lists: list[AnnotationList], workers: int) -> list[Finding]:
    """Check everything. Fills lines, records and findings of `lists`; returns the findings about the configuration."""
    names, general = read_names(data)
    if not general:
        general.extend(flip_findings(data.label_list or config_path, data, names))

    for each in lists:
        each.findings.extend(line_findings(each, data))
    known: dict[str, list[tuple[str, VideoRecord]]] = {}
    for each in validation_first(lists):
        each.findings.extend(shared_path_findings(each, known))
        bad_places = each.bad_places
        each.records = [record for record in each.records if record.source not in bad_places]
    for each in lists:
        each.findings.extend(label_findings(each, data.num_classes, names))
    check_files(lists, data, workers)
    for each in lists:
        each.findings.sort(key=lambda finding: line_number(each, finding))
    return general


def validation_first(lists: list[AnnotationList]) -> list[AnnotationList]:
    """If a training and a validation video are the same, the later one in this order gets the finding: training's."""
    return sorted(lists, key=lambda each: each.part != "val")


# Classes


def read_names(data: DotMap) -> tuple[list[str] | None, list[Finding]]:
    """The class names of `data.label_list`, None without one, and what prevents reading them."""
    if not data.label_list:
        return None, []
    try:
        return read_class_names(data.label_list, data.num_classes), []
    except DataError as error:
        return None, [Finding("error", "names", *error.line.split(": ", 1))]


def flip_findings(place: str, data: DotMap, names: list[str] | None) -> Iterator[Finding]:
    """What is wrong with the labels that a flip swaps, and with the order of the classes that it relies on."""
    if not data.flip:
        return
    try:
        pairs = flip_pairs(data.protocol, data.num_classes, names)
    except ConfigError as error:
        if data.train_list:  # a test does not flip
            yield Finding("error", "flip", place, error.line)
        return
    if names is None:
        if pairs:
            message = "data.label_list: none, so nothing shows whether classes are in alphabetical order, as flips need"
            yield Finding("warning", "flip", place, message)
        return
    for label, name in enumerate(names):
        if label in pairs or not suggests_side(name):
            continue
        message = f"class {label}: {name!r} suggests a side in a word that a flip does not swap, so it keeps its label"
        if (mirrored := mirror_words(name)) != name:
            message = f"class {label}: the mirror of {name!r} is no class ({mirrored!r}), so a flip keeps its label"
        yield Finding("warning", "flip", place, f"{message}; see data.flip")
    if data.protocol == "something":
        for label, (name, expected) in enumerate(zip(names, sorted(names), strict=True)):
            if name != expected:
                message = f"class {label} is {name!r}, not {expected!r}: released checkpoints have their classes in "
                yield Finding("warning", "order", place, f"{message}alphabetical order")
                break


# Lines


def line_findings(each: AnnotationList, data: DotMap) -> Iterator[Finding]:
    """Parse every line by itself, so that a bad line hides no other. Fills `each.lines` and `each.records`.

    A validation list may be without labels, but if one line has a label, every line needs one.
    """
    parsed = []
    try:
        for source, line in numbered_lines(each.path):
            if not line:
                continue
            each.lines += 1
            try:
                parsed.append(parse_line(source, line, data.num_classes, data.modality, data.segments))
            except DataError as error:
                yield Finding("error", "line", source, without_place(error, source))
    except DataError as error:
        yield Finding("error", "list", each.path, without_place(error, each.path))
        return
    if not each.lines:
        yield Finding("error", "list", each.path, "the list is empty")
    unlabelled = each.part == "val" and all(record.label == UNLABELLED for record in parsed)
    if unlabelled and parsed:
        message = "no line has a label: only test.py reads such a list, with --save_scores"
        yield Finding("warning", "list", each.path, message)
    for record in parsed:
        try:
            check_labelled(record, record, unlabelled)
            each.records.append(record)
        except DataError as error:
            yield Finding("error", "line", record.source, without_place(error, record.source))


def without_place(error: DataError, place: str) -> str:
    return error.line.removeprefix(f"{place}: ")


def shared_path_findings(each: AnnotationList, known: dict[str, list[tuple[str, VideoRecord]]]) -> Iterator[Finding]:
    """Videos that are listed before, in this list or in the validation list.

    Args:
        known: absolute path -> (part, record) of its lines before, over all lists; filled here.
    """
    for record in each.records:
        before = known.setdefault(os.path.normpath(os.path.join(os.path.abspath(each.root), record.path)), [])
        same = next((other for other in before if span(other[1]) == span(record)), None)
        if same is None:
            shared = next((other for part, other in before if part != each.part and overlap(other, record)), None)
            if shared is not None:
                message = f"{record.name}: shares frames with the validation video at {shared.source}, {shared.name}"
                yield Finding.at(record, "warning", "overlap", message)
            before.append((each.part, record))
        elif same[0] == each.part:
            first = same[1]
            differs = "" if first.label == record.label else f" with another label, {first.label}"
            message = f"{record.name}: listed before{differs}, at {first.source}"
            yield Finding.at(record, "error", "duplicate", message)
        else:
            message = f"{record.name}: is a validation video too, at {same[1].source}"
            yield Finding.at(record, "error", "overlap", message)


def span(record: VideoRecord) -> tuple[int, int] | None:
    """First frame of a segment and the first one behind it; None for a whole video."""
    if record.first_frame is None or record.num_frames is None:
        return None
    return record.first_frame, record.first_frame + record.num_frames


def overlap(a: VideoRecord, b: VideoRecord) -> bool:
    """Whether two segments of one video share a frame."""
    spans = span(a), span(b)
    return spans[0] is None or spans[1] is None or (spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1])


def label_findings(each: AnnotationList, num_classes: int, names: list[str] | None) -> Iterator[Finding]:
    """Videos in a folder that is named like another class, and classes without videos."""
    label_of = {folder_name(name): label for label, name in enumerate(names or ())}
    for record in each.records:
        folder = folder_name(record.path.split("/", 1)[0])
        label = label_of.get(folder, record.label)
        if label != record.label != UNLABELLED and folder != folder_name(names[record.label]):
            message = f"label {record.label} is {names[record.label]!r}, but the folder is named like label {label}"
            yield Finding.at(record, "warning", "folder", f"{record.path}: {message}")
    present = {record.label for record in each.records}
    if present <= {UNLABELLED}:
        return
    for label in sorted(set(range(num_classes)) - present):
        name = f" ({names[label]!r})" if names else ""
        message = f"no {PARTS[each.part]} video is of class {label}{name}; check data.num_classes"
        yield Finding("error" if each.part == "train" else "warning", "class", each.path, message)


def folder_name(class_name: str) -> str:
    return class_name.replace("_", " ").strip().lower()


# Files


def check_files(lists: list[AnnotationList], data: DotMap, workers: int) -> None:
    """Check the files of every record in several processes, and compare the videos' contents."""
    read: Callable[[list[Task]], list[Checked]]
    if data.modality == "video" and data.segments:
        read = functools.partial(check_segments, decoder=data.decoder, on_damage=data.on_damage)
    elif data.modality == "video":
        check = functools.partial(check_video_file, decoder=data.decoder, on_damage=data.on_damage)
        read = functools.partial(check_each, check=check)
    else:
        check = functools.partial(
            check_frame_folder,
            image_tmpl=data.image_tmpl,
            index_base=data.index_base,
            count_frames=data.count_frames,
            on_damage=data.on_damage,
        )
        read = functools.partial(check_each, check=check)
    list_of = {each.part: each for each in lists}
    tasks = [Task(each.part, each.root, record) for each in validation_first(lists) for record in each.records]
    groups = [[task] for task in tasks]
    if data.segments:  # the segments of a file are checked together
        of_path: dict[str, list[Task]] = defaultdict(list)
        for task in tasks:
            of_path[os.path.normpath(os.path.abspath(task.path))].append(task)
        groups = list(of_path.values())
    first_of: dict[bytes, VideoRecord] = {}
    videos_of: dict[str, list[VideoRecord]] = {}
    results = parallel_map(read, groups, workers, died)
    with (
        contextlib.closing(results),
        tqdm(results, desc="videos", unit="video", disable=None, total=len(groups)) as progress,
    ):
        for group, results_of_group in progress:
            for task, checked in zip(group, results_of_group, strict=True):
                findings, record, digest = list_of[task.part].findings, task.record, checked.digest
                findings.extend(checked.findings)
                for kind in checked.kinds:
                    videos_of.setdefault(kind, []).append(record)
                if digest is not None and (first := first_of.setdefault(digest, record)) is not record:
                    message = f"{record.name}: has the same content as {first.name}, at {first.source}"
                    findings.append(Finding.at(record, "warning", "content", message))
    if len(videos_of) > 1:
        kinds = sorted(videos_of.items(), key=lambda item: -len(item[1]))
        told = ", ".join(f"{kind} ({len(videos)} videos, the first {videos[0].name})" for kind, videos in kinds)
        lists[0].findings.append(Finding("warning", "mixed", lists[0].path, f"frames of several kinds: {told}"))


# Reports


def line_number(each: AnnotationList, finding: Finding) -> int:
    """0 for a finding about the list as a whole."""
    line = finding.place.removeprefix(each.path).removeprefix(":")
    return int(line) if line else 0


def show(findings: list[Finding]) -> None:
    """Print the findings, at most PRINTED of one kind in one list."""
    printed: Counter[tuple[str, str, str]] = Counter()
    for finding in findings:
        key = finding.place.rpartition(":")[0], finding.severity, finding.kind
        printed[key] += 1
        if printed[key] <= PRINTED:
            print(finding)
    for (place, severity, kind), number in printed.items():
        if number > PRINTED:
            print(f"{place}: {number - PRINTED} more {severity}s of the kind {kind!r}; --json FILE names all")


def clean_paths(lists: list[AnnotationList], folder: Path) -> dict[str, Path]:
    """Part -> path of its cleaned list. Raises UserError if two are equal, or if one is a list that is read."""
    paths = {each.part: folder / os.path.basename(each.path) for each in lists}
    if len(set(paths.values())) < len(paths):
        raise UserError(f"--clean: both lists are called {os.path.basename(lists[0].path)}; rename one")
    for each in lists:
        if paths[each.part].exists() and os.path.samefile(paths[each.part], each.path):
            raise UserError(f"--clean: {paths[each.part]} is the list itself; name another folder")
    return paths


def write_clean(each: AnnotationList, path: Path) -> str:
    """Write the lines without errors, unchanged to the byte. Writes no file if there are none. Returns a line."""
    if any(finding.kind == "list" and finding.severity == "error" for finding in each.findings):
        return f"{path}: not written, since {each.path} cannot be read"
    bad = each.bad_places
    with open(each.path, encoding="utf-8", newline="") as file:
        kept = [line for number, line in enumerate(file, 1) if f"{each.path}:{number}" not in bad]
    videos = sum(bool(line.strip()) for line in kept)
    if not videos:
        return f"{path}: not written, since every line has errors"
    write_text(path, "".join(kept))
    return f"{path}: {videos} of {each.lines} lines kept"


if __name__ == "__main__":
    run_program(main)
