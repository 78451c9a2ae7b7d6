"""What the page of tools/demo_page.py shows for one uploaded video, as HTML: classes, frames, time line.

The HTML has all its pictures in itself, so that nothing of a video is written to the disk.

T frames of a clip, H, W pixels.
"""

import base64
import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import av
import numpy as np
import torch
from dotmap import DotMap
from PIL import Image
from torch import Tensor

from datasets.decoders import open_container
from datasets.sampling import sample_test
from engine.loops import view_scores
from inference.inputs import given_videos
from inference.recognizer import Recognizer, checkpoint_file, top_classes
from inference.stream import FRAME_RATE, Timeline, Window, describe_segments
from inference.timeline_plot import seconds_text, timeline_png
from utils.errors import DataError, UserError

# FFmpeg's names of the containers of datasets/video_files.py. Others, such as play lists, may lead to other files.
CONTAINERS = "asf,avi,flv,matroska,mov,mpeg,mpegts,mpegvideo,ogg"
MOST_PIXELS = 2**25  # of a frame; 8K has fewer
WINDOWS_OF_A_LONG_VIDEO = 2  # a video with fewer has no time line
PROGRESS_STEPS = 50
FEW_FRAMES = 8  # have larger pictures on the screen
TITLE = "What does this video show?"
STYLE = """<style>
.s4v h3 { margin: 1.2em 0 0.4em; font-size: 1.1em; font-weight: 600 }
.s4v p { margin: 0.3em 0 }
.s4v .facts { opacity: 0.75 }
.s4v .classes { display: grid; grid-template-columns: max-content 1fr max-content; gap: 0.4em 0.9em }
.s4v .classes > * { align-self: center }
.s4v .names { max-width: 22em; overflow: hidden; text-overflow: ellipsis }
.s4v .bar { background: color-mix(in srgb, currentColor 12%, transparent); border-radius: 3px; height: 1.1em }
.s4v .bar div { background: #0072b2; border-radius: 3px; height: 100% }
.s4v .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.s4v .first { font-weight: 600 }
.s4v h1 { margin: 0 0 0.4em; font-size: 1.6em; font-weight: 600 }
.s4v .frames { display: grid; gap: 0.7em }
.s4v figure { margin: 0 }
.s4v figcaption { font-size: 0.8em; opacity: 0.75; text-align: center }
.s4v figure img { image-rendering: pixelated; display: block; border-radius: 3px; margin: 0; width: 100% }
.s4v .timeline { width: 100%; max-width: 1100px; border-radius: 3px; margin: 0.5em 0 }
.s4v .segments { display: grid; grid-template-columns: repeat(3, max-content); gap: 0.2em 1.5em }
.s4v .error { border-left: 4px solid #d55e00; padding: 0.5em 0.9em; overflow-wrap: anywhere }
</style>"""


@dataclass(frozen=True)
class Limits:
    """Of an uploaded file: megabytes (10^6 bytes), and seconds of the video."""

    max_mb: float
    max_seconds: float


@dataclass(frozen=True)
class Answer:
    """What the model says about a video, and what it has seen of it.

    num_frames: of the whole video
    top: (class name, score), the highest first
    frames: T indices of the frames that the model has seen, from 0
    pixels: uint8 (T, H, W, 3), what entered the model, before the normalisation
    """

    num_frames: int
    top: list[tuple[str, float]]
    frames: list[int]
    pixels: np.ndarray


def answers(recognizer: Recognizer, path: str, limits: Limits, window: float, topk: int) -> Iterator[tuple[str, str]]:
    """(answer, time line) as HTML, again each time that more is known. At the end, whatever ends it, `path` is removed.

    Args:
        path: an uploaded video file, alone in its folder.
        window: seconds of a window of the time line.
        topk: classes of the answer.

    A video that cannot be read, or is beyond the limits, gives one line that says why in place of what is missing.
    """
    answer = timeline = ""
    try:
        seconds = check_upload(path, limits)
        found = recognise(recognizer, path, topk)
        answer = answer_html(os.path.basename(path), seconds, found)
        if seconds < WINDOWS_OF_A_LONG_VIDEO * window:
            least = f"{WINDOWS_OF_A_LONG_VIDEO * window:g} s"
            yield answer, section(f'<p class="facts">Videos of {least} or more also get a time line.</p>')
            return
        for timeline in timelines(recognizer, path, window, seconds):
            yield answer, timeline
    except UserError as error:
        line = error_html(error.line.replace(f"{os.path.dirname(path)}{os.sep}", ""))
        yield (answer, line) if answer else (line, "")
    finally:
        remove_upload(path)


