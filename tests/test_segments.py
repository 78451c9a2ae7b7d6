"""Segments of videos: the frames of a slice of the whole video, read without decoding what lies before."""

import contextlib
import dataclasses
import shutil

import av
import numpy as np
import pytest
from PIL import Image
from tiny import loader_config, save_untrained, score_run, smooth_pictures, spoil_packets

import datasets.segments
from datasets.annotations import VideoRecord, read_annotations
from datasets.decoders import Converter, Damage, FrameCountError, decode_all
from datasets.loaders import build_eval_loader, build_train_loader
from datasets.readers import FrameFolderReader, VideoFileReader
from datasets.segments import SegmentDecoder, SegmentError, scan
from engine.configuration import default_config
from inference.inputs import PathReader, find_videos
from inference.overlay import all_frames
from tools import prepare_data
from utils.errors import DataError

COUNT = 200
# Name -> codec, options of the encoder, whether reading may start in the middle of the file.
KINDS = {
    "b_frames.mp4": ("libx264", {"g": "20", "bf": "2"}, True),
    "long_groups.mov": ("libx264", {"g": "90", "bf": "3"}, True),
    "h264.mkv": ("libx264", {"g": "20", "bf": "2"}, True),
    "vp9.webm": ("libvpx-vp9", {"g": "30", "deadline": "realtime", "cpu-used": "8"}, True),
    "mpeg4.avi": ("mpeg4", {"g": "12"}, False),
    "h264.ts": ("libx264", {"g": "20", "bf": "2"}, False),
    "open_groups.mp4": ("libx264", {"g": "20", "x264-params": "open-gop=1"}, False),
}
SEGMENTS = [(0, 1), (0, COUNT), (63, 3), (64, 1), (79, 2), (80, 40), (137, 20), (150, 50), (COUNT - 1, 1)]


SHORT_AND_LONG = [(0, 12, 0), (0, 4, 1), (7, 5, 0), (6, 6, 1), (11, 1, 0), (1, 5, 0)]  # first frame, frames, label


