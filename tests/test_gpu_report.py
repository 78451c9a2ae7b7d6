"""The report about a GPU: its sections run on the CPU, small, and one that fails stops no other."""

import getpass
import io
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import run_script
from torch import multiprocessing

from benchmarks import gpu_report, gpu_sections, timing
from benchmarks.gpu_report import SECTIONS, as_text, collect, describe_error, run_in_child, without_names, write_rows
from utils.errors import ConfigError
from utils.precision import set_switches

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A single round, and the switches of this process put back."""
    monkeypatch.setattr(gpu_sections, "ROUNDS", 1)
    monkeypatch.setattr(timing, "SERIES_SECONDS", 0.0)
    monkeypatch.setenv("DEVICE", "cpu")
    yield
    set_switches()


def rows_of(section):
    rows = list(SECTIONS[section][0](CPU))
    assert all(isinstance(row.pop("what"), str) for row in [dict(row) for row in rows])
    assert json.loads(json.dumps(rows)) == rows
    return {row["what"]: row for row in rows}


def test_the_environment_names_versions_switches_and_the_kernel_of_attention():
    rows = rows_of("environment")
    assert rows["versions"]["torch"] == torch.__version__
    assert rows["switches as a run sets them"] | {"what": ""} == {
        "what": "",
        "described": "TF32 off, deterministic operators not asked for",
        "amp": "fp32",
    }
    assert rows["attention in float32"]["tower"] == "flash_attention"


def test_the_roofline_has_every_type_of_product_and_leaves_the_switches_as_a_run_sets_them():
    rows = rows_of("roofline")
    for kind in ("bf16", "fp16", "tf32", "fp32"):
        assert rows[f"product in {kind}"]["TFLOP/s"] > 0
    assert rows["copy inside the memory"]["GB/s"] > 0 and rows["host to device, pageable memory"]["GB/s"] > 0
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("section", ["parts", "evaluation"])
def test_the_plan_stands_beside_what_is_measured_for_both_variants(section):
    rows = rows_of(section)
    planned = [row for row in rows.values() if "planned GB" in row]
    assert {row["what"].split(",")[0] for row in planned} == {"vitb16", "eva_l14"}
    for row in planned:  # on the CPU the count is exact
        assert row["planned / measured"] == pytest.approx(1, abs=0.01), row
    if section == "parts":
        times = {"tower ms", "side forward ms", "side backward ms", "optimizer ms", "whole step ms"}
        assert all(row[name] > 0 for row in planned for name in times)


def test_a_batch_that_does_not_fit_is_a_row_and_the_smaller_ones_stay(monkeypatch):
    def peak(model, optimizer, config, precision):
        if config.data.batch_size > 1:
            raise torch.OutOfMemoryError("too much")
        return 10**6

    monkeypatch.setattr(gpu_sections, "training_peak", peak)
    monkeypatch.setattr(gpu_sections, "milliseconds_by_part", lambda *_: {})
    rows = rows_of("parts")
    assert rows["vitb16, 2 clips"]["result"] == "out of memory" and rows["vitb16, 2 clips"]["planned GB"] > 0
    assert rows["eva_l14, 1 clips"]["measured GB"] == 0.001


def test_forms_are_compared_in_turns():
    rows = rows_of("forms")
    assert [row["what"].partition("clips, ")[2] for row in rows.values()] == ["recomputed", "not recomputed"]
    assert next(iter(rows.values()))["of the first"] == 1


def test_one_and_two_processes_train_the_same_batch():
    for attempt in range(3):
        try:
            rows = rows_of("processes")
            break
        except (
            multiprocessing.ProcessExitedException
        ):  # gloo ends a process with SIGABRT now and then; a report says so
            assert attempt < 2
    one, two = rows["1 process(es)"], rows["2 process(es)"]
    assert one["efficiency"] == 1 and two["efficiency"] == pytest.approx(one["step ms"] / two["step ms"], abs=1e-3)
    assert two["gradients MB"] > 0 and two["all-reduce GB/s sent by each"] > 0 and two["step ms, tower sharded"] > 0


def test_each_test_has_a_row_and_failed_ones_say_why(tmp_path):
    file = tmp_path / "test_small.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('x', [1])\n"
        "def test_bad(x): assert x == 2, 'x is wrong'\n"
        "@pytest.mark.skip(reason='none')\n"
        "def test_skipped(): pass\n"
    )
    rows = list(gpu_sections.gpu_tests(CPU, [str(file), "-c", os.devnull, "--rootdir", str(tmp_path)]))
    results = {row["what"]: row.get("result") for row in rows[:3]}
    assert results == {"test_good": "passed", "test_bad[1]": "failed", "test_skipped": "skipped"}
    assert rows[3]["what"] == "why test_bad[1] failed" and "x is wrong" in rows[3]["reason"]
    assert rows[-1]["status"] == 1 and "1 failed, 1 passed, 1 skipped" in rows[-1]["result"]


# ---------------------------------------------------------------- the report


def test_a_section_that_fails_says_so_in_one_line_and_stops_no_other(monkeypatch):
    def failing(device):
        yield {"what": "first", "value": 1}
        raise RuntimeError(f"CUDA error: an illegal memory access\n  in {os.getcwd()}/modules/autograd.py")

    monkeypatch.setitem(SECTIONS, "roofline", (failing, 5))

    def run(section, seconds):
        if section != "roofline":
            return [{"what": "done"}]
        file = io.StringIO()
        assert write_rows(section, CPU, file) == 1
        return [json.loads(line) for line in file.getvalue().splitlines()]

    report = collect(run)
    assert report["sections"]["roofline"]["rows"] == [
        {"what": "first", "value": 1},
        {"what": "failed", "reason": "RuntimeError: CUDA error: an illegal memory access"},
    ]
    assert [section["rows"] for name, section in report["sections"].items() if name != "roofline"] == [
        [{"what": "done"}]
    ] * (len(SECTIONS) - 1)
    assert "failed: reason RuntimeError" in as_text(report) and as_text(report).endswith(f"{gpu_report.SEND}\n")


@pytest.mark.parametrize(
    "program, reason",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import sys; sys.exit('a fault')", "ended with status 1; a fault"),
    ],
)
def test_a_process_that_is_killed_leaves_the_rows_that_it_has_printed(monkeypatch, tmp_path, program, reason):
    interpreter = tmp_path / "python"
    interpreter.write_text(
        f"""#!/bin/sh\necho '{{"what": "first"}}'\nprintf '{{"what": "half'\nexec '{sys.executable}' -c "{program}"\n"""
    )
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    first, failed = run_in_child("parts", 60)
    assert first == {"what": "first"} and failed["what"] == "failed" and failed["reason"].startswith(reason)


