"""Rows of a benchmark as a table for people."""

from collections.abc import Iterable
from typing import Any

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
