"""Labels that a horizontal flip swaps (docs/protocol.md, section 5)."""

import re
from collections.abc import Sequence

from utils.errors import ConfigError

# Pairs of direction classes among the 174 classes of Something-Something, numbered in alphabetical order.
SOMETHING_FLIP_PAIRS = ((86, 87), (93, 94), (166, 167))


def flip_pairs(protocol: str, num_classes: int, class_names: Sequence[str] | None) -> dict[int, int]:
    """Return {label: label after a horizontal flip} for the classes whose label changes.

    With class names, two classes form a pair if swapping the words "left" and "right" turns one name into the other.
    Without names, `something` with 174 classes has its known pairs, and other protocols have none.

    Raises:
        ConfigError: protocol `something` without names and with a number of classes other than 174.
    """
    if class_names is not None:
        labels = {name: label for label, name in enumerate(class_names)}
        mirrored = [labels.get(mirror_words(name), label) for label, name in enumerate(class_names)]
        return {label: other for label, other in enumerate(mirrored) if other != label}
    if protocol != "something":
        return {}
    if num_classes != 174:
        raise ConfigError(
            "data.label_list: set it to a csv file (id,name). A flip must swap the labels of left and right, and "
            f"without names they are known for 174 classes only, not for {num_classes}; or set data.flip=False"
        )
    return dict(SOMETHING_FLIP_PAIRS) | {b: a for a, b in SOMETHING_FLIP_PAIRS}


def mirror_words(name: str) -> str:
    """Return `name` with the words "left" and "right" swapped, in the same letter case."""

    def swap(match: re.Match) -> str:
        word = match.group()
        other = "right" if word.lower() == "left" else "left"
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    return re.sub(r"(?<![^\W_])(left|right)(?![^\W_])", swap, name, flags=re.IGNORECASE)
