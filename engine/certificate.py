"""The certificate of a result: what another person needs to check a score file, and what its accuracy says.

It is a dictionary, stored as JSON in the score file, beside the protocol of the test:

    format              "side4video-certificate/1"
    checkpoint_sha256   of the checkpoint's file
    tower_sha256        of the tensors of the frozen tower, as in a checkpoint
    class_names_sha256  of the class names, one a line; None if they are unknown
    environments        versions of libraries and the device, one entry for each in which videos were scored
    expected, scored, unreadable, damaged   numbers of videos: in the list; with scores; without; scored in part

The protocol holds `list_sha256`, `model_sha256` (of the trained tensors), the decoder, and what else decides scores.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.statistics import Interval, finite_interval, wilson_interval

FORMAT = "side4video-certificate/1"

# Videos of the validation lists as they were published. Kinetics: the csv file of the release that CVDF hosts.
OFFICIAL_VIDEOS = {"kinetics400": 19_906, "something-something-v1": 11_522, "something-something-v2": 24_777}


def make_certificate(
    checkpoint_sha256: str,
    tower_sha256: str,
    class_names: Sequence[str] | None,
    environments: list[dict[str, str]],
    scores: np.ndarray,
    damaged: np.ndarray,
) -> dict[str, Any]:
    """The certificate of a test; arguments as the entries above, and of `engine.scores.Scores`."""
    unreadable = int(np.isnan(scores).any(axis=1).sum())
    return {
        "format": FORMAT,
        "checkpoint_sha256": checkpoint_sha256,
        "tower_sha256": tower_sha256,
        "class_names_sha256": hash_names(class_names),
        "environments": environments,
        "expected": len(scores),
        "scored": len(scores) - unreadable,
        "unreadable": unreadable,
        "damaged": int(damaged.sum()),
    }


def hash_names(names: Sequence[str] | None) -> str | None:
    """SHA-256 of class names in label order, one a line; None for None."""
    return None if names is None else hashlib.sha256("\n".join(names).encode()).hexdigest()


def certificate_rows(certificate: dict[str, Any]) -> dict[str, str]:
    """The certificate in words, for a table."""
    hashes = {f"SHA-256 of {what}": certificate.get(key) or "unknown" for key, what in (
        ("checkpoint_sha256", "the checkpoint's file"),
        ("tower_sha256", "the tower's tensors"),
        ("class_names_sha256", "the class names"),
    )}  # fmt: skip
    counts = {f"videos {what}": str(certificate.get(what, "unknown")) for what in ("expected", "scored", "unreadable")}
    counts["videos scored in part (damaged)"] = str(certificate.get("damaged", "unknown"))
    environments = [describe_environment(of) for of in certificate.get("environments", [])]
    return {**hashes, **counts, "scored with": "; and ".join(environments)}


def describe_environment(environment: dict[str, str]) -> str:
    """An entry of `environments` in words."""
    return ", ".join(f"{name} {value}" for name, value in environment.items()) or "unknown versions"


@dataclass(frozen=True)
class Bounds:
    """What is known of the accuracy over all videos of a data set when some have no scores. Shares, not per cent.

    total: videos of the data set
    scored: of them with scores
    right: of them with the right answer
    worst, best: accuracy over all of them if every missing video were wrong, or right
    at_random: 95 % interval of it if they were missing at random
    others: 95 % interval of Wilson for other videos of the same kind
    """

    total: int
    scored: int
    right: int
    worst: float
    best: float
    at_random: Interval
    others: Interval


def bounds(right: int, scored: int, total: int) -> Bounds:
    """Bounds of the accuracy over `total` videos, of which `scored` have scores and `right` of these are right."""
    missing = total - scored
    return Bounds(
        total,
        scored,
        right,
        right / total,
        (right + missing) / total,
        finite_interval(right, scored, total),
        wilson_interval(right, scored),
    )
