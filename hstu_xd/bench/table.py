"""Rows of a benchmark as a table for people."""

from collections.abc import Iterable
from typing import Any

# Column title -> key of the row and how to show it. A column without a value is left out.
_COLUMNS = {
    "provider": ("provider", str),
    "N": ("seq_len", str),
    "D": ("num_domains", str),
    "skew": ("skew", "{:g}".format),
    "rows": ("rows", "{:,}".format),
    "correct": ("correct", lambda value: "yes" if value else "NO"),
    "ms": ("ms_median", "{:.1f}".format),
    "ms p20": ("ms_p20", "{:.1f}".format),
    "ms p80": ("ms_p80", "{:.1f}".format),
    "x faster than reference": ("times_faster_than_reference", "{:.2f}".format),
    "x faster than dense": ("times_faster_than_dense", "{:.2f}".format),
    "N in the time of dense": ("equal_time_seq_len", "{:,}".format),
    "samples/s": ("samples_per_second", "{:,.0f}".format),
    "seconds": ("seconds", "{:.2f}".format),
    "events/s": ("events_per_second", "{:,}".format),
    "peak MiB": ("peak_bytes", lambda value: f"{value / 2**20:.0f}"),
    "absent": ("absent", str),
}


def render(rows: Iterable[dict[str, Any]]) -> str:
    """Rows of one benchmark, a line each, columns aligned; unknown values are a dash."""
    rows = list(rows)
    used = {
        title: column
        for title, column in _COLUMNS.items()
        if any(row.get(column[0]) is not None for row in rows)
    }
    lines = [list(used)]
    for row in rows:
        shown = ((row.get(key), show) for key, show in used.values())
        lines.append(["-" if value is None else show(value) for value, show in shown])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
