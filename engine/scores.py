"""The scores of a test, and the file that holds them."""

import glob
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.annotations import UNLABELLED
from utils.atomic import write_atomically, writing
from utils.distributed import get_rank
from utils.errors import DataError

SECONDS_BETWEEN_WRITES = 60.0


@dataclass(frozen=True)
class Scores:
    """What a test gives, in list order. K classes.

    paths: as the list names them
    labels: int64 (videos,), all UNLABELLED for a list without labels
    scores: float32 (videos, K), mean over views of softmax(logits); NaN for a video that could not be read
    damaged: bool (videos,), videos of which a part could not be decoded
    class_names: of the K columns, None if unknown
    protocol: what decides the scores beside the weights: data set, frames, crops, clips, pixels, precision, decoder
    """

    paths: list[str]
    labels: np.ndarray
    scores: np.ndarray
    damaged: np.ndarray
    class_names: list[str] | None
    protocol: dict[str, Any]

    @property
    def labelled(self) -> bool:
        return bool(self.labels[0] != UNLABELLED)


class PartialScores:
    """Scores of a test that is not finished, in files beside the one that it will write.

    Each process writes its own, FILE.partial-<rank>-<pid>.npz: `indices` int64 (videos,), `scores` float32 (videos, K),
    `damaged` (JSON: index -> what is damaged) and the protocol. A test with the same protocol goes on from all of them.
    """

    def __init__(self, path: Path, protocol: dict[str, Any]):
        """
        Args:
            path: the file of the finished scores.
            protocol: of the test, with the hashes of the model and of the list.

        Raises:
            DataError: there are partial scores of another test, or they cannot be read.
        """
        self._path, self._protocol = path, json.dumps(protocol, sort_keys=True)
        self._own: dict[int, np.ndarray] = {}
        self._written = time.monotonic()
        self.done: dict[int, np.ndarray] = {}
        self.damaged: dict[int, str] = {}  # among `done`
        self._own_damaged: dict[int, str] = {}
        for file in _partial_files(path):
            self._read(file)

    def add(self, indices: list[int], scores: np.ndarray, damaged: dict[int, str]) -> None:
        """Scores (videos, K) of some videos, and the damage met so far; written to the disk once a minute."""
        self._own |= dict(zip(indices, scores, strict=True))
        self._own_damaged |= damaged
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write what this process has added so far."""
        if self._own:
            indices, scores = np.array(list(self._own), np.int64), np.stack(list(self._own.values()))
            name = self._path.with_name(f"{self._path.name}.partial-{get_rank()}-{os.getpid()}.npz")
            content: dict[str, Any] = {
                "indices": indices,
                "scores": scores,
                "damaged": json.dumps(self._own_damaged),
                "protocol": self._protocol,
            }
            with writing(name):
                write_atomically(name, lambda file: np.savez(file, **content))
        self._written = time.monotonic()

    @staticmethod
    def remove_all(path: Path) -> None:
        """Remove the partial files of a test whose scores are in `path` now."""
        for file in _partial_files(path):
            file.unlink(missing_ok=True)

    def _read(self, file: Path) -> None:
        try:
            with np.load(file) as content:
                protocol, indices, scores = (content[name] for name in ("protocol", "indices", "scores"))
                damaged = {int(index): what for index, what in json.loads(str(content["damaged"])).items()}
        except Exception as error:  # NumPy and zipfile raise many kinds
            raise DataError(f"{file}: cannot be read ({error}); remove it, and its videos are scored again") from error
        if str(protocol) != self._protocol:
            old, new = json.loads(str(protocol)), json.loads(self._protocol)
            changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
            raise DataError(
                f"{file}: holds scores of another test (different: {', '.join(changed)}); remove it, or name another "
                "file"
            )
        self.done |= dict(zip(indices.tolist(), scores, strict=True))
        self.damaged |= damaged


def _partial_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.partial-*.npz"))


def save_scores(path: Path, result: Scores) -> None:
    """Write an npz atomically: `paths`, `labels`, `scores`, `damaged`, `protocol` (JSON), and `class_names` if known.

    Raises:
        DataError: the file cannot be written.
    """
    arrays: dict[str, Any] = {
        "paths": np.array(result.paths, dtype=str),
        "labels": np.asarray(result.labels, dtype=np.int64),
        "scores": np.asarray(result.scores, dtype=np.float32),
        "damaged": np.asarray(result.damaged, dtype=bool),
        "protocol": np.array(json.dumps(result.protocol)),
    }
    if result.class_names:
        arrays["class_names"] = np.array(result.class_names, dtype=str)
    with writing(path):
        write_atomically(path, lambda file: np.savez(file, **arrays))
