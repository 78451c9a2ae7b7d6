"""Read columns of a table in any csv, tsv or json file (for the source `table` of tools/prepare_data.py)."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.errors import DataError, quoted

DELIMITERS = ",;\t|"
LONGEST_FIELD = 1 << 30  # characters; Python's own limit is 128 KiB
KEY, VALUE = "key", "value"  # columns of the names of the entries of a JSON object, and of entries without columns
NAMED = 12  # columns in an error message

Row = tuple[str, list[str]]  # "FILE:LINE", and the values of the wanted columns


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the values of `columns` in every row of a UTF-8 file.

    A csv or tsv file has a header with the names of its columns. In a file without one, columns are numbers from 1.

    A json file holds a list of objects, one object for each line, an object of objects, whose names are the column
    `key`, or an object with a list for each column. `a.b` is the column `b` of an object in the column `a`. What is no
    object, as in {"a.mp4": "run"} and {"run": ["a.mp4", "b.mp4"]}, is the column `value`.

    Raises:
        DataError: the file cannot be read or has no rows, or a row does not have a column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    is_json = path.suffix.lower().startswith(".json") or text.lstrip()[:1] in ("[", "{")
    rows = list(_json_rows(path, text, columns) if is_json else _csv_rows(path, text, columns))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _csv_rows(path: Path, text: str, columns: Sequence[str]) -> Iterator[Row]:
    lines = text.splitlines(keepends=True)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return
    usual_limit = csv.field_size_limit(LONGEST_FIELD)
    started = width = 0
    try:
        delimiter, header = _header(path, first, columns)
        rows = csv.reader(lines, delimiter=delimiter)
        for row in rows:
            source, started = f"{path}:{started + 1}", rows.line_num
            if not any(row):
                continue
            if width == 0:
                width = len(row)
                if header:
                    continue
            if len(row) < width or any(row[width:]):
                raise DataError(f"{source}: {width} columns expected, got {len(row)}; is a quote not closed?")
            yield source, [row[header.index(name) if header else int(name) - 1].strip() for name in columns]
    except csv.Error as error:
        raise DataError(f"{path}:{started + 1}: not readable as csv ({error})") from error
    finally:
        csv.field_size_limit(usual_limit)


def _header(path: Path, line: str, columns: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter of a file with this first line, and the names of its columns; none if `columns` are numbers."""
    split = {}
    for delimiter in "\t" if path.suffix.lower() == ".tsv" else DELIMITERS + " ":
        split[delimiter] = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        if set(columns) <= set(split[delimiter]):
            for name in columns:
                if split[delimiter].count(name) > 1:
                    raise DataError(f"{path}:1: the column {name!r} is there more than once; rename one")
            return delimiter, split[delimiter]
    if all(name.isdecimal() and int(name) > 0 for name in columns):
        for delimiter, values in sorted(split.items(), key=lambda item: (item[0] == " ", -len(item[1]))):
            if len(values) >= max(map(int, columns)):
                return delimiter, []
    header = max(split.values(), key=len)
    raise _missing(f"{path}:1", next(name for name in columns if name not in header), header)


def _json_rows(path: Path, text: str, columns: Sequence[str]) -> Iterator[Row]:
    for source, entry in _entries(path, text, columns):
        values = []
        for name in columns:
            if not _has(entry, name):
                raise _missing(source, name, list(entry))
            value = _value(entry, name)
            if isinstance(value, dict | list):
                raise DataError(f"{source}: the column {name!r} must hold one value, got {quoted(value)}")
            missing = value is None or value != value  # pandas writes NaN
            values.append("" if missing else str(value).strip())
        yield source, values


def _entries(path: Path, text: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        try:
            content = [json.loads(line) for _, line in lines]
        except (ValueError, RecursionError):
            raise DataError(f"{path}: is not valid JSON ({error})") from error
        sources = [f"{path}:{number}" for number, _ in lines]
    else:
        if isinstance(content, dict):
            content = _rows_of(path, content, columns)
        if not isinstance(content, list):
            raise DataError(f"{path}: must hold a JSON list or object")
        sources = [f"{path}: entry {number}" for number in range(1, len(content) + 1)]
    for source, entry in zip(sources, content, strict=True):
        if isinstance(entry, list):
            entry = {str(number): value for number, value in enumerate(entry, 1)}
        yield source, entry if isinstance(entry, dict) else {VALUE: entry}


def _rows_of(path: Path, content: dict[str, Any], columns: Sequence[str]) -> list[Any]:
    """The rows of a JSON object."""
    if all(isinstance(content.get(name), list | dict) for name in columns):  # a list or an object for each column
        lists = [list(c.values()) if isinstance(c := content[name], dict) else c for name in columns]
        if len(set(map(len, lists))) > 1:
            raise DataError(f"{path}: the columns {', '.join(columns)} are of different lengths")
        return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]
    if all(_has(content, name) for name in columns):  # the only row, as in a file of one line
        return [content]
    for place in (content, *content.values()):
        rows = _objects(place) or (_pairs(place) if VALUE in columns else [])
        if rows and all(_has(rows[0], name) for name in columns):
            return rows
    some_are_there = any(_has(content, name) for name in columns)
    return _objects(content) or ([] if some_are_there else _pairs(content)) or [content]


def _objects(place: Any) -> list[Any]:
    """The rows in a list of objects, or in an object; none if it holds something else."""
    if isinstance(place, list):
        return place if all(isinstance(entry, dict) for entry in place) else []
    if isinstance(place, dict) and all(isinstance(entry, dict) for entry in place.values()):
        return [{KEY: name, **entry} for name, entry in place.items()]
    return []


def _pairs(place: Any) -> list[Any]:
    """A row for each entry of an object or, where an entry is a list, for each item."""
    if not isinstance(place, dict):
        return []
    return [
        {KEY: name, VALUE: value}
        for name, values in place.items()
        for value in (values if isinstance(values, list) else [values])
    ]


def _value(entry: dict[str, Any], name: str) -> Any:
    if name in entry:
        return entry[name]
    outer, _, inner = name.partition(".")
    return _value(entry[outer], inner) if inner and isinstance(entry.get(outer), dict) else None


def _has(entry: dict[str, Any], name: str) -> bool:
    outer, _, inner = name.partition(".")
    return name in entry or (bool(inner) and isinstance(entry.get(outer), dict) and _has(entry[outer], inner))


def _missing(source: str, name: str, names: list[str]) -> DataError:
    there = ", ".join(map(str, names[:NAMED])) + (", ..." if len(names) > NAMED else "")
    return DataError(f"{source}: no column {name!r}; the columns are {there}")
