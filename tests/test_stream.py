"""Windows of long videos and live streams: the scores of each window by itself, whatever is shared between windows."""

import io
import itertools
import json
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from tiny import save_untrained

from datasets.transforms import EvalTransform, normalize_clips
from inference import Recognizer
from inference.stream import StreamError, Timeline, Window, WindowScorer, on_grid
from tools import predict as predict_program
from tools.motion_demo import render_video
from utils.errors import ConfigError, DataError

SIZE, FRAMES = 64, 4
TOWERS = {
    "CLIP": {"arch": "timm/vit_tiny_patch16_224", "backbone_kwargs": {"pre_norm": True, "depth": 3}},
    "EVA": {"arch": "timm/eva02_tiny_patch14_224", "backbone_kwargs": {"depth": 3, "patch_size": 16}},
    "registers": {"arch": "timm/vit_small_patch14_reg4_dinov2", "backbone_kwargs": {"depth": 2, "patch_size": 16}},
}


def make_recognizer(config, folder, tower="CLIP", variant="pre", seed=0):
    content = yaml.safe_load(Path(config).read_text())
    content["data"] |= {"num_segments": FRAMES, "input_size": 32, "resize": 40}
    content["network"] |= {**TOWERS[tower], "side_variant": variant, "init": False}
    (folder / "stream.yaml").write_text(yaml.safe_dump(content))
    torch.manual_seed(seed)
    save_untrained(folder / "stream.yaml", folder / "stream.pt")
    return Recognizer.load(folder / "stream.pt")


@pytest.fixture
def recognizer(config, tmp_path):
    return make_recognizer(config, tmp_path)


def pictures(count, size=(48, 56), seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8))


def scores_alone(recognizer, frames):
    """The slow, obvious form: one window as one clip through the whole model."""
    data = recognizer.config.data
    clips = EvalTransform(data.input_size, data.resize)(frames)
    with torch.no_grad():
        logits = recognizer.model(normalize_clips(clips, tuple(data.mean), tuple(data.std)))
    return logits.softmax(dim=-1)[0].numpy()


@pytest.mark.parametrize("variant", ["pre", "post"])
@pytest.mark.parametrize("tower", TOWERS)
def test_each_window_has_the_scores_that_it_has_by_itself(config, tmp_path, tower, variant):
    recognizer, frames = make_recognizer(config, tmp_path, tower, variant), pictures(11)
    stream = recognizer.stream(frames, window=FRAMES / 25, stride=1 / 25)
    windows = list(stream)
    assert len(windows) == 8 and stream._scorer.frames == 11  # each frame went through the tower once
    spread = 0.0
    for number, (start, end, scores) in enumerate(windows):
        assert (start, end) == pytest.approx((number / 25, (number + FRAMES) / 25))
        alone = scores_alone(recognizer, frames[number : number + FRAMES])
        assert np.abs(scores - alone).max() < 1e-5
        spread = max(spread, np.abs(windows[0].scores - alone).max())
    assert spread > 1e-4  # windows differ by more than they may be apart


@pytest.mark.parametrize(("step", "used"), [(2, 10), (4, 8), (6, 10)])
def test_a_longer_stride_gives_every_nth_window_and_skips_frames_that_none_needs(recognizer, step, used):
    frames = pictures(11)
    stream = recognizer.stream(frames, window=FRAMES / 25, stride=step / 25)
    starts = range(0, 11 - FRAMES + 1, step)
    for first, window in itertools.zip_longest(starts, stream):
        assert window.start == pytest.approx(first / 25)
        assert np.abs(window.scores - scores_alone(recognizer, frames[first : first + FRAMES])).max() < 1e-5
    needed = {frame for frame in range(11) if frame % step < FRAMES} if step > FRAMES else set(range(11))
    assert stream._scorer.frames == len(needed)


def test_the_grid_follows_the_clock_of_a_variable_rate():
    times = [10.0, 10.1, 10.2, 11.0, 11.05, 11.9]
    shown = [(t, lambda t=t: t) for t in times]
    found = [(frame.number, round(frame.time, 6), frame.pixels) for frame in on_grid(shown, 0.5)]
    # The last frame is shown for 0.85 s, as the one before, so until 12.75 s.
    assert found == [(0, 10.25, 10.2), (1, 10.75, 10.2), (2, 11.25, 11.05), (3, 11.75, 11.05), (4, 12.25, 11.9)]


