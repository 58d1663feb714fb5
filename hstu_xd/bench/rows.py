"""Rows of benchmarks: their columns, the environment they were measured in, files and tables.

Rows are stored as JSON or CSV, written whole or not at all, and read back the same.
"""

import csv
import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from hstu_xd.bench.cases import Case
from hstu_xd.bench.encoder_passes import source_of_jagged_operators
from hstu_xd.bench.roofline import Ceilings, Work
from hstu_xd.bench.timing import Times
from hstu_xd.errors import InputError
from hstu_xd.version import __version__

Row = dict[str, Any]
FORMATS = (".json", ".csv")
# A Linux kernel that has this file lets a process start the peak of its resident set anew.
RESETS_PEAK = Path("/proc/self/clear_refs")


def empty_row(provider: str, case: Case, *, threads: int, repeats: int) -> Row:
    """Return the row of a provider before it is measured.

    Args:
        provider: its name.
        case: the case that is measured.
        threads: threads of PyTorch.
        repeats: number of timed passes.
    """
    return {
        "provider": provider,
        "seq_len": case.seq_len,
        "num_domains": case.num_domains,
        "skew": case.skew,
        "dtype": case.dtype,
        "device": case.device,
        "ms_median": None,
        "ms_p20": None,
        "ms_p80": None,
        "peak_bytes": None,
        "correct": None,
        "what": case.what,
        "batch_size": case.batch_size,
        "heads": case.heads,
        "dqk": case.dqk,
        "dv": case.dv,
        "width": case.width,
        "layers": case.layers,
        "interleaving": case.interleaving,
        "plan": case.plan,
        "threads": threads,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "repeats": repeats,
        "peak_bytes_method": _peak_bytes_method(case.device),
        **environment(case.device),
    }


def time_columns(times: Times) -> Row:
    """Return median, 20th and 80th percentile of whole passes, and the median of each phase."""
    low, median, high = (float(x) for x in np.percentile(times["total"], [20, 50, 80]))
    others = {f"ms_{name}": float(np.median(x)) for name, x in times.items() if name != "total"}
    return {"ms_median": median, "ms_p20": low, "ms_p80": high, **others}


def times_faster(times: Mapping[str, Times], provider: str, rival: str) -> Row:
    """Return how often a provider runs in the time of its rival: the median over turns, if any."""
    if rival not in times:
        return {}
    ratios = np.divide(times[rival]["total"], times[provider]["total"])
    return {f"times_faster_than_{rival}": float(np.median(ratios))}


def speed_columns(work: Work, row: Row, ceilings: Ceilings) -> Row:
    """Return the speed of both phases, and its share of what the machine can reach.

    ``roofline_*`` is the time that the work takes at the ceilings over the time that it took.

    Args:
        work: work of the case, as the provider computes it.
        row: row with the times of the phases.
        ceilings: ceilings measured in this run.
    """
    columns: Row = {"ceiling_tflops": ceilings.tflops, "ceiling_gbs": ceilings.gbs}
    for phase, flops, moved in (
        ("forward", work.forward_flops, work.forward_bytes),
        ("backward", work.backward_flops, work.backward_bytes),
    ):
        seconds = row[f"ms_{phase}"] / 1e3
        columns |= {
            f"tflops_{phase}": flops / seconds / 1e12,
            f"gbs_{phase}": moved / seconds / 1e9,
            f"roofline_{phase}": ceilings.seconds(flops, moved) / seconds,
        }
    return columns


def _peak_bytes_method(device: str) -> str:
    """Return how the bytes of a row are counted."""
    if device != "cpu":
        return "allocator peak less baseline"
    if RESETS_PEAK.exists():
        return "resident peak less baseline"
    return "resident peak less earlier peak"


def environment(device: str) -> dict[str, object]:
    """Return the columns that a stored row needs to be read later.

    Args:
        device: "cpu" or "cuda".

    Returns:
        ``device_name``; versions of torch, triton (None where it is not installed), python and
        hstu_xd; ``jagged_operators``, whose operators upstream's dense layers use;
        ``load_average``, the processes that wanted a core in the last minute; and the command.
    """
    return {
        "device_name": _device_name(device),
        "torch": version("torch"),
        "triton": _version_or_none("triton"),
        "python": platform.python_version(),
        "hstu_xd": __version__,
        "jagged_operators": source_of_jagged_operators(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "command": shlex.join(["hstu-xd", *sys.argv[1:]]),
    }


@cache
def _device_name(device: str) -> str:
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor()


def _version_or_none(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_file_name(path: Path) -> None:
    """Refuse a file that :func:`write_rows` could not write, before anything is measured.

    Raises:
        InputError: the name ends in neither ``.json`` nor ``.csv``, or its folder is not there.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: rows are stored as {' or '.join(FORMATS)}; name such a file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
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


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Read the rows of several files, one file after the other.

    Raises:
        InputError: a file is not there, or holds no rows of a benchmark.
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
    """Return a cell of CSV: empty for None, else JSON; text is bare where it reads back as text."""
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
    "search": ("search_share", _percent),
    "x the time of hstu": ("times_hstu", "{:.2f}".format),
    "fwd TFLOP/s": ("tflops_forward", "{:.3g}".format),
    "bwd TFLOP/s": ("tflops_backward", "{:.3g}".format),
    "fwd roofline": ("roofline_forward", _percent),
    "bwd roofline": ("roofline_backward", _percent),
    "x the time of one": ("times_of_ask_one", "{:.2f}".format),
    "x faster than in turn": ("times_faster_than_in_turn", _tenth),
    "state bytes": ("state_bytes", "{:,}".format),
    "formula": ("formula_bytes", "{:,}".format),
    "N in the time of dense": ("equal_time_seq_len", "{:,}".format),
    "samples/s": ("samples_per_second", "{:,.0f}".format),
    "seconds": ("seconds", "{:.2f}".format),
    "events/s": ("events_per_second", "{:,}".format),
    "peak MiB": ("peak_bytes", lambda value: f"{value / 2**20:.0f}"),
    "us a candidate": ("us_per_candidate", _tenth),
    "ms a candidate": ("ms_per_candidate", "{:.2f}".format),
    "us cold": ("us_per_candidate_cold", _tenth),
    "bytes an event": ("bytes_per_event", _tenth),
    "append us": ("append_us", _tenth),
    "open ms": ("open_ms", _tenth),
    "log events": ("log_events", "{:,}".format),
    "ready s": ("ready_s", "{:.2f}".format),
    "ready s empty": ("ready_s_empty", "{:.2f}".format),
    "first ms": ("first_ms_median", _tenth),
    "absent": ("absent", str),
    "failed": ("failed", str),
}
_RATIO = "times_faster_than_"


def render(rows: Iterable[dict[str, Any]]) -> str:
    """Lay out rows of one benchmark, a line each, columns aligned; unknown values are a dash."""
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
    """Lay out the same as a Markdown table."""
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
