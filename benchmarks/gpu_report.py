"""A report about a GPU that this project has not seen: what is there, what it does, and whether the tests pass.

    sh scripts/gpu_report.sh [--output DIR]

Takes about 10 minutes and needs no weights and no videos. Without a GPU it ends at once; DEVICE=cpu runs it small on
the CPU, to try it. Writes gpu_report.txt and gpu_report.json, which hold no paths and no names of users or machines.
docs/contributing.md says how to send them in.
"""

import argparse
import contextlib
import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.gpu_sections import Row, environment, evaluation, forms, gpu_tests, parts, processes, roofline
from utils.atomic import probe, write_json, write_text
from utils.distributed import device_type
from utils.errors import ConfigError, UserError, run_program

# Section -> what it measures, and the most seconds that it may take.
SECTIONS: dict[str, tuple[Callable[[torch.device], Iterator[Row]], int]] = {
    "environment": (environment, 60),
    "roofline": (roofline, 90),
    "tests": (gpu_tests, 300),
    "parts": (parts, 120),
    "evaluation": (evaluation, 90),
    "processes": (processes, 120),
    "forms": (forms, 120),
}
MINUTES = 10
SEND = (
    "How to send it in: open an issue from the template 'GPU report' (.github/ISSUE_TEMPLATE/gpu_report.md) and attach "
    "gpu_report.txt and gpu_report.json. Read them before: they should hold no paths and no names of users or machines."
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gpu_report.py", description="A report about the GPUs of this machine.")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="folder of the files (default: .)")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(device_type(), 0) if device_type() == "cuda" else torch.device("cpu")
    if device.type == "cpu" and os.environ.get("DEVICE") != "cpu":
        raise ConfigError("PyTorch finds no GPU here, which the report is about; DEVICE=cpu runs it small on the CPU")
    if args.section:
        rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print is no row
        sys.exit(write_rows(args.section, device, rows))
    text_file, json_file = (args.output / f"gpu_report.{ending}" for ending in ("txt", "json"))
    probe(text_file)
    probe(json_file)
    report = collect(run_in_child)
    write_text(text_file, as_text(report))
    write_json(json_file, report)
    sys.stdout.write(as_text(report))


def write_rows(section: str, device: torch.device, file: TextIO) -> int:
    """Run a section and write its rows, one JSON object a line. An error becomes the last row, and the status 1."""
    try:
        for row in SECTIONS[section][0](device):
            file.write(json.dumps(row) + "\n")
            file.flush()
    except Exception as error:  # whatever it is, it goes into the report
        file.write(json.dumps({"what": "failed", "reason": describe_error(error)}) + "\n")
        file.flush()
        return 1
    return 0


def describe_error(error: Exception) -> str:
    """One line."""
    if isinstance(error, UserError):
        return error.line
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__ == "ProcessRaisedException":  # of torch.multiprocessing: a traceback, the error at its end
        return lines[-1]
    return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"


def run_in_child(section: str, seconds: float) -> list[Row]:
    """The rows of a section that runs in a process of its own, so that no fault of CUDA reaches the next one."""
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--section", section]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        try:
            printed, late = child.communicate(timeout=seconds)[0], False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            stop_group(child.pid)  # also the processes that it has started
        if late:
            printed = child.communicate()[0]
        rows = [json.loads(line) for line in printed.splitlines(keepends=True) if line.endswith("\n")]
        if late:
            rows.append({"what": "not finished", "reason": f"stopped after {seconds:.0f} s"})
        elif child.returncode and not (rows and rows[-1]["what"] == "failed"):
            errors.seek(0)
            said = errors.read().strip().splitlines()
            rows.append({"what": "failed", "reason": f"{how_it_ended(child.returncode)}; {said[-1] if said else ''}"})
    return rows


def stop_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(leader, signal.SIGKILL)


def how_it_ended(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def collect(run: Callable[[str, float], list[Row]]) -> dict[str, Any]:
    """The report: for each section its rows and seconds. A section that fails does not stop the others.

    Args:
        run: gives the rows of a section, in at most so many seconds.
    """
    sections, started = {}, time.monotonic()
    for name, (_, most) in SECTIONS.items():
        begun = time.monotonic()
        left = 60 * MINUTES - (begun - started)
        sys.stderr.write(f"{name} ...\n")
        if left < 5:
            rows = [{"what": "left out", "reason": f"{MINUTES} minutes are over"}]
        else:
            try:
                rows = run(name, min(most, left))
            except (OSError, ValueError) as error:  # no process, or no rows that can be read
                rows = [{"what": "failed", "reason": describe_error(error)}]
        sections[name] = {"seconds": round(time.monotonic() - begun, 1), "rows": without_names(rows)}
    return {"report": "Side4Video GPU report", "sections": sections, "send": SEND}


def without_names(value: Any) -> Any:
    """The value without paths, of which the last part stays, and without the names of this user and machine."""
    if isinstance(value, dict):
        return {without_names(key): without_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_names(item) for item in value]
    if not isinstance(value, str):
        return value
    text = re.sub(r"(?<![\w.])~?(?:/[^\s/:;,'\"()\[\]]+)+/([^\s/:;,'\"()\[\]]*)", r"\1", value)
    for name, word in ((socket.gethostname(), "HOST"), (user_name(), "USER")):
        if len(name) > 1 and name not in ("root", "localhost"):  # "root" is also a word
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, text)
    return text


def user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without an entry, as in some containers
        return ""


def as_text(report: dict[str, Any]) -> str:
    """The report for people, one line a row."""
    lines = [report["report"]]
    for name, section in report["sections"].items():
        lines += ["", f"{name} ({section['seconds']} s)"]
        for row in section["rows"]:
            values = ", ".join(f"{key} {value}" for key, value in row.items() if key != "what")
            lines.append(f"  {row['what']}: {values}")
    return "\n".join([*lines, "", report["send"]]) + "\n"


if __name__ == "__main__":
    run_program(main)