def write_file(path, frames, times):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for seconds, pixels in zip(times, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(1000 * seconds), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_the_windows_of_a_file_have_the_times_of_its_own_clock(recognizer, tmp_path):
    times = [2 + number / 25 + (3 if number >= 12 else 0) for number in range(24)]  # 3 s without a new frame
    write_file(tmp_path / "a.mkv", pictures(24), times)
    windows = list(recognizer.stream(tmp_path / "a.mkv", window=1.0, stride=0.25))
    assert windows[0].start == pytest.approx(2.0, abs=0.01) and windows[0].end - windows[0].start == pytest.approx(1)
    assert times[-1] - 0.25 < windows[-1].end < times[-1] + 0.04 + 0.125  # at most half a cell behind the last frame
    assert np.array_equal(windows[4].scores, windows[6].scores)  # both see one frame only
    assert not np.array_equal(windows[0].scores, windows[4].scores)


def test_a_file_a_pipe_and_a_folder_of_the_same_frames_give_the_same_windows(recognizer, tmp_path, monkeypatch):
    write_file(tmp_path / "a.mkv", pictures(12), [number / 25 for number in range(12)])
    expected = list(recognizer.stream(tmp_path / "a.mkv", window=0.16))
    piped = list(recognizer.stream(io.BytesIO((tmp_path / "a.mkv").read_bytes()), window=0.16))
    with av.open(str(tmp_path / "a.mkv")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    listed = list(recognizer.stream(frames, window=0.16))
    for windows in (piped, listed):
        assert [w.start for w in windows] == pytest.approx([w.start for w in expected], abs=2e-3)
        assert all(np.abs(w.scores - e.scores).max() < 1e-6 for w, e in zip(windows, expected, strict=True))


def test_memory_does_not_grow_over_ten_thousand_windows(recognizer):
    """The ring keeps its tensors, and nothing that a window made is kept."""
    frame, scorer = pictures(1)[0], WindowScorer(recognizer.model, recognizer.precision, recognizer.config)
    parts = recognizer.model.trained.side
    real, seen = parts.frame_parts, []

    def counted(clips, layer_tokens):  # the tower's work of one frame, again and again
        if not seen:
            products, projected = real(clips, layer_tokens)
            seen.append((products, list(projected)))
        return seen[0]

    parts.frame_parts = counted
    frames = (frame for _ in range(10_000 + FRAMES - 1))
    stream = recognizer.stream(frames, window=FRAMES / 25)
    stream._scorer = scorer
    scorer.scores = lambda: len(scorer._ring)
    kept = None
    for number, window in enumerate(stream, 1):
        if number in (10, 10_000):
            sizes = [(part.data_ptr(), part.shape) for part in scorer._ring]
            assert kept is None or kept == sizes
            kept = sizes
        assert window.scores == len(kept or scorer._ring)
    assert number == 10_000 and scorer.frames == 10_003


# Live sources


class Paced:
    """A binary file object that waits before each read, or ends badly."""

    name = "camera"

    def __init__(self, content, wait=lambda: None):
        self._file, self._wait = io.BytesIO(content), wait

    def read(self, size):
        self._wait()
        return self._file.read(size)


@pytest.fixture
def ts_file(tmp_path):
    write_file(tmp_path / "a.ts", pictures(60), [number / 25 for number in range(60)])
    return (tmp_path / "a.ts").read_bytes()


def test_a_live_source_that_is_too_fast_drops_grid_frames_and_counts_them(recognizer, ts_file):
    """The first frame goes through the tower when the whole source has been read."""
    stream = recognizer.stream(frames_then_event(60, done := threading.Event()), window=0.16, live=True)
    add = stream._scorer.add
    stream._scorer.add = lambda frame: (done.wait(30), add(frame))
    windows = list(stream)
    assert stream.dropped >= 60 - FRAMES - 2 and stream._scorer.frames + stream.dropped == 60
    starts = [window.start for window in windows]
    assert np.diff(starts) == pytest.approx(0.04)  # no window is missing
    assert windows[-1].end == pytest.approx(60 / 25)


def frames_then_event(count, done):
    yield from pictures(count)
    done.set()


def test_a_live_source_that_stalls_is_an_error_with_its_name(recognizer, ts_file):
    release = threading.Event()
    reads = itertools.count()
    camera = Paced(ts_file, wait=lambda: release.wait(20) if next(reads) > 2 else None)
    with pytest.raises(StreamError, match="^camera: no frame for 0.3 s, the stream has stalled$"):
        list(recognizer.stream(camera, window=0.16, live=True, stall_seconds=0.3))
    release.set()


def test_a_live_source_that_breaks_is_opened_again_and_its_times_go_on(
    recognizer, ts_file, tmp_path, caplog, monkeypatch
):
    """The first opening ends in an error, as an address does whose server goes away."""
    from inference import stream as module

    opened, real, seen = [], module.timed_frames, threading.Event()

    def breaking(container, damage):
        opened.append(1)
        for number, frame in enumerate(real(container, damage)):
            if len(opened) == 1 and number == 30:
                seen.wait(30)
                raise OSError(5, "Input/output error")
            yield frame

    (tmp_path / "a.ts").write_bytes(ts_file)
    monkeypatch.setattr(module, "timed_frames", breaking)
    options = {"window": 0.16, "stride": 0.16, "live": True, "stall_seconds": 30}
    monkeypatch.setattr(module, "open_source", lambda source, live, stall: av.open(str(source)))
    seen.set()
    with pytest.raises(StreamError, match=r"a.ts: cannot be read further \(Input/output error\)"):
        list(recognizer.stream(tmp_path / "a.ts", **options))
    opened.clear()
    seen.clear()
    windows = []
    for window in recognizer.stream(tmp_path / "a.ts", reopen=1, **options):
        windows.append(window)
        seen.set()  # it breaks after the first window
    assert len(opened) == 2 and "cannot be read further (Input/output error); opened again" in caplog.text
    starts = [window.start for window in windows]
    assert starts == sorted(starts) and windows[-1].end > 60 / 25  # longer than one opening of the file


# Errors


def test_values_that_do_not_fit_and_sources_that_are_none_are_errors(recognizer, tmp_path):
    for options, message in (
        ({"window": 0.0}, "window: must be a number of seconds above 0"),
        ({"window": float("nan")}, "window: must be a number of seconds above 0"),
        ({"window": 2.0, "stride": 0.3}, r"stride: 0.3 s is no multiple of .* = 0.5 s"),
        ({"window": 2.0, "stride": -1}, "stride: -1 s is no multiple"),
        ({"window": 2.0, "rate": 0}, "rate: must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            recognizer.stream(pictures(3), **options)
    with pytest.raises(DataError, match="0.12 s of frames, less than one window of 0.16 s"):
        list(recognizer.stream(pictures(3), window=0.16))
    with pytest.raises(StreamError, match="no.mp4: cannot be read further .no such file, folder, device or address"):
        list(recognizer.stream("no.mp4", window=1.0))
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(DataError, match="text.mp4: cannot be read further"):
        list(recognizer.stream(tmp_path / "text.mp4", window=1.0))


# Time lines


def window_of(start, label, score=0.75):
    scores = np.full(3, (1 - score) / 2, np.float32)
    scores[label] = score
    return Window(start, start + 2.0, scores)


def test_neighbouring_windows_of_one_class_are_one_segment_and_segments_have_no_gaps():
    timeline = Timeline(stride=0.5)
    for number, label in enumerate((0, 0, 2, 2, 2, 1)):
        timeline.add(window_of(number * 0.5, label, 0.5 + number / 20))
    found = [(s.start, s.end, s.label, round(s.score, 6)) for s in timeline.segments()]
    # Windows speak for the half second around their middles 1.0, 1.5, 2.0, ...
    assert found == [(0.0, 1.75, 0, 0.525), (1.75, 3.25, 2, 0.65), (3.25, 4.5, 1, 0.75)]
    assert Timeline(0.5).segments() == []


def test_the_program_writes_windows_as_they_come_and_then_the_segments(recognizer, tmp_path, capsys):
    write_file(tmp_path / "a.mkv", pictures(50), [number / 25 for number in range(50)])
    arguments = [str(tmp_path / "stream.pt"), str(tmp_path / "a.mkv"), "--window", "1", "--stride", "0.25"]
    predict_program.main([*arguments, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "p.png")])
    *windows, last = map(json.loads, (tmp_path / "out.json").read_text().splitlines())
    assert len(windows) == 5 and windows[1].keys() == {"path", "start", "end", "top"}
    assert windows[1]["start"] == pytest.approx(0.25, abs=1e-2) and len(windows[1]["top"]) == 5
    assert last["windows"] == 5 and last["dropped"] == 0 and last["error"] is None and last["damage"] is None
    assert set(last["segments"][0]) == {"start", "end", "name", "score"}
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert "segments:" in capsys.readouterr().out


def test_a_source_that_breaks_keeps_the_windows_before_and_ends_with_its_error(recognizer, tmp_path):
    with pytest.raises(StreamError, match="no such file, folder, device or address"):
        predict_program.main([str(tmp_path / "stream.pt"), "no.mp4", "--window", "1", "--json", str(tmp_path / "o")])
    (row,) = map(json.loads, (tmp_path / "o").read_text().splitlines())
    assert row["windows"] == 0 and "no such file" in row["error"] and row["segments"] == []


def test_a_time_line_of_five_motions_finds_at_least_four(trained_demo, tmp_path):
    """Motions after each other, as in an untrimmed video: each right segment is off by less than a window."""
    checkpoint, _ = trained_demo
    recognizer = Recognizer.load(checkpoint)
    labels, length, rate = (0, 3, 8, 1, 9), 40, 25
    videos = [render_video(label, np.random.default_rng(label), 32, length) for label in labels]
    write_file(tmp_path / "long.mkv", np.concatenate(videos), [n / rate for n in range(length * len(labels))])
    window, stride = 8 * recognizer.config.data.num_segments / 6 / rate, None
    stream = recognizer.stream(tmp_path / "long.mkv", window, stride)
    timeline = Timeline(stream.stride)
    for found in stream:
        timeline.add(found)
    segments = timeline.segments()
    right = 0
    for place, label in enumerate(labels):
        start, end = place * length / rate, (place + 1) * length / rate
        right += any(
            s.label == label and abs(s.start - start) <= window and abs(s.end - end) <= window for s in segments
        )
    assert right >= 4, [(s.start, s.end, recognizer.class_names[s.label]) for s in segments]
    assert all(a.end == b.start for a, b in itertools.pairwise(segments))
