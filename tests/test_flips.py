"""Labels that a flip swaps, by the names of the classes (see also tests/test_transforms.py)."""

import pytest

from datasets.flips import describe_flips, flip_pairs, mirror_words, suggests_side

SPELLINGS = (
    "counterclockwise",
    "counter-clockwise",
    "counter clockwise",
    "counter_clockwise",
    "anticlockwise",
    "Anti-Clockwise",
)


@pytest.mark.parametrize("protocol", ["kinetics", "something"])
@pytest.mark.parametrize("other", SPELLINGS)
def test_clockwise_and_its_opposite_in_any_spelling_are_a_pair(protocol, other):
    names = ["Turning Hand Clockwise", "drop", f"Turning Hand {other}", "clockwise", "clockwiser"]
    assert flip_pairs(protocol, len(names), names) == {0: 2, 2: 0}


def test_a_side_and_a_turn_in_one_name_are_both_swapped():
    names = ["left hand clockwise", "left hand anticlockwise", "right hand clockwise", "right hand counter-clockwise"]
    assert flip_pairs("kinetics", 4, names) == {0: 3, 3: 0, 1: 2, 2: 1}


def test_two_classes_that_differ_only_in_spelling_have_no_partner():
    names = ["clockwise", "anticlockwise", "counter-clockwise"]
    assert flip_pairs("kinetics", 3, names) == {}


def test_words_keep_their_case():
    assert mirror_words("Left, CLOCKWISE, Counter-clockwise") == "Right, COUNTERCLOCKWISE, Clockwise"


@pytest.mark.parametrize(
    "name", ["TurnLeft", "turn_right2", "left-handed", "leftwards", "CCW turn", "Lefthand", "counter-clockwise"]
)
def test_names_that_suggest_a_side(name):
    assert suggests_side(name)


@pytest.mark.parametrize("name", ["bright light", "eating leftovers", "Upright row", "copyright", "Righteous", "jump"])
def test_names_that_only_contain_the_letters(name):
    assert not suggests_side(name)


def test_the_line_for_the_log_names_each_pair_once():
    names = ["jump", "turn left", "turn right"]
    line = describe_flips(flip_pairs("kinetics", 3, names), names)
    assert line == "flips: half of the training clips; labels swapped: 'turn left' and 'turn right'"
    assert describe_flips({}, names).endswith("labels swapped: none")
    assert describe_flips({86: 87, 87: 86}, None).endswith("labels swapped: label 86 and label 87")
    assert describe_flips(None, names) == "flips: none"
