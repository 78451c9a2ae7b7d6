"""Load a YAML configuration, apply overrides, and check the result against the schema.

    python -m utils.config train|test CONFIG [key=value ...]        check only

Every error is one line: the place of the value (FILE:LINE or the command line), its key, and the problem.
"""

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import yaml
from dotmap import DotMap

from utils.config_schema import ANY, FIELDS, LEGACY, REQUIRED, SECTIONS
from utils.errors import ConfigError, quoted, run_program

NO_FILES = (("network.weights", "hub"), ("resume", "auto"))  # values of file keys that name no file
MOST_VALUES = 10_000  # of one file
COMMAND_LINE = "command line"
USAGE = "usage: python -m utils.config train|test CONFIG [key=value ...]"
Fail = Callable[[str, str], NoReturn]
Purpose = Literal["train", "test", "model"]
Values = dict[str, Any]  # dotted key -> value in the type that its field reads
Missing = Callable[[Values], list[str]]  # what a run needs beside lists, roots and files, and is not there


class Entry(NamedTuple):
    """A value as YAML gives it, and the place where it was given."""

    value: object
    origin: str


def load_config(
    path: str | Path, overrides: Sequence[str] = (), purpose: Purpose = "train", missing: Missing | None = None
) -> DotMap:
    """Return the configuration of one run. Values that it leaves open are derived later, by `resolve_config`.

    Args:
        path: the YAML file. The files that it names in `base` are merged below it.
        overrides: `section.key=value`, with the value in YAML; they replace the file's values.
        purpose: decides which lists, roots and files must exist. "model" requires none.
        missing: names more that is missing, for the same error.

    Returns:
        every key of the schema except `base`. Reading another name raises AttributeError or KeyError, but not on a
        copy of the DotMap: a copy returns an empty DotMap for it. `.toDict()` is the plain form; its YAML loads to an
        equal configuration.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.
    """
    entries = _read_file(Path(path))
    for override in overrides:
        _apply_override(entries, override)
    return _checked(entries, str(path), purpose, missing)


def config_from_dict(
    plain: dict[str, Any], source: str, purpose: Purpose = "train", overrides: Sequence[str] = ()
) -> DotMap:
    """Return the configuration that nested dictionaries hold, such as those of a checkpoint.

    Errors name `source` as the place of every value. Raises ConfigError.
    """
    entries: dict[str, Entry] = {}
    for name, value in plain.items():
        keys = {f"{name}.{key}": item for key, item in value.items()} if name in SECTIONS else {name: value}
        entries |= {key: Entry(item, source) for key, item in keys.items()}
    for override in overrides:
        _apply_override(entries, override)
    return _checked(entries, source, purpose)


def _checked(entries: dict[str, Entry], source: str, purpose: Purpose, missing: Missing | None = None) -> DotMap:
    """Check the entries against the schema and add its defaults. An error about a missing key names `source`."""

    def place(key: str) -> str:
        return entries[key].origin if key in entries else source

    def fail(key: str, problem: str) -> NoReturn:
        raise ConfigError(f"{place(key)}: {key}: {problem}")

    for key in entries:
        if key not in FIELDS and key not in LEGACY:
            fail(key, f"unknown key; did you mean {_nearest(key)}?")
    values: Values = {}
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
    _check_paths(values, purpose, fail, place, missing)

    plain: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (plain.setdefault(section, {}) if section else plain)[name] = value
    return DotMap(plain, _dynamic=False)


