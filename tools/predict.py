"""Say which class each video shows: video files, folders of frames, whole directories, lists, in any mixture.

    sh scripts/run_predict.sh CHECKPOINT PATH... [--topk 5] [--crops 1|3|5|10] [--clips N] [--json FILE] [--csv FILE]
                              [--overlay OUT.mp4] [--workers N] [--root DIR] [--set KEY=VALUE] ...
    sh scripts/run_predict.sh CHECKPOINT SOURCE --window SECONDS [--stride SECONDS] [--plot OUT.png] [--json FILE] ...
    python tools/predict.py CHECKPOINT PATH... [...]                    the same, without a look for an environment

Frames, pixels, class names and the rest come from the checkpoint. A video that cannot be read gets a line that says
why; the others are done, and the exit status is 1. With --window, one long video or live stream gives a time line.
docs/prediction.md has examples and the format of the files.
"""

import argparse
import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import VideoRecord
from inference.inputs import find_videos
from inference.overlay import write_overlay
from inference.recognizer import CROPS, Recognizer, VideoScores, top_classes
from inference.stream import Timeline, describe_segments
from inference.timeline_plot import draw_timeline
from tools.recognizer_options import add_model_options, load_recognizer
from utils.errors import DataError, UserError, run_program

STDOUT = "-"
BROKEN_PIPE = 141  # the status of a program that SIGPIPE ends


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="predict.py", description="Say which class each video shows.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model_best.pt of a run, its folder, a released one")
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="video file, folder or zip file of frames, directory of such, or list (*.txt); with --window one video, "
        "an address, a camera, or - for the standard input",
    )
    parser.add_argument("--topk", type=int, default=5, metavar="N", help="classes of a video (default 5)")
    parser.add_argument("--crops", type=int, choices=CROPS, default=1, help="crops of a clip (default 1)")
    parser.add_argument("--clips", type=int, default=1, metavar="N", help="clips of a video (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write a JSON object a line; - is the standard output")
    parser.add_argument("--csv", metavar="FILE", help="write a table; - is the standard output")
    parser.add_argument("--overlay", metavar="OUT.mp4", type=Path, help="write the video with its top classes on it")
    parser.add_argument("--window", type=float, metavar="SECONDS", help="score windows of one long video or stream")
    parser.add_argument("--stride", type=float, metavar="SECONDS", help="between windows (default: a frame's share)")
    parser.add_argument("--plot", metavar="OUT.png", type=Path, help="draw the time line of --window")
    parser.add_argument(
        "--live", action="store_true", help="drop frames that come too fast, and follow a file while it grows"
    )
    parser.add_argument("--reopen", type=int, default=0, metavar="N", help="open a broken live stream again, N times")
    add_model_options(parser)
    args = parser.parse_args(argv)
    if args.window is not None:
        check_window_options(parser, args)
        stream_windows(args)
        return
    for name in ("stride", "plot", "live", "reopen"):
        if getattr(args, name):
            parser.error(f"--{name}: goes with --window")
    for name in ("topk", "clips"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)} is less than 1")
    if args.json == args.csv == STDOUT:
        parser.error("--json and --csv: only one of them can be the standard output")
    if args.overlay and args.overlay.suffix.lower() != ".mp4":
        parser.error(f"--overlay: {args.overlay} must be called *.mp4")
    try:
        unreadable, videos = predict(args)
    except BrokenPipeError:  # as of `| head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    if unreadable:
        raise DataError(f"{unreadable} of {videos} videos could not be read, see their rows")


def predict(args: argparse.Namespace) -> tuple[int, int]:
    """Do what the command line says; returns how many videos could not be read, and of how many."""
    recognizer = load_recognizer(args)
    records = find_videos(args.paths, recognizer.config.data.image_tmpl, args.root)
    if args.overlay and len(records) != 1:
        raise UserError(f"--overlay: needs one video, and these are {len(records)}")
    topk = min(args.topk, len(recognizer.class_names))
    unreadable = 0
    with contextlib.ExitStack() as files:
        outputs = list(open_outputs(args, topk, files, video_text))
        results = recognizer.score_videos(records, args.crops, args.clips)
        # No bar on a terminal that shows the rows themselves.
        hidden = True if args.json is args.csv is None and sys.stdout.isatty() else None
        for record, video in zip(records, tqdm(results, total=len(records), unit="video", disable=hidden), strict=True):
            unreadable += video.error is not None
            row = row_of(video, recognizer, topk)
            for write_row in outputs:
                write(write_row, row)
            if args.overlay and not video.error:
                overlay(args.overlay, record, recognizer, row)
    return unreadable, len(records)


def check_window_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if len(args.paths) != 1:
        parser.error(f"--window: takes one video or stream, and these are {len(args.paths)}")
    for name, unused in (("crops", 1), ("clips", 1), ("overlay", None), ("csv", None), ("root", None)):
        if getattr(args, name) != unused:
            parser.error(f"--{name}: does not go with --window, which scores the centre crop of each window")
    if args.plot and args.plot.suffix.lower() != ".png":
        parser.error(f"--plot: {args.plot} must be called *.png")


