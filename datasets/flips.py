"""Labels that a horizontal flip swaps (docs/protocol.md, section 5)."""

import re
from collections.abc import Mapping, Sequence

from utils.errors import ConfigError

# Pairs of direction classes among the 174 classes of Something-Something, numbered in alphabetical order.
SOMETHING_FLIP_PAIRS = ((86, 87), (93, 94), (166, 167))


_LEFT_RIGHT = re.compile(r"(?<![^\W_])(left|right)(?![^\W_])", re.IGNORECASE)
_CLOCKWISE = re.compile(r"(?<![^\W_])((?:counter|anti|contra)[\s_-]*)?clockwise(?![^\W_])", re.IGNORECASE)
# Words that suggest a side, in names that may join words, such as TurnLeft and left-handed.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_]+")
_SIDE = re.compile(
    r"(left|right)((hand|side|ward|most)(ed|s)?|y|ies)?|(counter|anti|contra)?clockwise|c?cw", re.IGNORECASE
)


def flip_pairs(protocol: str, num_classes: int, class_names: Sequence[str] | None) -> dict[int, int]:
    """Return {label: label after a horizontal flip} for the classes whose label changes.

    With class names, two classes form a pair if swapping the words "left" and "right", and "clockwise" and
    "counterclockwise", turns one name into the other. "anticlockwise", "counter-clockwise" and the like are one word.
    Without names, `something` with 174 classes has its known pairs, and other protocols have none.

    Raises:
        ConfigError: protocol `something` without names and with a number of classes other than 174.
    """
    if class_names is not None:
        labels: dict[str, list[int]] = {}
        for label, name in enumerate(class_names):
            labels.setdefault(_CLOCKWISE.sub(_one_spelling, name), []).append(label)
        pairs = {}
        for label, name in enumerate(class_names):
            others = labels.get(_CLOCKWISE.sub(_one_spelling, mirror_words(name)), [])
            same = labels[_CLOCKWISE.sub(_one_spelling, name)]
            if len(others) == len(same) == 1 and others != same:  # not with two classes that differ only in spelling
                pairs[label] = others[0]
        return pairs
    if protocol != "something":
        return {}
    if num_classes != 174:
        raise ConfigError(
            "data.label_list: set it to a csv file (id,name). A flip must swap the labels of left and right, and "
            f"without names they are known for 174 classes only, not for {num_classes}; or set data.flip=False"
        )
    return dict(SOMETHING_FLIP_PAIRS) | {b: a for a, b in SOMETHING_FLIP_PAIRS}


def describe_flips(pairs: Mapping[int, int] | None, class_names: Sequence[str] | None) -> str:
    """One line that names the classes whose labels a flip swaps; None stands for no flips."""
    if pairs is None:
        return "flips: none"

    def name(label: int) -> str:
        return repr(class_names[label]) if class_names else f"label {label}"

    swapped = [f"{name(label)} and {name(other)}" for label, other in sorted(pairs.items()) if label < other]
    return f"flips: half of the training clips; labels swapped: {'; '.join(swapped) or 'none'}"


def mirror_words(name: str) -> str:
    """Return `name` with the words "left" and "right", "clockwise" and "counterclockwise" swapped, in their case."""

    def swap_side(match: re.Match) -> str:
        return _in_case_of(match.group(), "right" if match.group().lower() == "left" else "left")

    def swap_turn(match: re.Match) -> str:
        return _in_case_of(match.group(), "clockwise" if match[1] else "counterclockwise")

    return _CLOCKWISE.sub(swap_turn, _LEFT_RIGHT.sub(swap_side, name))


def suggests_side(name: str) -> bool:
    """Whether the name has a word for a side or a turn, in a spelling that a flip swaps or in another one."""
    return any(_SIDE.fullmatch(word) for word in (*_WORD.findall(name), *re.findall(r"[^\W\d_]+", name)))


def _in_case_of(word: str, other: str) -> str:
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def _one_spelling(match: re.Match) -> str:
    return "counterclockwise" if match[1] else "clockwise"
