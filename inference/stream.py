"""Windows of a long video or of a live stream, each frame through the tower once.

The tower looks at each frame alone, so windows that overlap share its work. The T frames of a window stand on a grid of
window / T seconds. What a grid frame decides alone (`SideNetwork.frame_parts`) is computed once and kept in a ring of T
frames; what mixes frames runs anew for each window.

Letters: T frames of a window, N patches of a frame, S side width, K classes, H, W pixels.
"""

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
import torch
from dotmap import DotMap
from PIL import Image

from datasets.decoders import Converter, Damage, decoded_frames, open_container
from datasets.transforms import EvalTransform, normalize_clips
from inference.inputs import folder_frames, given_videos, is_video_file
from modules.side4video import Side4Video
from utils.errors import ConfigError, DataError, UserError
from utils.precision import Precision

STDIN = "-"
FRAME_RATE = 25.0  # of frames without a clock: folders and lists
STALL_SECONDS = 10.0

log = logging.getLogger(__name__)

Source = str | Path | BinaryIO | Iterable[np.ndarray | str | Path]


class StreamError(UserError):
    """A live source gives no frames, or has broken."""


class Window(NamedTuple):
    """What the model says about a part of a video.

    start, end: seconds on the source's own clock
    scores: float32 (K,), softmax(logits) of one centre crop
    """

    start: float
    end: float
    scores: np.ndarray


class GridFrame(NamedTuple):
    """The frame that is shown at one point of the grid: number of the point from 0, its seconds, uint8 (H, W, 3)."""

    number: int
    time: float
    pixels: np.ndarray


class WindowScorer:
    """Scores of windows that slide over frames.

    Attributes:
        frames: how many frames went through the tower.
    """

    def __init__(self, model: Side4Video, precision: Precision, config: DotMap):
        self._model, self._precision, self._data = model, precision, config.data
        self._transform = EvalTransform(config.data.input_size, config.data.resize)
        self._ring: list[torch.Tensor] = []  # of all parts: (T, N, 3S), then (T, 1 + N, S) for each layer
        self._next = 0  # place in the ring that is written next: that of the oldest frame
        self.frames = 0

    def clear(self) -> None:
        """Forget all frames."""
        self._ring, self._next = [], 0

    @torch.inference_mode()
    def add(self, frame: np.ndarray) -> None:
        """A frame, uint8 (H, W, 3), takes the place of the oldest one."""
        data, side = self._data, self._model.trained.side
        clip = self._transform([frame]).to(self._precision.device)  # (1, 1, 3, H, W)
        clip = normalize_clips(clip, tuple(data.mean), tuple(data.std))
        with self._precision.autocast():
            products, projected = side.frame_parts(clip, self._model.backbone.layer_tokens(clip))
            for place, part in enumerate((products, *projected)):
                if place == len(self._ring):
                    self._ring.append(part.new_empty(data.num_segments, *part.shape[2:]))
                self._ring[place][self._next] = part[0, 0]
        self._next = (self._next + 1) % data.num_segments
        self.frames += 1

    @torch.inference_mode()
    def repeat(self) -> None:
        """The newest frame takes the place of the oldest one too: it stands for a frame that was dropped."""
        for part in self._ring:
            part[self._next] = part[self._next - 1]
        self._next = (self._next + 1) % self._data.num_segments

    @torch.inference_mode()
    def scores(self) -> np.ndarray:
        """float32 (K,) of the last T frames."""
        products, *projected = (torch.cat([part[self._next :], part[: self._next]])[None] for part in self._ring)
        with self._precision.autocast():
            logits = self._model.trained.classify(self._model.trained.side.mix_frames(products, projected))
        return logits.float().softmax(dim=-1)[0].cpu().numpy()