def check_upload(path: str, limits: Limits) -> float:
    """The seconds from the first to the end of the last frame, by the time stamps of all packets.

    Raises:
        DataError: the file is too large, too long, no video file, or gone.
    """
    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise DataError(f"{name}: the file is no longer there; drop it again")
    if (size := os.path.getsize(path)) > limits.max_mb * 1e6:
        raise DataError(f"{name}: has {size / 1e6:.1f} MB, and this page takes at most {limits.max_mb:g} MB")
    try:
        with open_container(path, options={"format_whitelist": CONTAINERS}) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise DataError(f"{name}: holds no video")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MOST_PIXELS:
                raise DataError(f"{name}: frames of {width} x {height} pixels are too large for this page")
            seconds = 0.0
            for seconds in _seconds_so_far(container, stream):
                if seconds > limits.max_seconds:
                    raise DataError(f"{name}: longer than the {limits.max_seconds:g} s that this page takes")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{name}: is no video file that can be read here, or a damaged one") from error
    return seconds


def _seconds_so_far(container, stream) -> Iterator[float]:
    first = last = None
    frame_seconds = 1 / float(stream.average_rate or FRAME_RATE)
    for number, packet in enumerate(container.demux(stream), 1):
        if packet.size == 0:
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None or packet.time_base is None:  # a raw stream
            yield number * frame_seconds
            continue
        start = float(time * packet.time_base)
        end = start + (float(packet.duration * packet.time_base) if packet.duration else frame_seconds)
        first = start if first is None else min(first, start)
        last = end if last is None else max(last, end)
        yield last - first


def recognise(recognizer: Recognizer, path: str, topk: int) -> Answer:
    """What one view says, by the loader, the loop and the scores of `Recognizer.scores`, and the pixels of that view.

    Raises:
        DataError: the video cannot be read.
    """
    entered: list[Tensor] = []

    def forward(clips: Tensor) -> Tensor:
        entered.append(clips)
        return recognizer.model(clips)

    ((_, num_frames, scores, error),) = recognizer.outputs(given_videos([path]), forward, view_scores)
    if scores is None or num_frames is None:
        raise DataError(str(error))
    data, (clip,) = recognizer.config.data, entered[0]
    frames = sample_test(num_frames, data.num_segments, data.protocol, dense=data.dense)[0].tolist()
    values = scores.cpu().numpy()
    top = [(recognizer.class_names[label], float(values[label])) for label in top_classes(values, topk)]
    return Answer(num_frames, top, frames, pixels_of(clip, data))


