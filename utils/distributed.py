"""Processes: torch.distributed if a launcher started this program, otherwise one process. Same calls for both."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import ConfigError, UserError, quoted
from utils.launch import LOST, last_progress, report_progress

LAUNCHER_VARIABLES = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class ProcessLostError(UserError):
    """Another process of this run has ended, or does not answer."""


def init_distributed(timeout_minutes: float = 10.0) -> torch.device:
    """Join the launcher's process group, if any (nccl on CUDA, otherwise gloo), and return this process's device.

    The launcher is torchrun or, inside a step of several tasks, Slurm's srun. A process of torchrun ends with it.

    Args:
        timeout_minutes: after so long without an answer of another process, a collective call fails.

    Raises:
        ConfigError: variables of the launcher are missing, the port is in use, or the GPUs cannot be used.
    """
    _adopt_slurm()
    if "RANK" in os.environ and (missing := [name for name in LAUNCHER_VARIABLES if name not in os.environ]):
        raise ConfigError(
            f"RANK is set, but {', '.join(missing)} is not: start with torchrun or scripts/run_train_vision.sh, or "
            "unset RANK to run one process"
        )
    device = own_device()
    if "RANK" in os.environ and not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent()
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(minutes=timeout_minutes),
                device_id=device if device.type == "cuda" else None,
            )
        except dist.DistError as error:
            reason = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
            raise ConfigError(
                f"process {os.environ['RANK']}: no connection at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({reason}); set another MASTER_PORT"
            ) from error
    return device


def device_type() -> str:
    """`cuda` if PyTorch can use a GPU here, otherwise `cpu`. The variable DEVICE=cpu insists on the CPU.

    Raises:
        ConfigError: DEVICE has another value, or there are GPUs that PyTorch cannot use.
    """
    wish = os.environ.get("DEVICE") or "auto"
    if wish not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"DEVICE: is {quoted(wish)}, must be auto, cpu or cuda")
    if wish == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if count := torch.cuda.device_count():
        raise ConfigError(
            f"{count} GPU(s) are here, but this PyTorch ({torch.__version__}) cannot use them; most often the driver "
            f"is older than CUDA {torch.version.cuda} needs: update the driver, install a PyTorch for an older CUDA, "
            "or set DEVICE=cpu to run on the CPU"
        )
    if wish == "cuda":
        raise ConfigError("DEVICE: is cuda, but PyTorch finds no GPU here; unset it to run on the CPU")
    return "cpu"


def own_device() -> torch.device:
    """The device of this process; of several GPUs, the one that LOCAL_RANK numbers, which becomes the current one.

    Raises:
        ConfigError: as from `device_type`, or this machine has fewer GPUs than processes.
    """
    if device_type() == "cpu":
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: PyTorch finds {count}; start one process for each GPU "
            "(NUM_GPUS of scripts/run_train_vision.sh)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _adopt_slurm() -> None:
    """Give torch.distributed the variables of a Slurm step of several tasks that was started without torchrun.

    Raises:
        ConfigError: srun or mpirun started several tasks, and how they find each other is not known.
    """
    if "RANK" in os.environ:
        return
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1:
        needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_LAUNCH_NODE_IPADDR", "SLURM_JOB_ID")
        if missing := [name for name in needed if name not in os.environ]:
            raise ConfigError(
                f"srun started {tasks} tasks, but {', '.join(missing)} is not set, so they cannot find each other; "
                "start scripts/run_train_vision.sh in one task on each node (scripts/slurm_train.sh does)"
            )
        os.environ |= {
            "RANK": os.environ["SLURM_PROCID"],
            "WORLD_SIZE": str(tasks),
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", os.environ["SLURM_LAUNCH_NODE_IPADDR"]),
            "MASTER_PORT": os.environ.get("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000)),
        }
    elif int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            f"mpirun started {os.environ['OMPI_COMM_WORLD_SIZE']} tasks without the variables of torchrun; start "
            "scripts/run_train_vision.sh in one task on each node, with NNODES, NODE_RANK and MASTER_ADDR"
        )


def end_with_parent() -> None:
    """Receive SIGTERM when the parent process ends, so that no trainer outlives a launcher that was killed (Linux)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn the error of a collective call whose other side is gone into a ProcessLostError.

    torch.distributed raises plain RuntimeErrors for that, which only their words tell from others.
    """
    try:
        yield
    except RuntimeError as error:
        words = ("closed by peer", "reset by peer", "Timed out waiting", "Socket Timeout", "NCCL", "Broken pipe")
        if dist.is_initialized() and any(word in str(error) for word in words):
            report_progress(last_progress())  # this process is alive: the launcher looks for the one that is silent
            raise ProcessLostError(
                f"process {dist.get_rank()} of {dist.get_world_size()}: at {last_progress()}, {LOST} "
                f"({str(error).splitlines()[0][:120]})"
            ) from error
        raise


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

    def __init__(self, timeout_minutes: float = 10.0) -> None:
        """`timeout_minutes`: as of `init_distributed`; a group of its own would wait for half an hour."""
        self._group: Any = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
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
