"""Video files: in every kind of file, a decoder returns exactly the frames of the given indices or raises."""

import gc
import io
import json
import os
import re
import struct
import subprocess
import sys
from fractions import Fraction
from importlib import metadata

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CELL, FRAMES, HEIGHT, WIDTH, numbered_picture, write_packets
from torch.utils.data import DataLoader

import test as test_program
import train as train_program
from datasets import decoders
from datasets.annotations import VideoRecord
from datasets.bitstreams import Picture
from datasets.decoders import FrameCountError, PyAVDecoder, decode_all, presentation, read_packet_table
from datasets.readers import FrameBuffers, VideoFileReader, decode_image
from datasets.video_files import missing_bytes
from tools.check_videos import Task, check_video_file
from tools.extract_frames import upright_frames
from utils.errors import ConfigError, DataError

TICKS = [int(tick) for tick in np.cumsum(np.random.default_rng(0).choice([20, 40, 40, 120, 400], FRAMES))]
LATE = [2000 + 40 * i for i in range(FRAMES)]
OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0"}
DECODERS = ["decord", "pyav"]
VP9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "6"}}
HIDDEN = {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "20"}

# File name -> arguments of `write_packets`: codec, distance of key frames, B-frames in a row, times in milliseconds.
KINDS = {
    "constant rate.mp4": {},
    "B-frames.mp4": {"b_frames": 3},
    "every frame a key.mp4": {"keys": 1},
    "a single key.mp4": {"keys": 1000, "b_frames": 2},
    "variable rate.mp4": {"times": TICKS},
    "variable rate, B-frames, a single key.mp4": {"times": TICKS, "b_frames": 3, "keys": 1000},
    "first timestamp.mp4": {"times": LATE},
    "first timestamp, B-frames.mp4": {"times": LATE, "b_frames": 3},
    "first timestamp, B-frames.mkv": {"times": LATE, "b_frames": 3},
    "variable rate, B-frames.flv": {"times": TICKS, "b_frames": 3},
    # Frames before a key frame in presentation follow it in the file, so seeking fails.
    "open groups.mp4": {"b_frames": 3, "options": OPEN_GROUPS},
    "open groups.mkv": {"b_frames": 3, "options": OPEN_GROUPS},
    "MPEG-4, B-frames.mp4": {"codec": "mpeg4", "b_frames": 2},
    "MPEG-4, B-frames.avi": {"codec": "mpeg4", "b_frames": 2},
    # Files without time stamps.
    "H.264.avi": {},
    "H.264, B-frames.avi": {"b_frames": 3},
    "variable rate.webm": {**VP9, "times": TICKS},
    "VP9, a single key.webm": {**VP9, "keys": 1000},
    "VP9, hidden frames.webm": {"codec": "libvpx-vp9", "options": HIDDEN},
    "VP9, odd size.webm": {**VP9, "more": 1},
    "MPEG-4, odd size.mp4": {"codec": "mpeg4", "more": 1},
    "MPEG-4, odd size.avi": {"codec": "mpeg4", "more": 1},
    "H.264 4:4:4, odd size.mp4": {"b_frames": 3, "more": 1, "pixel_format": "yuv444p"},
    "10 bits.mp4": {"b_frames": 3, "pixel_format": "yuv420p10le"},
}
# Kinds whose packet headers describe all frames, so that PyAV decodes only the packets it needs.
WITH_TABLE = {
    kind
    for kind, how in KINDS.items()
    if how.get("codec", "libx264") in ("libx264", "libvpx-vp9") and not kind.endswith((".avi", ".flv"))
}


