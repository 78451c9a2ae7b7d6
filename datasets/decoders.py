"""Frames of a video file at given indices, decoded by PyAV or decord.

Index i is the i-th frame in the order of presentation. A decoder that cannot return exactly the requested frames
raises. docs/numerics.md compares the two libraries.
"""

import bisect
import contextlib
import functools
import importlib
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from dotmap import DotMap

from datasets.bitstreams import Picture, h264_picture, vp9_picture
from datasets.video_files import missing_bytes
from utils.errors import ConfigError

# Most frames that decord skips in one call. In a file with fewer frames than decord counts, `skip_frames` takes the 128
# end marks behind the last frame for frames, and waits forever after them. A shorter skip leaves some marks, and the
# following `next` raises at a mark.
LONGEST_SKIP = 64

# Most bytes of packets, or of decoded frames, that are kept in memory while a clip is read. A file with more bytes of
# decoded frames is decoded twice instead: once to count its frames and once to read them.
MOST_HELD = 2**28


class FrameCountError(Exception):
    """A file turned out to be damaged while it was read: fewer frames can be decoded than its packets promise.

    num_frames: how many can be decoded. Indices below it can be read now.
    """

    def __init__(self, promised: int, num_frames: int):
        super().__init__(f"{promised} packets hold a frame, but {num_frames} frames can be decoded")
        self.num_frames = num_frames


@dataclass
class Damage:
    """What decoding has met so far in a damaged file; false for an intact one."""

    packets: int = 0  # that cannot be decoded
    frames: int = 0  # that the decoder has filled up by guessing
    lost: int = 0  # packets that gave no frame and no error

    def __bool__(self) -> bool:
        return bool(self.packets or self.frames or self.lost)

    def __str__(self) -> str:
        counts = (
            (self.packets, "packet", "cannot be decoded"),
            (self.frames, "frame", "decoded in part"),
            (self.lost, "packet", "without a frame"),
        )
        return ", ".join(f"{number} {noun}{'s' * (number > 1)} {what}" for number, noun, what in counts if number)


def describe_damage(path: str | Path, damage: Damage) -> str | None:
    """What decoding has met in a file, and what its header promises beyond its end; None for an intact file."""
    found = [str(damage)] if damage else []
    if (missing := missing_bytes(path)) > 0:
        found.append(f"the file ends {missing} bytes before the end that its header states")
    return ", ".join(found) or None


