"""Seconds of calls on a CPU or a GPU, of several in turns."""

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch

Measured = TypeVar("Measured")
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


def processor_seconds(run: Callable[[], Any]) -> float:
    """Seconds of the processor in all threads of this process, for one call on a CPU."""
    started = time.process_time()
    run()
    return time.process_time() - started


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


def rounds_in_turns(
    runs: Iterable[Callable[[], Any]], rounds: int, measure: Callable[[Callable[[], Any]], Measured]
) -> list[list[Measured]]:
    """What `measure` gives of the runs, called one after the other: a row for each round. A first one warms up."""
    runs = list(runs)
    return [[measure(run) for run in runs] for _ in range(rounds + 1)][1:]


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Name -> median seconds, and median of the ratios to the first run of the same round."""
    rows = rounds_in_turns(runs.values(), rounds, partial(seconds_of, device=device))
    return {
        name: (statistics.median(row[i] for row in rows), statistics.median(row[i] / row[0] for row in rows))
        for i, name in enumerate(runs)
    }
