"""Video files: both decoders give the frame that an index names, in every kind of file, or say that they cannot."""

import os
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

import test as test_program
import train as train_program
from datasets.annotations import VideoRecord
from datasets.readers import VideoFileReader
from utils.errors import ConfigError, DataError

WIDTH, HEIGHT, CELL = 96, 64, 24
FRAMES = 50
TICKS = [int(tick) for tick in np.cumsum(np.random.default_rng(0).choice([20, 40, 40, 120, 400], FRAMES))]
LATE = [2000 + 40 * i for i in range(FRAMES)]
OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0"}
DECODERS = ["decord", "pyav"]

# Name of the file -> how it is written: codec, distance of key frames, B-frames in a row, times in milliseconds.
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
    # Key frames are not where their place in the file says: seeking fails.
    "open groups.mp4": {"b_frames": 3, "options": OPEN_GROUPS},
    "open groups.mkv": {"b_frames": 3, "options": OPEN_GROUPS},
    "MPEG-4, B-frames.mp4": {"codec": "mpeg4", "b_frames": 2},
    "MPEG-4, B-frames.avi": {"codec": "mpeg4", "b_frames": 2},
    # No timestamps.
    "H.264.avi": {},
    "H.264, B-frames.avi": {"b_frames": 3},
    "variable rate.webm": {"codec": "libvpx-vp9", "times": TICKS},
}


def picture(number: int) -> np.ndarray:
    """A frame that carries its number below 256: eight squares, white for a set bit."""
    frame = np.full((HEIGHT, WIDTH, 3), 60, dtype=np.uint8)
    for bit in range(8):
        row, column = 8 + bit // 4 * CELL, bit % 4 * CELL
        frame[row : row + CELL, column : column + CELL] = 255 * (number >> bit & 1)
    return frame


