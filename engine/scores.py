"""The scores of a test, and the file that holds them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.annotations import UNLABELLED
from utils.atomic import write_atomically


@dataclass(frozen=True)
class Scores:
    """What a test gives, in list order. K classes.

    paths: as the list names them
    labels: int64 (videos,), all UNLABELLED for a list without labels
    scores: float32 (videos, K), mean over views of softmax(logits); NaN for a video that could not be read
    class_names: of the K columns, None if unknown
    protocol: what decides the scores beside the weights: data set, frames, crops, clips, pixels, precision, decoder
    """

    paths: list[str]
    labels: np.ndarray
    scores: np.ndarray
    class_names: list[str] | None
    protocol: dict[str, Any]

    @property
    def labelled(self) -> bool:
        return bool(self.labels[0] != UNLABELLED)


def save_scores(path: Path, result: Scores) -> None:
    """Write an npz atomically: `paths`, `labels`, `scores`, `protocol` (JSON), and `class_names` if they are known."""
    arrays: dict[str, Any] = {
        "paths": np.array(result.paths, dtype=str),
        "labels": np.asarray(result.labels, dtype=np.int64),
        "scores": np.asarray(result.scores, dtype=np.float32),
        "protocol": np.array(json.dumps(result.protocol)),
    }
    if result.class_names:
        arrays["class_names"] = np.array(result.class_names, dtype=str)
    write_atomically(path, lambda file: np.savez(file, **arrays))
