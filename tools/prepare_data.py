"""Extract or pack the frames of videos, or write annotation lists from the official files of a data set.

    python tools/prepare_data.py extract VIDEOS OUT [--short_side 256] [--quality 90] [--workers N]
    python tools/prepare_data.py pack FRAMES OUT [--workers N]
    python tools/prepare_data.py list SOURCE ROOT OUT ... [--modality video]

`extract` writes every frame of every video to OUT/<path without suffix>/img_00001.jpg and so on: in display order,
upright, with the shorter side at most --short_side. Smaller frames keep their size. VIDEOS is a folder, searched at any
depth, or a list of lines `path label`. A folder of frames appears when it is complete, and the same command run again
skips it. Videos that cannot be decoded to their end are left out and named in OUT/failures.json.

`pack` writes the frame files of each folder, unchanged, to one uncompressed file OUT/<path>.zip. With the same lists
and OUT as the root, training reads these instead of the folders. A zip file appears when it is complete and has been
compared with the frames. The same command run again skips it, unless a frame was added, removed or changed since.
Folders that cannot be read are left out and named in OUT/pack_failures.json.

`list` writes OUT/train.txt and OUT/val.txt (for video files train_videos.txt and val_videos.txt) and OUT/classes.csv.
SOURCE is kinetics, something-v1, something-v2, ucf101 or hmdb51, which read the official files, or `folders`, which
expects one folder per class. ROOT holds the videos, as files or as folders of frames, at any depth. Test files, which
may be without labels, give OUT/test.txt. What a search of ROOT leaves out is counted and named.

    python tools/prepare_data.py list table FILE ROOT OUT --path COLUMN [--label COLUMN] [--split COLUMN] ...

reads any csv, tsv or json file with a column of paths below ROOT. Columns are names in the header, or numbers from 1 in
a file without a header; in json, `a.b` is a value inside an object, `key` the name of an entry, and `value` an entry
that is no object. A label that is empty or -1 is none.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.extract_frames import Extraction, extract, named_videos
from tools.pack_frames import pack
from tools.write_lists import SOURCES, WITH_TEST, write_lists
from utils.config_schema import FIELDS
from utils.errors import UserError, run_program
from utils.parallel import usable_cores

IMAGE_TMPL = FIELDS["data.image_tmpl"]


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    check_template(args.image_tmpl)
    try:
        args.run(args)
    except KeyboardInterrupt:
        raise UserError("interrupted; what is complete stays, and the same command goes on") from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Extract or pack the frames of videos, or write annotation lists from the files of a data set."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("extract", help="write the frames of videos as JPEG files")
    command.add_argument("videos", metavar="VIDEOS", type=Path, help="folder of videos, or list of lines 'path label'")
    command.add_argument("out", metavar="OUT", type=Path, help="folder in which each video gets a folder of frames")
    command.add_argument("--root", type=Path, help="folder that a list's paths are relative to (default: the list's)")
    command.add_argument("--short_side", type=int, default=256, help="shorter side of larger frames, in pixels")
    command.add_argument("--quality", type=int, default=90, help="JPEG quality, 1 to 95")
    _add_template(command)
    command.add_argument("--workers", type=int, default=usable_cores(), help="number of processes; 0 starts none")
    command.set_defaults(run=run_extract)

    command = commands.add_parser("pack", help="pack the frames of each video into one uncompressed zip file")
    command.add_argument("frames", metavar="FRAMES", type=Path, help="folder of folders of frames, at any depth")
    command.add_argument("out", metavar="OUT", type=Path, help="folder in which each video gets a file <path>.zip")
    _add_template(command)
    command.add_argument("--workers", type=int, default=usable_cores(), help="number of processes; 0 starts none")
    command.set_defaults(run=run_pack)

    command = commands.add_parser("list", help="write annotation lists and class names")
    sources = command.add_subparsers(required=True, metavar="SOURCE", dest="source")
    for name, read in SOURCES.items():
        source = sources.add_parser(name, help=read.__doc__)
        if name == "table":
            source.add_argument("file", metavar="FILE", type=Path, help="csv, tsv or json file with a row per video")
        source.add_argument("root", metavar="ROOT", type=Path, help="folder of the videos")
        source.add_argument("out", metavar="OUT", type=Path, help="folder for the lists")
        source.add_argument("--val_root", type=Path, help="folder of the validation videos (default: ROOT)")
        if name in (*WITH_TEST, "table"):
            source.add_argument("--test_root", type=Path, help="folder of the test videos (default: ROOT)")
        if name == "hmdb51":
            source.add_argument("--splits", type=Path, required=True, help="folder of <class>_test_split1.txt ...")
            source.add_argument("--split", type=int, choices=(1, 2, 3), default=1)
        elif name in ("folders", "table"):
            if name == "table":
                source.add_argument("--path", metavar="COLUMN", required=True, help="column of the paths below ROOT")
                source.add_argument("--label", metavar="COLUMN", help="column of the class names (default: no labels)")
                source.add_argument("--split", metavar="COLUMN", help="column that says train, val or test")
            source.add_argument("--val_share", type=float, help="share of each class to hold out for validation")
            source.add_argument("--seed", type=int, default=0, help="selects the videos that are held out")
        else:
            source.add_argument("--train", type=Path, help="official file of the training videos")
            source.add_argument("--val", type=Path, help="official file of the validation videos")
            if name in WITH_TEST:
                source.add_argument(
                    "--test", type=Path, help="official file of the test videos, with labels or without"
                )
            if name != "kinetics":
                source.add_argument("--labels", type=Path, required=True, help="official file of the class names")
        source.add_argument("--modality", choices=("RGB", "video"), default="RGB", help="folders of frames, or files")
        _add_template(source)
        source.add_argument("--leave_out_missing", action="store_true", help="write the lists without missing videos")
        source.set_defaults(run=write_lists)
    return parser


def _add_template(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image_tmpl", default=IMAGE_TMPL.default, help="file name of a frame, as data.image_tmpl")


def check_template(image_tmpl: str) -> None:
    if not IMAGE_TMPL.rule.holds(image_tmpl) or os.path.dirname(image_tmpl):
        raise UserError(f"--image_tmpl: must be a file name with a field for the number, got {image_tmpl!r}")


def run_extract(args: argparse.Namespace) -> None:
    for name, value, low, high in (
        ("short_side", args.short_side, 1, None),
        ("quality", args.quality, 1, 95),
        ("workers", args.workers, 0, None),
    ):
        if value < low or (high is not None and value > high):
            raise UserError(f"--{name}: must be {low} {f'to {high}' if high else 'or more'}, got {value}")
    if Path(args.image_tmpl).suffix.lower() not in (".jpg", ".jpeg"):
        example = IMAGE_TMPL.default
        raise UserError(f"--image_tmpl: must be the name of a JPEG file like {example}, got {args.image_tmpl!r}")
    root, paths = named_videos(args.videos, args.root)
    settings = Extraction(str(root.resolve()), args.short_side, args.quality, args.image_tmpl)
    extract(root, paths, args.out, settings, args.workers)


def run_pack(args: argparse.Namespace) -> None:
    if args.workers < 0:
        raise UserError(f"--workers: must be 0 or more, got {args.workers}")
    pack(args.frames, args.out, args.image_tmpl, args.workers)


if __name__ == "__main__":
    run_program(main)
