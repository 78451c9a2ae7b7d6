"""How much of a result is motion: clips whose frames are reversed, shuffled, one frame, or fewer.

Letters: V views, T frames of a clip, K classes.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

IN_ORDER, REVERSED, SHUFFLED, STILL = "frames in order", "reversed", "shuffled", "one frame repeated"

# Words that a video played backwards exchanges. A pair of classes needs a class with all its words exchanged.
OPPOSITES = (
    ("left", "right"), ("up", "down"), ("upward", "downward"), ("forward", "backward"), ("in", "out"),
    ("into", "out of"), ("onto", "off"), ("on", "off"), ("open", "close"), ("opens", "closes"), ("opening", "closing"),
    ("growing", "shrinking"), ("rising", "falling"), ("entering", "leaving"), ("covering", "uncovering"),
    ("folding", "unfolding"), ("plugging", "unplugging"), ("wrapping", "unwrapping"), ("tying", "untying"),
    ("locking", "unlocking"), ("loading", "unloading"), ("lifting", "lowering"), ("inflating", "deflating"),
    ("attaching", "detaching"), ("toward", "away from"), ("clockwise", "counterclockwise"),
)  # fmt: skip
SAME = {"upwards": "upward", "downwards": "downward", "forwards": "forward", "backwards": "backward"}
SAME |= {"towards": "toward", "anticlockwise": "counterclockwise"}
_EXCHANGED = {a: b for pair in reversed(OPPOSITES) for a, b in (pair, pair[::-1])}
_WORDS = re.compile(
    r"(?<!\w)(" + "|".join(sorted(map(re.escape, _EXCHANGED), key=len, reverse=True)) + r")(?!\w)", re.I
)


def variants(num_segments: int, seed: int = 0) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is done to clips, by name: each maps (views, T, 3, H, W) to (views, frames, 3, H, W).

    "4 of 8 frames" are clips of 4 frames, evenly spread; the other clips have T frames. A shuffled clip is never in
    order; the draws depend on the seed and on the order of the clips.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(clips: Tensor) -> Tensor:
        orders = [shuffle(clips.shape[1], generator) for _ in clips]
        return torch.stack([clip[order.to(clips.device)] for clip, order in zip(clips, orders, strict=True)])

    def fewer(count: int) -> Callable[[Tensor], Tensor]:
        places = [int((2 * number + 1) * num_segments / (2 * count)) for number in range(count)]
        return lambda clips: clips[:, places]

    middle = num_segments // 2
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        IN_ORDER: lambda clips: clips,
        REVERSED: lambda clips: clips.flip(1),
        SHUFFLED: shuffled,
        STILL: lambda clips: clips[:, middle : middle + 1].expand_as(clips),
    }
    count = num_segments // 2
    while count >= 2:
        changes[f"{count} of {num_segments} frames"] = fewer(count)
        count //= 2
    return changes


def shuffle(num_segments: int, generator: torch.Generator) -> Tensor:
    """A random order of T frames, int64 (T,), other than the one they have; T is at least 2."""
    while True:
        order = torch.randperm(num_segments, generator=generator)
        if (order.diff() < 0).any():
            return order


def reversal_pairs(names: Sequence[str]) -> dict[int, int]:
    """{label: label of the class that its videos show when they are played backwards}, as far as names tell.

    Two classes form a pair if exchanging all words of OPPOSITES in the name of each gives the name of the other.
    """
    plain = [re.sub(r"\w+", lambda word: SAME.get(word.group(), word.group()), name.casefold()) for name in names]
    labels = {name: label for label, name in enumerate(plain)}
    partner = {label: labels.get(_exchanged(name)) for label, name in enumerate(plain)}
    return {
        label: other
        for label, other in partner.items()
        if other is not None and other != label and partner[other] == label
    }


def _exchanged(name: str) -> str:
    return _WORDS.sub(lambda match: _EXCHANGED[match.group()], name)


def above_chance(labels: np.ndarray) -> float:
    """Accuracy of always answering the most frequent class, a share."""
    return float(np.bincount(labels).max() / len(labels))