def number_of(frame: np.ndarray) -> int:
    grey = frame.mean(axis=-1)
    cells = [grey[8 + bit // 4 * CELL :, bit % 4 * CELL :][6 : CELL - 6, 6 : CELL - 6] for bit in range(8)]
    return sum(int(cell.mean() > 128) << bit for bit, cell in enumerate(cells))


def write(
    path, frames=FRAMES, codec="libx264", keys=12, b_frames=0, times=None, options=None, container_options=None, empty=0
):
    """A video of `frames` numbers or of the pictures in it, and then of `empty` MPEG-4 packets without a picture."""
    if codec not in av.codec.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    pictures = [picture(number) for number in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = keys, b_frames
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = times[index] if times else 40 * index, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for index in range(len(pictures), len(pictures) + empty):
            packet = av.Packet(b"\0\0\1\xb6\x50\x06")  # a frame's start code and header, which ends in "not coded"
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = 40 * index
            container.mux(packet)


def open_video(path, decoder):
    return VideoFileReader(str(path.parent), decoder).open(VideoRecord(path.name, None, 0, "list.txt:3"))


def numbers(path, decoder, indices=None):
    video = open_video(path, decoder)
    return [number_of(frame) for frame in video.read(indices or range(video.num_frames))]


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
            write(folder / kind, **KINDS[kind])
        return folder / kind

    return clip


# Index is frame


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_index_names_its_frame(clips, kind, decoder):
    path = clips(kind)
    assert numbers(path, decoder) == list(range(FRAMES))
    rng = np.random.default_rng(1)
    for indices in ([0], [FRAMES - 1], [11, 12, 13], *(sorted(rng.choice(FRAMES, 8, replace=False)) for _ in range(5))):
        assert numbers(path, decoder, [int(index) for index in indices]) == list(indices)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("first", [10, 150])  # decord has 128 marks for the end of the file
def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path, decoder, first):
    """As `ffmpeg -ss ... -c copy` leaves them: all packets since the last key frame, and times below 0 for some."""
    path, times = tmp_path / "cut.mp4", [40 * (index - first) for index in range(200)]
    options = {"options": {"sc_threshold": "0"}, "container_options": {"avoid_negative_ts": "disabled"}}
    write(path, frames=200, keys=1000, b_frames=2, times=times, **options)
    with av.open(str(path)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == first
    assert numbers(path, decoder) == list(range(first, 200))
    assert numbers(path, decoder, [3, 30]) == [first + 3, first + 30]
    assert numbers(path, decoder, [199 - first]) == [199]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_single_frame_is_a_video(tmp_path, decoder):
    for name in ("one.mp4", "one.avi", "one.mkv"):
        write(tmp_path / name, frames=[picture(77)])
        assert numbers(tmp_path / name, decoder) == [77]


def test_the_frames_of_a_transport_stream_are_right_or_refused(tmp_path):
    write(tmp_path / "clip.ts", b_frames=3)
    assert numbers(tmp_path / "clip.ts", "pyav") == list(range(FRAMES))
    line = error_line(tmp_path / "clip.ts", "decord")
    assert "decord cannot read it (it may lose the first frames of an MPEG" in line
    assert line.endswith("data.decoder=pyav may read it")


# Damaged files


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["first timestamp, B-frames.mkv", "variable rate.webm", "MPEG-4, B-frames.avi"])
@pytest.mark.parametrize("part", [0.6, 0.9])
def test_a_truncated_file_has_the_frames_that_are_left(clips, tmp_path, kind, part, decoder):
    data = clips(kind).read_bytes()
    path = tmp_path / kind
    path.write_bytes(data[: int(len(data) * part)])
    found = numbers(path, decoder)
    whole = len(found) - 3  # B-frames of the last ones may be lost
    assert found[:whole] == list(range(whole)) and found == sorted(set(found)) and whole > 5
    assert numbers(path, decoder, [len(found) - 1]) == found[-1:]
    assert found == numbers(path, "pyav")


def test_an_mp4_that_ends_inside_a_frame_is_read_by_pyav_and_refused_by_decord(tmp_path):
    whole, path = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    write(whole, container_options={"movflags": "faststart"})
    with av.open(str(whole)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][30]
        start, size = packet.pos, packet.size
    path.write_bytes(whole.read_bytes()[: start + size // 2])
    assert numbers(path, "pyav") == list(range(30))
    assert error_line(path, "decord").endswith("data.decoder=pyav may read it")
    path.write_bytes(whole.read_bytes()[:start])
    assert numbers(path, "pyav") == numbers(path, "decord") == list(range(30))


@pytest.mark.parametrize("empty", [5, 200])  # decord has 128 marks for the end of the file, and waits for more in vain
def test_packets_without_a_picture_are_an_error_with_decord_which_counts_them(tmp_path, empty):
    path = tmp_path / "clip.mp4"
    write(path, frames=40, codec="mpeg4", keys=1000, empty=empty)
    assert numbers(path, "pyav")[:40] == list(range(40))
    assert open_video(path, "decord").num_frames == 40 + empty
    assert numbers(path, "decord", [0, 39]) == [0, 39]
    for indices in ([42], [30, 40 + empty // 2], [39 + empty]):  # some FFmpeg give the last picture twice
        with pytest.raises(DataError, match="clip.mp4: decord cannot read it .*data.decoder=pyav may read it$"):
            numbers(path, "decord", indices)


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_no_video_is_named_in_one_line(clips, tmp_path, decoder):
    path = tmp_path / "clip.mp4"
    whole = clips("constant rate.mp4").read_bytes()
    for data in (b"", b"no video at all" * 50, whole[: len(whole) // 2]):  # the last has lost its table of contents
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


# Pixels


def test_both_decoders_give_the_same_pixels(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)).resize((140, 104), Image.BICUBIC)
    pictures = [np.asarray(noise.crop((i, i, i + WIDTH, i + HEIGHT))) for i in range(20)]
    write(tmp_path / "clip.mp4", frames=pictures, b_frames=2, options={"crf": "10"})
    decord, pyav = (open_video(tmp_path / "clip.mp4", decoder).read([0, 7, 19]) for decoder in DECODERS)
    for one, other, index in zip(decord, pyav, (0, 7, 19), strict=True):
        assert one.dtype == other.dtype == np.uint8 and one.shape == other.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(np.subtract(one, other, dtype=int)).max() <= 2
        assert np.abs(np.subtract(one, pictures[index], dtype=int)).mean() < 8  # no channel swapped


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_both_decoders_turn_a_video_upright(clips, tmp_path, quarters):
    data = bytearray(clips("constant rate.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # of the track header, in 16.16 fixed point
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    struct.pack_into(">9i", data, matrix, cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    decord, pyav = (open_video(path, decoder).read([5])[0] for decoder in DECODERS)
    assert decord.shape == pyav.shape == ((HEIGHT, WIDTH, 3) if quarters == 2 else (WIDTH, HEIGHT, 3))
    assert np.abs(np.subtract(decord, pyav, dtype=int)).max() <= 2
    assert number_of(np.rot90(decord, quarters)) == 5


# Processes and libraries


@pytest.mark.parametrize("decoder", DECODERS)
def test_workers_read_what_the_process_that_forks_them_reads(clips, decoder):
    paths = [clips(kind) for kind in list(KINDS)[:6]]
    plain = [numbers(path, decoder, [2, 30, 49]) for path in paths]
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


def test_the_demo_videos_are_scored_as_their_frames_are(config, motion_root, tmp_path):
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
    assert np.abs(decord["scores"] - frames["scores"]).max() < 0.02  # one is compressed as JPEG, the other as H.264
