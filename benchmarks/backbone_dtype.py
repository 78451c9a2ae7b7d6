"""Measure how much the scores change when the frozen tower is stored and run in bfloat16 or float16.

    python -m benchmarks.backbone_dtype

The model is ViT-B/16 in eval mode with seeded random weights. Only the tower changes its dtype
(`network.backbone_dtype`); the side network stays in float32. Writes benchmarks/results/backbone_dtype.txt.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from engine.configuration import default_config
from modules import build_model

RESULTS = Path("benchmarks/results/backbone_dtype.txt")
CLIPS, FRAMES, CLASSES, SEED = 2, 8, 174, 1024


def logits_and_tokens(dtype: str, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model with a tower in `dtype` on `clips`, float32 (B, T, 3, H, W).

    Returns:
        The logits (B, K) and the tokens of the last block (B, T, 1+N, D), both in float32.
    """
    network = {"arch": "ViT-B/16", "backbone_kwargs": {}, "side_dim": 320, "backbone_dtype": dtype}
    config = default_config(data={"input_size": 224, "num_classes": CLASSES}, network=network)
    torch.manual_seed(SEED)
    model = build_model(config).eval()
    with torch.inference_mode():
        tokens = list(model.backbone.layer_tokens(clips))
        return model.trained(clips, tokens), tokens[-1].float()


def main() -> None:
    torch.manual_seed(SEED)
    clips = torch.randn(CLIPS, FRAMES, 3, 224, 224)
    logits, tokens = logits_and_tokens("float32", clips)
    lines = [
        describe_machine(),
        f"ViT-B/16, seed {SEED}, {CLIPS} clips of {FRAMES} frames of 224 pixels of noise, side width 320, {CLASSES} "
        "classes; deviation from the float32 tower",
    ]
    for dtype in ("bfloat16", "float16"):
        low_logits, low_tokens = logits_and_tokens(dtype, clips)
        scores, low_scores = logits.softmax(-1), low_logits.softmax(-1)
        lines.append(
            f"{dtype}: scores (softmax) at most {(low_scores - scores).abs().max():.1e} apart, where they are up to "
            f"{scores.max():.1e}, {((low_scores - scores).norm() / scores.norm()):.1e} of their norm; logits "
            f"{((low_logits - logits).norm() / logits.norm()):.1e} of their norm; last tokens "
            f"{((low_tokens - tokens).norm() / tokens.norm()):.1e}; the best class is the same for "
            f"{(low_scores.argmax(-1) == scores.argmax(-1)).sum()} of {CLIPS} clips"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
