"""Frames at given indices from a video file, by the libraries that decode it.

Index i is the i-th frame that is shown. What a decoder cannot give exactly, it does not give: it raises an error.
"""

import bisect
import contextlib
import functools
import importlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from datasets.bitstreams import Picture, h264_picture, vp9_picture
from utils.errors import ConfigError

# decord queues 128 marks behind the last frame, skips them like frames, and waits forever once they are used up. When
# it skips fewer at once, it is `next` that finds out a file with fewer frames than counted: it takes no mark for one.
LONGEST_SKIP = 64

# Bytes of packets, or of decoded frames, that are held while a clip is read. What needs more is decoded twice instead.
MOST_HELD = 2**28


class VideoFile(Protocol):
    """An opened video file."""

    num_frames: int

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The RGB frames at ascending, distinct indices, uint8 (H, W, 3) each. To be called once."""


class DecordVideo:
    """A video file through decord, in one pass from the first frame.

    decord's `get_batch` seeks, and then gives other frames than those it is asked for in many kinds of files; its
    count includes frames that are never shown (docs/numerics.md). This pass has neither flaw and raises an error where
    frames are missing. It skips as fast, without converting what it skips, where the file has timestamps.
    """

    def __init__(self, path: str):
        decord = _import("decord")
        decord.logging.set_level(decord.logging.QUIET)
        if is_mpeg_stream(path):
            raise ValueError("it may lose the first frames of an MPEG program or transport stream")
        # With any fault_tol above 0 and below 1 / frames, a copy in place of a frame that is missing is an error.
        self._decoder = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
        times = self._decoder.get_frame_timestamp(range(len(self._decoder)))[:, 0]
        self._timed = bool((np.diff(times) > 0).all() and times[-1] >= 0)
        # Frames before an edit list's start are counted, but the decoder does not give them.
        self.num_frames = len(times) - (int((times < 0).sum()) if self._timed else 0)

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        last, stops = indices[-1], range(indices[-1] + 1)
        if self._timed:
            # A skip that ends on a key frame or goes past one is a seek, so it ends before, and `next` takes the step.
            before_keys = (key - 1 for key in self._decoder.get_key_indices() if 0 < key <= last)
            stops = sorted({*indices, *before_keys, *range(0, last, LONGEST_SKIP)})
        wanted, frames, position = set(indices), [], 0
        for stop in stops:
            if stop > position:
                self._decoder.skip_frames(stop - position)
            frame, position = self._decoder.next(), stop + 1
            if stop in wanted:
                frames.append(frame.asnumpy())
        if any(frame.shape[2:] != (3,) for frame in frames):  # decord2 3.4.0, of some files
            raise ValueError(f"it gives frames of shape {frames[0].shape}, not of three channels")
        return frames


class PyAVVideo:
    """A video file through PyAV.

    Where the packets tell all frames (see `read_packet_table`), it decodes only what the wanted frames need, and checks
    the times of what comes out. It decodes any other file whole to count the frames, and once more if they are too
    large to be held: `decodes_twice`. A damaged one has the frames before the first packet that cannot be decoded.
    """

    def __init__(self, path: str):
        self._path = path
        self._table = read_packet_table(path)
        self.decodes_twice = self._table is None and decoded_size(path) > MOST_HELD
        self._held: list[Any] = []

    @functools.cached_property
    def num_frames(self) -> int:
        count = len(self._table.shown) if self._table else self._count()
        if count == 0:
            raise ValueError("no frame can be decoded")
        return count

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The frames, turned upright as the file asks for."""
        if self._table is not None:
            if (frames := self._table.read(indices)) is not None:
                return frames
            if (decoded := sum(1 for _ in self._decode())) != self.num_frames:
                raise ValueError(f"{self.num_frames} packets hold a frame, but {decoded} frames can be decoded")
        wanted, convert = set(indices), _Converter()
        frames = enumerate(itertools.islice(self._held or self._decode(), indices[-1] + 1))
        return [convert(frame) for index, frame in frames if index in wanted]

    def _count(self) -> int:
        if self.decodes_twice:
            return sum(1 for _ in self._decode())
        self._held = list(self._decode())
        return len(self._held)

    def _decode(self) -> Iterator[Any]:
        return decode_all(self._path, stop_at_damage=True)


