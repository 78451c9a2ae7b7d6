"""Class names of a checkpoint against those of `data.label_list`: the same names in another order go unnoticed else."""

import logging
from itertools import zip_longest
from pathlib import Path

from utils.errors import CheckpointError

log = logging.getLogger(__name__)


def names_differ(here: list[str] | None, there: list[str] | None) -> bool:
    """True if both sides have names and they are not the same in the same order; white space around them is nothing."""
    return bool(here and there) and [name.strip() for name in here] != [name.strip() for name in there]


def class_order(
    here: list[str] | None, there: list[str] | None, source: str | Path, remap: bool = False
) -> list[int] | slice:
    """Where this run's classes stand in a checkpoint: what `scores[:, ...]` needs to be in this run's order.

    Args:
        here: names in label order, of `data.label_list`.
        there: those that the checkpoint was trained with.
        source: the checkpoint's file, for errors and the log.
        remap: accept another order of the same names.

    Returns:
        All columns as they are if the names are equal, or if one side has none, which is logged.

    Raises:
        CheckpointError: the names differ, with the difference.
    """
    if not here or not there:
        log.info("class names: could not be compared, %s", f"{source} has none" if here else "no data.label_list")
        return slice(None)
    if not names_differ(here, there):
        return slice(None)
    here, there = [name.strip() for name in here], [name.strip() for name in there]
    pairs = list(enumerate(zip_longest(here, there)))
    differing = [f"{label}: {a!r} here, {b!r} in the checkpoint" for label, (a, b) in pairs if a != b]
    only_order = sorted(here) == sorted(there)
    if only_order and remap:
        log.info("class names: %d stand elsewhere in %s; scores are put into this order", len(differing), source)
        return [there.index(name) for name in here]
    raise CheckpointError(
        f"{source}: {len(differing)} of {len(here)} class names differ from data.label_list: {'; '.join(differing[:3])}"
        f"{'; ...' if len(differing) > 3 else ''}; "
        + (
            "only the order differs: test.remap_labels=True brings the scores of a test into this one"
            if only_order
            else "without data.label_list nothing is compared"
        )
    )
