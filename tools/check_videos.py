"""Check the files of one video (for tools/check_data.py): decode them to their end and report what is wrong."""

import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import av
import simplejpeg
from PIL import Image

from datasets.annotations import VideoRecord
from datasets.decoders import Damage, FrameCountError, decode_all, describe_damage, open_container
from datasets.frame_archives import Frames, open_frames
from datasets.frame_files import frame_pattern
from datasets.readers import JPEG_START, OpenedVideo, VideoFileReader, seen_by_a_person
from datasets.segments import SegmentError, check_end, count_frames
from utils.errors import UserError

CHUNK = 1 << 20
HASH_BYTES = 16
MOST_FRAMES = 10**7  # of a line whose files are looked up by name; a wrong number must not fill the memory
WHOLE_SHARE = 0.9  # of the stated length: the last frame may be shown longer, or the sound may outlast the pictures


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    severity: "error" or "warning"
    kind: one word; only the first findings of a kind are printed
    place: FILE:LINE, or FILE for a list or the configuration as a whole
    message: what is wrong
    path: the video's path in the list, None if the finding is not about one video
    """

    severity: str
    kind: str
    place: str
    message: str
    path: str | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.severity}: {self.message}"

    @classmethod
    def at(cls, record: VideoRecord, severity: str, kind: str, message: str) -> "Finding":
        """A finding about the video of one line."""
        return cls(severity, kind, record.source, message, record.path)


@dataclass(frozen=True)
class Task:
    """A video to check.

    part: "train" or "val"
    root: folder that the record's path is relative to
    """

    part: str
    root: str
    record: VideoRecord

    @property
    def path(self) -> str:
        return os.path.join(self.root, self.record.path)


@dataclass(frozen=True)
class Checked:
    """What one video gave.

    digest: hash of its content, None if it is not to be compared with other videos
    kinds: format and mode of its frames, such as "PNG RGBA"; empty for a video file
    """

    findings: list[Finding]
    digest: bytes | None = None
    kinds: frozenset[str] = frozenset()


def died(tasks: list[Task]) -> list[Checked]:
    """The results for videos whose process ended."""
    message = f"{tasks[0].path}: the process that read it ended: a crash in the decoder, or not enough memory"
    return [Checked([Finding.at(task.record, "error", "unreadable", message)]) for task in tasks]


def check_each(tasks: list[Task], check: Callable[[Task], Checked]) -> list[Checked]:
    """The results of `check` for each task."""
    return [check(task) for task in tasks]


# Folders of frames


def check_frame_folder(
    task: Task, image_tmpl: str, index_base: int, count_frames: bool, on_damage: str = "accept"
) -> Checked:
    """Check the numbers of the frames of a folder or zip file, and decode each one. With findings there is no hash."""
    folder, template = os.path.split(os.path.join(task.path, image_tmpl))
    digest, kinds = hashlib.blake2b(digest_size=HASH_BYTES), set[str]()
    try:
        with open_frames(folder) as frames:
            expected = (frames, task.record, template, index_base, count_frames, on_damage)
            findings = list(frame_findings(*expected, digest, kinds))
    except UserError as error:
        return Checked([Finding.at(task.record, "error", "unreadable", error.line)])
    return Checked(findings, None if findings else digest.digest(), frozenset(kinds))


def frame_findings(
    frames: Frames,
    record: VideoRecord,
    template: str,
    index_base: int,
    count_frames: bool,
    on_damage: str,
    digest: "hashlib.blake2b",
    kinds: set[str],
) -> Iterator[Finding]:
    """What is wrong with opened frames. Updates `digest` with the content of each frame, and `kinds` with its kind."""
    folder = frames.path
    try:
        files = frames.names()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        advice = "; data.modality: video reads video files" if isinstance(error, NotADirectoryError) else ""
        reason = getattr(error, "strerror", None) or error
        yield Finding.at(record, "error", "missing", f"{folder}: {reason}{advice}")
        return
    except UserError as error:
        yield Finding.at(record, "error", "unreadable", error.line)
        return
    pattern = frame_pattern(template)
    count = sum(pattern.fullmatch(file) is not None for file in files)
    if not count:
        message = f"{folder}: no file like {template.format(index_base)} in it; check data.image_tmpl"
        yield Finding.at(record, "error", "missing", message)
        return

    num_frames = count if count_frames else record.num_frames
    start = index_base + (record.first_frame or 0)
    wanted = [template.format(number) for number in range(start, start + min(num_frames, MOST_FRAMES))]
    missing = [name for name in wanted if name not in files]
    since = "" if record.first_frame is None else f" from frame {record.first_frame} on"
    listed = f"{num_frames} frames {'counted' if count_frames else 'listed'}{since}, {count} files"
    first = min(number for number in map(pattern.number, files) if number is not None)
    if missing and first != index_base and template.format(first + (record.first_frame or 0) + num_frames - 1) in files:
        message = f"numbered from {first}, not from {index_base}: {missing[0]} is missing; {listed}"
        yield Finding.at(record, "error", "index_base", f"{folder}: {message}; see data.index_base")
    elif missing:
        kind = "gap" if set(wanted[wanted.index(missing[0]) :]) & files else "count"
        yield Finding.at(record, "error", kind, f"{folder}: {and_more(missing)} missing; {listed}")
    elif count > num_frames and record.first_frame is None:
        yield Finding.at(record, "warning", "count", f"{folder}: {listed}: the others are never read")

    sizes: Counter[tuple[int, int]] = Counter()
    broken: dict[str, list[tuple[str, Exception]]] = defaultdict(list)
    damaged: list[tuple[str, str]] = []
    for name in (name for name in wanted if name in files):
        try:
            content = frames.read(name)
            digest.update(content)
            size, kind, complaint = decoded(content)
            sizes[size] += 1
            kinds.add(kind)
            if complaint is not None:
                damaged.append((name, complaint))
        except Exception as error:  # Pillow raises many exception types for broken files
            broken["empty" if isinstance(error, EOFError) else "unreadable"].append((name, error))
    for kind, cases in broken.items():
        reason = "" if kind == "empty" else f" ({cases[0][1]})"
        message = f"{folder}: {and_more([name for name, _ in cases])} {kind}{reason}; extract it again"
        yield Finding.at(record, "error", kind, message)
    if damaged:
        names = and_more([name for name, _ in damaged])
        message = f"{folder}: {names} damaged, but decoded ({damaged[0][1]}); extract it again"
        yield Finding.at(record, damage_severity(on_damage), "damaged", message)
    if len(sizes) > 1:
        yield Finding.at(record, "warning", "sizes", f"{folder}: {shown_sizes(sizes)}")


def damage_severity(on_damage: str) -> str:
    """With `data.on_damage: error`, a damaged video is one that cannot be read."""
    return "error" if on_damage == "error" else "warning"


def decoded(content: bytes) -> tuple[tuple[int, int], str, str | None]:
    """((width, height), format and mode, complaint of libjpeg or None) of an image that can be decoded to its end.

    Raises what Pillow raises, and EOFError for no content. simplejpeg decodes JPEG files first: Pillow says nothing
    about damage inside them.
    """
    if not content:
        raise EOFError
    complaint = None
    if content.startswith(JPEG_START):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if colours not in ("CMYK", "YCCK"):
                # Decoding at 1/8 of the size reads every bit and skips most transforms, which cannot fail.
                simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1, min_factor=8)
                return (width, height), "JPEG L" if colours == "Gray" else "JPEG RGB", None
        except ValueError as error:
            complaint = str(error)
    with Image.open(io.BytesIO(content)) as image:
        kind = f"{image.format} {image.mode}"
        seen_by_a_person(image)
        return image.size, kind, complaint


# Video files


def check_video_file(task: Task, decoder: str, on_damage: str = "accept") -> Checked:
    """Decode a video to its end with PyAV, then read its last frame with `decoder`, as training does.

    A video that cannot be decoded gets no hash.
    """
    record, path = task.record, task.path
    if not os.path.isfile(path):
        shorter = path.rpartition(" ")[0]
        too_many = os.path.isfile(shorter) and f"; {shorter} is: a line must read 'path label', with no number between"
        return Checked([Finding.at(record, "error", "missing", f"{path}: no such video{too_many or ''}")])
    if os.path.getsize(path) == 0:
        return Checked([Finding.at(record, "error", "empty", f"{path}: the file is empty")])

    sizes: Counter[tuple[int, int]] = Counter()
    damage, times = Damage(), []
    try:
        for frame in decode_all(path, damage):
            sizes[frame.width, frame.height] += 1
            times.append(frame.time)
        stated = stated_seconds(path)
        digest = file_hash(path)
    except Exception as error:  # decoders raise many exception types
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        message = f"{path}: cannot be decoded after {len(times)} frames ({reason})"
        return Checked([Finding.at(record, "error", "unreadable", message)])
    if not times:
        return Checked([Finding.at(record, "error", "unreadable", f"{path}: no frame can be decoded")])

    findings = list(reading_findings(task, decoder, len(times)))
    if (damaged := describe_damage(path, damage)) is not None:
        message = f"{path}: damaged ({damaged}); {len(times)} frames can be decoded"
        findings.append(Finding.at(record, damage_severity(on_damage), "damaged", message))
    elif stated is not None and len(times) > 1 and None not in times:
        shown = (times[-1] - times[0]) * len(times) / (len(times) - 1)
        if shown < WHOLE_SHARE * stated:
            message = f"{path}: the pictures end after {shown:.2f} s of the {stated:.2f} s that the file states"
            findings.append(Finding.at(record, "warning", "cut_off", message))
    if len(sizes) > 1:
        findings.append(Finding.at(record, "warning", "sizes", f"{path}: {shown_sizes(sizes)}"))
    return Checked(findings, digest)


def check_segments(tasks: list[Task], decoder: str, on_damage: str = "accept") -> list[Checked]:
    """Check segments of one video file: the whole file once, and whether each segment lies in it.

    The first segment gets the warnings about the file, each segment the errors.
    """
    first = tasks[0]
    whole = replace(first, record=replace(first.record, num_frames=None, first_frame=None))
    checked = check_video_file(whole, decoder, on_damage)
    found, digest = checked.findings, checked.digest
    errors = [finding for finding in found if finding.severity == "error"]
    count = None if errors else count_frames(first.path)
    results = []
    for task in tasks:
        record = task.record
        findings = [replace(finding, place=record.source, path=record.path) for finding in errors]
        findings += (finding for finding in found if task is first and finding not in errors)
        try:
            if count is not None:
                check_end(record.first_frame, record.num_frames, count)
        except SegmentError as error:
            findings.append(Finding.at(record, "error", "segment", f"{task.path}: {error}"))
        part = f"{record.first_frame} {record.num_frames}".encode()
        content = None if digest is None else hashlib.blake2b(digest + part, digest_size=HASH_BYTES).digest()
        results.append(Checked(findings, content))
    return results


def reading_findings(task: Task, decoder: str, num_frames: int) -> Iterator[Finding]:
    """What goes wrong when the reader of training counts the frames and reads the last one."""
    try:
        video = VideoFileReader(task.root, decoder).open(task.record)
        counted, problem = last_frame(video)
    except UserError as error:
        yield Finding.at(task.record, "error", "unreadable", with_path(task, error))
        return
    if counted != num_frames and (decoder == "decord" or counted > num_frames):
        message = f"{task.path}: {decoder} counts {counted} frames, but {num_frames} can be decoded"
        yield Finding.at(task.record, "error", "unreadable", message)
    if problem is not None:
        yield Finding.at(task.record, "error", "unreadable", with_path(task, problem))


def last_frame(video: OpenedVideo) -> tuple[int, UserError | None]:
    """Read the last frame; return the number of frames, and why the frame cannot be read."""
    counted = video.num_frames
    while True:
        try:
            video.read([counted - 1])
            return counted, None
        except FrameCountError as error:
            counted = error.num_frames
        except UserError as error:
            return counted, error


def with_path(task: Task, error: UserError) -> str:
    return f"{task.path}: {error.line.removeprefix(f'{task.path}: ')}"


def stated_seconds(path: str) -> float | None:
    """The length of the pictures that a Matroska or WebM file states, in seconds.

    Decoding a file of these formats that was cut off raises no error, so the length has to be compared. None for other
    formats, and where the length is unknown, as in a file with sound and no tag.
    """
    with open_container(path) as container:
        if "matroska" not in container.format.name:
            return None
        stream = container.streams.best("video")
        tag = stream.metadata.get("DURATION")
        if tag is not None:
            if (parts := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d*)?)", tag.strip())) is None:
                return None  # some programs write other texts
            return 3600 * int(parts[1]) + 60 * int(parts[2]) + float(parts[3])
        alone = len(container.streams) == 1 and container.duration is not None
        return container.duration / av.time_base if alone else None


def file_hash(path: str) -> bytes:
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.digest()


def and_more(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def shown_sizes(sizes: Counter[tuple[int, int]]) -> str:
    return "frames of several sizes: " + ", ".join(f"{width}x{height} ({n})" for (width, height), n in sizes.items())
