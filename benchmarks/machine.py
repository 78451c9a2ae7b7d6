"""Describe the machine that a benchmark ran on; the first line of every result."""

import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from engine.software import git_commit


def describe_machine() -> str:
    """One line: date, commit, processor, cores, GPU, versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{time.strftime('%Y-%m-%d')}, commit {git_commit()}, {processor}, {os.cpu_count()} cores, {gpu}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def keep_lines(lines: Iterable[str], path: Path) -> None:
    """Print each line as soon as it is known, and write all of them to a file at the end."""
    kept = []
    for line in lines:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        kept.append(f"{line}\n")
    path.write_text("".join(kept), encoding="utf-8")