def write(path, codec, options):
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for picture in smooth_pictures(0, 8, (96, 64)) * (COUNT // 8):
            noisy = np.clip(picture.astype(int) + rng.integers(-20, 20, picture.shape), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with a video of each kind, and all frames of each, as decoding the whole file gives them."""
    folder, frames = tmp_path_factory.mktemp("videos"), {}
    for name, (codec, options, _) in KINDS.items():
        write(folder / name, codec, options)
        whole = VideoFileReader(str(folder), "pyav").open(VideoRecord(name, None, 0, "list:1"))
        frames[name] = whole.read(range(whole.num_frames))
        assert len(frames[name]) == COUNT
    return folder, frames


def open_segment(folder, name, first, count, decoder="pyav"):
    return VideoFileReader(str(folder), decoder).open(VideoRecord(name, count, 0, "list:7", first))


@pytest.mark.parametrize("name", KINDS)
def test_a_segment_has_exactly_the_frames_of_the_slice(videos, name):
    folder, frames = videos
    for first, count in SEGMENTS:
        for indices in (range(count), sorted({0, count // 2, count - 1})):
            segment = open_segment(folder, name, first, count)
            assert segment.num_frames == count
            expected = [frames[name][first + index] for index in indices]
            assert np.array_equal(segment.read(list(indices)), expected)


@pytest.mark.parametrize("name", [name for name, (*_, places) in KINDS.items() if places])
def test_a_segment_far_into_a_file_is_read_from_the_nearest_place_before_it(videos, name, monkeypatch):
    folder, frames = videos
    found = scan(str(folder / name))
    assert found.num_frames == COUNT and len(found.sizes) > 1

    def refuse(*args, **kwargs):
        raise AssertionError("decoded from the start")

    read = []
    monkeypatch.setattr(datasets.segments, "decode_all", refuse)
    table = datasets.segments.packet_table
    monkeypatch.setattr(datasets.segments, "packet_table", lambda codec, d: read.append(len(d)) or table(codec, d))
    for first in (0, 100, 190):
        assert np.array_equal(
            open_segment(folder, name, first, 10).read([3, 9]), frames[name][first + 3 : first + 10 : 6]
        )
    assert max(read) < COUNT


@pytest.mark.parametrize("name", [name for name, (*_, places) in KINDS.items() if places])
def test_a_seek_that_lands_elsewhere_is_noticed_and_the_file_is_decoded_from_its_start(videos, name, monkeypatch):
    folder, frames = videos
    found = scan(str(folder / name))
    group = len(found.sizes) // 2
    first, places = int(found.first_frames[group]), found.places.copy()
    assert np.array_equal(datasets.segments.read_at(str(folder / name), found, [first + 2]), [frames[name][first + 2]])
    for other in (group - 1, group + 1):
        places[group, 1:] = found.places[other, 1:]  # the times to which the container is told to seek
        places[group, 0] = min(found.places[group, 0], found.places[other, 0])
        wrong = dataclasses.replace(found, places=places)
        read = datasets.segments.read_at(str(folder / name), wrong, [first + 2])
        assert read is None or np.array_equal(read, [frames[name][first + 2]])
        monkeypatch.setattr(datasets.segments, "scan", lambda path, wrong=wrong: wrong)
        segment = open_segment(folder, name, first, 5)
        assert np.array_equal(segment.read([2, 4]), frames[name][first + 2 : first + 5 : 2]) and not segment.damage()


@pytest.mark.parametrize("name", ["b_frames.mp4", "h264.mkv", "mpeg4.avi"])
def test_the_packets_of_a_file_are_scanned_once(videos, name, monkeypatch):
    folder, _ = videos
    open_segment(folder, name, 0, 5)

    def refuse(*args, **kwargs):
        raise AssertionError("scanned again")

    monkeypatch.setattr(datasets.segments, "presentation", refuse)
    open_segment(folder, name, 60, 5)


def test_a_file_that_changed_is_scanned_again_and_packets_unlike_the_scan_are_not_trusted(videos, tmp_path):
    folder, frames = videos
    path = tmp_path / "b_frames.mp4"
    shutil.copy(folder / "long_groups.mov", path)
    assert np.array_equal(open_segment(tmp_path, path.name, 150, 4).read([0, 3]), frames["long_groups.mov"][150:154:3])
    shutil.copy(folder / "b_frames.mp4", path)
    assert np.array_equal(open_segment(tmp_path, path.name, 150, 4).read([0, 3]), frames["b_frames.mp4"][150:154:3])
    assert scan(str(path)).digests == scan(str(folder / "b_frames.mp4")).digests
    assert datasets.segments.read_at(str(path), scan(str(folder / "long_groups.mov")), [150]) is None


def decoded_by_time(path):
    """The times of the packets in order of presentation, and {time: frame} of all frames that FFmpeg decodes."""
    convert, found, times = Converter(), {}, []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for packet in container.demux(video=0):
            times += [packet.pts] if packet.size else []
            with contextlib.suppress(av.FFmpegError):
                found.update((frame.pts, convert(frame)) for frame in packet.decode())
    return sorted(times), found


def read_what_there_is(video, choose):
    try:
        return video.read(choose(video.num_frames))
    except FrameCountError as error:
        return video.read(choose(error.num_frames))


@pytest.mark.parametrize("name", ["b_frames.mp4", "long_groups.mov", "h264.mkv", "vp9.webm"])
def test_segments_of_a_damaged_file_have_the_frames_that_ffmpeg_decodes_at_their_times(videos, tmp_path, name):
    folder, intact = videos
    path, seen = tmp_path / name, set()
    for numbers in ([100], [103, 104, 107], [1], list(range(120, 140))):
        shutil.copy(folder / name, path)
        spoil_packets(path, numbers)
        times, found = decoded_by_time(path)
        assert scan(str(path)) is not None
        for first, count in ((0, 20), (85, 40), (102, 4), (125, 5), (180, 20)):
            expected = [found[time] for time in times[first : first + count] if time in found]
            for choose in (range, lambda n: sorted({0, n // 2, n - 1})):
                segment = open_segment(tmp_path, name, first, count)
                if not expected:
                    with pytest.raises(DataError, match=f"{name}: .*no frame of the segment can be decoded.*list:7"):
                        segment.read(list(choose(count)))
                    continue
                frames = read_what_there_is(segment, choose)
                unmet = segment.damage() is None and segment.num_frames > len(expected)  # what is lost was not needed
                others = intact[name][first : first + count] if unmet else expected
                assert np.array_equal(frames, [others[index] for index in choose(len(others))])
                if choose is range:
                    changed = len(expected) < count or not np.array_equal(expected, intact[name][first : first + count])
                    if changed and name != "vp9.webm":  # VP9 decoders take much noise for pictures
                        assert segment.damage().startswith(f"{path}: damaged (")
                    assert first < 180 or segment.damage() is None  # the damage lies in groups before
                    seen |= {"lost"} if len(expected) < count else {"changed"} if changed else set()
    assert seen


def test_frames_that_come_out_of_order_or_not_at_all_are_sorted_and_named(videos, monkeypatch):
    folder, frames = videos
    decoded = list(decode_all(str(folder / "b_frames.mp4")))
    order = [*range(7), 8, 12, 9, 10, 11, *range(13, COUNT)]  # 7 is lost
    monkeypatch.setattr(datasets.segments, "decode_all", lambda *args: (decoded[number] for number in order))
    monkeypatch.setattr(datasets.segments, "read_at", lambda *args: None)
    segment = open_segment(folder, "b_frames.mp4", 5, 8)
    expected = [frames["b_frames.mp4"][number] for number in (5, 6, 8, 9, 10, 11, 12)]
    assert np.array_equal(read_what_there_is(segment, range), expected)
    assert "damaged (1 packet without a frame)" in segment.damage()


def test_segments_of_a_damaged_file_without_a_scan_count_the_frames_that_can_be_decoded(videos, tmp_path):
    folder, _ = videos
    path = tmp_path / "mpeg4.avi"
    shutil.copy(folder / path.name, path)
    spoil_packets(path, [36, 100])
    _, found = decoded_by_time(path)
    whole = VideoFileReader(str(tmp_path), "pyav").open(VideoRecord(path.name, None, 0, "list:1"))
    frames = whole.read(range(whole.num_frames))
    for first, count in ((0, 30), (90, 30), (len(frames) - 5, 5)):
        segment = open_segment(tmp_path, path.name, first, count)
        assert np.array_equal(segment.read(range(count)), frames[first : first + count])
        assert (segment.damage() is not None) == (first > 0)
    with pytest.raises(DataError, match=f"the segment .* has {len(frames)} frames"):
        open_segment(tmp_path, path.name, len(frames) - 5, 6).read([0])


@pytest.mark.parametrize("on_damage", ["accept", "error"])
def test_a_test_scores_a_damaged_segment_and_names_it(videos, tmp_path, on_damage):
    folder, intact = videos
    shutil.copy(folder / "b_frames.mp4", tmp_path / "b_frames.mp4")
    spoil_packets(tmp_path / "b_frames.mp4", range(120, 140))
    path = tmp_path / "list.txt"
    path.write_text("b_frames.mp4 0 20 0\nb_frames.mp4 115 20 1\n")
    keys = {"modality": "video", "decoder": "pyav", "segments": True, "workers": 0, "on_damage": on_damage}
    config = loader_config((str(tmp_path), str(path)), **keys)
    loader = build_eval_loader(config)
    batches = list(loader)
    told = loader.damaged if on_damage == "accept" else loader.unreadable
    ((index, message),) = told
    assert index == 1 and "b_frames.mp4: damaged (" in message and "list.txt:2" in message
    assert sum(len(batch["indices"]) for batch in batches) == (2 if on_damage == "accept" else 1)


class OneFrameLess:
    """A decoder like decord, which counts a last packet without a frame until it reads it."""

    num_frames, damage = 10, Damage()

    def __init__(self, path):
        pass

    def read(self, indices):
        if self.num_frames == 10 and indices[-1] == 9:
            self.num_frames = 9
            raise FrameCountError(10, 9)
        return list(indices)


def test_a_segment_that_ends_at_a_frame_that_only_the_decoder_counts_ends_behind_the_file():
    assert SegmentDecoder("a.avi", 4, 5, OneFrameLess).read([0, 4]) == [4, 8]
    with pytest.raises(SegmentError, match="frames 5 to 9, but the file has 9 frames"):
        SegmentDecoder("a.avi", 5, 5, OneFrameLess).read([0, 4])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("first", "count"), [(COUNT - 3, 4), (COUNT, 1), (10**30, 1), (3, 10**30)])
def test_a_segment_that_ends_behind_the_file_is_an_error_that_names_file_line_and_frames(videos, name, first, count):
    folder, _ = videos
    with pytest.raises(DataError, match=rf"{name}: the segment .* has {COUNT} frames, from 0; listed at list:7"):
        open_segment(folder, name, first, count).read([0])


def test_decord_reads_the_same_segment(videos):
    pytest.importorskip("decord")
    folder, frames = videos
    segment = open_segment(folder, "b_frames.mp4", 137, 20, "decord")
    difference = np.subtract(segment.read([0, 19]), frames["b_frames.mp4"][137:157:19], dtype=int)
    assert np.abs(difference).max() <= 2
    with pytest.raises(DataError, match="the segment"):
        open_segment(folder, "b_frames.mp4", 190, 20, "decord")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("base", [0, 1, 17])
def test_first_frame_counts_the_frames_of_a_folder_from_0_whatever_their_first_number(tmp_path, base, packed):
    template, root = "f{:03d}.png", tmp_path / "frames"
    pictures = smooth_pictures(1, 9, (16, 12))
    (root / "a b").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(root / "a b" / template.format(number + base))
    if packed:
        prepare_data.main(["pack", str(root), str(tmp_path / "out"), "--image_tmpl", template, "--workers", "0"])
        root = tmp_path / "out"
    reader = FrameFolderReader(str(root), template, index_base=base)
    with reader.open(VideoRecord("a b", 4, 0, "list:1", 5)) as video:
        assert video.num_frames == 4 and np.array_equal(video.read([0, 3]), [pictures[5], pictures[8]])
    with pytest.raises(DataError, match=f"f{9 + base:03d}.png: frame missing; listed at list:2 with 4 frames"):
        reader.open(VideoRecord("a b", 4, 0, "list:2", 6)).read([3])


def test_lines_of_segments(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a b.mp4 0 5 1\na b.mp4 5 70 0\n")
    records = read_annotations(str(path), 2, "video", segments=True)
    assert records == read_annotations(str(path), 2, "RGB", segments=True)
    assert records[1] == VideoRecord("a b.mp4", 70, 0, f"{path}:2", 5)
    assert [record.name for record in records] == ["a b.mp4 0 5", "a b.mp4 5 70"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.mp4 -1 5 0", "first_frame must be an integer of at least 0, got '-1'"),
        ("a.mp4 0 0 0", "num_frames must be an integer of at least 1, got '0'"),
        ("a.mp4 0.5 5 0", "first_frame must be an integer"),
        ("a.mp4 5 0", "a line must read 'path first_frame num_frames label', got 'a.mp4 5 0'; lines of whole videos"),
        ("my a.mp4 5 0", "first_frame must be an integer of at least 0, got 'a.mp4'; lines of whole videos"),
        ("a.mp4 0 5 9", "label (data.num_classes is 2) must be an integer in 0..1, got '9'"),
    ],
)
def test_a_wrong_line_of_a_segment_is_an_error_that_names_it(tmp_path, line, message):
    path = tmp_path / "list.txt"
    path.write_text(f"a.mp4 0 5 1\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_annotations(str(path), 2, "video", segments=True)
    assert str(caught.value).startswith(f"{path}:2: {message}")


def test_training_samples_a_segment_as_if_it_were_a_video(videos, tmp_path):
    folder, frames = videos
    path = tmp_path / "list.txt"
    path.write_text("b_frames.mp4 30 9 0\nvp9.webm 150 9 1\n")
    config = loader_config((str(folder), str(path)), modality="video", segments=True, workers=0, num_segments=9)
    dataset = build_train_loader(config).dataset
    seen = []
    dataset.transform = lambda given, label, rng, clip: seen.append(given) or label
    dataset.transform.input_size = 32
    for index, (name, first) in enumerate((("b_frames.mp4", 30), ("vp9.webm", 150))):
        dataset[0, index]
        indices = dataset.sample(9, 0, index)
        assert np.array_equal(seen[index], [frames[name][first + i] for i in indices])


def test_the_score_file_names_segments_with_their_numbers(config, motion_root, tmp_path):
    save_untrained(config, tmp_path / "model.pt")
    path = tmp_path / "list.txt"
    path.write_text("val_00000 0 4 0\nval_00000 2 4 1\nval_00001 1 5 2\n")
    saved = score_run(config, tmp_path / "model.pt", tmp_path / "s.npz", f"data.val_list={path}", "data.segments=True")
    assert saved["paths"].tolist() == ["val_00000 0 4", "val_00000 2 4", "val_00001 1 5"]
    assert saved["labels"].tolist() == [0, 1, 2] and not np.array_equal(saved["scores"][0], saved["scores"][1])


@pytest.mark.parametrize("packed", [False, True])
def test_min_frames_and_balance_take_a_segment_for_a_video(make_frame_folders, tmp_path, caplog, packed):
    root, _ = make_frame_folders([12])
    if packed:
        prepare_data.main(["pack", root, str(tmp_path / "packed"), "--workers", "0"])
        root = str(tmp_path / "packed")
    path = tmp_path / "segments.txt"
    path.write_text("".join(f"video 0 {first} {count} {label}\n" for first, count, label in SHORT_AND_LONG))
    config = loader_config((root, str(path)), segments=True, min_frames=5, balance=True, workers=0)
    with caplog.at_level("INFO"):
        loader = build_train_loader(config)
    assert f"{path}: 2 of 6 videos left out, which have fewer frames than data.min_frames 5" in caplog.messages
    assert [record.name for record in loader.dataset.records] == [
        f"video 0 {first} {count}" for first, count, _ in SHORT_AND_LONG if count >= 5
    ]
    labels = [batch["labels"].tolist() for batch in loader]
    assert sorted(sum(labels, [])) == [0, 0, 1, 1]
    assert len(build_eval_loader(config).dataset) == 4
    assert len(build_eval_loader(config, every_video=True).dataset) == 6


def test_predict_reads_a_list_of_segments(videos, tmp_path):
    folder, frames = videos
    path = tmp_path / "list.txt"
    path.write_text("b_frames.mp4 30 9 0\nb_frames.mp4 60 4 1\nvp9.webm\n")
    records = find_videos([str(path)], "img_{:05d}.jpg", folder)
    assert [record.name.removeprefix(f"{folder}/") for record in records] == [
        "b_frames.mp4 30 9",
        "b_frames.mp4 60 4",
        "vp9.webm",
    ]
    data = default_config(data={"modality": "video"}).data
    video = PathReader(data).open(records[1])
    assert video.num_frames == 4 and np.array_equal(video.read([3])[0], frames["b_frames.mp4"][63])
    assert np.array_equal(list(all_frames(records[0], data)), frames["b_frames.mp4"][30:39])
