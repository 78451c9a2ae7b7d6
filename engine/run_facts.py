"""What a run knows of itself beside its numbers: code, machine, data and time, in the rows of its metrics.

The first training row of each start holds them in the entry `run`:

    started             seconds since 1970
    Side4Video, commit, Python, torch, timm, NumPy  versions
    device, processes   name of the GPU or processor, and how many processes trained
    train_list, val_list  names of the lists, without their folders
    train_list_sha256, val_list_sha256, train_videos  hashes of the lists, and videos of an epoch
"""

import hashlib
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dotmap import DotMap

from engine.sinks import Row
from engine.software import describe_software
from utils.distributed import get_world_size

RUN = "run"  # entry of a row


def start_of_run(config: DotMap, device: torch.device, dataset: Sized | None, started: float) -> dict[str, Any]:
    """The entry `run` of a run with this training set, that started at this time."""
    facts: dict[str, Any] = {
        "started": round(started, 3),
        **describe_software(device),
        "processes": get_world_size(),
        "train_videos": None if dataset is None else len(dataset),
    }
    for name in ("train_list", "val_list"):
        path = Path(config.data[name]) if config.data[name] else None
        facts[name] = None if path is None else path.name
        there = path is not None and path.is_file()
        facts[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest() if path and there else None
    return facts


@dataclass(frozen=True)
class RunFacts:
    """What the rows of a run say of it; None for what they do not say.

    starts: the entries `run`, in order
    seconds: from each start to its last row, added up
    memory_mb: the peak, in 10^6 bytes: of the GPU of process 0, or of that process without one
    """

    starts: list[dict[str, Any]]
    seconds: float | None
    memory_mb: float | None

    def values(self, name: str) -> list[Any]:
        """The values of an entry over all starts, each once, in order."""
        return list(dict.fromkeys(start[name] for start in self.starts if start.get(name) is not None))


def facts_of_run(rows: list[Row]) -> RunFacts:
    """What rows say of their run; rows of older versions know no start."""
    starts = [row[RUN] for row in rows if isinstance(row.get(RUN), dict)]
    memory = [row["memory_mb"] for row in rows if row.get("memory_mb") is not None]
    seconds, start, last = 0.0, None, None
    for row in rows:
        if isinstance(row.get(RUN), dict):
            seconds += last - start if start is not None and last is not None else 0.0
            start = row[RUN]["started"]
        last = row.get("time")
    seconds += last - start if start is not None and last is not None else 0.0
    complete = bool(rows) and isinstance(rows[0].get(RUN), dict)
    return RunFacts(starts, seconds if complete else None, max(memory) if memory else None)
