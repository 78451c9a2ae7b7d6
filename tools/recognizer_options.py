"""Options that the programs which load a Recognizer share."""

import argparse

import torch

from inference.recognizer import Recognizer
from utils.parallel import usable_cores

MOST_WORKERS = 8


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of `add_checkpoint_options`, and how lists and many videos are read."""
    parser.add_argument("--root", metavar="DIR", help="folder that paths in lists start at (default: the list's own)")
    add_checkpoint_options(parser)
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"processes that read videos; 0 reads in this one (default: cores - 1, at most {MOST_WORKERS})",
    )


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of `Recognizer.load` beside the checkpoint and `workers`."""
    parser.add_argument("--config", metavar="FILE", help="YAML file, for a released checkpoint, which holds none")
    parser.add_argument("--weights", metavar="FILE", help="the tower's file, if it is not in clip_pretrain/")
    parser.add_argument(
        "--precision", choices=("amp", "bf16", "fp16", "fp32"), default="amp", help="of the model (default amp)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="in place of the checkpoint's configuration, such as data.image_tmpl=frame_{:06d}.png; can be repeated",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")


def load_recognizer(args: argparse.Namespace, device: torch.device | None = None) -> Recognizer:
    """The Recognizer of parsed arguments, `args.checkpoint`, `args.workers` and those of `add_checkpoint_options`.

    Raises:
        UserError: as `Recognizer.load`.
    """
    workers = min(MOST_WORKERS, usable_cores() - 1) if args.workers is None else args.workers
    return Recognizer.load(
        args.checkpoint,
        config=args.config,
        weights=args.weights,
        device=device or args.device,
        precision=args.precision,
        workers=workers,
        overrides=args.overrides,
    )