class WindowStream(Iterator[Window]):
    """An iterator over the windows of one source.

    Attributes:
        dropped: grid frames that a live source gave too fast; in their windows, the frame before stands in their place.
        damage: what could not be decoded so far.
    """

    def __init__(
        self,
        model: Side4Video,
        precision: Precision,
        config: DotMap,
        source: Source,
        window: float,
        stride: float | None = None,
        *,
        live: bool | None = None,
        rate: float = FRAME_RATE,
        stall_seconds: float = STALL_SECONDS,
        reopen: int = 0,
    ):
        """
        Args:
            source: a video file; `-` for the standard input; an address or a device that PyAV opens; a binary file
                object; a folder of frames; or an iterable of frames, uint8 (H, W, 3), or of image files.
            window: seconds of a window.
            stride: seconds from one window to the next, a multiple of window / T; None is one grid frame.
            live: frames come at their own pace, and are dropped if they come too fast. None: addresses and devices are
                live; whoever writes into a pipe waits. True for a file follows it while it grows.
            rate: frames a second of a folder or an iterable.
            stall_seconds: a live source that gives no frame for so long has stalled.
            reopen: how often a live source that stalls or breaks is opened again.

        Raises:
            ConfigError: window, stride or rate do not fit.
        """
        num_frames = config.data.num_segments
        if not 0 < window < float("inf"):
            raise ConfigError(f"window: must be a number of seconds above 0, got {window}")
        if not 0 < rate < float("inf"):
            raise ConfigError(f"rate: must be a number of frames a second above 0, got {rate}")
        self.spacing = window / num_frames
        self.step = 1 if stride is None else round(stride / self.spacing) if 0 < stride < float("inf") else 0
        if self.step < 1 or (stride is not None and abs(self.step * self.spacing - stride) > 1e-6 * window):
            raise ConfigError(
                f"stride: {stride} s is no multiple of window / data.num_segments = {window} / {num_frames} = "
                f"{self.spacing:g} s, the grid on which frames are shared"
            )
        self.window, self.stride = window, self.step * self.spacing
        self.live = is_live(source) if live is None else live
        self.dropped, self.damage = 0, Damage()
        self._source, self._rate, self._stall_seconds, self._reopen = source, rate, stall_seconds, reopen
        self._num_frames = num_frames
        self._scorer = WindowScorer(model, precision, config)
        self._config = config
        self._windows = self._all_windows()

    def __next__(self) -> Window:
        return next(self._windows)

    def close(self) -> None:
        """Close the source."""
        self._windows.close()

    def _all_windows(self) -> Generator[Window]:
        end, opened = None, 0
        while True:
            try:
                for found in self._windows_of_one_opening(end):
                    end, opened = found.end, 0
                    yield found
                return
            except StreamError as error:
                opened += 1
                if opened > self._reopen:
                    raise
                log.warning("%s; opened again", error.line)

    def _windows_of_one_opening(self, earliest: float | None) -> Iterator[Window]:
        """Windows until the source ends. Their times go on from `earliest` if the source's clock starts anew."""
        frames = self._grid_frames()
        if self.live:
            frames = self._as_they_come(frames)
        self._scorer.clear()
        done, first, shift = 0, 0, 0.0  # grid points, counted from the first one that arrived; its number
        with closing(frames):
            for frame in frames:
                if done == 0:
                    first = frame.number
                    shift = max(0.0, earliest - frame.time) if earliest is not None else 0.0
                time = frame.time + shift - (frame.number - first) * self.spacing  # of the first grid point
                while done < frame.number - first:
                    self._scorer.repeat()  # for a frame that was dropped
                    done += 1
                    yield from self._finished(done, time)
                if done % self.step < self._num_frames:  # no window needs the others
                    self._scorer.add(frame.pixels)
                done += 1
                yield from self._finished(done, time)
        if done < self._num_frames and earliest is None:
            raise DataError(
                f"{name_of(self._source)}: {done * self.spacing:.2f} s of frames, less than one window of "
                f"{self.window:g} s"
            )

    def _finished(self, done: int, time: float) -> Iterator[Window]:
        """The window that ends with grid point number `done`, if one does; `time` is that of the first grid point."""
        first = done - self._num_frames
        if first >= 0 and first % self.step == 0:
            start = time + (first - 0.5) * self.spacing
            yield Window(start, start + self.window, self._scorer.scores())

    def _grid_frames(self) -> Generator[GridFrame]:
        source, name = self._source, name_of(self._source)
        try:
            if isinstance(source, str | Path) and holds_frames(source):
                (record,) = given_videos([source])
                yield from self._at_rate(folder_frames(record, self._config.data))
            elif isinstance(source, str | Path | BinaryIO) or hasattr(source, "read"):
                with open_source(source, self.live, self._stall_seconds) as container:
                    yield from on_grid(timed_frames(container, self.damage), self.spacing)
            else:
                yield from self._at_rate(source)
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            kind = StreamError if self.live else DataError
            raise kind(f"{name}: cannot be read further ({reason})") from error

    def _at_rate(self, frames: Iterable[np.ndarray | str | Path]) -> Iterator[GridFrame]:
        timed = ((number / self._rate, partial(as_pixels, frame)) for number, frame in enumerate(frames))
        yield from on_grid(timed, self.spacing, 1 / self._rate)

    def _as_they_come(self, frames: Iterator[GridFrame]) -> Generator[GridFrame]:
        """Grid frames of a live source, read in a thread: if they come too fast, the oldest are dropped and counted."""
        # Room for a window and for the mark of the end.
        arrived: queue.Queue[GridFrame | BaseException | None] = queue.Queue(self._num_frames + 1)
        stopped = threading.Event()

        def put(item: GridFrame | BaseException | None) -> None:
            while not stopped.is_set():
                try:
                    return arrived.put_nowait(item)
                except queue.Full:
                    try:
                        arrived.get_nowait()
                        self.dropped += 1
                    except queue.Empty:
                        pass

        def read() -> None:
            try:
                for frame in frames:
                    if stopped.is_set():
                        break
                    put(frame)
                put(None)
            except BaseException as error:  # raised again by the reader of the queue
                put(error)

        thread = threading.Thread(target=read, daemon=True)  # a read that hangs must not keep the program
        thread.start()
        try:
            while True:
                try:
                    item = arrived.get(timeout=self._stall_seconds)
                except queue.Empty:
                    stall = f"{name_of(self._source)}: no frame for {self._stall_seconds:g} s, the stream has stalled"
                    raise StreamError(stall) from None
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()