class VideoDecoder(Protocol):
    """A video file opened by a decoding library."""

    @property
    def num_frames(self) -> int: ...

    @property
    def damage(self) -> Damage:
        """What was damaged where frames were read or counted."""

    @property
    def decodes_twice(self) -> bool:
        """Whether counting and reading each decode the file, because its frames are too large to keep."""

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Return the RGB frames at ascending, distinct indices, each uint8 (H, W, 3). May be called once.

        Raises:
            FrameCountError: the file is damaged and has fewer frames than `num_frames` said. `read` may be called
                again, with indices below the new number.
        """


class DecordDecoder:
    """Reads a video file with decord, in one pass from the first frame.

    decord's own `get_batch` seeks and so returns wrong frames for many kinds of files, and its frame count includes
    frames that are never shown (docs/numerics.md). This class avoids both, and raises if frames are missing. In files
    with time stamps it skips unwanted frames without converting them to RGB, which is as fast as `get_batch`.
    """

    decodes_twice = False
    damage = Damage()  # decord raises at what it cannot decode

    def __init__(self, path: str):
        decord = _import("decord")
        decord.logging.set_level(decord.logging.QUIET)
        if is_mpeg_stream(path):
            raise ValueError("it may lose the first frames of an MPEG program or transport stream")
        # By default decord replaces a missing frame by a copy of another. With a fault_tol above 0 and below
        # 1 / num_frames it raises instead.
        self._open = functools.partial(decord.VideoReader, path, num_threads=1, fault_tol=1e-9)
        self._decoder = self._open()
        times = self._decoder.get_frame_timestamp(range(len(self._decoder)))[:, 0]
        self._timed = bool((np.diff(times) > 0).all() and times[-1] >= 0)
        # decord counts the frames before the start of an edit list, but does not return them.
        self.num_frames = len(times) - (int((times < 0).sum()) if self._timed else 0)

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        last = indices[-1]
        stops: Sequence[int] = range(last + 1)
        if self._timed:
            # `skip_frames` seeks if it reaches or passes a key frame. So a skip ends one frame earlier, and `next`
            # decodes across the key frame.
            before_keys = (key - 1 for key in self._decoder.get_key_indices() if 0 < key <= last)
            stops = sorted({*indices, *before_keys, *range(0, last, LONGEST_SKIP)})
        wanted, frames, position = set(indices), [], 0
        for stop in stops:
            try:
                if stop > position:
                    self._decoder.skip_frames(stop - position)
                frame, position = self._decoder.next(), stop + 1
            except Exception:
                # decord counts a last packet that holds no frame, as many avi files have.
                if stop != self.num_frames - 1 or stop == 0:
                    raise
                self._decoder, self.num_frames = self._open(), stop
                raise FrameCountError(stop + 1, stop) from None
            if stop in wanted:
                frames.append(frame.asnumpy())
        if any(frame.shape[2:] != (3,) for frame in frames):  # decord2 3.4.0 does this for some files
            raise ValueError(f"it gives frames of shape {frames[0].shape}, not of three channels")
        return frames


class PyAVDecoder:
    """Reads a video file with PyAV.

    If the packet headers describe every frame (see `read_packet_table`), only the packets that the wanted frames need
    are decoded, and the times of the decoded frames are checked. Any other file is decoded completely to count its
    frames. The frames are kept for `read` if they fit in MOST_HELD bytes; otherwise `read` decodes the file again.

    Damage ends neither. As in FFmpeg's own programs, a packet that cannot be decoded is skipped, decoding goes on
    behind it, and what can be decoded counts. If damage is met among the packets of a clip, the whole file is decoded,
    so that the frames do not depend on which packets were skipped.
    """

    def __init__(self, path: str):
        self._path = path
        self._table = read_packet_table(path)
        self.decodes_twice = self._table is None and decoded_size(path) > MOST_HELD
        self._held: list[Any] = []
        self.damage = Damage()

    @functools.cached_property
    def num_frames(self) -> int:
        count = len(self._table.shown) if self._table else self._count()
        if count == 0:
            raise ValueError("no frame can be decoded")
        return count

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Return the frames, turned and mirrored as the file's display matrix says."""
        if self._table is not None:
            if (read := self._table.read(indices)) is not None:
                return read
            promised, self._table = self.num_frames, None
            self.decodes_twice = decoded_size(self._path) > MOST_HELD
            del self.num_frames  # counted anew
            if self.num_frames != promised:
                raise FrameCountError(promised, self.num_frames)
        return pick(self._held or decode_all(self._path, Damage()), indices)

    def _count(self) -> int:
        if self.decodes_twice:
            return sum(1 for _ in decode_all(self._path, self.damage))
        self._held = list(decode_all(self._path, self.damage))
        return len(self._held)


# Codecs of which each packet gives a frame. Others have packets that only prepare later frames.
FRAME_IN_EACH_PACKET = ("h264", "hevc", "mjpeg")


def open_container(path: str | Path, **options: Any) -> Any:
    """Open a video file with PyAV, whatever its name is and in whatever encoding its metadata are.

    FFmpeg takes what precedes a colon for a protocol, except in an absolute path. Old files have titles in other
    encodings than UTF-8, which PyAV would raise at.
    """
    return _import("av").open(os.path.abspath(path), metadata_errors="replace", **options)


def decode_all(path: str | Path, damage: Damage | None = None) -> Generator[Any]:
    """Yield every frame of a video file as a PyAV frame, in the order of presentation.

    Each call opens the file, because seeking back to the start is not exact in every format. Without `damage`, the
    first packet that cannot be decoded raises PyAV's error. With it, decoding goes on behind such a packet, as in
    FFmpeg's own programs. A file that cannot be read further ends after the frames that the decoder still holds.
    `damage` counts what was met.
    """
    strict = damage is None
    damage = Damage() if damage is None else damage
    av = _import("av")
    with open_container(path) as container:
        try:
            yield from decoded_frames(container, damage, strict)
        except av.FFmpegError:
            if strict:
                raise
            damage.packets += 1
            with contextlib.suppress(av.FFmpegError):
                for frame in _video_stream(container).codec_context.decode(None):
                    damage.frames += frame.is_corrupt
                    yield frame


