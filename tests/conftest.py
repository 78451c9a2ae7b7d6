"""Shared fixtures: tiny data sets on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def random_frame(seed: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """A smooth random RGB image of (width, height), another one for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, size=(6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def make_frame_folders(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """make(lengths, size, num_classes) -> (root, list): one JPEG folder "video <i>" per length, labels in turn."""

    def make(lengths: Sequence[int], size: tuple[int, int] = (40, 32), num_classes: int = 4) -> tuple[str, str]:
        lines = []
        for video, length in enumerate(lengths):
            folder = tmp_path / "frames" / f"video {video}"
            folder.mkdir(parents=True)
            for number in range(1, length + 1):
                random_frame((video, number), size).save(folder / f"img_{number:05d}.jpg", quality=90)
            lines.append(f"{folder.name} {length} {video % num_classes}\n")
        list_path = tmp_path / "list.txt"
        list_path.write_text("".join(lines))
        return str(tmp_path / "frames"), str(list_path)

    return make
