"""Where the side network looks in a clip: which patches speak for a class, and which its last block attends to.

Letters: B clips, T frames of a clip, N patches of a frame, S side width, K classes, H, W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from datasets.annotations import VideoRecord
from datasets.sampling import sample_test
from inference.recognizer import Recognizer
from utils.errors import DataError


@dataclass(frozen=True)
class Look:
    """What `look` finds in one clip of a video.

    frames: indices in the video, T of them
    pixels: uint8 (T, H, W, 3), what the model sees
    scores: float32 (K,), of this clip
    label: the class that `gradient` is about
    gradient: float32 (T, rows, columns), how much each patch speaks for the class; 0 where it speaks against it
    attention: float32 (T, rows, columns), the mean share that the patches of a frame take of each patch in the last
        side block; what is missing to 1 in a frame goes to the class token
    """

    frames: list[int]
    pixels: np.ndarray
    scores: np.ndarray
    label: int
    gradient: np.ndarray
    attention: np.ndarray


def look(recognizer: Recognizer, record: VideoRecord, label: int | None = None) -> Look:
    """Where the side network looks in the centre crop of one clip.

    The gradient map is taken at all that the side network reads, before its patches mix: the tokens of its stem and the
    projected tokens of each layer of the tower. The products of these tokens with their gradients are summed over
    channels and layers. At the last block, patches have exchanged so much that such a map says little.

    Args:
        label: the class that the gradient is of; None: the one with the highest score.

    Raises:
        DataError: the video cannot be read.
    """
    ((_, num_frames, clip, error),) = recognizer.outputs([record], lambda clips: clips, lambda clips: clips)
    if clip is None or num_frames is None:
        raise DataError(str(error))
    data, model = recognizer.config.data, recognizer.model
    clip = clip.clone()  # made without gradients
    read: list[Tensor] = []
    attended: list[tuple] = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        output.retain_grad()
        read.append(output)

    side = model.trained.side
    last: nn.Module = side.blocks[-1].attn  # type: ignore[assignment]
    hooks = [module.register_forward_hook(keep) for module in (side.stem_bn, *side.projections)]
    hooks.append(last.register_forward_pre_hook(lambda module, inputs: attended.append(inputs)))
    recompute, side.recompute = side.recompute, False  # hooks would see each block twice
    try:
        with torch.enable_grad(), recognizer.precision.autocast():
            logits = model(clip).float()[0]
            chosen = int(logits.argmax()) if label is None else label
            logits[chosen].backward()
        with torch.no_grad(), recognizer.precision.autocast():
            weights = last.weights(*attended[0]).float()[0]  # type: ignore[operator]  # (T, heads, N, 1 + N)
    finally:
        side.recompute = recompute
        for hook in hooks:
            hook.remove()
        model.trained.zero_grad(set_to_none=True)
    num_patches = side.pos.shape[0]
    evidence = torch.zeros(clip.shape[1], num_patches, device=clip.device)
    for tokens in read:
        assert tokens.grad is not None
        evidence += (tokens.grad.float() * tokens.detach().float())[0, :, -num_patches:].sum(dim=-1)
    rows = round(num_patches**0.5)
    mean, std = (torch.tensor(values, device=clip.device).view(-1, 1, 1) for values in (data.mean, data.std))
    pixels = ((clip[0] * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    frames = sample_test(num_frames, data.num_segments, data.protocol, dense=data.dense)[0]
    return Look(
        frames.tolist(),
        pixels.cpu().numpy(),
        logits.detach().softmax(dim=0).cpu().numpy(),
        chosen,
        evidence.clamp(min=0).unflatten(-1, (rows, rows)).cpu().numpy(),
        weights[..., 1:].mean(dim=(1, 2)).unflatten(-1, (rows, rows)).cpu().numpy(),
    )


def focus(weights: np.ndarray, mask: np.ndarray) -> float:
    """How much more of the weight lies on a mask than its area would get: (share of weight) / (share of area).

    Args:
        weights: (T, rows, columns), at least 0.
        mask: bool (T, H, W), H and W multiples of rows and columns.
    """
    frames, rows, columns = weights.shape
    covered = mask.reshape(frames, rows, mask.shape[1] // rows, columns, -1).mean(axis=(2, 4))
    return float((weights * covered).sum() / weights.sum() / covered.mean())
