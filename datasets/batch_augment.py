"""Random erasing, mixup and cutmix of training batches, on the device (docs/protocol.md, section 5).

timm implements all three for single images, with draws from the global generators of Python and NumPy. Here a clip is
passed to timm as one image with 3 * T channels, so each draw holds for all frames of the clip, and the global
generators are seeded for the call.

B clips, T frames, H, W pixels, K classes.
"""

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from utils.seeding import seeded_globals


class BatchAugment:
    """Erases a box of some clips, then mixes clips in pairs, and returns the soft targets.

    Erasing changes a quarter of the clips: one box is filled with noise, drawn per pixel and frame from PyTorch's
    global generator. Mixing pairs the first clip with the last, the second with the last but one, and so on. Each batch
    draws one lambda and either blends the pairs (mixup) or exchanges a box between them (cutmix). It needs an even
    number of clips.
    """

    def __init__(self, num_classes: int, smoothing: float, rand_erase: bool, mixup: bool, device: torch.device):
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.erase = RandomErasing(0.25, mode="pixel", device=device) if rand_erase else None
        self.mix = None
        if mixup:
            self.mix = Mixup(0.8, 1.0, switch_prob=0.5, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, clips: Tensor, labels: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Augment a batch. The same `key` gives the same decisions, boxes and lambda.

        Args:
            clips: float32 (B, T, 3, H, W), contiguous and normalised; modified in place.
            labels: int64 (B,).
            key: integers that seed the draws, such as seed, epoch, iteration and process.

        Returns:
            clips: float32 (B, T, 3, H, W).
            targets: float32 (B, K), label-smoothed class probabilities.
        """
        images = clips.flatten(1, 2)  # (B, T*3, H, W)
        with seeded_globals(*key):
            if self.erase:
                images = self.erase(images)
            if self.mix:
                images, targets = self.mix(images, labels)
            else:
                targets = self.targets(labels, self.smoothing)
        return images.view(clips.shape), targets

    def targets(self, labels: Tensor, smoothing: float) -> Tensor:
        """Labels (B,) of clips that are not mixed -> label-smoothed class probabilities, float32 (B, K)."""
        return mixup_target(labels, self.num_classes, smoothing=smoothing)