def decode_all(path: str | Path, stop_at_damage: bool = False) -> Iterator[Any]:
    """Every frame of a video file as PyAV gives it, in the order of presentation.

    Opens the file anew: seeking to the start is not exact in every format. At the first packet that cannot be decoded
    it raises PyAV's error, or with `stop_at_damage` ends after the frames that the decoder still holds.
    """
    av = _import("av")
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        try:
            for packet in container.demux(stream):
                yield from packet.decode()
        except av.FFmpegError:
            if not stop_at_damage:
                raise
            with contextlib.suppress(av.FFmpegError):
                yield from stream.codec_context.decode(None)


def upright_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Every frame that PyAVVideo has, in order, RGB uint8 (H, W, 3), one at a time and in bounded memory."""
    yield from map(_Converter(), decode_all(path, stop_at_damage=True))


@dataclass(frozen=True)
class PacketTable:
    """The packets of a video that, undecoded, tell its frames: each packet one, with a time of its own.

    `shown`: the numbers of the packets whose frames are shown, in that order. `entries`: those where decoding may
    start, the first packet among them.
    """

    codec: Any
    packets: list[Any]
    pictures: list[Picture]
    shown: list[int]
    entries: list[int]

    def read(self, indices: Sequence[int]) -> list[np.ndarray] | None:
        """The frames at ascending, distinct indices; None if the decoder gives others than the packets tell."""
        errors = _import("av").FFmpegError
        wanted = {self.packets[self.shown[index]].pts for index in indices}
        needed = self.needed(indices)
        times, frames, convert = [], [], _Converter()
        try:
            for packet in [*(self.packets[number] for number in needed), None]:
                for frame in self.codec.decode(packet):
                    times.append(frame.pts)
                    if frame.pts in wanted:
                        frames.append(convert(frame))
        except errors:
            return None
        expected = sorted(self.packets[number].pts for number in needed if not self.packets[number].is_discard)
        return frames if times == expected else None

    def needed(self, indices: Sequence[int]) -> list[int]:
        """The numbers of the packets to decode: each wanted one, and from the entry before it on those referred to."""
        needed, place = [], 0
        for number in sorted(self.shown[index] for index in indices):
            entry = self.entries[bisect.bisect_right(self.entries, number) - 1]
            between = range(max(place, entry), number)
            needed += [*(other for other in between if self.pictures[other].reference), number]
            place = number + 1
        return needed


def read_packet_table(path: str) -> PacketTable | None:
    """The table of an mp4, mov, mkv or webm file with H.264 or VP9, if its packets leave no doubt; else None.

    No doubt means: every packet is whole and holds exactly one shown frame, and `presentation` finds their order.
    """
    av, container_format = _import("av"), _timed_container(path)
    if container_format is None or os.path.getsize(path) > MOST_HELD:
        return None
    packets, pictures = [], []
    # As a rule opening a file decodes its beginning; without a decoder it takes a tenth of the time.
    options = {"codec_whitelist": "none"}
    try:
        with av.open(path, format=container_format, options=options) as container:
            stream = _video_stream(container)
            codec = stream.codec_context
            codec.options = {"strict": "1"}  # what does not say how far it reorders is not guessed at
            if (parse := _header_parser(codec.name, codec.extradata or b"")) is None:
                return None
            for packet in container.demux(stream):
                if packet.size == 0 and packet.pts is None:
                    continue  # what ends the stream
                # Extradata with a packet are other parameter sets, which a seek would miss.
                told = not packet.is_corrupt and not packet.has_sidedata("new_extradata")
                picture = parse(memoryview(packet)) if told else None
                if picture is None:
                    return None
                packets.append(packet)
                pictures.append(picture)
    except av.FFmpegError:
        return None
    if (found := presentation([packet.pts for packet in packets], pictures)) is None:
        return None
    order, entries = found
    shown = [number for number in order if not packets[number].is_discard]
    return PacketTable(codec, packets, pictures, shown, entries)


def presentation(times: Sequence[int | None], pictures: Sequence[Picture]) -> tuple[list[int], list[int]] | None:
    """(the numbers of the packets in the order of `times`, those of the entries); None if anything is contradictory.

    Times must be distinct, and reorder packets exactly if a packet says that it is reordered. The first packet must be
    an entry, no packet may be shown across an entry, and parameter sets may come with entries only.
    """
    entries = [number for number, picture in enumerate(pictures) if picture.entry]
    if not entries or entries[0] != 0 or None in times or len(set(times)) < len(times):
        return None
    order = sorted(range(len(times)), key=times.__getitem__)
    if any(picture.reordered for picture in pictures) != (order != list(range(len(order)))):
        return None
    latest = list(itertools.accumulate(order, max))
    if any(number and latest[number - 1] != number - 1 for number in entries):
        return None
    if any(picture.parameter_sets and not picture.entry for picture in pictures):
        return None
    if len({pictures[number].parameter_sets for number in entries}) > 1:
        entries = [0]  # a later entry may need the parameter sets of an earlier one
    return order, entries


def _timed_container(path: str) -> str | None:
    """What FFmpeg calls the container, by the file's first bytes, if it is one that says when each packet is shown."""
    with open(path, "rb") as file:
        head = file.read(8)
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    return "mp4" if head[4:] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide") else None


