"""Processes: torch.distributed if a launcher started this program, otherwise one process. Same calls for both."""

import os
from typing import Any

import torch
import torch.distributed as dist


def init_distributed() -> torch.device:
    """Join the launcher's process group, if any (nccl on CUDA, otherwise gloo), and return this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def close_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def get_local_world_size() -> int:
    """Number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce a tensor in place over all processes and return it; without a process group, return it unchanged."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


class Agreement:
    """A number that all processes agree on, one call later, without holding up the device.

    The numbers travel on the CPU beside the computation, in a process group of their own.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[Any, torch.Tensor] | None = None  # the work, and the wishes that it reduces

    def largest(self, wish: int) -> int:
        """The largest wish of all processes in their call before this one; in a single process, this wish.

        All processes must call it equally often.
        """
        if self._group is None:
            return wish
        decided = 0
        if self._pending is not None:
            work, wishes = self._pending
            work.wait()
            decided = int(wishes)
        wishes = torch.tensor(wish)
        work = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, wishes)
        return decided


def gather(values: list) -> list:
    """Return the lists of all processes joined into one, in the order of ranks, on every process."""
    lists: list[list] = [values]
    if dist.is_initialized():
        lists = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(lists, values)
    return [value for values in lists for value in values]


def from_first(value: Any) -> Any:
    """Return the value of process 0, on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]
