"""Segments of long video files: the frames first..first + num - 1 of a file, read without decoding what lies before.

A scan of the packets, once for each file and process, proves where decoding may start and how many frames are shown
before. A segment is then read from the last such place before it. Its packets are compared with the scan. Where this is
not possible, or decoding meets damage, the file is decoded from its start.

In a file with a scan, a packet that cannot be decoded keeps its frame number, so damage moves no other segment. In
other files, only frames that can be decoded are counted.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasets.bitstreams import Picture
from datasets.decoders import (
    MOST_HELD,
    Converter,
    Damage,
    FrameCountError,
    Undescribed,
    VideoDecoder,
    decode_all,
    described_packets,
    packet_table,
    pick,
    presentation,
)

# Fewest packets between two places at which reading may start. More places need more memory in every loader process; a
# packet that lies between place and segment is read, but not decoded.
SHORTEST_GROUP = 64

# A damaged file may give frames in another order than that of presentation. A decoder holds back at most 16 frames.
MOST_REORDERED = 17

# Files whose scans a process keeps. A file of 100,000 frames takes 0.1 MB.
MOST_SCANS = 1024


@dataclass(frozen=True, eq=False)
class Scan:
    """The packets of a file in groups, each of which can be decoded by itself. A group starts with an entry.

    first_packets, first_frames: int64 (groups + 1,), packets before each group, and frames that are shown before it;
        the last element is that of the whole file
    places: int64 (groups, 3), of the first packet of each group: byte in the file, time of decoding and of presentation
    sizes: int64 (groups,), bytes of the packets
    digests: hash of what the headers of the packets say, for each group
    """

    first_packets: np.ndarray
    first_frames: np.ndarray
    places: np.ndarray
    sizes: np.ndarray
    digests: list[bytes]

    @property
    def num_frames(self) -> int:
        return int(self.first_frames[-1])


class SegmentError(Exception):
    """The file ends before the segment does."""


class SegmentDecoder:
    """Frames `first`..`first + num_frames - 1` of a video file, as a file of their own.

    They are those that a decoder of the whole file has at these indices.
    """

    def __init__(self, path: str, first: int, num_frames: int, whole: Callable[[str], VideoDecoder] | None = None):
        """Args:
            whole: decoder that reads from the start of the file; None: PyAV, from the nearest place.

        Raises:
            SegmentError: the segment ends behind the end of the file, as far as this is known without decoding.
        """
        self.num_frames = num_frames
        self.damage = Damage()
        self._path, self._first, self._length = path, first, num_frames
        self._times: list[int] | None = None  # of the frames that can be decoded, if damage was met
        self._whole = whole(path) if whole else None
        self._scan = None if whole else scan(path)
        if known := self._whole or self._scan:
            check_end(self._first, self.num_frames, known.num_frames)

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Return the frames at ascending, distinct indices of the segment. May be called once.

        Raises:
            FrameCountError: the segment is damaged and has fewer frames. `read` may be called again.
            SegmentError: the segment ends behind the end of the file.
        """
        wanted = [self._first + index for index in indices]
        if self._whole is not None:
            try:
                return self._whole.read(wanted)
            except FrameCountError as error:  # its number is that of the file
                check_end(self._first, self.num_frames, error.num_frames)
                return self._whole.read(wanted)
        if self._scan is not None:
            if self._times is None and (frames := read_at(self._path, self._scan, wanted)) is not None:
                return frames
            if self._times is not None:
                return self._read_by_time(indices, self._times)
            if times := shown_times(self._path, self._first, self._length):
                return self._read_by_time(indices, self._decoded_times(times))
        return self._read_from_start(wanted)

    def _decoded_times(self, times: list[int]) -> list[int]:
        """Return those of the times at which a frame is shown that can be decoded. Sets `damage`."""
        decoded = sorted({frame.pts for frame in self._decode_to(times, self.damage)})
        if not decoded:
            raise ValueError("no frame of the segment can be decoded")
        if len(decoded) < len(times) and not self.damage:  # without a complaint of the decoder
            self.damage.lost = len(times) - len(decoded)
        return decoded

    def _read_by_time(self, indices: Sequence[int], times: list[int]) -> list[np.ndarray]:
        """Read frames of a segment whose frames are shown at these times."""
        self._times = times
        if len(times) < self.num_frames:
            promised, self.num_frames = self.num_frames, len(times)
            raise FrameCountError(promised, self.num_frames)
        wanted, found, convert = [times[index] for index in indices], dict[int, np.ndarray](), Converter()
        for frame in self._decode_to(wanted, Damage()):
            found.setdefault(frame.pts, convert(frame))
        return [found[time] for time in wanted]

    def _decode_to(self, times: list[int], damage: Damage) -> Iterator[Any]:
        """Yield the frames at ascending times, decoded from the start of the file."""
        wanted, left = set(times), MOST_REORDERED
        for frame in decode_all(self._path, damage):
            if frame.pts in wanted:
                yield frame
            if frame.pts is not None and frame.pts >= times[-1]:
                left -= 1
                if left == 0:
                    return

    def _read_from_start(self, wanted: list[int]) -> list[np.ndarray]:
        # The last frame is read too, so that a segment that ends behind the file's end is always found.
        last = self._first + self._length - 1
        if last < sys.maxsize:
            frames = pick(decode_all(self._path, self.damage), sorted({*wanted, last}))
            if len(frames) == len({*wanted, last}):
                return frames[: len(wanted)]
        check_end(self._first, self._length, count_decoded(self._path))
        raise ValueError("the file was changed while it was read")


