"""Apply one function to many items in several processes, in order and with bounded memory.

An item that ends its process, such as a video that crashes the decoder, gets a result of its own, and the others go on.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 8  # items submitted per process: the other processes stay busy while one works on a long video


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, died: Callable[[Item], Result]
) -> Generator[tuple[Item, Result], None, None]:
    """Yield (item, function(item)) in the order of `items`. At most `workers * AHEAD` items are taken in advance.

    Args:
        function: pickled, and so are the items: a function at module level, or a `functools.partial` of one.
        workers: number of processes; 0 runs `function` in this process.
        died: makes the result of an item whose process ends while working on it, by a crash or by lack of memory.

    An exception of `function` is raised here. Then, and when the generator is closed or interrupted, the workers are
    terminated at once; work in progress is lost. The workers also end when this process is killed.
    """
    if workers == 0:
        yield from ((item, function(item)) for item in items)
        return
    items = iter(items)
    pending: deque[tuple[Item, Future[Result]]] = deque()
    while True:
        try:
            with _pool(workers) as pool:
                while True:
                    taken = islice(items, workers * AHEAD - len(pending))
                    pending += [(item, _submit(pool, function, item)) for item in taken]
                    if not pending:
                        return
                    item, future = pending[0]
                    result = future.result()
                    pending.popleft()
                    yield item, result
        except BrokenProcessPool:  # does not tell which item ended its process: run each unfinished item alone
            for item, future in pending:
                broken = not future.done() or isinstance(future.exception(), BrokenProcessPool)
                yield item, _run_alone(function, item, died) if broken else future.result()
            pending.clear()


def _submit(pool: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item) -> Future[Result]:
    """Submit an item; in a broken pool return a failed future, so that the item is kept and runs alone later."""
    try:
        return pool.submit(function, item)
    except BrokenProcessPool as error:
        future: Future[Result] = Future()
        future.set_exception(error)
        return future


def _run_alone(function: Callable[[Item], Result], item: Item, died: Callable[[Item], Result]) -> Result:
    try:
        with _pool(1) as pool:
            return pool.submit(function, item).result()
    except BrokenProcessPool:
        return died(item)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    others = set(multiprocessing.active_children())
    # "spawn", because forking a process that has threads (the progress bar has one) can deadlock.
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
    """Ignore Ctrl-C, which the parent handles, and exit when the parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child process

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
