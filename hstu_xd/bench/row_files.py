"""Rows of a benchmark as a table for people.

Rows in a file, JSON or CSV: written whole or not at all, read back the same.
"""

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


_percent = "{:.0%}".format
_tenth = "{:.1f}".format

# Column title -> key of the row and how to show it. A column without a value is left out.
_COLUMNS = {
    "provider": ("provider", str),
    "N": ("seq_len", str),
    "D": ("num_domains", str),
    "skew": ("skew", "{:g}".format),
    "order": ("interleaving", str),
    "delta": ("delta", "{:.3f}".format),
    "rows": ("rows", "{:,}".format),
    "items": ("items", "{:,}".format),
    "recall": ("recall", "{:.3f}".format),
    "correct": ("correct", lambda value: "yes" if value else "NO"),
    "ms": ("ms_median", _tenth),
    "ms p20": ("ms_p20", _tenth),
    "ms p80": ("ms_p80", _tenth),
    "ms p99": ("ms_p99", _tenth),
    "p99 of p50": ("p99_of_p50", _tenth),
    "capacity/s": ("capacity_per_second", "{:,.0f}".format),
    "offered/s": ("offered_per_second", "{:,.0f}".format),
    "accepted/s": ("accepted_per_second", "{:,.0f}".format),
    "503": ("refused_share", _percent),
    "other errors": ("other_errors", str),
    "lost events": ("lost_events", str),
    "fwd ms": ("ms_forward", _tenth),
    "bwd ms": ("ms_backward", _tenth),
    "fwd TFLOP/s": ("tflops_forward", "{:.3g}".format),
    "bwd TFLOP/s": ("tflops_backward", "{:.3g}".format),
    "fwd roofline": ("roofline_forward", _percent),
    "bwd roofline": ("roofline_backward", _percent),
    "x the time of one": ("times_of_ask_one", "{:.2f}".format),
    "state bytes": ("state_bytes", "{:,}".format),
    "formula": ("formula_bytes", "{:,}".format),
    "N in the time of dense": ("equal_time_seq_len", "{:,}".format),
    "samples/s": ("samples_per_second", "{:,.0f}".format),
    "seconds": ("seconds", "{:.2f}".format),
    "events/s": ("events_per_second", "{:,}".format),
    "peak MiB": ("peak_bytes", lambda value: f"{value / 2**20:.0f}"),
    "absent": ("absent", str),
    "failed": ("failed", str),
}
_RATIO = "times_faster_than_"


def render(rows: Iterable[dict[str, Any]]) -> str:
    """Rows of one benchmark, a line each, columns aligned; unknown values are a dash."""
    lines = _cells(list(rows))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The same as a Markdown table."""
    head, *lines = _cells(list(rows))
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def _cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    ratios = dict.fromkeys(key for row in rows for key in row if key.startswith(_RATIO))
    columns = _COLUMNS | {
        f"x faster than {key.removeprefix(_RATIO)}": (key, "{:.2f}".format) for key in ratios
    }
    used = {
        title: column
        for title, column in columns.items()
        if any(row.get(column[0]) is not None for row in rows)
    }
    lines = [list(used)]
    for row in rows:
        shown = ((row.get(key), show) for key, show in used.values())
        lines.append(["-" if value is None else show(value) for value, show in shown])
    return lines
