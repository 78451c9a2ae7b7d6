"""What the headers of a video packet say about its picture, read without decoding: H.264 and VP9.

A packet is what a container file stores with one time stamp. The decoder classes use these headers to skip packets that
no wanted frame needs. Sources: ITU-T H.264, clause 7.3, and the VP9 Bitstream & Decoding Process Specification.
"""

import dataclasses
from dataclasses import dataclass

# Types of NAL units, the parts of an H.264 packet (nal_unit_type).
SLICE, IDR_SLICE = 1, 5
PARAMETER_SETS = (7, 8)  # of sequences and of pictures
WITHOUT_PIXELS = (6, 9, 10, 11, 12)  # messages, delimiters, end marks and filler

B_SLICE = 1  # slice_type modulo 5


@dataclass(frozen=True, slots=True)
class Picture:
    """The one picture that a packet shows.

    entry: decoding can start here, because no picture from here on refers to an earlier one
    reference: other pictures may refer to it
    reordered: it may be shown before pictures of earlier packets
    parameter_sets: the parameter sets that the packet carries
    """

    entry: bool
    reference: bool
    reordered: bool = False
    parameter_sets: bytes = b""


def h264_picture(packet: memoryview, length_size: int) -> Picture | None:
    """Return the picture of an H.264 packet, or None unless the packet holds exactly one whole frame.

    The packet is a sequence of NAL units, each preceded by its length in `length_size` bytes, big-endian. A unit starts
    with one byte: a bit that is always 0, nal_ref_idc in two bits (0: no picture refers to this one), nal_unit_type in
    five bits. A frame is one or more slices. Interlaced fields, parts of a frame, two frames, scalable or partitioned
    video and damaged packets give None.
    """
    picture: Picture | None = None
    parameter_sets = b""
    end = 0
    while end < len(packet):
        start = end + length_size
        end = start + int.from_bytes(packet[end:start], "big")
        if not start < end <= len(packet):
            return None
        unit = packet[start:end]
        kind = unit[0] & 0x9F  # the type and the bit that is always 0, so that a damaged unit has an unknown type
        if kind in (SLICE, IDR_SLICE):
            if len(unit) < 3:
                return None
            entry, reference = kind == IDR_SLICE, unit[0] & 0x60 > 0
            if unit[1] >= 0x80:  # first_mb_in_slice is 0: the first slice of a frame
                if picture is not None:
                    return None
                picture = Picture(entry, reference, reordered=_slice_type(unit[1:3]) % 5 == B_SLICE)
            elif picture is None or (entry, reference) != (picture.entry, picture.reference):
                return None
        elif kind in PARAMETER_SETS:
            parameter_sets += bytes(unit)
        elif kind not in WITHOUT_PIXELS:
            return None
    return dataclasses.replace(picture, parameter_sets=parameter_sets) if picture else None


def _slice_type(header: memoryview) -> int:
    """Return slice_type from the first two bytes of a slice header whose first bit is first_mb_in_slice = 0.

    slice_type is an Exp-Golomb code: some zeros, then a one and as many bits as there were zeros. These bits, with the
    one in front, are the binary form of slice_type + 1.
    """
    bits = f"{int.from_bytes(header, 'big'):016b}"[1:]
    zeros = len(bits) - len(bits.lstrip("0"))
    return int(bits[: 2 * zeros + 1], 2) - 1


def vp9_picture(packet: memoryview) -> Picture | None:
    """Return the picture of a VP9 packet, or None unless the packet shows exactly one frame, its last.

    Frames before the last may be hidden: they are decoded as references, but not shown.
    """
    keys, shown = [], []
    for frame in _vp9_frames(packet):
        flags = _vp9_flags(frame)
        if flags is None:
            return None
        keys.append(flags[0])
        shown.append(flags[1])
    if shown != [False] * (len(shown) - 1) + [True]:
        return None
    return Picture(entry=keys[0], reference=True)


def _vp9_frames(packet: memoryview) -> list[memoryview]:
    """Split a VP9 packet into its frames; an empty list if its index is damaged.

    A packet of several frames (a superframe) ends with an index: a marker byte, the size of each frame, little-endian,
    and the marker again. The marker's bits are 110, then the bytes of a size minus 1 (two bits), then the number of
    frames minus 1 (three bits). A packet without an index is one frame.
    """
    marker = packet[-1] if len(packet) else 0
    if marker & 0xE0 != 0xC0:
        return [packet]
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    end = len(packet) - 2 - count * width
    if end < 0 or packet[end] != marker:
        return [packet]
    index = packet[end + 1 : -1]
    sizes = [int.from_bytes(index[i * width : (i + 1) * width], "little") for i in range(count)]
    if sum(sizes) != end or 0 in sizes:
        return []
    starts = [sum(sizes[:i]) for i in range(count)]
    return [packet[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _vp9_flags(frame: memoryview) -> tuple[bool, bool] | None:
    """Return (key frame, shown) from the header of a VP9 frame; None if it does not start like a frame.

    The first bits are 10, the profile in two bits (and one more bit, unused, in profile 3), show_existing_frame,
    frame_type (0: key frame) and show_frame. With show_existing_frame, the packet shows an earlier frame again.
    """
    if len(frame) == 0 or frame[0] >> 6 != 2:
        return None
    bits = int.from_bytes(bytes(frame[:2]).ljust(2, b"\0"), "big")
    if frame[0] & 0x30 == 0x30:  # profile 3
        bits <<= 1
    show_existing, not_key, show = (bool(bits >> place & 1) for place in (11, 10, 9))
    return (False, True) if show_existing else (not not_key, show)