def _header_parser(codec: str, extradata: bytes) -> Callable[[memoryview], Picture | None] | None:
    if codec == "vp9":
        return vp9_picture
    if codec == "h264" and len(extradata) > 4 and extradata[0] == 1:  # units have a length before them
        return functools.partial(h264_picture, length_size=(extradata[4] & 3) + 1)
    return None


def decoded_size(path: str) -> int:
    """About how many bytes all frames of a file have once they are decoded: 12 bits a pixel, a frame a packet."""
    av = _import("av")
    with av.open(path) as container, contextlib.suppress(av.FFmpegError):
        stream, packets = _video_stream(container), 0
        for packets, _ in enumerate(container.demux(stream), 1):  # noqa: B007
            pass
    return packets * stream.codec_context.width * stream.codec_context.height * 3 // 2


class _Converter:
    """PyAV's frames -> uint8 (H, W, 3), upright, on one thread."""

    def __init__(self):
        av = _import("av")
        self._reformatter = av.video.reformatter.VideoReformatter()
        # From 17.0 on, PyAV converts on all cores unless told not to.
        self._threads = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

    def __call__(self, frame: Any) -> np.ndarray:
        converted = self._reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", **self._threads)
        return np.ascontiguousarray(np.rot90(converted.to_ndarray(), round(frame.rotation / 90)))


def _video_stream(container: Any) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("it holds no video")
    stream.codec_context.thread_count = 1
    return stream


DECODERS: dict[str, Callable[[str], VideoFile]] = {"pyav": PyAVVideo, "decord": DecordVideo}


# Decoder -> its name, and the packages that may bring it.
_PACKAGES = {"pyav": ("PyAV", "av"), "decord": ("decord", "decord", "decord2")}


def describe_decoder(data: Any) -> str | None:
    """What `data.decoder` stands for, with the versions: "PyAV 18.1.0"; None where no video files are read."""
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
    """Whether the file starts like a transport stream (packets of 188 bytes, or 192 in m2ts) or a program stream."""
    with open(path, "rb") as file:
        head = file.read(197).ljust(197, b"\0")
    return head.startswith(b"\0\0\1\xba") or head[0] == head[188] == 0x47 or head[4] == head[196] == 0x47


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library that it needs is missing
        raise ConfigError(
            f"data.decoder: {name} cannot be imported ({error}); install requirements.txt, or set another decoder"
        ) from error
