"""The parsers of packet headers, on packets written by hand from the standards."""

import pytest

from datasets.bitstreams import Picture, h264_picture, vp9_picture

# Slices of H.264: the header byte of the unit, then first_mb_in_slice (0, except in "later" slices) and slice_type.
IDR, REFERENCE_I, REFERENCE_P, PLAIN_B, REFERENCE_B = (
    b"\x65\x88\x84",
    b"\x61\x88\0",
    b"\x41\x9a\0",
    b"\x01\x9c\0",
    b"\x41\xa0\0",
)
LATER_P, LATER_PLAIN, LATER_IDR = b"\x41\x4d\0", b"\x01\x4d\0", b"\x65\x45\0"
SEQUENCE, PICTURE, MESSAGE, DELIMITER, END = b"\x67\x64\0", b"\x68\xee", b"\x06\x05\x01", b"\x09\xf0", b"\x0a"

KEY, HIDDEN_KEY, INTER, HIDDEN, EXISTING, KEY_OF_PROFILE_3 = (
    b"\x82\x49",
    b"\x80\x49",
    b"\x86\0",
    b"\x84\0",
    b"\x88",
    b"\xb1\x24",
)


def packet(*units, length_size=4):
    return memoryview(b"".join(len(unit).to_bytes(length_size, "big") + unit for unit in units))


def superframe(*frames, sizes=None, width=2):
    marker = bytes([0xC0 | (width - 1) << 3 | len(frames) - 1])
    sizes = sizes or [len(frame) for frame in frames]
    index = b"".join(size.to_bytes(width, "little") for size in sizes)
    return memoryview(b"".join(frames) + marker + index + marker)


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([IDR], Picture(entry=True, reference=True)),
        ([REFERENCE_I], Picture(entry=False, reference=True)),
        ([REFERENCE_P], Picture(entry=False, reference=True)),
        ([REFERENCE_B], Picture(entry=False, reference=True, reordered=True)),
        ([PLAIN_B], Picture(entry=False, reference=False, reordered=True)),
        ([DELIMITER, MESSAGE, REFERENCE_P, LATER_P, LATER_P, END], Picture(entry=False, reference=True)),
        ([SEQUENCE, PICTURE, IDR, LATER_IDR], Picture(True, True, False, SEQUENCE + PICTURE)),
    ],
)
@pytest.mark.parametrize("length_size", [1, 2, 4])
def test_an_h264_packet_of_one_frame_gives_its_picture(units, expected, length_size):
    assert h264_picture(packet(*units, length_size=length_size), length_size) == expected


@pytest.mark.parametrize(
    "data",
    [
        packet(),
        packet(MESSAGE),
        packet(REFERENCE_P, REFERENCE_P),  # two fields, or two frames
        packet(LATER_P),  # the second part of a frame
        packet(REFERENCE_P, LATER_PLAIN),
        packet(IDR, LATER_P),
        packet(b"\x42\x9a\0"),  # a data partition
        packet(REFERENCE_P, b"\x74\x9a\0"),  # a slice of another layer
        packet(b"\xc1\x9a\0"),
        packet(REFERENCE_P[:2]),
        packet(REFERENCE_P)[:-1],
        packet(REFERENCE_P, b""),
        memoryview(bytes(packet(REFERENCE_P)) + b"\0\0"),
        memoryview(b"\0\0\0\1" + REFERENCE_P),  # a start code in place of the length
    ],
)
def test_an_h264_packet_that_is_not_one_whole_frame_gives_none(data):
    assert h264_picture(data, 4) is None


@pytest.mark.parametrize(
    ("data", "entry"),
    [
        (memoryview(KEY), True),
        (memoryview(INTER), False),
        (memoryview(EXISTING), False),
        (memoryview(KEY_OF_PROFILE_3), True),
        (superframe(HIDDEN, INTER), False),
        (superframe(HIDDEN_KEY, INTER, width=1), True),
        (superframe(HIDDEN, HIDDEN_KEY, INTER, width=4), False),
    ],
)
def test_a_vp9_packet_that_shows_its_last_frame_gives_its_picture(data, entry):
    assert vp9_picture(data) == Picture(entry=entry, reference=True)


@pytest.mark.parametrize(
    "data",
    [
        memoryview(b""),
        memoryview(HIDDEN),
        memoryview(b"\x02\x49"),
        superframe(INTER, INTER),
        superframe(INTER, HIDDEN),
        superframe(HIDDEN, INTER, sizes=[1, 2]),
        superframe(HIDDEN, INTER, sizes=[0, 4]),
    ],
)
def test_a_vp9_packet_that_does_not_show_exactly_its_last_frame_gives_none(data):
    assert vp9_picture(data) is None
