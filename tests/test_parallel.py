"""Work in several processes: in order, with bounded memory, and without losing items when a process ends."""

import functools
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from utils.errors import DataError
from utils.parallel import parallel_map


def work(item: int) -> int:
    if item == 5:
        os._exit(3)  # like a crash in a decoder
    return item * item


def refuse(item: int) -> int:
    if item == 3:
        raise DataError("list.txt:3: no")
    return item


def note(item: int, folder: Path) -> int:
    """Writes one file per call. The first item ends its process once four files exist."""
    while item == 0 and len(list(folder.iterdir())) < 4:
        time.sleep(0.01)
    if item == 0:
        os._exit(3)
    tempfile.mkstemp(prefix=f"{item}.", dir=folder)
    return item


def interrupt(item: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return item


def test_an_interruption_is_left_to_the_parent():
    assert list(parallel_map(interrupt, range(3), 1, died=lambda item: -1)) == [(0, 0), (1, 1), (2, 2)]


def test_an_item_that_kills_its_process_is_named_and_no_other_lost():
    wanted = [(item, -1 if item == 5 else item * item) for item in range(40)]
    assert list(parallel_map(work, range(40), 2, died=lambda item: -1)) == wanted


def test_what_was_answered_before_a_process_ended_is_not_done_again(tmp_path):
    results = parallel_map(functools.partial(note, folder=tmp_path), range(12), 2, died=lambda item: -1)
    assert list(results) == [(item, item or -1) for item in range(12)]
    times = Counter(int(path.name.split(".")[0]) for path in tmp_path.iterdir())
    assert set(times) == set(range(1, 12)) and [times[item] for item in (1, 2, 3)] == [1, 1, 1]


def test_results_come_in_order_and_few_items_are_taken_ahead():
    taken = []

    def items():
        for item in range(10**6, 10**6 + 10**9):
            taken.append(item)
            yield item

    results = parallel_map(work, items(), 1, died=lambda item: -1)
    for number in range(20):
        item, _ = next(results)
        assert item == 10**6 + number and len(taken) < number + 20
    results.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_reaches_the_caller(workers):
    results = parallel_map(refuse, range(10), workers, died=lambda item: -1)
    assert [next(results) for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(DataError, match="list.txt:3: no"):
        next(results)