def decoded_frames(container: Any, damage: Damage, strict: bool = False) -> Iterator[Any]:
    """Yield the frames of an opened container as PyAV frames; `damage` counts packets that are skipped.

    Raises:
        av.FFmpegError: the container cannot be read further, or, if `strict`, a packet cannot be decoded.
    """
    av = _import("av")
    stream, packets, frames, failed = _video_stream(container), 0, 0, 0
    for packet in container.demux(stream):
        packets += packet.size > 0 and not packet.is_discard
        try:
            decoded = packet.decode()
        except av.FFmpegError:
            if strict:
                raise
            damage.packets, failed = damage.packets + 1, failed + 1
            continue
        for frame in decoded:
            frames += 1
            damage.frames += frame.is_corrupt
            yield frame
    if stream.codec_context.name in FRAME_IN_EACH_PACKET:
        damage.lost += max(0, packets - failed - frames)


def pick(frames: Iterable[Any], indices: Sequence[int]) -> list[np.ndarray]:
    """Return the PyAV frames at ascending, distinct indices as RGB, those that there are; takes no later frame."""
    wanted, convert = set(indices), Converter()
    return [convert(frame) for index, frame in enumerate(itertools.islice(frames, indices[-1] + 1)) if index in wanted]


def upright_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Every frame that PyAVDecoder has, in order, RGB uint8 (H, W, 3), one at a time and in bounded memory."""
    yield from map(Converter(), decode_all(path, Damage()))


@dataclass(frozen=True)
class PacketTable:
    """The packets of a video in which every packet holds exactly one frame with a time stamp of its own.

    codec: PyAV's codec context, which decodes the packets
    packets: PyAV's packets, in file order
    pictures: what the header of each packet says
    shown: packet numbers in the order in which their frames are shown
    entries: numbers of the packets at which decoding may start, in ascending order from 0
    """

    codec: Any
    packets: list[Any]
    pictures: list[Picture]
    shown: list[int]
    entries: list[int]

    def read(self, indices: Sequence[int]) -> list[np.ndarray] | None:
        """Return the frames at ascending, distinct indices; None if decoding meets damage or returns other times."""
        errors = _import("av").FFmpegError
        wanted = {self.packets[self.shown[index]].pts for index in indices}
        needed = self.needed(indices)
        times, frames, convert = [], [], Converter()
        try:
            for packet in [*(self.packets[number] for number in needed), None]:
                for frame in self.codec.decode(packet):
                    if frame.is_corrupt:
                        return None
                    times.append(frame.pts)
                    if frame.pts in wanted:
                        frames.append(convert(frame))
        except errors:
            return None
        expected = sorted(self.packets[number].pts for number in needed if not self.packets[number].is_discard)
        return frames if times == expected else None

    def needed(self, indices: Sequence[int]) -> list[int]:
        """Return the packets to decode: the wanted ones, and the reference pictures since the entry before each."""
        needed: list[int] = []
        place = 0
        for number in sorted(self.shown[index] for index in indices):
            entry = self.entries[bisect.bisect_right(self.entries, number) - 1]
            between = range(max(place, entry), number)
            needed += [*(other for other in between if self.pictures[other].reference), number]
            place = number + 1
        return needed


def read_packet_table(path: str) -> PacketTable | None:
    """Return the packet table of a video file, or None if its packet headers do not describe every frame.

    They do if the file is mp4, mov, mkv or webm with H.264 or VP9, every packet is intact and shows exactly one frame,
    and `presentation` finds the order of the frames.
    """
    if os.path.getsize(path) > MOST_HELD:
        return None
    try:
        with described_packets(path) as (codec, packets):
            return packet_table(codec, list(packets))
    except Undescribed:
        return None


def packet_table(codec: Any, described: Sequence[tuple[Any, Picture]]) -> PacketTable | None:
    """Return the table of packets and what their headers say; None if `presentation` finds no order."""
    packets, pictures = [packet for packet, _ in described], [picture for _, picture in described]
    if (found := presentation([packet.pts for packet in packets], pictures)) is None:
        return None
    order, entries = found
    shown = [number for number in order if not packets[number].is_discard]
    return PacketTable(codec, packets, pictures, shown, entries)


class Undescribed(Exception):
    """The headers of the packets do not describe every frame, or the file cannot be read."""


@contextlib.contextmanager
def described_packets(path: str, time: int | None = None) -> Iterator[tuple[Any, Iterator[tuple[Any, Picture]]]]:
    """Open a file; gives its codec context, and an iterator of its packets and what their headers say.

    Args:
        time: start at a key frame near this time, in units of the stream's time base, and not at the first packet.

    Raises:
        Undescribed: also while the packets are iterated.
    """
    av, container_format = _import("av"), _timed_container(path)
    if container_format is None:
        raise Undescribed
    # FFmpeg decodes the beginning of a file when it opens it, unless no decoder is allowed. Opening is then about ten
    # times faster.
    options = {"codec_whitelist": "none"}
    try:
        with open_container(path, format=container_format, options=options) as container:
            stream = _video_stream(container)
            codec = stream.codec_context
            codec.options = {"strict": "1"}  # FFmpeg otherwise guesses the reordering of streams that do not state it
            if (parse := _header_parser(codec.name, codec.extradata or b"")) is None:
                raise Undescribed
            if time is not None:
                container.seek(time, stream=stream)
            yield codec, _described(container.demux(stream), parse)
    except av.FFmpegError as error:
        raise Undescribed from error


def _described(packets: Iterator[Any], parse: Callable[[memoryview], Picture | None]) -> Iterator[tuple[Any, Picture]]:
    for packet in packets:
        if packet.size == 0 and packet.pts is None:
            continue  # the empty packet at the end of the stream
        # "new_extradata" holds new parameter sets, which would be lost if this packet were skipped.
        usable = not packet.is_corrupt and not packet.has_sidedata("new_extradata")
        if (picture := parse(memoryview(packet)) if usable else None) is None:
            raise Undescribed
        yield packet, picture


def presentation(times: Sequence[int | None], pictures: Sequence[Picture]) -> tuple[list[int], list[int]] | None:
    """Return (packet numbers in the order of presentation, packet numbers of the entries).

    Return None if times and headers contradict each other, or if packets cannot be skipped safely. Required are:
    distinct times, which reorder the packets exactly if some picture is `reordered`; an entry as the first packet; all
    packets before an entry shown before all packets from the entry on; parameter sets in entries only.
    """
    entries = [number for number, picture in enumerate(pictures) if picture.entry]
    known = [time for time in times if time is not None]
    if not entries or entries[0] != 0 or len(set(known)) < len(times):
        return None
    order = sorted(range(len(known)), key=known.__getitem__)
    if any(picture.reordered for picture in pictures) != (order != list(range(len(order)))):
        return None
    latest = list(itertools.accumulate(order, max))
    if any(number and latest[number - 1] != number - 1 for number in entries):
        return None
    if any(picture.parameter_sets and not picture.entry for picture in pictures):
        return None
    if len({pictures[number].parameter_sets for number in entries}) > 1:
        entries = [0]  # with several parameter sets, a later entry may need those of an earlier one
    return order, entries


def _timed_container(path: str) -> str | None:
    """Return FFmpeg's name of the container, found from the first bytes, if it stores a time for each packet."""
    with open(path, "rb") as file:
        head = file.read(8)
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    return "mp4" if head[4:] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide") else None


