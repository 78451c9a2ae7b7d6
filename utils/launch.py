"""torchrun without its long reports: `python -m utils.launch [torchrun's arguments] PROGRAM [arguments]`.

torchrun starts and supervises the processes. A signal that ends it, or a process that fails, becomes one line: which
process, what ended it, and where the processes were (`report_progress`). Signals SIGTERM and SIGUSR1
go to all processes, which save and end.
"""

import logging
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

PROGRESS = "SIDE4VIDEO_PROGRESS"  # the folder in which each process says how far it is
ERRORS = "SIDE4VIDEO_ERROR_FILE"  # the file to which each process appends its error
LOST = "another process has ended or does not answer"  # in the error of a process that is only the victim of another
_SIZE = 256


class _Progress:
    """Where this process is: in memory, and in a file that the launcher reads after a failure."""

    def __init__(self) -> None:
        self.where = "the start"
        self._map: mmap.mmap | None = None

    def write(self, where: str) -> None:
        self.where = where
        if self._map is None and (folder := os.environ.get(PROGRESS)):
            with open(Path(folder, os.environ.get("RANK", "0")), "w+b") as file:
                file.truncate(_SIZE)
                self._map = mmap.mmap(file.fileno(), _SIZE)
        if self._map is not None:
            self._map[:] = f"{time.time():.0f} {where}".encode()[:_SIZE].ljust(_SIZE, b"\0")


_own = _Progress()


def report_progress(where: str) -> None:
    """Say what this process is doing, as "epoch 3, iteration 20". It takes about a microsecond."""
    _own.write(where)


def last_progress() -> str:
    """What `report_progress` was told last."""
    return _own.where


def read_progress(folder: Path) -> dict[int, tuple[float, str]]:
    """Rank -> (time, where) of every process that has said something."""
    found = {}
    for path in folder.iterdir():
        moment, _, where = path.read_bytes().rstrip(b"\0").decode(errors="replace").partition(" ")
        if path.name.isdigit() and moment.isdigit():
            found[int(path.name)] = (float(moment), where)
    return dict(sorted(found.items()))


def main(argv: list[str]) -> int:
    """Run torchrun and return the exit status."""
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="side4video_"))
    os.environ |= {PROGRESS: str(folder), ERRORS: str(folder / "errors")}
    try:
        run.main(argv)
    except DistError as error:
        words = "is in use" if "EADDRINUSE" in str(error) else f"cannot be used ({str(error).splitlines()[0]})"
        port = os.environ.get("MASTER_PORT", "29500")
        sys.stderr.write(f"error: MASTER_PORT {port} {words}; set another one, or unset it for a free one\n")
        return 1
    except SignalException as stopped:
        return 130 if stopped.sigval == signal.SIGINT else 143
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode in (130, 143):
            return failure.exitcode
        lines = (folder / "errors").read_text(encoding="utf-8").splitlines() if (folder / "errors").exists() else []
        cause = [line for line in lines if LOST not in line]
        if not cause:
            cause = [explain(rank, failure.exitcode, read_progress(folder), victims=bool(lines))]
        # torchrun mixes the output of the processes; what began it stands last.
        sys.stderr.write("".join(f"{line}\n" for line in dict.fromkeys(cause)))
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def explain(rank: int, exit_code: int, progress: dict[int, tuple[float, str]], victims: bool = False) -> str:
    """One line about what ended a run in which no process has said why.

    Args:
        rank: the process that failed first.
        exit_code: its status, or minus the signal that ended it.
        progress: of `read_progress`.
        victims: processes failed because another one did not answer; that is the one that was silent longest.
    """
    if victims and exit_code > 0 and progress:
        silent = min(progress, key=lambda r: progress[r][0])
        late = max(moment for moment, _ in progress.values()) - progress[silent][0]
        return (
            f"error: process {silent} does not answer; it was at {progress[silent][1]}, {late:.0f} s before the others "
            "gave up; it may be stopped, or wait for a disk or a device"
        )
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        likely = "; not enough memory is the usual cause" if name == "SIGKILL" else ""
        what = f"process {rank} was ended by {name}{likely}"
    else:
        what = f"process {rank} failed with status {exit_code}"
    return f"error: {what}" + (f"; it was at {progress[rank][1]}" if rank in progress else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
