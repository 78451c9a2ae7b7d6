"""Class names of a checkpoint against those of `data.label_list`.

Without this check, another class order silently gives wrong scores.
"""

import logging
from itertools import zip_longest
from pathlib import Path

from utils.errors import CheckpointError

log = logging.getLogger(__name__)


def names_differ(here: list[str] | None, there: list[str] | None) -> bool:
    """True if both sides have names and these differ, or their order does. White space around a name is ignored."""
    if not here or not there:
        return False
    return _stripped(here) != _stripped(there)


def class_order(
    here: list[str] | None, there: list[str] | None, source: str | Path, remap: bool = False
) -> list[int] | None:
    """For each class of this run, its place in a checkpoint: `scores[:, order]` has this run's order.

    Args:
        here: names in label order, of `data.label_list`; None without it.
        there: names that the checkpoint was trained with; None for a released one.
        source: the checkpoint's file, for errors and the log.
        remap: accept another order of the same names.

    Returns:
        The order, or None if the columns stay as they are: the names are equal, or one side has none, which is logged.

    Raises:
        CheckpointError: the names differ; the message lists the first differences.
    """
    if not here or not there:
        log.info("class names: could not be compared, %s", f"{source} has none" if here else "no data.label_list")
        return None
    here, there = _stripped(here), _stripped(there)
    differing = [
        f"{label}: {a!r} here, {b!r} in the checkpoint"
        for label, (a, b) in enumerate(zip_longest(here, there))
        if a != b
    ]
    if not differing:
        return None
    only_order = sorted(here) == sorted(there)
    if only_order and remap:
        log.info(
            "class names: %d have another label in %s; scores are put into the order of data.label_list",
            len(differing),
            source,
        )
        return [there.index(name) for name in here]
    advice = (
        "only the order differs: test.remap_labels=True brings the scores of a test into this one"
        if only_order
        else "without data.label_list nothing is compared"
    )
    raise CheckpointError(
        f"{source}: {len(differing)} of {len(here)} class names differ from data.label_list: {'; '.join(differing[:3])}"
        f"{'; ...' if len(differing) > 3 else ''}; {advice}"
    )


def _stripped(names: list[str]) -> list[str]:
    return [name.strip() for name in names]