def _header_parser(codec: str, extradata: bytes) -> Callable[[memoryview], Picture | None] | None:
    if codec == "vp9":
        return vp9_picture
    if codec == "h264" and len(extradata) > 4 and extradata[0] == 1:  # each unit is preceded by its length
        return functools.partial(h264_picture, length_size=(extradata[4] & 3) + 1)
    return None


def decoded_size(path: str) -> int:
    """Estimate the bytes of all decoded frames of a file: one frame per packet, 12 bits per pixel."""
    av = _import("av")
    with open_container(path) as container, contextlib.suppress(av.FFmpegError):
        stream, packets = _video_stream(container), 0
        for packets, _ in enumerate(container.demux(stream), 1):  # noqa: B007
            pass
    return packets * stream.codec_context.width * stream.codec_context.height * 3 // 2


class Converter:
    """Converts PyAV frames to RGB arrays, uint8 (H, W, 3), contiguous, upright and unmirrored, on one thread."""

    def __init__(self) -> None:
        av = _import("av")
        self._reformatter = av.video.reformatter.VideoReformatter()
        # PyAV 17.0 and later convert on all cores by default.
        self._threads = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

    def __call__(self, frame: Any) -> np.ndarray:
        # FFmpeg 8 converts the two fields of a frame apart if it is flagged interlaced, earlier versions do not.
        plain = _progressive(frame) if frame.interlaced_frame else frame
        converted = self._reformatter.reformat(plain, format="rgb24", interpolation="BICUBIC", **self._threads)
        return np.ascontiguousarray(_upright(converted.to_ndarray(), _display_matrix(frame)))


