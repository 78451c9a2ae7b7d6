"""Draw an animated strip of videos with what a model says of each: the picture that opens the README.

    python tools/draw_predictions.py CHECKPOINT VIDEO... --out FILE.gif [--columns 5] [--set KEY=VALUE] ...

Each cell shows the frames that the model saw, one after the other, and below them its highest class and the score of
that class. The README's own:

    python tools/draw_predictions.py exp_onehot/demo demo_data/motion/videos/val_0000?.mp4 --out docs/images/demo.gif
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference.page import Answer, recognise
from tools.recognizer_options import add_checkpoint_options, load_recognizer
from utils.atomic import probe, write_atomically, writing
from utils.errors import ConfigError, run_program

CELL, TEXT, GAP = 128, 34, 6  # pixels: side of a frame, height of the text below it, space between cells
SECONDS, HOLD = 0.2, 0.8  # a frame is shown, and the last one
COLOURS = 144  # of the whole strip: fewer make a smaller file


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="draw_predictions.py", description="Draw an animated strip of predictions.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model_best.pt of a run, its folder, a released one")
    parser.add_argument("videos", metavar="VIDEO", nargs="+", help="video file, or folder of frames")
    parser.add_argument("--out", metavar="FILE.gif", type=Path, required=True, help="the strip")
    parser.add_argument("--columns", metavar="N", type=int, default=5, help="videos side by side (default 5)")
    add_checkpoint_options(parser)
    args = parser.parse_args(argv)
    args.workers = 0  # one video at a time
    if args.out.suffix.lower() != ".gif":
        raise ConfigError(f"--out {args.out}: must end in .gif")
    if args.columns < 1:
        raise ConfigError(f"--columns {args.columns}: must be at least 1")
    probe(args.out)
    recognizer = load_recognizer(args)
    answers = [recognise(recognizer, video, topk=1) for video in args.videos]
    pictures = in_few_colours(draw_strip(answers, args.columns))
    shown = [round(1000 * SECONDS)] * (len(pictures) - 1) + [round(1000 * HOLD)]
    with writing(args.out):
        write_atomically(
            args.out,
            lambda file: pictures[0].save(
                file, "gif", save_all=True, append_images=pictures[1:], duration=shown, loop=0, optimize=True
            ),
        )
    for video, answer in zip(args.videos, answers, strict=True):
        name, score = answer.top[0]
        print(f"{video}: {name}, {100 * score:.1f} %")
    print(f"written: {args.out}, {len(pictures)} frames, {args.out.stat().st_size / 1000:.0f} kB")


def draw_strip(answers: Sequence[Answer], columns: int) -> list[Image.Image]:
    """One picture for each frame of a clip: a cell for each video, row by row."""
    rows = -(-len(answers) // columns)
    columns = min(columns, len(answers))
    size = columns * (CELL + GAP) - GAP, rows * (CELL + TEXT)
    name_font, score_font = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    pictures = []
    for moment in range(len(answers[0].pixels)):
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)
        for place, answer in enumerate(answers):
            left, top = place % columns * (CELL + GAP), place // columns * (CELL + TEXT)
            frame = Image.fromarray(answer.pixels[moment])
            sheet.paste(frame.resize((CELL, CELL), Image.Resampling.BICUBIC), (left, top))
            name, score = answer.top[0]
            draw.text((left + 1, top + CELL + 9), fitting(name, name_font), fill="black", font=name_font, anchor="lm")
            draw.text((left + 1, top + CELL + 24), f"{100 * score:.1f} %", fill="#555", font=score_font, anchor="lm")
        pictures.append(sheet)
    return pictures


def fitting(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A name that is not wider than a cell; what is cut becomes dots."""
    if font.getlength(name) <= CELL:
        return name
    while name and font.getlength(f"{name}...") > CELL:
        name = name[:-1]
    return f"{name}..."


def in_few_colours(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures with one palette for all of them, so that what does not move does not flicker."""
    width, height = pictures[0].size
    whole = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures]))
    whole = whole.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return [whole.crop((0, number * height, width, (number + 1) * height)) for number in range(len(pictures))]


if __name__ == "__main__":
    run_program(main)
