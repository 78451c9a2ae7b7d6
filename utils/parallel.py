"""One function over many items in several processes: in order, in bounded memory, and no lost item stops it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 8  # items under way for each process: enough to go on beside a long video


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, died: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in the order of `items`, of which only a few are taken ahead.

    Args:
        function: sent to new processes, as the items are: defined in a module, or a `functools.partial` of such.
        workers: number of processes; 0 works in this one.
        died: the result of an item whose process ends while it works on it: a crash in a decoder, memory used up.

    What `function` raises is raised here. Then, and when the iterator is closed or interrupted, nobody waits: the
    processes end at once, with whatever they were at. They also end when this process is killed.
    """
    if workers == 0:
        yield from ((item, function(item)) for item in items)
        return
    items, pending = iter(items), deque()
    while True:
        try:
            with _pool(workers) as pool:
                while True:
                    pending += ((item, _submit(pool, function, item)) for item in _take(items, workers, pending))
                    if not pending:
                        return
                    item, future = pending[0]
                    result = future.result()
                    pending.popleft()
                    yield item, result
        except BrokenProcessPool:  # which item did it shows when each is tried alone
            for item, future in pending:
                broken = not future.done() or isinstance(future.exception(), BrokenProcessPool)
                yield item, _alone(function, item, died) if broken else future.result()
            pending.clear()


def _take(items: Iterator[Item], workers: int, pending: deque) -> list[Item]:
    return list(islice(items, workers * AHEAD - len(pending)))


def _submit(pool: ProcessPoolExecutor, function: Callable, item: object) -> Future:
    try:
        return pool.submit(function, item)
    except BrokenProcessPool as error:
        future = Future()
        future.set_exception(error)
        return future


def _alone(function: Callable[[Item], Result], item: Item, died: Callable[[Item], Result]) -> Result:
    try:
        with _pool(1) as pool:
            return pool.submit(function, item).result()
    except BrokenProcessPool:
        return died(item)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    others = set(multiprocessing.active_children())
    # Spawned, since a fork of a process with threads (the progress bar has one) can hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow(parent: multiprocessing.process.BaseProcess) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, args=(multiprocessing.parent_process(),), daemon=True).start()
