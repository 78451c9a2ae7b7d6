"""Draw where the side network looks in a video.

    python tools/visualize.py CHECKPOINT VIDEO OUT [--class NAME] [--set KEY=VALUE] ...

Writes OUT.png, a strip of frames, and OUT.mp4, all frames of the clip. Each frame is shown three times: as the model
sees it, with the patches that speak for the class, and with those that the last side block attends to. OUT may also be
a folder, or end in .png or .mp4. docs/report.md says how to read the pictures.
"""

import argparse
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference.inputs import find_videos
from inference.looking import Look, look
from inference.overlay import write_mp4
from inference.recognizer import top_classes
from tools.recognizer_options import add_model_options, load_recognizer
from utils.atomic import probe, write_atomically, writing
from utils.errors import ConfigError, UserError, run_program

MOST_FRAMES = 8  # of the strip
FULL_HEAT = 0.97  # share of the patches of a clip that are cooler than the brightest colour
CELL = 160  # pixels of a frame in the pictures
RATE = Fraction(4)  # frames a second of the mp4 file
ROWS = ("what the model sees", "speaks for the class", "attention of the last block")
# Dark to bright, as of matplotlib's "inferno".
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="visualize.py", description="Draw where the side network looks in a video.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model_best.pt of a run, its folder, a released one")
    parser.add_argument("video", metavar="VIDEO", help="video file, or folder of frames")
    parser.add_argument("out", metavar="OUT", type=Path, help="OUT.png and OUT.mp4 are written")
    parser.add_argument("--class", dest="name", metavar="NAME", help="class or label (default: the highest score)")
    add_model_options(parser)
    args = parser.parse_args(argv)
    args.workers = args.workers or 0  # one video
    png, mp4 = outputs(args.out, Path(args.video))
    for path in (png, mp4):
        probe(path)
    recognizer = load_recognizer(args)
    records = find_videos([args.video], recognizer.config.data.image_tmpl, args.root)
    if len(records) != 1:
        raise UserError(f"{args.video}: holds {len(records)} videos; name one")
    label = None if args.name is None else find_class(args.name, recognizer.class_names)
    found = look(recognizer, records[0], label)
    names = recognizer.class_names
    title = f"{names[found.label]}: {100 * found.scores[found.label]:.1f} %"
    best = top_classes(found.scores, 1)[0]
    if best != found.label:
        title += f" (the highest: {names[best]}, {100 * found.scores[best]:.1f} %)"
    strip = draw_strip(found, title)
    with writing(png):
        write_atomically(png, lambda file: strip.save(file, "png", optimize=True))
    write_mp4(mp4, draw_frames(found, title), RATE, "the pictures")
    print(f"{args.video}: {title}")
    print(f"written: {png}, {mp4}")


def outputs(out: Path, video: Path) -> tuple[Path, Path]:
    """The files to write for OUT: in a folder they are called as the video, else OUT is their name without suffix."""
    stem = out / video.stem if out.is_dir() else out
    if stem.suffix.lower() in (".png", ".mp4"):
        stem = stem.with_suffix("")
    return stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".mp4")


def find_class(name: str, names: list[str]) -> int:
    """The label of a class that is given by its name or its label. Raises ConfigError for another one."""
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    raise ConfigError(f"--class {name}: no class of the model; {len(names)} classes, such as {names[0]!r}")


def heated(frame: Image.Image, weights: np.ndarray, largest: np.floating) -> Image.Image:
    """A frame in which patches shine by their weight, float (rows, columns); `largest` is full heat."""
    share = Image.fromarray(np.clip(weights / max(largest, 1e-12), 0, 1).astype(np.float32))
    heat = np.asarray(share.resize(frame.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    steps = np.linspace(0, 1, len(HEAT))
    colours = np.concatenate([np.interp(heat, steps, HEAT[:, channel]) for channel in range(3)], axis=-1)
    grey = np.asarray(frame.convert("L"), float)[..., None]
    alpha = 0.25 + 0.6 * heat
    return Image.fromarray((grey * (1 - alpha) + colours * alpha).round().astype(np.uint8))


def rows_of(found: Look, place: int) -> list[Image.Image]:
    """The three pictures of one frame. A map has one scale for the whole clip, so that frames can be compared.

    The hottest patches, a share of 1 - FULL_HEAT, are cut: a single one would leave the others dark.
    """
    frame = Image.fromarray(found.pixels[place]).resize((CELL, CELL), Image.Resampling.BICUBIC)
    maps = (found.gradient, found.attention)
    return [frame, *(heated(frame, weights[place], np.quantile(weights, FULL_HEAT)) for weights in maps)]


def draw_strip(found: Look, title: str) -> Image.Image:
    """A row for each of ROWS, a column for each frame, at most MOST_FRAMES."""
    count = len(found.pixels)
    places = np.unique(np.linspace(0, count - 1, min(count, MOST_FRAMES)).round().astype(int))
    font, gap, line = ImageFont.load_default(size=14), 3, 22
    width = max(3 * CELL, len(places) * (CELL + gap) - gap)
    sheet = Image.new("RGB", (width, line * 2 + 3 * (CELL + line)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, line / 2), title, fill="black", font=ImageFont.load_default(size=16), anchor="lm")
    for row, name in enumerate(ROWS):
        draw.text((4, line * 1.5 + row * (CELL + line)), name, fill="#444444", font=font, anchor="lm")
    for column, place in enumerate(places):
        for row, picture in enumerate(rows_of(found, place)):
            sheet.paste(picture, (column * (CELL + gap), 2 * line + row * (CELL + line)))
        x = column * (CELL + gap) + CELL / 2
        text = f"frame {found.frames[place]}"
        draw.text((x, line * 1.5 + 3 * (CELL + line)), text, fill="#444444", font=font, anchor="mm")
    return sheet


def draw_frames(found: Look, title: str) -> Iterator[Image.Image]:
    """Each frame of the clip three times side by side, with the title below."""
    line = 24
    for place in range(len(found.pixels)):
        sheet = Image.new("RGB", (3 * CELL, CELL + line), "black")
        for column, picture in enumerate(rows_of(found, place)):
            sheet.paste(picture, (column * CELL, 0))
        draw = ImageDraw.Draw(sheet)
        text = f"{title}   frame {found.frames[place]}"
        draw.text((6, CELL + line / 2), text, fill="white", font=ImageFont.load_default(size=13), anchor="lm")
        yield sheet


if __name__ == "__main__":
    run_program(main)
