"""Does the demo's model recognise motion? Two controls on the generated data, after `sh scripts/run_demo.sh`.

    python -m benchmarks.motion_controls exp_onehot/demo/model_best.pt

1. The checkpoint on validation videos whose frames are in reverse order. Most must get the opposite class.
2. The same training from scratch, with a model that cannot relate frames to each other: every temporal kernel, also
   that of the stem, is reduced to its centre tap, and class tokens are not shifted. Its accuracy must stay under 60 %:
   the frames of a video in any order show which pair of opposite classes it belongs to, but not which of the two.

Writes benchmarks/results/motion_controls.txt.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from dotmap import DotMap
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.machine import describe_machine
from datasets.annotations import VideoRecord, read_annotations, read_class_names
from datasets.loaders import build_eval_loader, build_train_loader
from engine.configuration import read_config
from engine.loops import evaluate, train_one_epoch
from engine.metrics import topk_accuracy
from engine.run import Run
from modules import build_model, side_network
from modules.checkpoint import load_weights
from modules.side4video import Side4Video
from modules.side_network import TemporalConv, TubeletStem
from utils.errors import run_program
from utils.logger import setup_logging
from utils.precision import resolve_precision
from utils.seeding import seed_everything

CONFIG = "configs/demo/motion.yaml"
RESULTS = Path("benchmarks/results/motion_controls.txt")


class CentreTap(nn.Module):
    """Sets the first and last temporal slice of a Conv3d weight (out, in, 3, h, w) to zero."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)


def build_without_time(config: DotMap) -> Side4Video:
    """The model of a configuration, with every temporal kernel reduced to its centre tap."""
    model = build_model(config)
    for module in model.modules():
        if isinstance(module, TubeletStem | TemporalConv):
            register_parametrization(module, "weight", CentreTap())
    return model


def train_without_time(config: DotMap) -> float:
    """The best validation top-1 in percent of a training on the CPU, with the steps and random draws of train.py."""
    val_loader = build_eval_loader(config)
    seed_everything(config.seed)
    model = build_without_time(config)
    precision = resolve_precision("fp32", torch.device("cpu"))
    train_loader = build_train_loader(config)
    run = Run(config, model, precision)
    best = 0.0
    for epoch in range(config.solver.epochs):
        seed_everything(config.seed, epoch, 0)
        train_loader.sampler.set_epoch(epoch)
        train_one_epoch([run], train_loader, epoch)
        scores = evaluate(model, val_loader, precision, config)
        best = max(best, topk_accuracy(scores, val_loader.dataset.labels, 1))
    return best


def reverse_videos(config: DotMap, records: list[VideoRecord], root: Path) -> None:
    """Copy the videos to `root` with the last frame first."""
    for record in records:
        (root / record.path).mkdir(parents=True)
        for number in range(1, record.num_frames + 1):
            source = Path(config.data.val_root, record.path, config.data.image_tmpl.format(number))
            target = root / record.path / config.data.image_tmpl.format(record.num_frames + 1 - number)
            shutil.copyfile(source, target)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.motion_controls", description="Does the demo's model recognise motion?"
    )
    parser.add_argument("checkpoint", help="model_best.pt of the demo's training")
    args = parser.parse_args(argv)
    setup_logging()
    config = read_config(CONFIG)
    precision = resolve_precision("fp32", torch.device("cpu"))
    records = read_annotations(config.data.val_list, config.data.num_classes)
    names = read_class_names(config.data.label_list, config.data.num_classes)
    labels = torch.tensor([record.label for record in records])
    lines = [describe_machine()]

    with tempfile.TemporaryDirectory() as folder:
        reverse_videos(config, records, Path(folder))
        model = build_model(config, load_tower=False)
        load_weights(model, args.checkpoint)
        forward = torch.from_numpy(evaluate(model, build_eval_loader(config), precision, config)).argmax(1)
        backward_config = read_config(CONFIG, [f"data.val_root={folder}"])
        backward = torch.from_numpy(evaluate(model, build_eval_loader(backward_config), precision, config)).argmax(1)
    opposite = labels ^ 1  # opposite classes are neighbours
    lines += [
        f"frames as they are: {share(forward == labels)} get their class",
        f"frames reversed: {share(backward == opposite)} get the opposite class, {share(backward == labels)} their own",
    ]
    for label, name in enumerate(names):
        lines.append(f"  {name}: {share((backward == opposite)[labels == label])} are called {names[label ^ 1]}")

    side_network.shift_class_token = lambda class_tokens: class_tokens
    best = train_without_time(config)
    lines.append(f"trained from scratch without a look at other frames: best top-1 {best:.1f} % (must stay under 60 %)")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def share(correct: Tensor) -> str:
    return f"{100 * correct.float().mean().item():.1f} %"


if __name__ == "__main__":
    run_program(main)
