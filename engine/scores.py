"""The scores of a test, and the file that holds them."""

import glob
import json
import os
import time
import zipfile
from collections.abc import Sequence
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
    num_frames: int64 (videos,), of each whole video, 0 for one that could not be read; None if unknown
    thumbnails: float32 (videos, T, 4, 4), grey levels of each frame of a view; they show whether two tests saw the same
        frames and pixels; None if unknown
    """

    paths: list[str]
    labels: np.ndarray
    scores: np.ndarray
    damaged: np.ndarray
    class_names: list[str] | None
    protocol: dict[str, Any]
    num_frames: np.ndarray | None = None
    thumbnails: np.ndarray | None = None

    @property
    def labelled(self) -> bool:
        return bool(self.labels[0] != UNLABELLED)


class PartialScores:
    """Scores of a test that is not finished, in files beside the one that it will write.

    Each process writes its own, FILE.partial-<rank>-<pid>.npz: `indices` int64 (videos,), `scores` float32 (videos, K),
    `damaged` (JSON: index -> what is damaged), the protocol, and details, an array (videos, ...) each. A test with the
    same protocol goes on from all of them.

    Attributes:
        done: {index: {name: row}} of the videos that have scores and all details.
        damaged: {index: what is damaged} of the damaged ones among them.
    """

    def __init__(self, path: Path, protocol: dict[str, Any], details: Sequence[str] = ()):
        """
        Args:
            path: the file of the finished scores.
            protocol: of the test, with the hashes of the model and of the list.
            details: names of the details. Videos in files without them are scored again.

        Raises:
            DataError: there are partial scores of another test, or they cannot be read.
        """
        self._path, self._protocol = path, json.dumps(protocol, sort_keys=True)
        self._names = ("scores", *details)
        self._own: dict[int, dict[str, np.ndarray]] = {}
        self._written = time.monotonic()
        self.done: dict[int, dict[str, np.ndarray]] = {}
        self.damaged: dict[int, str] = {}
        self._own_damaged: dict[int, str] = {}
        for file in _partial_files(path):
            self._read(file)

    def add(
        self,
        indices: list[int],
        scores: np.ndarray,
        damaged: dict[int, str],
        details: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Scores (videos, K) and details (videos, ...) of some videos, and the damage met so far.

        They are written to the disk once a minute.
        """
        self._own |= _rows(indices, {"scores": scores, **(details or {})})
        self._own_damaged |= damaged
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write what this process has added so far."""
        if self._own:
            indices = np.array(list(self._own), np.int64)
            arrays: dict[str, Any] = {name: np.stack([row[name] for row in self._own.values()]) for name in self._names}
            name = self._path.with_name(f"{self._path.name}.partial-{get_rank()}-{os.getpid()}.npz")
            content: dict[str, Any] = {
                "indices": indices,
                **arrays,
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
                protocol, indices = content["protocol"], content["indices"]
                complete = all(name in content for name in self._names)
                arrays = {name: content[name] for name in self._names} if complete else {}
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
        if complete:
            self.done |= _rows(indices.tolist(), arrays)
            self.damaged |= damaged


def _rows(indices: list[int], arrays: dict[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """{index: {name: row}} of arrays whose first axis belongs to `indices`."""
    return {index: {name: array[place] for name, array in arrays.items()} for place, index in enumerate(indices)}


def _partial_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.partial-*.npz"))


def save_scores(path: Path, result: Scores) -> None:
    """Write an npz atomically: `paths`, `labels`, `scores`, `damaged`, `protocol` (JSON), and what is known of
    `class_names`, `num_frames` and `thumbnails`.

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
    for name in ("num_frames", "thumbnails"):
        if (values := getattr(result, name)) is not None:
            arrays[name] = values
    with writing(path):
        write_atomically(path, lambda file: np.savez(file, **arrays))


def load_scores(path: str | Path) -> Scores:
    """Read a file of `save_scores`. A file without `protocol` or `damaged`, of another program, has an empty one.

    Raises:
        DataError: it cannot be read, or holds no scores.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; test.py --save_scores writes scores")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no npz file")
        with np.load(path) as content:
            arrays = {name: content[name] for name in content.files}
        protocol = json.loads(str(arrays.get("protocol", "{}")))
    except Exception as error:  # NumPy, zipfile and json raise many kinds
        raise DataError(
            f"{path}: cannot be read as scores ({error}); test.py --save_scores writes such files"
        ) from error
    if missing := [name for name in ("paths", "labels", "scores") if name not in arrays]:
        raise DataError(f"{path}: holds no {missing[0]}; test.py --save_scores writes such files")
    paths, labels, scores = arrays["paths"], arrays["labels"], arrays["scores"]
    names = arrays["class_names"].tolist() if "class_names" in arrays else None
    if scores.ndim != 2 or not len(scores) or not len(paths) == len(labels) == len(scores):
        raise DataError(
            f"{path}: {len(paths)} paths, {len(labels)} labels and scores of shape {scores.shape}; these must be as "
            "many, and at least one"
        )
    if names and len(names) != scores.shape[1]:
        raise DataError(f"{path}: {len(names)} class names for {scores.shape[1]} columns of scores")
    return Scores(
        paths.astype(str).tolist(),
        labels.astype(np.int64),
        scores.astype(np.float32),
        arrays.get("damaged", np.zeros(len(paths), bool)),
        names,
        protocol,
        arrays.get("num_frames"),
        arrays.get("thumbnails"),
    )
