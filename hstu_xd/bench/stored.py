"""Rows in a file, JSON or CSV: written whole or not at all, read back the same."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hstu_xd.bench.rows import Row
from hstu_xd.errors import InputError

FORMATS = (".json", ".csv")


def check_name(path: Path) -> None:
    """Refuse a file that :func:`write` could not write, before anything is measured.

    Raises:
        InputError: another ending than ``.json`` or ``.csv``, or no folder to write to.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: rows are stored as {' or '.join(FORMATS)}; name such a file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows; the old file stays whole until the new one is."""
    partial = path.with_suffix(path.suffix + ".partial")
    if path.suffix == ".json":
        partial.write_text(json.dumps(rows, indent=1) + "\n")
    else:
        buffer = io.StringIO()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
        partial.write_text(buffer.getvalue())
    partial.replace(path)


def read(paths: Iterable[Path]) -> list[Row]:
    """Rows of several files, one after the other.

    Raises:
        InputError: no such file, or no rows of a benchmark in it.
    """
    return [row for path in paths for row in _read(path)]


def _read(path: Path) -> list[Row]:
    if path.suffix not in FORMATS or not path.is_file():
        raise InputError(f"{path}: no such file of rows, {' or '.join(FORMATS)}")
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text())
        else:
            table = csv.DictReader(io.StringIO(path.read_text()))
            rows = [{key: _value(text) for key, text in row.items()} for row in table]
        if all(isinstance(row["provider"], str) for row in rows):
            return rows
    except (ValueError, TypeError, KeyError):
        pass
    raise InputError(f"{path}: no rows of a benchmark; write them with hstu-xd bench ... --out")


def _cell(value: Any) -> str:
    """Empty for None, else JSON; text without quotes unless it would read as something else."""
    if value is None:
        return ""
    return value if isinstance(value, str) and _value(value) == value else json.dumps(value)


def _value(text: str) -> Any:
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
