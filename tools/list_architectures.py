"""Print the README's table of architectures: frozen and trained parameters, and the operations of one view.

    python -m tools.list_architectures

No memory is allocated: the models consist of fake tensors, which have shapes but no values. PyTorch's FLOP counter
counts every matrix product and convolution, a multiplication and an addition as two operations. Norms and element-wise
operations are not counted.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.configuration import default_config
from modules import build_model

FRAMES, CLASSES = 8, 400
SIDE_WIDTHS = {  # for B, L and E those of the paper
    "ViT-B/32": 320,
    "ViT-B/16": 320,
    "ViT-L/14": 512,
    "ViT-L/14-336px": 512,
    "EVA02-CLIP-L-14": 512,
    "EVA02-CLIP-L-14-336": 512,
    "EVA02-CLIP-bigE-14": 576,
    "EVA02-CLIP-bigE-14-plus": 576,
    "timm/vit_base_patch16_siglip_224.v2_webli": 320,
    "timm/vit_base_patch16_dinov3": 320,
}
HEAD = (
    "network.arch",
    "variant",
    "pixels",
    "side width",
    "frozen (M)",
    "trained (M)",
    "GFLOPs a view",
    "of which side",
)


def main() -> None:
    rows = [HEAD, ("---",) * len(HEAD), *(describe(arch) for arch in SIDE_WIDTHS)]
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in rows))


def describe(arch: str) -> tuple[str, ...]:
    """The table row of one architecture at its own input size, with 8 frames and 400 classes."""
    network = {"arch": arch, "side_dim": SIDE_WIDTHS[arch], "backbone_kwargs": {}}
    config = default_config(data={"num_classes": CLASSES, "input_size": None}, network=network)
    pixels = config.data.input_size
    with torch.device("meta"):
        model = build_model(config).eval()
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # autocast does not support the meta device
    with fake, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the counter sees both matrix products of attention
        model.to_empty(device="cpu")
        clip = torch.empty(1, FRAMES, 3, pixels, pixels)
        with FlopCounterMode(display=False) as tower:
            tokens = list(model.backbone.layer_tokens(clip))
        with FlopCounterMode(display=False) as side:
            model.trained(clip, tokens)
    frozen, trained = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.backbone, model.trained))
    total, own = (flops / 1e9 for flops in (tower.get_total_flops() + side.get_total_flops(), side.get_total_flops()))
    variant, side_width = model.trained.side.norm_placement, str(SIDE_WIDTHS[arch])
    counts = (f"{frozen:.1f}", f"{trained:.1f}", f"{total:.0f}", f"{own:.0f}")
    return (f"`{arch}`", variant, str(pixels), side_width, *counts)


if __name__ == "__main__":
    main()
