"""YAML file + overrides -> checked against the schema -> DotMap. `python -m utils.config` only checks.

An error is one line: where the value stands (FILE:LINE or the command line), its key, what is wrong with it.
"""

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import yaml
from dotmap import DotMap

from utils.config_schema import ANY, FIELDS, LEGACY, REQUIRED, SECTIONS
from utils.errors import ConfigError, run_program

COMMAND_LINE = "command line"
USAGE = "usage: python -m utils.config train|test CONFIG [key=value ...]"
Fail = Callable[[str, str], NoReturn]
Purpose = Literal["train", "test", "model"]


class Entry(NamedTuple):
    """A value as YAML gives it, and where it was given."""

    value: object
    origin: str


def load_config(path: str | Path, overrides: Sequence[str] = (), purpose: Purpose = "train") -> DotMap:
    """The configuration of one run: every key of the schema but `base`; asking the DotMap for another name is an error.

    `overrides` are `section.key=value` with the value in YAML. Lists and roots that `purpose` needs must exist;
    "model" needs none.
    `.toDict()` is the plain form, and its YAML loads to the same again. A copy of the DotMap answers any name.
    Raises ConfigError.
    """
    entries = _read_file(Path(path))
    for override in overrides:
        _apply_override(entries, override)
    return _checked(entries, str(path), purpose)


def config_from_dict(
    plain: dict[str, Any], source: str, purpose: Purpose = "train", overrides: Sequence[str] = ()
) -> DotMap:
    """The configuration of nested dictionaries, such as a checkpoint holds; `source` names them in errors."""
    entries = {}
    for name, value in plain.items():
        keys = {f"{name}.{key}": item for key, item in value.items()} if name in SECTIONS else {name: value}
        entries |= {key: Entry(item, source) for key, item in keys.items()}
    for override in overrides:
        _apply_override(entries, override)
    return _checked(entries, source, purpose)


def _checked(entries: dict[str, Entry], source: str, purpose: Purpose) -> DotMap:
    """The values of `entries`, checked against the schema, with its defaults; `source` names what gives no entry."""

    def fail(key: str, problem: str) -> NoReturn:
        raise ConfigError(f"{entries[key].origin if key in entries else source}: {key}: {problem}")

    for key in entries:
        if key not in FIELDS and key not in LEGACY:
            fail(key, f"unknown key; did you mean {_nearest(key)}?")
    values = {}
    for key, field in FIELDS.items():
        if key not in entries and field.default is REQUIRED:
            fail(key, f"missing, and there is no default: {field.doc}")
        try:
            values[key] = field.read(entries[key].value if key in entries else field.default)
        except ValueError as error:
            fail(key, str(error))
    del values["base"]
    _check_legacy(entries, values, fail)
    _check_together(values, purpose, fail)
    _check_paths(values, purpose, fail)

    plain = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (plain.setdefault(section, {}) if section else plain)[name] = value
    return DotMap(plain, _dynamic=False)