def check_end(first: int, num_frames: int, count: int) -> None:
    """Raise SegmentError unless frames `first`..`first + num_frames - 1` are among the `count` frames of a file."""
    if first + num_frames > count:
        last = first + num_frames - 1
        raise SegmentError(f"the segment is of frames {first} to {last}, but the file has {count} frames, from 0")


def count_frames(path: str) -> int:
    """The number of frames of a file. Decodes it only if the headers of its packets do not say."""
    found = scan(path)
    return found.num_frames if found else count_decoded(path)


def count_decoded(path: str) -> int:
    """The number of frames of a file that can be decoded."""
    return sum(1 for _ in decode_all(path, Damage()))


def shown_times(path: str, first: int, num_frames: int) -> list[int] | None:
    """Return the times at which the frames of a segment are shown; None if the headers of the packets do not say."""
    times = []
    try:
        with described_packets(path) as (_, packets):
            for packet, _ in packets:
                if packet.pts is None:
                    return None
                if not packet.is_discard:
                    times.append(packet.pts)
    except Undescribed:
        return None
    return sorted(times)[first : first + num_frames] or None


def scan(path: str) -> Scan | None:
    """Return the scan of a file, or None if the headers of its packets do not describe every frame."""
    status = os.stat(path)
    return _scan(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(MOST_SCANS)
def _scan(path: str, identity: tuple[int, ...]) -> Scan | None:
    """As `scan`; another `identity` means that the file has changed."""
    times: list[int | None] = []
    pictures: list[Picture] = []
    facts: list[bytes] = []
    places: list[tuple[int, int, int]] = []
    sizes, shown = [], []
    try:
        with described_packets(path) as (_, packets):
            for packet, picture in packets:
                if packet.pos is None or packet.pts is None or (places and packet.pos <= places[-1][0]):
                    return None
                times.append(packet.pts)
                pictures.append(picture)
                facts.append(_facts(packet, picture))
                dts = packet.pts if packet.dts is None else packet.dts
                places.append((packet.pos, dts, packet.pts))
                sizes.append(packet.size)
                shown.append(not packet.is_discard)
    except Undescribed:
        return None
    if (found := presentation(times, pictures)) is None:
        return None
    borders = [0]
    borders += (entry for entry in found[1] if entry - borders[-1] >= SHORTEST_GROUP)
    borders.append(len(times))
    frames_before = np.concatenate([[0], np.cumsum(shown)])
    groups = list(itertools.pairwise(borders))
    return Scan(
        np.array(borders),
        frames_before[borders],
        np.array(places)[borders[:-1]],
        np.array([sum(sizes[a:b]) for a, b in groups]),
        [_digest(facts[a:b]) for a, b in groups],
    )


def _facts(packet: Any, picture: Picture) -> bytes:
    return repr((packet.pos, packet.pts, packet.size, packet.is_discard, picture)).encode()


def _digest(facts: Sequence[bytes]) -> bytes:
    return hashlib.blake2b(b"\n".join(facts), digest_size=16).digest()


def read_at(path: str, found: Scan, wanted: Sequence[int]) -> list[np.ndarray] | None:
    """Return the frames at ascending, distinct indices of a file; None if the file does not agree with its scan."""
    first, last = (int(np.searchsorted(found.first_frames, index, "right")) - 1 for index in (wanted[0], wanted[-1]))
    if found.sizes[first : last + 1].sum() > MOST_HELD:
        return None
    borders = (found.first_packets[first : last + 2] - found.first_packets[first]).tolist()
    position, *times = found.places[first].tolist()
    for time in times:  # of decoding, by which mp4 seeks, and of presentation, by which Matroska does
        with contextlib.suppress(Undescribed), described_packets(path, time) as (codec, packets):
            described = list(itertools.islice(_from_place(packets, position), borders[-1]))
            facts = [_facts(packet, picture) for packet, picture in described]
            if [_digest(facts[a:b]) for a, b in itertools.pairwise(borders)] == found.digests[first : last + 1]:
                break
    else:
        return None
    table = packet_table(codec, described)
    if table is None:
        return None
    return table.read([index - int(found.first_frames[first]) for index in wanted])


def _from_place(packets: Iterator[tuple[Any, Picture]], position: int) -> Iterator[tuple[Any, Picture]]:
    """Leave out the packets before a byte of the file."""
    return itertools.dropwhile(lambda described: described[0].pos is not None and described[0].pos < position, packets)
