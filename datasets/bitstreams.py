"""What a packet's headers say of its picture, before anything is decoded: H.264 (ITU-T H.264, 7.3) and VP9."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Picture:
    """The one picture that a packet shows.

    `entry`: nothing from here on refers to what came before. `reference`: other pictures may refer to it.
    `reordered`: it may be shown before pictures of earlier packets. `parameter_sets`: those that the packet carries.
    """

    entry: bool
    reference: bool
    reordered: bool = False
    parameter_sets: bytes = b""


def h264_picture(packet: memoryview, length_size: int) -> Picture | None:
    """The frame in a packet of units with their length, `length_size` bytes, before each; None for anything else.

    Else is a packet with two fields or frames, with a part of one, of scalable or partitioned video, or damaged.
    """
    picture, parameter_sets, place = None, b"", 0
    while place < len(packet):
        start = place + length_size
        place = start + int.from_bytes(packet[place:start], "big")
        if not start < place <= len(packet):
            return None
        header = packet[start]
        match header & 0x9F:  # the type of the unit; its bit 0x80 is set in none
            case 1 | 5 as kind:
                if place < start + 3:
                    return None
                slice_of = kind == 5, header & 0x60 > 0
                first = packet[start + 1] >= 0x80  # the slice begins at the first macroblock
                if first is (picture is not None) or not first and slice_of != picture[:2]:
                    return None
                if first:
                    picture = *slice_of, _slice_type(packet[start + 1 : start + 3]) % 5 == 1
            case 7 | 8:
                parameter_sets += packet[start:place]
            case 6 | 9 | 10 | 11 | 12:  # of no consequence
                pass
            case _:
                return None
    return Picture(*picture, parameter_sets) if picture else None


def _slice_type(start: memoryview) -> int:
    """The second of two Exp-Golomb codes, of which the first is the one bit of 0."""
    bits = int.from_bytes(start, "big") & (1 << 8 * len(start) - 1) - 1
    zeros = 8 * len(start) - 1 - bits.bit_length()
    return (bits >> max(0, 8 * len(start) - 2 - 2 * zeros)) - 1


def vp9_picture(packet: memoryview) -> Picture | None:
    """The shown frame of a packet, which may bring hidden ones before it; None if not exactly the last is shown."""
    frames = _vp9_frames(packet)
    shown = [_vp9_flags(frame) for frame in frames]
    if not shown or None in shown or [flag for _, flag in shown] != [False] * (len(shown) - 1) + [True]:
        return None
    return Picture(entry=shown[0][0], reference=True)


def _vp9_frames(packet: memoryview) -> list[memoryview]:
    """The frames of a packet, by the index at its end if it has one; none if that is damaged."""
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
    """(a key frame, shown); None if no frame begins like this."""
    if len(frame) == 0 or frame[0] >> 6 != 2:
        return None
    bits = int.from_bytes(bytes(frame[:2]).ljust(2, b"\0"), "big") << (1 if frame[0] & 0x30 == 0x30 else 0)
    exists, other, visible = (bool(bits >> place & 1) for place in (11, 10, 9))  # below marker, profile
    return (False, True) if exists else (not other, visible)