def on_grid(
    frames: Iterable[tuple[float, Callable[[], np.ndarray]]], spacing: float, last_length: float | None = None
) -> Iterator[GridFrame]:
    """The frame that is shown in the middle of each cell of a grid that starts with the first frame.

    Args:
        frames: (seconds, function that gives the pixels) in the order of presentation.
        spacing: seconds of a cell.
        last_length: seconds that the last frame is shown; None: as long as the one before.
    """
    number, first, shown = 0, None, None
    for time, pixels in frames:
        first = time if first is None else first
        while shown is not None and (middle := first + (number + 0.5) * spacing) < time:
            yield GridFrame(number, middle, shown[1]())
            number += 1
        if shown is not None and last_length is None:
            length = time - shown[0]
        elif shown is None:
            length = last_length or 0.0
        shown = time, pixels
    if shown is not None and first is not None:
        while (middle := first + (number + 0.5) * spacing) < shown[0] + (last_length or length):
            yield GridFrame(number, middle, shown[1]())
            number += 1


def timed_frames(container: Any, damage: Damage) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
    """(seconds on the file's clock, function that gives the pixels) of each frame; times never go backwards."""
    convert, before = Converter(), None
    for frame in decoded_frames(container, damage):
        time = frame.time
        if time is None or (before is not None and time <= before):  # no clock, or a broken one
            rate = container.streams.best("video").average_rate
            time = 0.0 if before is None else before + 1 / float(rate or FRAME_RATE)
        before = time
        yield time, partial(convert, frame)


def open_source(source: Any, live: bool, stall_seconds: float) -> Any:
    """Open what PyAV can open."""
    if source == STDIN:
        return av.open(sys.stdin.buffer, metadata_errors="replace")
    if not isinstance(source, str | Path):
        return av.open(source, metadata_errors="replace")
    if os.path.exists(source):
        if live and os.path.isfile(source):  # goes on reading where a file that is still written ends
            return av.open(f"file:{os.path.abspath(source)}", options={"follow": "1"}, metadata_errors="replace")
        return open_container(source)
    if "://" not in str(source):
        raise ValueError("no such file, folder, device or address")
    return av.open(str(source), timeout=stall_seconds, metadata_errors="replace")


def as_pixels(frame: np.ndarray | str | Path) -> np.ndarray:
    if isinstance(frame, np.ndarray):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"a frame must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        return frame
    with Image.open(frame) as image:
        return np.array(image.convert("RGB"))


def holds_frames(path: str | Path) -> bool:
    """A folder of frames, or a packed one."""
    return not is_video_file(str(path))


def is_live(source: Source) -> bool:
    """Whether frames come at their own pace: those of an address or of a device."""
    path = isinstance(source, str | Path) and source != STDIN
    return path and not (os.path.isfile(str(source)) or holds_frames(str(source)))


def name_of(source: Source) -> str:
    if isinstance(source, str | Path):
        return "the standard input" if source == STDIN else str(source)
    return str(getattr(source, "name", "the frames"))


@dataclass(frozen=True)
class Segment:
    """Neighbouring windows of one highest class: seconds, the class's label, and its mean score."""

    start: float
    end: float
    label: int
    score: float


class Timeline:
    """Segments of a stream, built window by window.

    A window speaks for the `stride` seconds around its middle, the first and the last one also for what lies before and
    behind.
    """

    def __init__(self, stride: float):
        self._stride = stride
        self._runs: list[tuple[int, float, float, list[float]]] = []  # label, first start, last end, scores
        self._middles: list[float] = []  # where each run begins, as the middle between two windows

    def add(self, window: Window) -> None:
        """The next window."""
        label = int(window.scores.argmax())
        score = float(window.scores[label])
        if self._runs and self._runs[-1][0] == label:
            _, start, _, scores = self._runs[-1]
            self._runs[-1] = label, start, window.end, [*scores, score]
            return
        self._middles.append((window.start + window.end - self._stride) / 2 if self._runs else window.start)
        self._runs.append((label, window.start, window.end, [score]))

    def segments(self) -> list[Segment]:
        """What the windows so far say, without gaps, in order."""
        ends = [*self._middles[1:], self._runs[-1][2]] if self._runs else []
        return [
            Segment(start, end, label, sum(scores) / len(scores))
            for start, end, (label, _, _, scores) in zip(self._middles, ends, self._runs, strict=True)
        ]


def describe_segments(segments: Sequence[Segment], names: Sequence[str]) -> list[dict[str, Any]]:
    """As they stand in files: {"start", "end", "name", "score"}."""
    return [{"start": s.start, "end": s.end, "name": names[s.label], "score": s.score} for s in segments]
