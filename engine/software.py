"""Versions, commit and device: what a result was computed with."""

import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import timm
import torch

from utils.version import VERSION


def describe_software(device: torch.device) -> dict[str, str]:
    """What this process computes with: versions, commit and device."""
    return {
        "Side4Video": VERSION,
        "commit": git_commit(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "NumPy": np.__version__,
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and (cpuinfo := Path("/proc/cpuinfo")).is_file():
        names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(encoding="utf-8"), flags=re.MULTILINE)
        return f"CPU ({names[0].strip()})" if names else "CPU"
    return device.type.upper()


def git_commit() -> str:
    """Short hash of the checked-out commit, with `+` if tracked files were changed; `unknown` without git."""
    root = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
