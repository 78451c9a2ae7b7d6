"""What the entries of a checkpoint must be; `modules.checkpoint` describes their meaning."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from modules.hashing import hash_tensors

REQUIRED = ("trained", "tower", "tower_file", "tower_sha256", "tower_sha256_but_positions")


def check_entries(checkpoint: dict[str, Any]) -> None:
    """Check every entry of a checkpoint for kind and form, and the hashes that it holds.

    Raises:
        ValueError: names the entry and what it must be.
    """
    for name in REQUIRED:
        if name not in checkpoint:
            raise ValueError(f"no entry {name}")
    for name, value in checkpoint.items():
        if name in ENTRIES:
            what, holds = ENTRIES[name]
            if not holds(value):
                raise ValueError(f"entry {name} must be {what}, got {_shown(value)}")
    if ("optimizer" in checkpoint) != ("scaler" in checkpoint):
        raise ValueError("of the entries optimizer and scaler only one is there")
    for part, tensors in (
        ("trained", checkpoint["trained"]),
        ("ema", checkpoint.get("ema", {})),
        ("optimizer", optimizer_tensors(checkpoint.get("optimizer", {}))),
    ):
        expected = checkpoint.get(f"{part}_sha256")
        if expected is not None and hash_tensors(tensors) != expected:
            raise ValueError(f"the tensors of {part} have changed since it was written (SHA-256)")


def optimizer_tensors(optimizer: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in the state dict of an optimizer, as `<number of the parameter>.<name>`."""
    return {
        f"{number}.{name}": value
        for number, entries in optimizer.get("state", {}).items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _count(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _percentage_or_none(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and math.isfinite(value) and 0 <= value <= 100)


def _names_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _plain(value: Any) -> bool:
    """True for what YAML can hold."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_plain, value.values()))
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _report(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("loss_sum"), list)
        and len(value["loss_sum"]) == 2
        and all(isinstance(number, int | float) for number in [*value["loss_sum"], value.get("mean_loss", "")])
        and isinstance(value.get("first_bad"), int | float)
        and isinstance(value.get("grad_norm", 0.0), int | float)
        and all(
            isinstance(videos, list) and all(len(video) == 2 for video in videos)
            for videos in (value.get("unreadable"), value.get("damaged", []))  # older files have no "damaged"
        )
    )


def _optimizer(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    state, groups = value.get("state", {}), value.get("param_groups", [])
    return (
        isinstance(state, dict)
        and all(isinstance(number, int) and _tensors(entries) for number, entries in state.items())
        and isinstance(groups, list)
        and all(isinstance(group, dict) for group in groups)
    )


ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "trained": ("a dictionary of tensors", lambda value: _tensors(value) and len(value) > 0),
    "ema": ("a dictionary of tensors", lambda value: _tensors(value) and len(value) > 0),
    "ema_sha256": ("64 hexadecimal digits", _sha256),
    "best_accuracy_ema": ("a percentage or None", _percentage_or_none),
    "improved": ("a whole number, at least 0, or None", lambda value: value is None or _count(0)(value)),
    "tower": ("a dictionary of tensors or None", lambda value: value is None or _tensors(value)),
    "tower_file": ("the name of a file or None", _text_or_none),
    "tower_sha256": ("64 hexadecimal digits", _sha256),
    "tower_sha256_but_positions": ("64 hexadecimal digits", _sha256),
    "trained_sha256": ("64 hexadecimal digits", _sha256),
    "optimizer_sha256": ("64 hexadecimal digits", _sha256),
    "optimizer": ("the state dict of an optimizer", _optimizer),
    "scaler": ("a dictionary", lambda value: isinstance(value, dict)),
    "epoch": ("a whole number, at least 0", _count(0)),
    "step": ("a whole number, at least 0", _count(0)),
    "world_size": ("a whole number, at least 1", _count(1)),
    "progress": ("a list of reports", lambda value: isinstance(value, list) and all(map(_report, value))),
    "best_accuracy": ("a percentage or None", _percentage_or_none),
    "config": ("a dictionary of plain values", lambda value: isinstance(value, dict) and _plain(value)),
    "class_names": ("a list of names or None", _names_or_none),
    "decoder": ("text or None", _text_or_none),
}