def _read_file(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Entry]:
    """Read a file and its bases into a dictionary from dotted key to entry.

    `chain` holds the files on the way to this one, so that a circle of bases is found.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    tree, places = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: {'empty' if tree is None else 'not a mapping'}; it must hold `section:` and keys")
    entries: dict[str, Entry] = {}
    for name, value in tree.items():
        if name not in SECTIONS:
            if "." in name:
                raise ConfigError(f"{places[name]}: {name}: in a file, a key stands below its section")
            entries[name] = Entry(value, places[name])
        elif isinstance(value, dict):
            entries |= {f"{name}.{key}": Entry(item, places[f"{name}.{key}"]) for key, item in value.items()}
        else:
            raise ConfigError(f"{places[name]}: {name}: a section, so keys must stand below it, not {quoted(value)}")
    base = entries.pop("base", Entry(None, ""))
    try:
        base_name = FIELDS["base"].read(base.value)
    except ValueError as error:
        raise ConfigError(f"{base.origin}: base: {error}") from error
    if not isinstance(base_name, str):  # None: no base
        return entries
    below, chain = path.parent / base_name, (*chain, path.resolve())
    if below.resolve() in chain:
        raise ConfigError(f"{base.origin}: base: {below} is itself based on this file")
    if not below.is_file():
        raise ConfigError(f"{base.origin}: base: no such file: {below.absolute()}")
    return _read_file(below, chain) | entries


def _parse(text: str, name: str, numbered: bool = True) -> tuple[object, dict[str, str]]:
    """Parse YAML into its value and the place of each dotted key.

    A place is `name:LINE`, or `name` alone unless `numbered`. PyYAML's own loader keeps no lines and accepts a key that
    is given twice, so the tree of nodes is read here. Raises ConfigError.
    """
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error
    places: dict[str, str] = {}
    values_left = MOST_VALUES  # aliases of aliases can stand for billions

    def place(mark: yaml.Mark | None) -> str:
        return f"{name}:{mark.line + 1}" if numbered and mark else name

    def plain(node: yaml.Node, prefix: str) -> object:
        nonlocal values_left
        values_left -= 1
        if values_left < 0:
            raise ConfigError(f"{name}: stands for more than {MOST_VALUES} values; its aliases repeat each other")
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist, 2023-02-30
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{place(getattr(error, 'problem_mark', None))}: not valid YAML: {problem}") from error


def _apply_override(entries: dict[str, Entry], override: str) -> None:
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigError(f"{COMMAND_LINE}: {quoted(override)} must have the form key=value, like solver.lr=1e-3")
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
    """Return the known key most similar to `key`. The last part counts first, so that data.lr gives solver.lr."""

    def likeness(known: str) -> tuple[float, float]:
        parts = known.rpartition(".")[2], key.rpartition(".")[2]
        return difflib.SequenceMatcher(None, *parts).ratio(), difflib.SequenceMatcher(None, known, key).ratio()

    return max([*FIELDS, *([] if "." in key else SECTIONS)], key=likeness)


def _check_legacy(entries: dict[str, Entry], values: Values, fail: Fail) -> None:
    """Fail if a key of older configurations has a value that this project does not implement."""
    for key in [key for key in entries if key in LEGACY]:
        neutral, why = LEGACY[key]
        value = None if entries[key].value == "None" else entries[key].value
        accepted = (values[neutral], None) if neutral in FIELDS else (neutral,)
        number_for_bool = value is not None and isinstance(value, bool) != isinstance(accepted[0], bool)
        if neutral is not ANY and (value not in accepted or number_for_bool):
            fail(key, f"is {quoted(value)}, but only {accepted[0]!r} is supported: {why}")


def _check_together(values: Values, purpose: Purpose, fail: Fail) -> None:
    """Fail if two keys contradict each other."""
    if values["resume"] is not None and values["pretrain"] is not None:
        fail("pretrain", "not together with resume, whose checkpoint already holds the weights")
    if problem := resize_problem(values["data.resize"], values["data.input_size"]):
        fail("data.resize", problem)
    if values["data.segments"] and values["data.count_frames"]:
        fail("data.count_frames", "contradicts data.segments: the list says how many frames a segment has")
    if values["data.dense"] and values["data.num_segments"] > 128:
        fail("data.num_segments", f"is {values['data.num_segments']}, at most 128 with data.dense")
    if values["solver.mixup"] and purpose == "train":
        clips = values["data.batch_size"] * values["data.num_sample"]
        if clips % 2:
            fail("data.batch_size", f"times data.num_sample is {clips}; solver.mixup pairs clips, so it must be even")
        if values["solver.smoothing"] != 0.1:
            fail("solver.smoothing", f"is {values['solver.smoothing']}, but solver.mixup goes with 0.1")
    weights, classes = values["solver.class_weights"], values["data.num_classes"]
    if isinstance(weights, list) and len(weights) != classes:
        fail("solver.class_weights", f"has {len(weights)} numbers, but data.num_classes is {classes}; give one a class")
    if weights == "balanced" and values["data.balance"]:
        fail("solver.class_weights", "balanced, but data.balance already draws classes equally often; set one of both")
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
    """Return what is wrong with `data.resize`, or None if it is right or if one of the two values is not known yet."""
    if resize is None or input_size is None:
        return None
    shorter = min(resize) if isinstance(resize, list) else resize
    return f"is {resize}, below data.input_size, which is {input_size}" if shorter < input_size else None


def _check_paths(
    values: Values, purpose: Purpose, fail: Fail, place: Callable[[str], str], more: Missing | None
) -> None:
    """Fail if lists, roots or files that this purpose needs are missing; one error names all of them.

    Args:
        more: describes what else the purpose needs and is not there.
    """
    if purpose == "model":
        return
    missing: list[tuple[str, str]] = []
    needed, optional = ["data.val_list", "data.val_root"], ["data.label_list"]
    if purpose == "train":  # a test reads its own checkpoint, which may also hold the tower
        optional += ["network.weights", "resume", "pretrain"]
        if not values["solver.evaluate"]:
            needed = ["data.train_list", "data.train_root", *needed]
    for key in [*needed, *optional]:
        value, field = values[key], FIELDS[key]
        exists = os.path.isdir if field.kind == "folder" else os.path.isfile
        if value is None and key in needed:
            missing.append((key, f"missing, and this run needs it: {field.doc}"))
        if value is not None and (key, value) not in NO_FILES and not exists(value):
            missing.append((key, f"no such {field.kind}: {os.path.abspath(value)}"))
    others = more(values) if more else []
    if len(missing) + len(others) == 1:
        for key, problem in missing:
            fail(key, problem)
        raise ConfigError(others[0])
    if missing or others:
        listed = [*(f"{place(key)}: {key}: {problem}" for key, problem in missing), *others]
        raise ConfigError(f"{len(listed)} things are missing: {'; '.join(text.rstrip('.') for text in listed)}")


def main(argv: list[str]) -> None:
    """Check a configuration. The scripts call this before they start any process."""
    match argv:
        case ["train" | "test" as purpose, path, *overrides]:
            load_config(path, overrides, purpose)
        case _:
            raise ConfigError(USAGE)


if __name__ == "__main__":
    run_program(main)