def stream_windows(args: argparse.Namespace) -> None:
    """Score the windows of one source. Each row is written at once, and the segments at the end, whatever ended it."""
    recognizer, (path,) = load_recognizer(args), args.paths
    topk = min(args.topk, len(recognizer.class_names))
    stream = recognizer.stream(path, args.window, args.stride, live=args.live or None, reopen=args.reopen)
    timeline, windows, error = Timeline(stream.stride), [], None
    with contextlib.ExitStack() as files:
        outputs = list(open_outputs(args, topk, files, window_text))
        try:
            for window in stream:
                timeline.add(window)
                windows.append(window)
                top = top_rows(window.scores, recognizer, topk)
                for write_row in outputs:
                    write(write_row, {"path": path, "start": window.start, "end": window.end, "top": top})
        except UserError as problem:
            error = problem
        segments = describe_segments(timeline.segments(), recognizer.class_names)
        facts = {"windows": len(windows), "dropped": stream.dropped, "damage": str(stream.damage) or None}
        row = {"path": path, "segments": segments, **facts, "error": None if error is None else error.line}
        for write_row in outputs:
            write(write_row, row)
    if args.plot and windows:
        draw_timeline(args.plot, windows, segments, recognizer.class_names)
    if error is not None:
        raise error


def window_text(row: dict[str, Any]) -> str:
    """A window in one line; at the end the segments."""
    if "segments" not in row:
        best = row["top"][0]
        return f"{row['start']:9.2f} {row['end']:9.2f}  {best['score']:.4f}  {best['name']}\n"
    lines = [f"{row['path']}: {row['windows']} windows, {row['dropped']} frames dropped, segments:"]
    if row["damage"]:
        lines[0] = f"{row['path']}: damaged ({row['damage']})\n{lines[0]}"
    lines += [f"{s['start']:9.2f} {s['end']:9.2f}  {s['score']:.4f}  {s['name']}" for s in row["segments"]]
    return "\n".join(lines) + "\n"


def top_rows(scores: np.ndarray, recognizer: Recognizer, topk: int) -> list[dict[str, Any]]:
    """The entry `top` of a row."""
    names = recognizer.class_names
    labels = top_classes(scores, topk)
    return [{"label": label, "name": names[label], "score": float(scores[label])} for label in labels]


def row_of(video: VideoScores, recognizer: Recognizer, topk: int) -> dict[str, Any]:
    """The JSON object of one video: docs/prediction.md lists its entries."""
    return {
        "path": video.path,
        "num_frames": video.num_frames,
        "top": [] if video.scores is None else top_rows(video.scores, recognizer, topk),
        "views": video.views,
        "error": video.error,
    }


def open_outputs(
    args: argparse.Namespace, topk: int, files: contextlib.ExitStack, as_text: Callable[[dict[str, Any]], str]
) -> Iterator[Callable[[dict[str, Any]], object]]:
    """For each output a function that writes one row to it, at once, so that a broken run keeps what it has done."""
    if args.json:
        file = open_output("--json", args.json, files)
        yield lambda row, file=file: file.write(json.dumps(row, ensure_ascii=False) + "\n") and file.flush()
    if args.csv:
        file = open_output("--csv", args.csv, files)
        table = csv.writer(file, lineterminator="\n")
        columns = [f"{name}_{place}" for place in range(1, topk + 1) for name in ("label", "name", "score")]
        table.writerow(["path", "num_frames", "views", "error", *columns])
        yield lambda row, file=file: table.writerow(csv_cells(row)) and file.flush()
    if STDOUT not in (args.json, args.csv):
        yield lambda row: (sys.stdout.write(as_text(row)), sys.stdout.flush())


def write(write_row: Callable[[dict[str, Any]], object], row: dict[str, Any]) -> None:
    try:
        write_row(row)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"--json, --csv: the row of {row['path']} cannot be written: {error.strerror}") from error


def open_output(option: str, name: str, files: contextlib.ExitStack) -> IO[str]:
    if name == STDOUT:
        return sys.stdout
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        return files.enter_context(open(name, "w", encoding="utf-8", newline=""))
    except OSError as error:
        raise UserError(f"{option}: {name} cannot be written: {error.strerror}") from error


def csv_cells(row: dict[str, Any]) -> list[Any]:
    top = [cell for entry in row["top"] for cell in (entry["label"], entry["name"], entry["score"])]
    return [row["path"], row["num_frames"], row["views"], row["error"], *top]


def video_text(row: dict[str, Any]) -> str:
    """The row for people: the path, then a line a class."""
    if row["error"]:
        return f"{row['path']}: not read: {row['error']}\n"
    lines = [f"{row['path']}: {row['num_frames']} frames, {row['views']} view{'s' * (row['views'] > 1)}"]
    lines += [f"  {entry['score']:.4f}  {entry['name']}" for entry in row["top"]]
    return "\n".join(lines) + "\n"


def overlay(path: Path, record: VideoRecord, recognizer: Recognizer, row: dict[str, Any]) -> None:
    top = [(entry["name"], entry["score"]) for entry in row["top"]]
    write_overlay(path, record, recognizer.config.data, top)


if __name__ == "__main__":
    run_program(main)
