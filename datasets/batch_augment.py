"""What timm adds to training clips on the device: random erasing, mixup and cutmix.

docs/protocol.md section 5. timm treats single images and draws from the global generators of Python and NumPy; here its
draws are seeded, and hold for all frames of a clip, which timm is shown as channels of one image. B clips, T frames,
K classes.
"""

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from utils.seeding import seeded_globals


class BatchAugment:
    """Random erasing, then mixup or cutmix, of a batch on its device, and the smoothed targets of its labels.

    Erasing replaces one box of a quarter of the clips by noise drawn for each pixel and frame, from PyTorch's global
    generator. Mixup mixes every clip with its partner, the first with the last and so on, by one lambda for the batch,
    or cuts the same box out of it; it needs an even number of clips.
    """

    def __init__(self, num_classes: int, smoothing: float, rand_erase: bool, mixup: bool, device: torch.device):
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.erase = RandomErasing(0.25, mode="pixel", device=device) if rand_erase else None
        self.mix = None
        if mixup:
            self.mix = Mixup(0.8, 1.0, switch_prob=0.5, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, clips: Tensor, labels: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Decisions, boxes and lambda are a function of `key`.

        Args:
            clips: float32 (B, T, 3, H, W), contiguous and normalised; changed in place.
            labels: int64 (B,).

        Returns:
            clips: float32 (B, T, 3, H, W).
            targets: float32 (B, K), probabilities.
        """
        images = clips.flatten(1, 2)  # (B, T*3, H, W)
        with seeded_globals(*key):
            if self.erase:
                images = self.erase(images)
            if self.mix:
                images, targets = self.mix(images, labels)
            else:
                targets = mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        return images.view(clips.shape), targets
