"""Curves and a table from stored rows: time and peak memory over one size, a line per provider."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter

from hstu_xd.bench.rows import Row, markdown
from hstu_xd.errors import InputError
from hstu_xd.experiments.report.style import Canvas, Image, colour, house_style, line_style, marker

# Column along the horizontal axis -> its label and scale.
_ACROSS = {
    "seq_len": ("events of a user", "log"),
    "num_domains": ("domains", "log"),
    "skew": ("share of the first domain (0: balanced)", "linear"),
}
# Two rows belong in one figure if these columns are equal, where a row has them.
_ALIKE = (
    "what", "device", "device_name", "dtype", "batch_size", "heads", "dqk", "dv", "width", "layers",
    "interleaving", "plan", *_ACROSS,
)  # fmt: skip
_UNITS = {"ms_median": ("ms", 1.0), "peak_bytes": ("MiB", 2.0**20)}
_HEIGHT = 3.4  # inches


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write figures (PNG) and ``table.md``.

    A figure is drawn for every column of seq_len, num_domains and skew that takes several values
    while all other sizes stay the same.

    Args:
        rows: of one or more runs.
        folder: made where it is not there.

    Returns:
        The files, the table first.

    Raises:
        InputError: there are no rows.
    """
    if not rows:
        raise InputError("there are no rows to draw; name files that hold some")
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "table.md"
    table.write_text(markdown(rows))
    files, seen = [table], Counter[str]()
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    with house_style():
        for image in _images(rows, providers):
            seen[image.name] += 1
            # The name tells the usual sizes only; figures of other sizes get a number.
            again = f"-{seen[image.name]}" if seen[image.name] > 1 else ""
            files.append(folder / f"{image.name}{again}.png")
            files[-1].write_bytes(image.png)
    return files


def _images(rows: Sequence[Row], providers: Sequence[str]) -> Iterator[Image]:
    for across in _ACROSS:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            key = tuple(row.get(name) for name in _ALIKE if name != across)
            groups.setdefault(key, []).append(row)
        for alike in groups.values():
            for value in _UNITS:
                known = [row for row in alike if None not in (row.get(value), row.get(across))]
                if len({row[across] for row in known}) > 1:
                    yield _figure(known, across, value, providers)


def _figure(rows: list[Row], across: str, value: str, providers: Sequence[str]) -> Image:
    first, (unit, size), (label, scale) = rows[0], _UNITS[value], _ACROSS[across]
    fixed = {
        "N": first["seq_len"], "D": first["num_domains"], "skew": first.get("skew"),
        "batch": first.get("batch_size"),
    }  # fmt: skip
    del fixed[{"seq_len": "N", "num_domains": "D", "skew": "skew"}[across]]
    sizes = ", ".join(f"{name}={number:g}" for name, number in fixed.items() if number is not None)
    kind = [
        str(first[name]) for name in ("what", "device", "dtype", "interleaving") if name in first
    ]
    name = "-".join([unit.lower(), "by", across, *kind, sizes])
    canvas = Canvas(
        re.sub(r"[^\w.=]+", "-", name), f"{' '.join(kind)}: {unit}", synthetic=False, height=_HEIGHT
    )
    for place, provider in enumerate(providers):
        points = sorted(
            (row[across], row[value] / size) for row in rows if row["provider"] == provider
        )
        if not points:
            continue
        canvas.ax.plot(
            *zip(*points),
            color=colour(place),
            linestyle=line_style(place),
            marker=marker(place),
            markersize=3,
            label=provider,
        )
    canvas.ax.set(xscale=scale, yscale="log", xlabel=f"{label}\n{sizes}", ylabel=unit)
    if scale == "log":
        ticks = sorted({row[across] for row in rows})
        canvas.ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        canvas.ax.minorticks_off()
    canvas.ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    canvas.ax.yaxis.set_minor_formatter(NullFormatter())
    canvas.ax.legend(fontsize=7, frameon=False)
    return canvas.finish()
