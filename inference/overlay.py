"""A video with the classes that a model sees in it drawn on its frames."""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from dotmap import DotMap
from PIL import Image, ImageDraw, ImageFont

from datasets.annotations import VideoRecord
from datasets.decoders import open_container, upright_frames
from inference.inputs import folder_frames, is_video_file
from utils.atomic import write_atomically
from utils.errors import DataError

FOLDER_RATE = Fraction(25)  # frames a second of a folder, which says nothing about time
SMALLEST = 240  # pixels of the shorter side: smaller frames are enlarged, so that text can be read


def write_overlay(path: Path, record: VideoRecord, data: DotMap, top: list[tuple[str, float]]) -> None:
    """Write an mp4 file (H.264) atomically: all frames of a video, with names and scores in their lower left corner.

    Args:
        path: file to write.
        record: a video that can be read.
        data: section `data` of the configuration.
        top: (name, score) of the classes to draw.

    Raises:
        DataError: the video cannot be read to its end, or the file cannot be written.
    """
    pictures = (draw_classes(frame, top) for frame in all_frames(record, data))
    write_mp4(path, pictures, frame_rate(record.path), f"the overlay of {record.path}")


def write_mp4(path: Path, pictures: Iterator[Image.Image], rate: Fraction, what: str) -> None:
    """Write pictures of even width and height as an mp4 file (H.264), atomically.

    Args:
        rate: pictures a second.
        what: is written, for the error.

    Raises:
        DataError: the file cannot be written, or the pictures come from a video that cannot be read to its end.
    """

    def write(file) -> None:
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.pix_fmt = "yuv420p"
            for number, picture in enumerate(pictures):
                if number == 0:
                    stream.width, stream.height = picture.size
                elif picture.size != (stream.width, stream.height):  # a few files change it on the way
                    picture = picture.resize((stream.width, stream.height))
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())

    try:
        write_atomically(path, write)
    except (OSError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: {what} cannot be written: {reason}") from error


def draw_classes(frame: np.ndarray, top: list[tuple[str, float]]) -> Image.Image:
    """The frame, uint8 (H, W, 3), with a bar, a score and a name for each class; both sides are even, as H.264 asks."""
    image = Image.fromarray(frame)
    scale = max(1.0, SMALLEST / min(image.size))
    width, height = (2 * round(size * scale / 2) for size in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    line = max(12, height // 16)
    font = ImageFont.load_default(size=0.75 * line)
    below = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(below)
    up = height - line * len(top)
    draw.rectangle((0, up, width, height), fill=(0, 0, 0, 140))
    for row, (name, score) in enumerate(top):
        y = up + row * line
        draw.rectangle((0, y + 1, round(score * width), y + line - 2), fill=(60, 120, 220, 170))
        draw.text((line // 3, y + line / 2), f"{score:.2f}  {name}", fill="white", font=font, anchor="lm")
    return Image.alpha_composite(image.convert("RGBA"), below).convert("RGB")


def all_frames(record: VideoRecord, data: DotMap) -> Iterator[np.ndarray]:
    """Every frame of a video, uint8 (H, W, 3), in bounded memory."""
    if is_video_file(record.path):
        first, count = record.first_frame, record.num_frames
        end = None if first is None or count is None else first + count
        yield from itertools.islice(upright_frames(record.path), first, end)
        return
    yield from folder_frames(record, data)


def frame_rate(path: str) -> Fraction:
    """Frames a second: the mean that a video file states, or FOLDER_RATE."""
    if not is_video_file(path):
        return FOLDER_RATE
    with open_container(path) as container:
        return container.streams.best("video").average_rate or FOLDER_RATE