def test_a_section_that_takes_too_long_is_stopped_with_all_that_it_has_started(monkeypatch, tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text(
        f"""#!/bin/sh\nsleep 600 &\necho $! > '{tmp_path}/started'\necho '{{"what": "first"}}'\nwait\n"""
    )
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    assert run_in_child("parts", 4) == [
        {"what": "first"},
        {"what": "not finished", "reason": "stopped after 4 s"},
    ]
    state = Path(f"/proc/{int((tmp_path / 'started').read_text())}/stat")

    def is_gone() -> bool:
        try:
            return state.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    deadline = time.monotonic() + 20  # a killed process is there until the system has cleaned it up
    while not is_gone() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone()


def test_sections_are_left_out_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(gpu_report, "MINUTES", 0)
    report = collect(lambda *_: pytest.fail("no time is left"))
    assert {row["what"] for section in report["sections"].values() for row in section["rows"]} == {"left out"}


def test_paths_and_names_of_users_and_machines_are_taken_out(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-node-7")
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    text = "no /home/ada/x.py:3 on gpu-node-7, ~/a/b and '/data/k400/list.txt' of ada; 3.5 TFLOP/s, step ms/clip, adams"
    cleaned = without_names([{"a": text, "/x/y/z": 1}, None, 2])
    assert cleaned[0]["a"] == "no x.py:3 on HOST, b and 'list.txt' of USER; 3.5 TFLOP/s, step ms/clip, adams"
    assert cleaned[0]["z"] == 1 and cleaned[1:] == [None, 2]


def test_without_a_gpu_it_ends_with_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="finds no GPU here.*DEVICE=cpu") as caught:
        gpu_report.main(["--output", str(tmp_path)])
    assert "\n" not in caught.value.line and not list(tmp_path.iterdir())


def test_text_and_json_are_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_report, "run_in_child", lambda section, seconds: [{"what": section, "value": 1.5}])
    gpu_report.main(["--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "gpu_report.txt").read_text()
    assert capsys.readouterr().out == text and "  parts: value 1.5\n" in text
    report = json.loads((tmp_path / "out" / "gpu_report.json").read_text())
    assert list(report["sections"]) == list(SECTIONS)


def test_the_error_of_another_process_is_that_process_own():
    class ProcessRaisedException(Exception):
        pass

    error = ProcessRaisedException("-- Process 1 terminated\nTraceback\n  File\nRuntimeError: NCCL error\n")
    assert describe_error(error) == "RuntimeError: NCCL error"
    assert describe_error(signal.ItimerError()) == "itimer_error: without a message"


def test_the_script_runs_the_report(tmp_path):
    """With an interpreter that only reports how it is called."""
    interpreter = tmp_path / "python"
    interpreter.write_text("""#!/bin/sh\ncase "$*" in -c*) ;; *) printf '[%s]' "$@" ;; esac\n""")
    interpreter.chmod(0o755)
    done = run_script("gpu_report.sh", "--output", "a b", PYTHON=str(interpreter))
    assert done.stdout == "[-m][benchmarks.gpu_report][--output][a b]" and done.returncode == 0
