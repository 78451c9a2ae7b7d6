"""Which labels a horizontal flip swaps: docs/protocol.md section 5."""

import re
from collections.abc import Sequence

from utils.errors import ConfigError

# Direction classes among the 174 of Something-Something in alphabetical order.
SOMETHING_FLIP_PAIRS = ((86, 87), (93, 94), (166, 167))


def flip_pairs(protocol: str, num_classes: int, class_names: Sequence[str] | None) -> dict[int, int]:
    """Label -> label of the mirrored action, for the classes where a mirror changes it.

    Names decide when they are given: "left" and "right" swapped must make another name. Without names, the known pairs
    of `something` with 174 classes; ConfigError for `something` with other classes.
    """
    if class_names is not None:
        labels = {name: label for label, name in enumerate(class_names)}
        mirrored = [labels.get(mirror_words(name)) for name in class_names]
        return {label: other for label, other in enumerate(mirrored) if other not in (None, label)}
    if protocol != "something":
        return {}
    if num_classes != 174:
        raise ConfigError(
            f"data.label_list: give it (csv id,name), a flip must swap the labels of left and right, and without names "
            f"they are only known for 174 classes, not for {num_classes}; or set data.flip=False"
        )
    return dict(SOMETHING_FLIP_PAIRS) | {b: a for a, b in SOMETHING_FLIP_PAIRS}


def mirror_words(name: str) -> str:
    """`name` with the words left and right swapped."""

    def swap(match: re.Match) -> str:
        word = match.group()
        other = "right" if word.lower() == "left" else "left"
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    return re.sub(r"(?<![^\W_])(left|right)(?![^\W_])", swap, name, flags=re.IGNORECASE)