def pixels_of(clip: Tensor, data: DotMap) -> np.ndarray:
    """The pixels, uint8 (T, H, W, 3), of which `normalize_clips` made this clip, (T, 3, H, W)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    pixels = (clip.float().cpu() * std + mean).mul(255).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def timelines(recognizer: Recognizer, path: str, window: float, seconds: float) -> Iterator[str]:
    """The time line as HTML: while it is made, how far it is; at the end the picture and the segments.

    Args:
        seconds: length of the video, at least `window`.

    Raises:
        UserError: the video cannot be read further, or the windows do not fit.
    """
    names = recognizer.class_names
    stream = recognizer.stream(path, window, live=False)
    timeline, windows, shown = Timeline(stream.stride), [], 0
    yield progress_html(0)
    with contextlib.closing(stream):
        for found in stream:
            windows.append(found)
            timeline.add(found)
            done = len(windows) * stream.stride / max(seconds - window, stream.stride)
            if shown < (step := min(PROGRESS_STEPS, int(done * PROGRESS_STEPS))):
                shown = step
                yield progress_html(step / PROGRESS_STEPS)
    segments = describe_segments(timeline.segments(), names)
    yield timeline_html(windows, segments, names, window, str(stream.damage))


def remove_upload(path: str) -> None:
    """Remove a file that may be gone already, and its folder if nothing else is in it."""
    Path(path).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))


def remove_older(folder: str, earliest: float) -> None:
    """Remove what nobody has changed since `earliest`, at any depth of a folder: uploads without an answer."""
    for path in sorted(Path(folder).rglob("*"), reverse=True):
        with contextlib.suppress(OSError):  # it is gone, or a folder that is not empty
            if path.is_file() and path.stat().st_mtime < earliest:
                path.unlink()
            elif path.is_dir() and path.stat().st_mtime < earliest:
                path.rmdir()


def introduction_html(recognizer: Recognizer, checkpoint: str, limits: Limits) -> str:
    """What the page is, for people who see it for the first time."""
    data, names = recognizer.config.data, recognizer.class_names
    file = checkpoint_file(Path(checkpoint)).absolute()
    name = os.path.join(file.parent.name, file.name)
    size = f"{data.input_size} × {data.input_size}"
    return section(
        f"<h1>{TITLE}</h1>"
        f"<p>Drop a video of at most {_length(limits.max_seconds)} and {limits.max_mb:g} MB below. The model looks at "
        f"{data.num_segments} of its frames and says which of {len(names)} classes it shows. The file is removed from "
        f"the server as soon as the answer is there.</p>"
        f"<details><summary>The {len(names)} classes</summary><p>{escape(', '.join(names))}</p></details>"
        f'<p class="facts">Model: {escape(name)} &middot; {data.num_segments} frames of {size} pixels '
        f"&middot; runs on {escape(str(recognizer.precision.device))}</p>"
    )


def answer_html(name: str, seconds: float, answer: Answer) -> str:
    rows = []
    for place, (label, score) in enumerate(answer.top):
        first = " first" if place == 0 else ""
        rows.append(
            f'<div class="names{first}" title="{escape(label)}">{escape(label)}</div>'
            f'<div class="bar"><div style="width: {100 * score:.2f}%"></div></div>'
            f'<div class="number{first}">{100 * score:.1f} %</div>'
        )
    columns = f"repeat(auto-fill, minmax({10 if len(answer.frames) <= FEW_FRAMES else 6}em, 1fr))"
    pictures = [
        f'<figure><img src="{data_uri(png(pixels))}" alt="frame {frame + 1} of the video">'
        f"<figcaption>frame {frame + 1}</figcaption></figure>"
        for frame, pixels in zip(answer.frames, answer.pixels, strict=True)
    ]
    height, across = answer.pixels.shape[1:3]
    return section(
        f"<h3>{escape(name)}</h3>"
        f'<p class="facts">{seconds:.1f} s, {answer.num_frames} frames. The most likely classes of the whole video:</p>'
        f'<div class="classes">{"".join(rows)}</div>'
        f"<h3>What the model saw</h3>"
        f'<p class="facts">The classes above follow from these {len(answer.frames)} frames alone, which are spread '
        f"over the video as in a test of the model, resized, and cropped to {across} × {height} pixels.</p>"
        f'<div class="frames" style="grid-template-columns: {columns}">{"".join(pictures)}</div>'
    )


def timeline_html(
    windows: Sequence[Window], segments: list[dict], names: Sequence[str], window: float, damage: str
) -> str:
    rows = [
        f'<div class="number">{seconds_text(segment["start"])} – {seconds_text(segment["end"])} s</div>'
        f"<div>{escape(segment['name'])}</div>"
        f'<div class="number">{100 * segment["score"]:.1f} %</div>'
        for segment in segments
    ]
    picture = data_uri(timeline_png(windows, segments, names))
    note = f"<p>Parts of the file are damaged: {escape(damage)}.</p>" if damage else ""
    return section(
        f"<h3>Time line</h3>"
        f'<p class="facts">The model on each {window:g} s of the video. The bar shows the most likely class, the lines '
        f"below show the scores of these classes.</p>{note}"
        f'<img class="timeline" src="{picture}" alt="scores over time">'
        f'<div class="segments">{"".join(rows)}</div>'
    )


def progress_html(share: float) -> str:
    """The time line while it is made; `share` of it is done, 0 to 1."""
    bar = f'<div class="bar" role="progressbar"><div style="width: {100 * share:.0f}%"></div></div>'
    return section(f'<h3>Time line</h3><p class="facts">{100 * share:.0f} % of the video is done.</p>{bar}')


def error_html(line: str) -> str:
    return section(f'<p class="error" role="alert">{escape(line)}</p>')


def section(content: str) -> str:
    return f'<div class="s4v">{STYLE}{content}</div>'


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as the content of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _length(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 120 and seconds % 60 == 0 else f"{seconds:g} s"
