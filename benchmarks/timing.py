"""Seconds of calls on a CPU or a GPU."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

SERIES_SECONDS = 0.2  # that many equal calls are timed over, at least


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until the device is through with it."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def steady_seconds(run: Callable[[], Any], device: torch.device, times: int | None = None) -> float:
    """Seconds of one call among many that the host launches ahead: the median of five series, after a warm-up.

    Args:
        times: calls of a series; None makes it last SERIES_SECONDS. Processes that wait for each other must name it.
    """
    run()
    first = seconds_of(run, device)
    times = times or max(1, round(SERIES_SECONDS / max(first, 1e-6)))

    def series() -> None:
        for _ in range(times):
            run()

    return statistics.median(seconds_of(series, device) for _ in range(5)) / times


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Name -> median seconds, and median of the ratios to the first run of the same round. The first round warms up."""
    rows = [[seconds_of(run, device) for run in runs.values()] for _ in range(rounds + 1)][1:]
    return {
        name: (statistics.median(row[i] for row in rows), statistics.median(row[i] / row[0] for row in rows))
        for i, name in enumerate(runs)
    }
