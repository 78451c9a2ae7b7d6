"""What the launcher says of processes that failed, and what a process says before it joins the others."""

import signal

import pytest
import torch.distributed as dist

from utils import launch
from utils.distributed import init_distributed
from utils.errors import ConfigError, DataError, run_program
from utils.launch import explain, last_progress, read_progress, report_progress
from utils.signals import Stopped


def test_the_progress_of_a_process_is_read_by_its_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDE4VIDEO_PROGRESS", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(launch, "_own", launch._Progress())
    report_progress("epoch 10, iteration 200")
    report_progress("epoch 1, iteration 2")
    assert last_progress() == "epoch 1, iteration 2"
    assert {rank: where for rank, (_, where) in read_progress(tmp_path).items()} == {3: "epoch 1, iteration 2"}


@pytest.mark.parametrize(
    ("rank", "code", "victims", "line"),
    [
        (
            1,
            -signal.SIGKILL,
            False,
            "process 1 was ended by SIGKILL; not enough memory is the usual cause; it was at t",
        ),
        (0, -signal.SIGSEGV, True, "process 0 was ended by SIGSEGV; it was at here"),
        (0, 1, False, "process 0 failed with status 1; it was at here"),
        (
            0,
            1,
            True,
            "process 1 does not answer; it was at there, 70 s before the others gave up; it may be",
        ),
    ],
)
def test_a_failure_names_the_process_and_where_it_was(rank, code, victims, line):
    progress = {0: (100.0, "here"), 1: (30.0, "there")}
    assert explain(rank, code, progress, victims).startswith(f"error: {line}")


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "srun started 2 tasks, but SLURM_LOCALID, .* is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 tasks without the variables of torchrun"),
    ],
)
def test_a_launcher_whose_variables_are_missing_is_one_line(monkeypatch, environment, line):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=line) as caught:
        init_distributed()
    assert "\n" not in caught.value.line and not dist.is_initialized()


def test_an_error_that_a_stop_has_caused_is_the_stop(monkeypatch, capsys):
    def main(argv):
        try:
            raise Stopped(signal.SIGTERM)
        finally:
            raise DataError("a loader process was ended")

    with pytest.raises(SystemExit) as end:
        run_program(main)
    assert end.value.code == 143 and capsys.readouterr().err == "stopped by SIGTERM\n"


def test_a_program_may_answer_a_stop_with_an_error_of_its_own(capsys):
    def main(argv):
        try:
            raise Stopped(signal.SIGINT)
        except KeyboardInterrupt:
            raise DataError("interrupted; nothing was written") from None

    with pytest.raises(SystemExit) as end:
        run_program(main)
    assert end.value.code == 1 and capsys.readouterr().err == "error: interrupted; nothing was written\n"
