"""Pictures of batches."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MOST = 8  # clips, and frames of each, in a picture
LINE = 14  # pixels of a line of text


def batch_picture(
    clips: Tensor, targets: Tensor, mean: tuple[float, ...], std: tuple[float, ...], names: list[str] | None
) -> np.ndarray:
    """The first clips of a batch below each other, their frames side by side, and above each what it is taken for.

    Args:
        clips: normalised, (B, T, 3, H, W).
        targets: int64 labels (B,), or float shares of the classes (B, K).
        names: of the classes, in label order.

    Returns:
        uint8 (H, W, 3).
    """
    frames = np.unique(np.linspace(0, clips.shape[1] - 1, MOST).round().astype(int)).tolist()
    shape = (1, 1, 3, 1, 1)
    pixels = clips[:MOST, frames].detach().float().cpu() * torch.tensor(std).view(shape)
    pixels = ((pixels + torch.tensor(mean).view(shape)).clamp(0, 1) * 255).round().byte()
    scale = max(1, 96 // pixels.shape[-1])
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    strips = pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).numpy()  # (B, H, T * W, 3)
    height = strips.shape[1] + LINE
    page = Image.new("RGB", (strips.shape[2], len(strips) * height), "white")
    draw = ImageDraw.Draw(page)
    for number, (strip, target) in enumerate(zip(strips, targets[: len(strips)].detach().cpu(), strict=True)):
        draw.text((2, number * height + 1), describe_target(target, names), fill="black")
        page.paste(Image.fromarray(strip), (0, number * height + LINE))
    return np.asarray(page)


def describe_target(target: Tensor, names: list[str] | None) -> str:
    """A label with its name, or the classes of a mixture with their shares above that of label smoothing."""
    if target.dim() == 0:
        return _name(int(target), names)
    shares, labels = target.topk(min(2, len(target)))
    parts = [(share, label) for share, label in zip(shares.tolist(), labels.tolist(), strict=True)]
    parts = [part for part in parts if part[0] > 1.5 * float(target.min())]
    return " + ".join(f"{_name(label, names)} {share:.2f}" for share, label in parts)


def _name(label: int, names: list[str] | None) -> str:
    text = f"{label} {names[label]}" if names else f"class {label}"
    return text.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has
