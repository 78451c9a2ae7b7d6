"""A picture of a time line: the segments, and the score of each class that leads somewhere, over time."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from inference.stream import Window
from utils.atomic import write_atomically, writing

WIDTH, LEFT, RIGHT, TOP, BAR, PLOT, AXIS = 1100, 70, 260, 20, 34, 260, 46  # pixels of the parts of the picture
# Okabe and Ito's colours, which people with any colour vision can tell apart, and a lighter round of them.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d31", "#7f7f7f")


def draw_timeline(path: Path, windows: Sequence[Window], segments: list[dict[str, Any]], names: Sequence[str]) -> None:
    """Write the picture of `timeline_png` atomically.

    Raises:
        DataError: the file cannot be written.
    """
    content = timeline_png(windows, segments, names)
    with writing(path):
        write_atomically(path, lambda file: file.write(content))


def timeline_png(windows: Sequence[Window], segments: list[dict[str, Any]], names: Sequence[str]) -> bytes:
    """The picture as the content of a PNG file.

    Args:
        windows: at least one, in order.
        segments: of `inference.stream.describe_segments`.
        names: K class names.
    """
    leading = list(dict.fromkeys(segment["name"] for segment in segments))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(leading)}
    start, end = windows[0].start, max(windows[-1].end, windows[0].start + 1e-9)
    line = 22
    height = TOP + BAR + 20 + max(PLOT, line * len(leading)) + AXIS
    bottom = height - AXIS
    image = Image.new("RGB", (WIDTH, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)

    def x(seconds: float) -> float:
        return LEFT + (seconds - start) / (end - start) * (WIDTH - LEFT - RIGHT)

    def y(score: float) -> float:
        return bottom - score * (bottom - TOP - BAR - 20)

    for segment in segments:
        draw.rectangle((x(segment["start"]), TOP, x(segment["end"]), TOP + BAR), fill=colours[segment["name"]])
        draw.line((x(segment["end"]), TOP, x(segment["end"]), TOP + BAR), fill="white", width=2)
    for score in (0.0, 0.5, 1.0):
        draw.line((LEFT, y(score), WIDTH - RIGHT, y(score)), fill="#dddddd")
        draw.text((LEFT - 8, y(score)), f"{score:.1f}", fill="#333333", font=font, anchor="rm")
    for number in range(6):
        seconds = start + (end - start) * number / 5
        draw.line((x(seconds), bottom, x(seconds), bottom + 5), fill="#333333")
        draw.text((x(seconds), bottom + 10), f"{seconds_text(seconds)} s", fill="#333333", font=font, anchor="mt")
    label_of = {name: label for label, name in reversed(list(enumerate(names)))}
    for number, name in enumerate(leading):
        points = [(x((w.start + w.end) / 2), y(float(w.scores[label_of[name]]))) for w in windows]
        if len(points) > 1:
            draw.line(points, fill=colours[name], width=2, joint="curve")
        for px, py in points if len(points) < 100 else ():
            draw.ellipse((px - 2, py - 2, px + 2, py + 2), fill=colours[name])
        top = TOP + BAR + 20 + line * number
        draw.rectangle((WIDTH - RIGHT + 18, top + 3, WIDTH - RIGHT + 32, top + 17), fill=colours[name])
        draw.text((WIDTH - RIGHT + 40, top + 10), shortened(name), fill="#111111", font=font, anchor="lm")
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def seconds_text(seconds: float) -> str:
    """With two decimals, and no sign before a zero."""
    return f"{round(seconds, 2) + 0.0:.2f}"


def shortened(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
