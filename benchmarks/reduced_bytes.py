"""What a process hands to all-reduce, measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from modules.side4video import Side4Video


class ByteCount:
    """Bytes that this process has handed to all-reduce so far."""

    total = 0


@contextmanager
def count_reduced_bytes(model: Side4Video) -> Iterator[ByteCount]:
    """Count the bytes of all tensors that go through torch.distributed.all_reduce inside: gradients and statistics.

    DistributedDataParallel reduces gradients in C++ unless it has a communication hook. The model's replica is given
    one here, which does the same in Python and stays for good, so a model can be counted once.
    """
    count, all_reduce = ByteCount(), dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count.total += tensor.nbytes
        return all_reduce(tensor, *args, **kwargs)

    assert model.replica is not None, "call parallelize() first"
    model.replica.register_comm_hook(None, average_bucket)
    dist.all_reduce = counting
    try:
        yield count
    finally:
        dist.all_reduce = all_reduce


def average_bucket(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average the gradients of a bucket over all processes, as torch's own `allreduce_hook` does."""
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
