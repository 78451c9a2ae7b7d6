"""What a frozen tower in bfloat16 or float16 (`network.backbone_dtype`) changes: scores, and seconds on a CPU.

    python -m benchmarks.backbone_dtype [--checkpoint FILE --list FILE [--root DIR]] [--rounds 5]

Two models: ViT-B/16 in eval mode with seeded random weights on noise, and, with --checkpoint, a trained one on the
videos of a list, one view each. Only the tower changes its dtype; the side network stays in float32. Seconds are taken
in turns in one process. Writes benchmarks/results/backbone_dtype.txt.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.timing import in_turns
from datasets.annotations import read_annotations
from engine.configuration import default_config
from engine.metrics import topk_accuracy
from inference.inputs import find_videos
from inference.recognizer import Recognizer
from modules import build_model
from modules.side4video import Side4Video
from utils.precision import has_bfloat16_units

RESULTS = Path("benchmarks/results/backbone_dtype.txt")
DTYPES = ("float32", "bfloat16", "float16")
CLIPS, FRAMES, CLASSES, SEED = 2, 8, 174, 1024
CPU = torch.device("cpu")


def random_model(dtype: str) -> Side4Video:
    """ViT-B/16 with seeded weights and a tower in `dtype`."""
    network = {"arch": "ViT-B/16", "backbone_kwargs": {}, "side_dim": 320, "backbone_dtype": dtype}
    config = default_config(data={"input_size": 224, "num_classes": CLASSES}, network=network)
    torch.manual_seed(SEED)
    return build_model(config).eval()


@torch.inference_mode()
def logits_and_tokens(model: Side4Video, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K) of clips, float32 (B, T, 3, H, W), and the tower's last tokens (B, T, 1+N, D), both in float32."""
    tokens = list(model.backbone.layer_tokens(clips))
    return model.trained(clips, tokens), tokens[-1].float()


def of_random_model(rounds: int) -> list[str]:
    """The lines of ViT-B/16 on noise."""
    torch.manual_seed(SEED)
    clips = torch.randn(CLIPS, FRAMES, 3, 224, 224)
    models = {dtype: random_model(dtype) for dtype in DTYPES}
    logits, tokens = logits_and_tokens(models["float32"], clips)
    lines = [
        f"ViT-B/16, seed {SEED}, {CLIPS} clips of {FRAMES} frames of 224 pixels of noise, side width 320, {CLASSES} "
        "classes; deviation from the float32 tower",
    ]
    for dtype in DTYPES[1:]:
        low_logits, low_tokens = logits_and_tokens(models[dtype], clips)
        scores, low_scores = logits.softmax(-1), low_logits.softmax(-1)
        lines.append(
            f"{dtype}: scores (softmax) at most {(low_scores - scores).abs().max():.1e} apart, where they are up to "
            f"{scores.max():.1e}, {((low_scores - scores).norm() / scores.norm()):.1e} of their norm; logits "
            f"{((low_logits - logits).norm() / logits.norm()):.1e} of their norm; last tokens "
            f"{((low_tokens - tokens).norm() / tokens.norm()):.1e}; the best class is the same for "
            f"{(low_scores.argmax(-1) == scores.argmax(-1)).sum()} of {CLIPS} clips"
        )

    @torch.inference_mode()
    def run(model: Side4Video, tower_only: bool) -> None:
        for _ in model.backbone.layer_tokens(clips[:1]) if tower_only else [model(clips[:1])]:
            pass

    # float16 is left out: CPUs compute it in software.
    for what, tower_only in (("tower", True), ("whole model", False)):
        runs = {dtype: lambda m=models[dtype], t=tower_only: run(m, t) for dtype in DTYPES[:2]}
        times = in_turns(runs, rounds, CPU)
        lines.append(
            f"one clip, {what}, {rounds} rounds in turns, medians: "
            + ", ".join(f"{dtype} {seconds:.3f} s ({ratio:.2f})" for dtype, (seconds, ratio) in times.items())
        )
    return lines


def of_checkpoint(checkpoint: str, list_file: str, root: str | None) -> list[str]:
    """The lines of a trained model on the videos of a list."""
    scores = {}
    for dtype in DTYPES:
        overrides = [f"network.backbone_dtype={dtype}"]
        recognizer = Recognizer.load(checkpoint, device="cpu", precision="fp32", overrides=overrides)
        data = recognizer.config.data
        records = read_annotations(list_file, data.num_classes, data.modality)
        found = find_videos([list_file], data.image_tmpl, root)
        scores[dtype] = recognizer.scores([record.name for record in found])
    labels = np.array([record.label for record in records])
    exact = scores["float32"]
    lines = [
        f"{recognizer.config.network.arch}, trained on {data.dataset}, {len(labels)} videos, one view; float32: "
        f"top-1 {topk_accuracy(exact, labels, 1):.2f}"
    ]
    for dtype in DTYPES[1:]:
        apart, same = np.abs(scores[dtype] - exact), scores[dtype].argmax(1) == exact.argmax(1)
        lines.append(
            f"{dtype}: top-1 {topk_accuracy(scores[dtype], labels, 1):.2f}; scores at most {apart.max():.1e} apart, "
            f"{apart.mean():.1e} on average; the best class is the same for {same.sum()} of {len(labels)} videos"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="FILE", help="a trained model, such as exp_onehot/demo/model_best.pt")
    parser.add_argument("--list", metavar="FILE", help="labelled videos for it")
    parser.add_argument("--root", metavar="DIR", help="folder that the paths in the list start at")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if (args.checkpoint is None) != (args.list is None):
        parser.error("--checkpoint and --list go together")
    units = "has" if has_bfloat16_units() else "has no"
    lines = [f"{describe_machine()}; {torch.get_num_threads()} threads; the CPU {units} units for bfloat16"]
    lines += of_random_model(args.rounds)
    if args.checkpoint:
        lines += of_checkpoint(args.checkpoint, args.list, args.root)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
