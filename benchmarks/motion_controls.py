"""Does the demo's model see motion? Two controls on the generated data, after `sh scripts/run_demo.sh`.

    python -m benchmarks.motion_controls exp_onehot/demo/model_best.pt

1. The validation videos with their frame files in reverse order: most must get the opposite class.
2. The same training from scratch with the look at other frames taken out: every temporal kernel, the stem's included,
   cut to its centre tap, and no shift of the class tokens. It must stay under 60 %: which of the four pairs a video
   belongs to shows in its frames taken together, in any order, but not which of the two.

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
from datasets.annotations import VideoRecord, read_annotations
from datasets.loaders import build_eval_loader
from engine.configuration import read_config
from engine.loops import evaluate
from modules import build_model, side_network
from modules.checkpoint import load_weights
from modules.side4video import Side4Video
from modules.side_network import TemporalConv, TubeletStem
from tools.motion_demo import CLASSES
from train import train
from utils.errors import run_program
from utils.precision import resolve_precision

CONFIG = "configs/demo/motion.yaml"
RESULTS = Path("benchmarks/results/motion_controls.txt")


class CentreTap(nn.Module):
    """Conv3d weight (out, in, 3, h, w) without its first and last temporal slice."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)


def build_without_time(config: DotMap, load_tower: bool = True) -> Side4Video:
    """The model of a configuration, blind to the order of frames."""
    model = build_model(config, load_tower)
    for module in model.modules():
        if isinstance(module, TubeletStem | TemporalConv):
            register_parametrization(module, "weight", CentreTap())
    return model


def reverse_videos(config: DotMap, records: list[VideoRecord], root: Path) -> None:
    """Copies of the videos in `root`, the last frame first."""
    for record in records:
        (root / record.path).mkdir(parents=True)
        for number in range(1, record.num_frames + 1):
            source = Path(config.data.val_root, record.path, config.data.image_tmpl.format(number))
            target = root / record.path / config.data.image_tmpl.format(record.num_frames + 1 - number)
            shutil.copyfile(source, target)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.motion_controls", description="Controls of the demo.")
    parser.add_argument("checkpoint", help="of the demo's training")
    args = parser.parse_args(argv)
    config = read_config(CONFIG)
    precision = resolve_precision("fp32", torch.device("cpu"))
    records = read_annotations(config.data.val_list, config.data.num_classes)
    labels = torch.tensor([record.label for record in records])
    lines = [describe_machine()]

    with tempfile.TemporaryDirectory() as folder:
        reverse_videos(config, records, Path(folder))
        model = build_model(config, load_tower=False)
        load_weights(model, args.checkpoint)
        forward = torch.from_numpy(evaluate(model, build_eval_loader(config), precision, config)).argmax(1)
        backward_config = read_config(CONFIG, [f"data.val_root={folder}"])
        backward = torch.from_numpy(evaluate(model, build_eval_loader(backward_config), precision, config)).argmax(1)
    opposite = labels ^ 1  # neighbours are opposites
    lines += [
        f"frames as they are: {share(forward == labels)} get their class",
        f"frames reversed: {share(backward == opposite)} get the opposite class, {share(backward == labels)} their own",
    ]
    for label, name in enumerate(CLASSES):
        lines.append(f"  {name}: {share((backward == opposite)[labels == label])} are called {CLASSES[label ^ 1]}")

    side_network.shift_class_token = lambda class_tokens: class_tokens
    with tempfile.TemporaryDirectory() as folder:
        best = train(config, folder, build_without_time)
    lines.append(f"trained from scratch without a look at other frames: best top-1 {best:.1f} % (must stay under 60 %)")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def share(correct: Tensor) -> str:
    return f"{100 * correct.float().mean().item():.1f} %"


if __name__ == "__main__":
    run_program(main)