def _progressive(frame: Any) -> Any:
    """Return a copy of a frame without the interlaced flag, which PyAV does not let one change."""
    copy = _import("av").VideoFrame(frame.width, frame.height, frame.format.name)
    for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
        if hasattr(frame, name):
            setattr(copy, name, getattr(frame, name))
    for source, target in zip(frame.planes, copy.planes, strict=True):
        size = min(source.line_size, target.line_size)
        lines = np.frombuffer(source, np.uint8).reshape(-1, source.line_size)
        into = np.frombuffer(target, np.uint8).reshape(-1, target.line_size)
        into[: len(lines), :size] = lines[: len(into), :size]
    return copy


def _display_matrix(frame: Any) -> np.ndarray | None:
    """Return how (x, y) of a frame turns into (x, y) of the screen, int32 (2, 2), applied from the right."""
    kind = _import("av").sidedata.sidedata.Type.DISPLAYMATRIX
    data = frame.side_data.get(kind)
    return None if data is None else np.frombuffer(data, np.int32)[:9].reshape(3, 3)[:2, :2]


def _upright(pixels: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Turn and mirror pixels (H, W, 3) by the nearest of the eight matrices that map the axes to axes."""
    if matrix is None:
        return pixels
    (a, b), (c, d) = matrix.astype(np.int64)
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _video_stream(container: Any) -> Any:
    stream = container.streams.best("video")
    if stream is not None and _is_cover(stream):
        stream = next((other for other in container.streams.video if not _is_cover(other)), None)
    if stream is None:
        raise ValueError("it holds no video")
    stream.codec_context.thread_count = 1
    return stream


def _is_cover(stream: Any) -> bool:
    """Return whether a video stream is a picture that belongs to the file as a whole, such as cover art."""
    return bool(stream.disposition & _import("av").stream.Disposition.attached_pic)


DECODERS: dict[str, Callable[[str], VideoDecoder]] = {"pyav": PyAVDecoder, "decord": DecordDecoder}

# Decoder -> its name, and the packages that may provide it.
_PACKAGES = {"pyav": ("PyAV", "av"), "decord": ("decord", "decord", "decord2")}


def describe_decoder(data: DotMap) -> str | None:
    """Return name and version of `data.decoder`, such as "PyAV 18.1.0"; None if no video files are read."""
    if data.modality != "video":
        return None
    names = list(DECODERS) if data.decoder == "auto" else [data.decoder]
    return " or ".join(f"{_PACKAGES[name][0]} {_version(_PACKAGES[name][1:])}" for name in names)


def _version(packages: Sequence[str]) -> str:
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "(not installed)"


def is_mpeg_stream(path: str) -> bool:
    """Return whether a file starts like an MPEG program stream or transport stream (188 or 192 bytes per packet)."""
    with open(path, "rb") as file:
        head = file.read(197).ljust(197, b"\0")
    return head.startswith(b"\0\0\1\xba") or head[0] == head[188] == 0x47 or head[4] == head[196] == 0x47


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library of the package is missing
        raise ConfigError(
            f"data.decoder: {name} cannot be imported ({error}); install requirements.txt, or set another decoder"
        ) from error