def _read_file(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Entry]:
    """Dotted key -> entry of a file and of the files below it; `chain` holds the files that lead here."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    tree, places = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: {'empty' if tree is None else 'not a mapping'}; it must hold `section:` and keys")
    entries = {}
    for name, value in tree.items():
        if name not in SECTIONS:
            if "." in name:
                raise ConfigError(f"{places[name]}: {name}: in a file, a key stands below its section")
            entries[name] = Entry(value, places[name])
        elif isinstance(value, dict):
            entries |= {f"{name}.{key}": Entry(item, places[f"{name}.{key}"]) for key, item in value.items()}
        else:
            raise ConfigError(f"{places[name]}: {name}: a section, so keys must stand below it, not {value!r}")
    base = entries.pop("base", Entry(None, ""))
    try:
        name = FIELDS["base"].read(base.value)
    except ValueError as error:
        raise ConfigError(f"{base.origin}: base: {error}") from error
    if name is None:
        return entries
    below, chain = path.parent / name, (*chain, path.resolve())
    if below.resolve() in chain:
        raise ConfigError(f"{base.origin}: base: {below} is itself based on this file")
    if not below.is_file():
        raise ConfigError(f"{base.origin}: base: no such file: {below.absolute()}")
    return _read_file(below, chain) | entries


def _parse(text: str, name: str, numbered: bool = True) -> tuple[object, dict[str, str]]:
    """YAML -> its value, and for each dotted key where it stands: `name:LINE`, or `name` alone if not `numbered`."""
    loader, places = yaml.SafeLoader(text), {}

    def place(mark: yaml.Mark | None) -> str:
        return f"{name}:{mark.line + 1}" if numbered and mark else name

    def plain(node: yaml.Node, prefix: str) -> object:
        if isinstance(node, yaml.ScalarNode):
            return loader.construct_object(node)
        if isinstance(node, yaml.SequenceNode):
            return [plain(item, f"{prefix}{number}.") for number, item in enumerate(node.value)]
        values = {}
        for key_node, value_node in node.value:
            origin, key = place(key_node.start_mark), key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{origin}: {prefix}: a key must be a word")
            if key in values:
                raise ConfigError(f"{origin}: {prefix}{key}: given twice, first at {places[prefix + key]}")
            places[prefix + key] = origin
            values[key] = plain(value_node, f"{prefix}{key}.")
        return values

    try:
        root = loader.get_single_node()
        return (None if root is None else plain(root, "")), places
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{place(getattr(error, 'problem_mark', None))}: not valid YAML: {problem}") from error


def _apply_override(entries: dict[str, Entry], override: str) -> None:
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigError(f"{COMMAND_LINE}: {override!r} must have the form key=value, like solver.lr=1e-3")
    if key == "base":
        raise ConfigError(f"{COMMAND_LINE}: base: only a file can name its base")
    if key in SECTIONS:
        raise ConfigError(f"{COMMAND_LINE}: {key}: a section; set one of its keys, like {key}.NAME=VALUE")
    value, _ = _parse(text, f"{COMMAND_LINE}: {key}", numbered=False)
    parent, _, name = key.rpartition(".")
    if name and parent in FIELDS and FIELDS[parent].kind == "dict":
        old = entries[parent].value if parent in entries else None
        key, value = parent, {**(old if isinstance(old, dict) else {}), name: value}
    entries[key] = Entry(value, COMMAND_LINE)


def _nearest(key: str) -> str:
    """The known key most like `key`: by its last part, then as a whole, so that data.lr gives solver.lr."""

    def likeness(known: str) -> tuple[float, float]:
        parts = known.rpartition(".")[2], key.rpartition(".")[2]
        return difflib.SequenceMatcher(None, *parts).ratio(), difflib.SequenceMatcher(None, known, key).ratio()

    return max([*FIELDS, *([] if "." in key else SECTIONS)], key=likeness)


def _check_legacy(entries: dict[str, Entry], values: dict[str, object], fail: Fail) -> None:
    for key in [key for key in entries if key in LEGACY]:
        neutral, why = LEGACY[key]
        value = None if entries[key].value == "None" else entries[key].value
        accepted = (values[neutral], None) if neutral in FIELDS else (neutral,)
        number_for_bool = value is not None and isinstance(value, bool) != isinstance(accepted[0], bool)
        if neutral is not ANY and (value not in accepted or number_for_bool):
            fail(key, f"is {value!r}, but only {accepted[0]!r} is supported: {why}")


def _check_together(values: dict[str, object], purpose: str, fail: Fail) -> None:
    """What no key can be checked for alone."""
    if values["resume"] is not None and values["pretrain"] is not None:
        fail("pretrain", "not together with resume, whose checkpoint already holds the weights")
    if problem := resize_problem(values["data.resize"], values["data.input_size"]):
        fail("data.resize", problem)
    if values["data.dense"] and values["data.num_segments"] > 128:
        fail("data.num_segments", f"is {values['data.num_segments']}, at most 128 with data.dense")
    if values["solver.mixup"] and purpose == "train":
        clips = values["data.batch_size"] * values["data.num_sample"]
        if clips % 2:
            fail("data.batch_size", f"times data.num_sample is {clips}; solver.mixup pairs clips, so it must be even")
        if values["solver.smoothing"] != 0.1:
            fail("solver.smoothing", f"is {values['solver.smoothing']}, but solver.mixup goes with 0.1")
    if values["network.weights"] is not None and not values["network.init"]:
        fail("network.weights", "contradicts network.init: False, which leaves the tower random")
    if values["solver.start_epoch"] >= values["solver.epochs"]:
        fail(
            "solver.start_epoch",
            f"is {values['solver.start_epoch']}, must be below solver.epochs, which is {values['solver.epochs']}",
        )
    if values["solver.type"] == "multistep" and values["solver.lr_decay_step"] is None:
        fail("solver.lr_decay_step", f"solver.type: multistep needs it: {FIELDS['solver.lr_decay_step'].doc}")


def resize_problem(resize: int | list[int] | None, input_size: int | None) -> str | None:
    """What is wrong with `data.resize`, if anything; an `input_size` that the tower has yet to state excuses it."""
    if resize is None or input_size is None:
        return None
    shorter = min(resize) if isinstance(resize, list) else resize
    return f"is {resize}, below data.input_size, which is {input_size}" if shorter < input_size else None


def _check_paths(values: dict[str, object], purpose: str, fail: Fail) -> None:
    if purpose == "model":
        return
    needed, optional = ["data.val_list", "data.val_root"], ["data.label_list"]
    if purpose == "train":  # a test has its own checkpoint, which may hold the tower too
        optional += ["network.weights", "resume", "pretrain"]
        if not values["solver.evaluate"]:
            needed = ["data.train_list", "data.train_root", *needed]
    for key in [*needed, *optional]:
        value, field = values[key], FIELDS[key]
        exists = os.path.isdir if field.kind == "folder" else os.path.isfile
        if value is None and key in needed:
            fail(key, f"missing, and this run needs it: {field.doc}")
        if value is not None and (key, value) != ("network.weights", "hub") and not exists(value):
            fail(key, f"no such {field.kind}: {os.path.abspath(value)}")


def main(argv: list[str]) -> None:
    """Check a configuration, for a script that is about to start processes with it."""
    if len(argv) < 2 or argv[0] not in ("train", "test"):
        raise ConfigError(USAGE)
    load_config(argv[1], argv[2:], argv[0])


if __name__ == "__main__":
    run_program(main)