def number_of(frame: np.ndarray) -> int:
    grey = frame.mean(axis=-1)
    cells = [grey[8 + bit // 4 * CELL :, bit % 4 * CELL :][6 : CELL - 6, 6 : CELL - 6] for bit in range(8)]
    return sum(int(cell.mean() > 128) << bit for bit, cell in enumerate(cells))


def open_video(path, decoder):
    return VideoFileReader(str(path.parent), decoder).open(VideoRecord(path.name, None, 0, "list.txt:3"))


def numbers(path, decoder, indices=None):
    return [number_of(frame) for frame in read(open_video(path, decoder), indices)]


def read(video, indices=None):
    """The frames at indices, or all, as a data set reads them: anew if damage leaves fewer frames than promised."""
    num_frames = video.num_frames
    while True:
        try:
            return video.read(indices or range(num_frames))
        except FrameCountError as error:
            num_frames = error.num_frames


def error_line(path, decoder):
    with pytest.raises(DataError) as caught:
        numbers(path, decoder)
    assert caught.value.line.startswith(f"{path}: ") and "list.txt:3" in caught.value.line
    assert "\n" not in str(caught.value)
    return caught.value.line


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """clips(kind) -> path; every kind is written once."""
    folder = tmp_path_factory.mktemp("clips")

    def clip(kind):
        if not (folder / kind).exists():
            write_packets(folder / kind, **KINDS[kind])
        return folder / kind

    return clip


# Frames at their indices


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_index_gives_its_frame(clips, kind, decoder):
    path = clips(kind)
    assert numbers(path, decoder) == list(range(FRAMES))
    rng = np.random.default_rng(1)
    for indices in ([0], [FRAMES - 1], [11, 12, 13], *(sorted(rng.choice(FRAMES, 8, replace=False)) for _ in range(5))):
        assert numbers(path, decoder, [int(index) for index in indices]) == list(indices)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("first", [10, 150])  # decord has 128 end marks behind the last frame
def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path, decoder, first):
    """A file as `ffmpeg -ss ... -c copy` writes it: all packets since the last key frame, some with times below 0."""
    path, times = tmp_path / "cut.mp4", [40 * (index - first) for index in range(200)]
    options = {"options": {"sc_threshold": "0"}, "container_options": {"avoid_negative_ts": "disabled"}}
    write_packets(path, frames=200, keys=1000, b_frames=2, times=times, **options)
    with av.open(str(path)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == first
    assert numbers(path, decoder) == list(range(first, 200))
    assert numbers(path, decoder, [3, 30]) == [first + 3, first + 30]
    assert numbers(path, decoder, [199 - first]) == [199]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_single_frame_is_a_video(tmp_path, decoder):
    for name, codec in {"1.mp4": "libx264", "1.avi": "mpeg4", "1.mkv": "libx264", "1.webm": "libvpx-vp9"}.items():
        write_packets(tmp_path / name, frames=[numbered_picture(77)], codec=codec)
        assert numbers(tmp_path / name, decoder) == [77]


def test_the_frames_of_a_transport_stream_are_right_or_refused(tmp_path):
    write_packets(tmp_path / "clip.ts", b_frames=3)
    assert numbers(tmp_path / "clip.ts", "pyav") == list(range(FRAMES))
    line = error_line(tmp_path / "clip.ts", "decord")
    assert "decord cannot read it (it may lose the first frames of an MPEG" in line
    assert line.endswith("data.decoder=pyav may read it")


# Packets that PyAV skips


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_with_a_packet_table_are_those_listed(clips, kind):
    table = read_packet_table(str(clips(kind)))
    assert (table is not None) == (kind in WITH_TABLE)
    if table is not None:
        assert len(table.shown) == FRAMES


# Options of x264 -> upper bound of the decoded packets, as a fraction of those up to the last wanted frame.
X264 = {
    "b-pyramid=none:bframes=3:b-adapt=0:keyint=20": 0.5,
    "b-pyramid=strict:bframes=8:b-adapt=0:ref=8:keyint=1000": 0.6,
    "direct=temporal:bframes=3:b-adapt=0:weightb=1:slices=4:keyint=20": 0.7,
    "interlaced=1:bframes=3:b-adapt=0:keyint=25": 0.7,
    "open-gop=1:bframes=3:b-adapt=0:keyint=12": 0.7,
    "intra-refresh=1:bframes=3:b-adapt=0:keyint=20": 0.8,
    "cabac=0:bframes=0:weightp=2:keyint=20": 0.8,
    "repeat-headers=1:aud=1:nal-hrd=vbr:vbv-maxrate=500:vbv-bufsize=500:keyint=15": 0.6,
}


@pytest.mark.parametrize(("options", "share"), X264.items())
def test_skipping_packets_changes_no_pixel(tmp_path, options, share):
    path, rng = tmp_path / "clip.mp4", np.random.default_rng(0)
    write_packets(path, frames=scene(FRAMES), options={"x264-params": options})
    convert = decoders.Converter()
    whole = [convert(frame) for frame in decode_all(path)]
    shares = []
    for count in (1, 1, 2, 4, 8, 8):
        indices = sorted(int(index) for index in rng.choice(FRAMES, count, replace=False))
        table = read_packet_table(str(path))
        shares.append(len(table.needed(indices)) / (indices[-1] + 1))
        assert np.array_equal(table.read(indices), [whole[index] for index in indices])
    assert np.mean(shares) < share


def test_decoding_starts_at_the_first_packet_if_later_ones_need_its_parameter_sets(tmp_path):
    """One stream has the packets of two encoders, and the parameter sets of each encoder come only once."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "20"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        packets = []
        for start, options in ((0, {"qp": "20"}), (25, {"qp": "44", "x264-params": "cabac=0:keyint=10:scenecut=0"})):
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt, encoder.options = WIDTH, HEIGHT, "yuv420p", options
            encoder.time_base, encoder.gop_size = Fraction(1, 25), 10
            encoded = []
            for number in range(start, start + 25):
                frame = av.VideoFrame.from_ndarray(numbered_picture(number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                encoded += encoder.encode(frame)
            packets += [*encoded, *encoder.encode(None)]
        first = None
        for packet in packets:
            data = bytes(packet)
            if packet.is_keyframe:
                units = [b"\0\0\1" + unit for unit in data.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]]
                sets = b"".join(unit for unit in units if unit[3] & 31 in (7, 8))
                if first == sets:
                    data = b"".join(unit for unit in units if unit[3] & 31 not in (7, 8))
                first = sets
            copy = av.Packet(data)
            copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
            copy.pts, copy.dts = packet.pts, packet.dts
            container.mux(copy)
    assert numbers(path, "pyav") == list(range(50))
    assert numbers(path, "pyav", [3, 44]) == [3, 44] and numbers(path, "pyav", [49]) == [49]
    assert read_packet_table(str(path)).entries == [0]


KEY = Picture(entry=True, reference=True)
P = Picture(entry=False, reference=True)
B = Picture(entry=False, reference=False, reordered=True)
R = Picture(entry=False, reference=True, reordered=True)  # a B-frame that other pictures refer to
SETS = Picture(True, True, False, b"one")


@pytest.mark.parametrize(
    ("times", "pictures", "expected"),
    [
        ([0], [KEY], ([0], [0])),
        ([0, 40, 80], [KEY, P, KEY], ([0, 1, 2], [0, 2])),
        ([0, 120, 40, 80, 160], [KEY, P, R, B, KEY], ([0, 2, 3, 1, 4], [0, 4])),
        ([7, 9, 8, 12], [SETS, P, B, SETS], ([0, 2, 1, 3], [0, 3])),
        ([7, 9, 8, 12], [SETS, P, B, KEY], ([0, 2, 1, 3], [0])),
        ([], [], None),
        ([0, 40], [P, KEY], None),
        ([0, None], [KEY, P], None),
        ([0, 40, 40], [KEY, P, P], None),
        ([0, 80, 40], [KEY, P, P], None),
        ([0, 40, 80], [KEY, P, B], None),
        ([0, 120, 80, 40, 160], [KEY, P, KEY, B, P], None),  # frame 1, before entry 2, is shown after it
        ([0, 160, 80, 120, 200], [KEY, P, KEY, P, B], None),  # likewise, with no frame shown before its entry
        ([0, 40], [KEY, Picture(False, True, False, b"one")], None),
    ],
)
def test_the_order_of_presentation_follows_from_times_that_agree_with_the_headers(times, pictures, expected):
    assert presentation(times, pictures) == expected


def without_reordering(sets):
    """Remove from the first of the parameter sets of an mp4 file how far frames are reordered."""
    start = sets.index(b"\x67")
    size = int.from_bytes(sets[start - 2 : start], "big")
    unit = sets[start : start + size].replace(b"\0\0\3", b"\0\0")
    bits, place = "".join(f"{byte:08b}" for byte in unit), 32

    def skip(kinds):
        nonlocal place
        for kind in kinds:
            zeros = bits.index("1", place) - place if kind == "v" else 0
            place += 2 * zeros + 1

    skip("vvvv11vvvv1vv1")  # up to frame_mbs_only_flag of the High profile
    assert bits[place - 1] == "1"
    skip("1")
    skip("1vvvv" if bits[place] == "1" else "1")
    assert bits[place] == "1"  # vui_parameters_present_flag
    kept = bits[:place] + "01"
    kept = kept.ljust(-(-len(kept) // 8) * 8, "0")
    unit = int(kept, 2).to_bytes(len(kept) // 8, "big")
    return sets[: start - 2] + len(unit).to_bytes(2, "big") + unit + sets[start + size :]


def test_frames_are_in_order_if_the_stream_does_not_say_how_far_it_reorders(clips, tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(clips("B-frames.mp4"))) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        stream.codec_context.extradata = without_reordering(stream.codec_context.extradata)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    for indices in ([0], [11, 12, 13], [3, 10, 22, 30, 49], range(FRAMES)):
        frames = read_packet_table(str(path)).read(indices)
        assert [number_of(frame) for frame in frames] == list(indices)


def test_times_that_contradict_the_order_of_decoding_give_no_table(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "bframes=3:b-adapt=0:keyint=1000"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(numbered_picture(number), format="rgb24") for number in range(FRAMES)]
        packets = [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        for place, packet in enumerate(packets):
            packet.pts = packet.dts = place
            container.mux(packet)
    assert read_packet_table(str(path)) is None
    assert numbers(path, "pyav") == list(range(FRAMES))


def test_the_times_of_decoded_frames_are_checked_against_the_table(clips):
    """The times of two packets are exchanged after the table was made, so the decoder returns another order."""
    video = PyAVDecoder(str(clips("B-frames.mp4")))
    first, second = (video._table.packets[video._table.shown[index]] for index in (5, 6))
    first.pts, second.pts = second.pts, first.pts
    assert video._table.read([5, 6]) is None
    assert [number_of(frame) for frame in video.read([5, 6])] == [5, 6]


def test_packets_with_new_parameter_sets_as_side_data_give_no_table(clips, monkeypatch):
    """The demuxer returns such packets for an mp4 file that was joined from two."""

    class Container:
        def __init__(self, path, **options):
            self.container = av.container.open(path, **options)
            self.streams = self.container.streams

        def demux(self, stream):
            for number, packet in enumerate(self.container.demux(stream)):
                if number == 20:
                    packet.set_sidedata(av.packet.PacketSideData(1, 4))
                    assert packet.has_sidedata("new_extradata")
                yield packet

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

    path = str(clips("B-frames.mp4"))
    assert read_packet_table(path) is not None
    monkeypatch.setattr(av, "open", Container)
    assert read_packet_table(path) is None


@pytest.mark.parametrize("kind", ["B-frames.mp4", "VP9, a single key.webm", "10 bits.mp4"])
def test_a_file_without_a_packet_table_is_decoded_completely(clips, monkeypatch, kind):
    monkeypatch.setattr(decoders, "read_packet_table", lambda path: None)
    for held in (decoders.MOST_HELD, 0):
        monkeypatch.setattr(decoders, "MOST_HELD", held)
        assert PyAVDecoder(str(clips(kind))).decodes_twice == (held == 0)
        assert numbers(clips(kind), "pyav") == list(range(FRAMES))
        assert numbers(clips(kind), "pyav", [3, 44]) == [3, 44]


def test_auto_uses_decord_for_a_file_that_pyav_would_decode_twice(clips, tmp_path, monkeypatch):
    taken = []
    write_packets(tmp_path / "clip.ts", b_frames=3)
    for name, library in decoders.DECODERS.items():
        monkeypatch.setitem(
            decoders.DECODERS, name, lambda path, name=name, library=library: taken.append(name) or library(path)
        )
    for held, kind, expected in (
        (2**28, "B-frames.mp4", ["pyav"]),
        (2**28, "VP9, odd size.webm", ["pyav"]),
        (2**28, "MPEG-4, B-frames.avi", ["pyav"]),
        (2**20, "B-frames.mp4", ["pyav"]),
        (2**18, "MPEG-4, B-frames.avi", ["pyav", "decord"]),
        (2**18, tmp_path / "clip.ts", ["pyav"]),
    ):
        monkeypatch.setattr(decoders, "MOST_HELD", held)
        taken.clear()
        path = clips(kind) if kind in KINDS else kind
        assert numbers(path, "auto") == list(range(FRAMES))
        assert taken == expected
    write_packets(tmp_path / "empty.avi", frames=40, codec="mpeg4", keys=1000, empty=5)
    assert numbers(tmp_path / "empty.avi", "auto")[:40] == list(range(40))


def test_auto_reads_with_pyav_what_decord_cannot_open(clips, monkeypatch):
    def refuse(path):
        raise RuntimeError("unknown codec")

    monkeypatch.setattr(decoders, "MOST_HELD", 1)
    monkeypatch.setitem(decoders.DECODERS, "decord", refuse)
    assert numbers(clips("MPEG-4, B-frames.avi"), "auto") == list(range(FRAMES))


@pytest.mark.parametrize("decoder", [*DECODERS, "auto"])
def test_a_relative_root_with_a_colon_is_a_path(clips, tmp_path, monkeypatch, decoder):
    (tmp_path / "k400:val").mkdir()
    (tmp_path / "k400:val" / "a.mp4").write_bytes(clips("B-frames.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    record = VideoRecord("a.mp4", None, 0, "list.txt:3")
    assert VideoFileReader("k400:val", decoder).open(record).num_frames == FRAMES


# Damaged files


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["first timestamp, B-frames.mkv", "variable rate.webm", "MPEG-4, B-frames.avi"])
@pytest.mark.parametrize("part", [0.6, 0.9])
def test_a_truncated_file_has_the_remaining_frames(clips, tmp_path, kind, part, decoder):
    data = clips(kind).read_bytes()
    path = tmp_path / kind
    path.write_bytes(data[: int(len(data) * part)])
    found = numbers(path, decoder)
    whole = len(found) - 3  # B-frames near the end may be lost
    assert found[:whole] == list(range(whole)) and found == sorted(set(found)) and whole > 5
    assert numbers(path, decoder, [len(found) - 1]) == found[-1:]
    assert found == numbers(path, "pyav")


def test_an_mp4_that_ends_inside_a_frame_is_read_by_pyav_and_raises_with_decord(tmp_path):
    whole, path = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    write_packets(whole, container_options={"movflags": "faststart"})
    with av.open(str(whole)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][30]
        start, size = packet.pos, packet.size
    path.write_bytes(whole.read_bytes()[: start + size // 2])
    assert numbers(path, "pyav") == list(range(30))
    assert error_line(path, "decord").endswith("data.decoder=pyav may read it")
    path.write_bytes(whole.read_bytes()[:start])
    assert numbers(path, "pyav") == numbers(path, "decord") == list(range(30))


def test_a_packet_without_a_decodable_frame_lowers_the_count_when_it_is_met(clips, tmp_path):
    path = tmp_path / "clip.mp4"
    data = bytearray(clips("a single key.mp4").read_bytes())
    with av.open(str(clips("a single key.mp4"))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
    data[packet.pos + 5 : packet.pos + 7] = b"\x82\0"  # first_mb_in_slice 0, and a slice_type that does not exist
    path.write_bytes(data)
    video = open_video(path, "pyav")
    assert video.num_frames == FRAMES
    assert numbers(path, "pyav", [3, 10]) == [3, 10]
    with pytest.raises(FrameCountError, match="50 packets hold a frame, but 49 frames can be decoded") as raised:
        video.read([3, 30])
    assert raised.value.num_frames == FRAMES - 1
    assert len(video.read(range(FRAMES - 1))) == FRAMES - 1


@pytest.mark.parametrize("empty", [5, 200])  # decord has 128 end marks, and would wait forever after the last one
def test_packets_without_a_picture_are_an_error_with_decord_because_it_counts_them(tmp_path, empty):
    path = tmp_path / "clip.mp4"
    write_packets(path, frames=40, codec="mpeg4", keys=1000, empty=empty)
    assert numbers(path, "pyav")[:40] == list(range(40))
    assert open_video(path, "decord").num_frames == 40 + empty
    assert numbers(path, "decord", [0, 39]) == [0, 39]
    for indices in ([42], [30, 40 + empty // 2], [38 + empty]):  # some FFmpeg give the last picture twice
        with pytest.raises(DataError, match="clip.mp4: decord cannot read it .*data.decoder=pyav may read it$"):
            numbers(path, "decord", indices)


@pytest.mark.parametrize("spoilt", [0, 20])
@pytest.mark.parametrize("held", [decoders.MOST_HELD, 0])
def test_decoding_goes_on_behind_a_packet_that_cannot_be_decoded(tmp_path, monkeypatch, spoilt, held):
    monkeypatch.setattr(decoders, "MOST_HELD", held)
    path = tmp_path / "clip.avi"
    write_packets(path, codec="mjpeg", pixel_format="yuvj420p")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][spoilt]
    data = bytearray(path.read_bytes())
    data[packet.pos + 8 : packet.pos + 8 + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    assert numbers(path, "pyav") == [number for number in range(FRAMES) if number != spoilt]


DAMAGED = {
    "clip.mp4": {"options": {"g": "12"}},
    "clip.mkv": {"b_frames": 2},
    "clip.ts": {"b_frames": 2},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:log-level=none"}},
    "motion.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "part4.avi": {"codec": "mpeg4"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": VP9,
}


def damage_packet(source, target, number, start):
    """Copy a file, and write noise over one packet from byte `start` on; return False if the muxer refuses it."""
    noise = np.random.default_rng(number).integers(0, 256, 2**16, dtype=np.uint8).tobytes()
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = (packet for packet in old.demux(video=0) if packet.size)
        for place, packet in enumerate(packets):
            content = bytes(packet)
            if place == number:
                content = content[:start] + noise[: len(content) - start]
            copy = av.Packet(content)
            copy.stream, copy.pts, copy.dts, copy.time_base = stream, packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.duration = packet.is_keyframe, packet.duration
            new.mux(copy)


def frames_of_ffmpeg(path):
    """What FFmpeg's own programs decode: they go on behind a packet that fails."""
    frames, complaints, convert = [], 0, decoders.Converter()
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for packet in container.demux(video=0):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                complaints += 1
                continue
            complaints += sum(frame.is_corrupt for frame in decoded)
            frames += map(convert, decoded)
    return frames, complaints


@pytest.mark.parametrize("number", [0, 20, FRAMES - 1])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_gives_what_ffmpeg_decodes_and_says_that_it_is_damaged(tmp_path, name, number):
    whole, path = tmp_path / f"whole {name}", tmp_path / name
    write_packets(whole, **DAMAGED[name])
    for start in (12, 60):
        damage_packet(whole, path, number, start)
        expected, complaints = frames_of_ffmpeg(path)
        video = open_video(path, "pyav")
        frames = read(video)
        assert len(frames) == len(expected)
        assert all(np.array_equal(frame, other) for frame, other in zip(frames, expected, strict=True))
        if complaints or len(expected) < FRAMES:
            assert video.damage().startswith(f"{path}: damaged (") and "listed at list.txt:3" in video.damage()
        for indices in ([3], [15, 22, 25], [len(expected) - 1]):
            again = open_video(path, "pyav")
            assert np.array_equal(read(again, indices), [expected[index] for index in indices]) or (
                again.num_frames != len(expected)  # the damage lies elsewhere and was not met
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_never_called_damaged(clips, kind):
    video = open_video(clips(kind), "pyav")
    read(video)
    assert video.damage() is None
    assert missing_bytes(str(clips(kind))) == 0


@pytest.mark.parametrize("name", ["clip.mp4", "long.mp4", "clip.mov", "clip.avi", "clip.mkv", "clip.webm"])
def test_a_file_that_ends_before_its_header_says_is_damaged(tmp_path, name):
    path = tmp_path / name
    codec = {"avi": "mpeg4", "webm": "libvpx"}.get(path.suffix[1:], "libx264")
    options = {} if path.suffix not in (".mp4", ".mov") else {"movflags": "faststart"}
    if name == "long.mp4":
        options = {"movflags": "frag_keyframe+empty_moov"}
    write_packets(path, codec=codec, container_options=options)
    content = path.read_bytes()
    with av.open(str(path)) as container:
        middle = [packet.pos for packet in container.demux(video=0) if packet.size][FRAMES // 2]
    for cut, most in ((len(content) - 1, FRAMES), (middle + 5, FRAMES // 2 + 1)):
        path.write_bytes(content[:cut])
        video = open_video(path, "pyav")
        assert most - 2 <= len(read(video)) <= most
        # A fragmented file states the length of each fragment only.
        missing = r"\d+" if name == "long.mp4" else len(content) - path.stat().st_size
        assert re.search(f"the file ends {missing} bytes before the end that its header states", video.damage())


@pytest.mark.parametrize("name", ["clip.avi", "clip.mkv", "clip.mp4"])
def test_titles_that_are_not_utf8_do_not_matter(tmp_path, name):
    """Files of HMDB51 have such titles."""
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a caf-e with a title"
        stream = container.add_stream("libx264" if name != "clip.avi" else "mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_picture(number), format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert b"caf-e" in content
    path.write_bytes(content.replace(b"caf-e", b"caf\xe9\xff"[:5]))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path)).metadata["title"]  # PyAV's default
    for decoder in [*DECODERS, "auto"]:
        assert numbers(path, decoder) == list(range(5))
    assert check_video_file(Task("val", str(tmp_path), VideoRecord(name, None, 0, "list.txt:1")), "pyav").findings == []


def test_the_last_frame_that_only_decord_counts_is_no_error(tmp_path):
    path = tmp_path / "clip.avi"
    write_packets(path, frames=40, codec="mpeg4", keys=1000, empty=1)
    assert open_video(path, "decord").num_frames == 41
    assert numbers(path, "decord") == list(range(40))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_file_that_is_not_a_video_is_an_error_of_one_line(clips, tmp_path, decoder):
    path = tmp_path / "clip.mp4"
    whole = clips("constant rate.mp4").read_bytes()
    for data in (b"", b"not a video" * 50, whole[: len(whole) // 2]):  # the last has lost its index
        path.write_bytes(data)
        assert f"{decoder} cannot read it (" in error_line(path, decoder)
    path.unlink()
    assert "no such video; listed at list.txt:3; check the data root" in error_line(path, decoder)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    error_line(tmp_path / "sound.mp4", decoder)


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(numbered_picture(3), format="rgb24")
        container.mux([*cover.encode(picture), *cover.encode(None)])
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*sound.encode(frame), *sound.encode(None)])
    assert "it holds no video" in error_line(path, "pyav")


# Pixels


def scene(frames, width=WIDTH, height=HEIGHT):
    """Pictures of moving coloured noise."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    wide = Image.fromarray(noise).resize((width + frames, height + frames), Image.BICUBIC)
    return [np.asarray(wide.crop((i, i, i + width, i + height))) for i in range(frames)]


def test_grey_images_of_16_bits_are_scaled_and_those_without_a_range_refused():
    def saved(levels, kind):
        file = io.BytesIO()
        Image.fromarray(levels).save(file, kind)
        return file.getvalue()

    levels = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    pixels, _ = decode_image(saved(levels, "PNG"), FrameBuffers([]))
    assert np.array_equal(pixels, np.array([[[0] * 3, [0] * 3, [1] * 3, [128] * 3, [255] * 3]]))
    with pytest.raises(ValueError, match="its mode is F"):
        decode_image(saved(levels.astype(np.float32), "TIFF"), FrameBuffers([]))


LEVELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("PA", "TIFF"), ("RGB", "PNG"), ("RGBA", "PNG"),
     ("CMYK", "TIFF"), ("YCbCr", "TIFF")],
)  # fmt: skip
def test_an_image_of_any_mode_gives_what_pillow_shows_of_it(mode, kind):
    image, file = Image.fromarray(LEVELS).convert(mode), io.BytesIO()
    image.save(file, kind)
    assert Image.open(io.BytesIO(file.getvalue())).mode == mode
    pixels, complaint = decode_image(file.getvalue(), FrameBuffers([]))
    assert np.array_equal(pixels, image.convert("RGB")) and complaint is None


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_pixels_are_an_error_because_they_show_what_lies_behind(mode):
    image, file = Image.fromarray(LEVELS).convert("RGBA"), io.BytesIO()
    if mode == "P":
        image.convert("RGB").convert("P").save(
            file, "PNG", transparency=image.convert("RGB").convert("P").getpixel((0, 0))
        )
    else:
        image.putpixel((1, 1), (9, 9, 9, 100))
        image.convert(mode).save(file, "PNG")
    with pytest.raises(ValueError, match="3 % of its pixels are transparent; save it on a background, without alpha"):
        decode_image(file.getvalue(), FrameBuffers([]))


def test_frames_have_the_channels_and_rows_of_the_pictures(tmp_path):
    pictures = scene(20)
    write_packets(tmp_path / "clip.mp4", frames=pictures, b_frames=2, options={"crf": "10"})
    for decoder in DECODERS:
        for frame, index in zip(open_video(tmp_path / "clip.mp4", decoder).read([0, 7, 19]), (0, 7, 19), strict=True):
            assert frame.dtype == np.uint8 and frame.shape == (HEIGHT, WIDTH, 3) and frame.flags.c_contiguous
            assert np.abs(np.subtract(frame, pictures[index], dtype=int)).mean() < 8


@pytest.mark.parametrize("kind", KINDS)
def test_both_decoders_give_the_same_pixels(clips, kind):
    path, indices = clips(kind), [0, 7, 19, 30, 49]
    decord, pyav = (np.stack(open_video(path, decoder).read(indices)) for decoder in DECODERS)
    difference = np.abs(np.subtract(decord, pyav, dtype=int)).max()
    assert difference <= (40 if "odd" in kind or "10 bits" in kind else 2 if "MPEG-4" in kind else 0)


def test_frames_of_decord_that_are_not_rgb_are_an_error(clips, monkeypatch):
    decord = pytest.importorskip("decord")
    four = decord.nd.array(np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8))
    monkeypatch.setattr(decord.VideoReader, "next", lambda self: four)
    line = error_line(clips("constant rate.mp4"), "decord")
    assert "not of three channels" in line and line.endswith("data.decoder=pyav may read it")


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_both_decoders_turn_a_video_upright(clips, tmp_path, quarters):
    data = bytearray(clips("constant rate.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # the display matrix of the track header, in 16.16 fixed point
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    struct.pack_into(">9i", data, matrix, cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    decord, pyav = (open_video(path, decoder).read([5])[0] for decoder in DECODERS)
    assert decord.shape == pyav.shape == ((HEIGHT, WIDTH, 3) if quarters == 2 else (WIDTH, HEIGHT, 3))
    assert np.abs(np.subtract(decord, pyav, dtype=int)).max() <= 2
    assert number_of(np.rot90(decord, quarters)) == 5


# (a, b, c, d) of the display matrix -> the frame on the screen
SHOWN = {
    (1, 0, 0, 1): lambda frame: frame,
    (-1, 0, 0, 1): lambda frame: frame[:, ::-1],
    (1, 0, 0, -1): lambda frame: frame[::-1],
    (-1, 0, 0, -1): lambda frame: frame[::-1, ::-1],
    (0, 1, 1, 0): lambda frame: frame.transpose(1, 0, 2),
    (0, 1, -1, 0): lambda frame: np.rot90(frame, -1),
    (0, -1, 1, 0): lambda frame: np.rot90(frame),
    (0, -1, -1, 0): lambda frame: frame[::-1, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", SHOWN)
def test_all_eight_display_matrices_come_out_upright_and_unmirrored(clips, tmp_path, matrix):
    data = bytearray(clips("constant rate.mp4").read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 4 + 40, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    stored = open_video(clips("constant rate.mp4"), "pyav").read([5])[0]
    assert np.array_equal(open_video(path, "pyav").read([5])[0], SHOWN[matrix](stored))
    assert np.array_equal(list(upright_frames(path, HEIGHT))[5], SHOWN[matrix](stored))


def test_the_interlaced_flag_changes_no_pixel(tmp_path):
    """The flag is set on a stream of the same lossless pixels."""
    for name, flag in (("plain.mp4", "0"), ("flagged.mp4", "1")):
        options = {"qp": "0", "x264-params": f"fake-interlaced={flag}:tff={flag}"}
        write_packets(tmp_path / name, frames=scene(3), options=options)
    flagged, plain = (PyAVDecoder(str(tmp_path / name)) for name in ("flagged.mp4", "plain.mp4"))
    assert [frame.interlaced_frame for frame in decode_all(tmp_path / "flagged.mp4")] == [True] * 3
    assert np.array_equal(flagged.read([0, 1, 2]), plain.read([0, 1, 2]))
    one, two = (list(upright_frames(tmp_path / name, 32)) for name in ("flagged.mp4", "plain.mp4"))
    assert np.array_equal(one, two)


# Processes and libraries


@pytest.mark.parametrize("decoder", DECODERS)
def test_workers_read_the_same_frames_as_the_main_process(clips, decoder):
    paths = [clips(kind) for kind in list(KINDS)[:6]]
    plain = [numbers(path, decoder, [2, 30, 49]) for path in paths]
    gc.collect()  # a decord reader that is freed in a forked process waits for ever for threads that are not there
    loader = DataLoader(
        paths, num_workers=2, batch_size=None, collate_fn=lambda path: numbers(path, decoder, [2, 30, 49])
    )
    assert list(loader) == plain == [[2, 30, 49]] * 6


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_no_file_stays_open(clips, decoder):
    path = clips("B-frames.mp4")
    numbers(path, decoder)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        numbers(path, decoder, [4])
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(("decoder", "module"), [("decord", "decord"), ("pyav", "av")])
def test_a_decoder_that_is_not_installed_is_an_error_of_the_key(clips, monkeypatch, decoder, module):
    path = clips("B-frames.mp4")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"^data.decoder: {module} cannot be imported .*; install requirements.txt"):
        numbers(path, decoder)


def test_decoders_are_imported_only_where_they_decode():
    code = "import sys, datasets.readers; sys.exit(bool({'decord', 'av'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Program


def test_the_demo_videos_get_nearly_the_scores_of_their_frames(config, motion_root, tmp_path):
    train_program.main(["--config", config, "--output", str(tmp_path / "run"), "solver.epochs=1"])

    def score(name, *overrides):
        arguments = ["--config", config, "--weights", str(tmp_path / "run" / "last_model.pt"), "--test_clips", "2"]
        test_program.main([*arguments, "--save_scores", str(tmp_path / name), *overrides])
        return np.load(tmp_path / name)

    frames = score("frames.npz")
    videos = [f"data.val_list={motion_root}/val_videos.txt", f"data.val_root={motion_root}/videos"]
    decord, pyav = (
        score(f"{decoder}.npz", "data.modality=video", f"data.decoder={decoder}", *videos) for decoder in DECODERS
    )
    assert decord["paths"].tolist() == [f"{path}.mp4" for path in frames["paths"]]
    assert decord["labels"].tolist() == frames["labels"].tolist()
    assert np.abs(decord["scores"] - pyav["scores"]).max() < 1e-3
    assert np.abs(decord["scores"] - frames["scores"]).max() < 0.02  # frames are compressed as JPEG, videos as H.264


def test_the_decoder_and_its_version_are_logged_and_stored(config, motion_root, tmp_path, capsys):
    lists = [f"data.{part}_list={motion_root}/val_videos.txt" for part in ("train", "val")]
    roots = [f"data.{part}_root={motion_root}/videos" for part in ("train", "val")]
    videos = ["data.modality=video", *lists, *roots]
    checkpoint, scores = tmp_path / "run" / "last_model.pt", tmp_path / "scores.npz"
    train_program.main(["--config", config, "--output", str(tmp_path / "run"), "solver.epochs=1", *videos])
    name = f"PyAV {av.__version__}"
    assert f"video files: decoded by {name}\n" in (tmp_path / "run" / "train.log").read_text()
    assert torch.load(checkpoint, weights_only=True)["decoder"] == name

    def stored(*overrides):
        capsys.readouterr()
        arguments = ["--config", config, "--weights", str(checkpoint), "--save_scores", str(scores)]
        test_program.main([*arguments, *overrides])
        return json.loads(str(np.load(scores)["protocol"]))["decoder"], capsys.readouterr().out

    decord = f"decord {metadata.version(metadata.packages_distributions()['decord'][0])}"
    for decoder, expected in {"pyav": name, "decord": decord, "auto": f"{name} or {decord}"}.items():
        found, output = stored(*videos, f"data.decoder={decoder}")
        assert found == expected and f"video files: decoded by {expected}\n" in output
    found, output = stored()
    assert found is None and "video files" not in output
