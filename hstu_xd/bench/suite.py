"""``bench suite``: the rows that the project's goals of speed are read from, in one command.

A part of the suite is a command of ``hstu-xd bench`` in a process of its own, so that a kernel that
brings its process down costs one part, and every row says by which command it can be had again. The
parts run in the order of importance until the time is over. Rows are stored in a file a part; what
is there already is not measured again, unless it failed.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hstu_xd.bench.rows import Row, environment, read_rows, render, write_rows
from hstu_xd.errors import InputError

Results = Mapping[str, Sequence[Row]]
_Options = dict[str, Any]
# A part that is begun with less time left would hardly get past loading PyTorch.
_LEAST_SECONDS = 10.0
# Rows of different environments cannot stand in one table.
_ENVIRONMENT = ("device_name", "torch", "triton", "hstu_xd")
# Sizes of a rehearsal: the same commands anywhere, on the CPU and by Triton's interpreter.
_TINY: _Options = {
    "seq_len": 12, "batch_size": 2, "heads": 2, "dqk": 16, "dv": 16, "width": 16, "layers": 1,
    "repeats": 1, "threads": 1, "device": "cpu", "dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A command whose rows are stored in one file.

    Attributes:
        name: name of the file, without ``.json``.
        what: sub-command of ``hstu-xd bench``.
        options: its options by parameter; a list is an option that is repeated.
    """

    name: str
    what: str
    options: _Options

    def words(self) -> list[str]:
        """Return the words of the command after ``hstu-xd``."""
        words = ["bench", self.what]
        for name, values in self.options.items():
            for value in values if isinstance(values, list) else [values]:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    def tiny(self) -> "Part":
        """Return the same part with the sizes of a rehearsal."""
        small = {name: _TINY.get(name, value) for name, value in self.options.items()}
        if self.what != "serving" and "data" not in small:
            small["batch_size"] = _TINY["batch_size"]
        return replace(self, options=small | {"repeats": 1, "threads": 1})


@dataclass(frozen=True)
class Goal:
    """A figure that the project means to reach.

    Attributes:
        text: what is measured, and against whom.
        bound: the figure.
        read: finds the figure in the rows by part; None where they are not there.
        at_most: whether the figure is to stay below the bound, else above it.
    """

    text: str
    bound: float
    read: Callable[[Results], float | None]
    at_most: bool = False

    def line(self, found: Results) -> list[str]:
        """Return goal, figure and verdict for the table."""
        value = self.read(found)
        goal = f"at {'most' if self.at_most else 'least'} {self.bound:g}"
        if value is None:
            return [self.text, goal, "-", "unmeasured"]
        reached = value <= self.bound if self.at_most else value >= self.bound
        return [self.text, goal, f"{value:.2f}", "yes" if reached else "NO"]


def cell(found: Results, part: str, provider: str, column: str, **sizes: object) -> float | None:
    """Return a column of the row of a provider, or of a variant, with these sizes; None without."""
    for row in found.get(part, ()):
        named = row.get("variant", row["provider"]) == provider
        if named and all(row.get(name) == size for name, size in sizes.items()):
            return row.get(column)
    return None


def column(part: str, provider: str, name: str, **sizes: object) -> Callable[[Results], Any]:
    """Return what reads one cell."""
    return lambda found: cell(found, part, provider, name, **sizes)


def ratio(
    above: Callable[[Results], float | None], below: Callable[[Results], float | None]
) -> Callable[[Results], float | None]:
    """Return what divides one figure by another, where there are both."""

    def read(found: Results) -> float | None:
        first, second = above(found), below(found)
        return None if first is None or not second else first / second

    return read


@dataclass(frozen=True)
class Suite:
    """Parts in the order of importance, and the goals that are read from their rows."""

    parts: Sequence[Part]
    goals: Sequence[Goal]


def run(
    suite: Suite, out: Path, *, minutes: float, rehearsal: bool, say: Callable[[str], None]
) -> None:
    """Measure what is not stored yet, until the time is over, and print the tables.

    Args:
        suite: parts and goals.
        out: folder of the rows; made where it is not there.
        minutes: time for all of it.
        rehearsal: run every part with tiny sizes on the CPU, rows in a folder of their own; the
            figures mean nothing.
        say: prints a line.

    Raises:
        InputError: the folder holds rows of another machine or version.
    """
    deadline = time.monotonic() + 60 * minutes
    out = out / "rehearsal" if rehearsal else out
    out.mkdir(parents=True, exist_ok=True)
    parts = [part.tiny() for part in suite.parts] if rehearsal else list(suite.parts)
    _check_environment(out, parts)
    notes: dict[str, str] = {}
    for part in parts:
        if note := _measure(part, out, deadline, rehearsal):
            notes[part.name] = note
        say(f"{part.name}: {notes.get(part.name, 'stored')}")
    found = {part.name: rows for part in parts if (rows := _stored(out, part))}
    for line in report(suite, parts, found, notes):
        say(line)
    if rehearsal:
        say("This was a rehearsal: the sizes were tiny, and the figures mean nothing.")


def report(
    suite: Suite, parts: Sequence[Part], found: Results, notes: Mapping[str, str]
) -> Iterator[str]:
    """Yield the lines of the report: rows, goals, ceilings, and what is missing and why."""
    for part in parts:
        if rows := found.get(part.name):
            yield f"\n{part.name}: hstu-xd {' '.join(part.words())}"
            yield render(rows)
    lines = [["goal", "bound", "found", "reached"], *(goal.line(found) for goal in suite.goals)]
    widths = [max(map(len, texts)) for texts in zip(*lines)]
    yield ""
    for line in lines:
        yield "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip()
    measured = [row for rows in found.values() for row in rows if row.get("ceiling_tflops")]
    for dtype in sorted({row["dtype"] for row in measured}):
        tflops, gbs = (
            max(row[name] for row in measured if row["dtype"] == dtype)
            for name in ("ceiling_tflops", "ceiling_gbs")
        )
        yield f"ceiling in {dtype}: {tflops:.3g} TFLOP/s, {gbs:.4g} GB/s"
    for name, note in notes.items():
        yield f"not measured: {name}: {note}"


def _measure(part: Part, out: Path, deadline: float, rehearsal: bool) -> str | None:
    """Run a part whose rows are not there; return why there are none, or what failed."""
    rows = _stored(out, part)
    if rows and not any(row.get("failed") for row in rows):
        return None
    left = deadline - time.monotonic()
    if left < _LEAST_SECONDS:
        return "the time was over"
    unfinished = out / f"{part.name}.unfinished.json"
    command = [sys.executable, "-m", "hstu_xd", *part.words(), "--out", str(unfinished)]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if rehearsal else {})
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=left, env=environment
        )
    except subprocess.TimeoutExpired:
        return "it took longer than the time that was left"
    if not unfinished.exists():
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return said[-1]
    rows = read_rows([unfinished])
    unfinished.unlink()
    write_rows(_file(out, part), rows)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def _file(out: Path, part: Part) -> Path:
    return out / f"{part.name}.json"


def _stored(out: Path, part: Part) -> list[Row]:
    file = _file(out, part)
    return read_rows([file]) if file.exists() else []


def _check_environment(out: Path, parts: Sequence[Part]) -> None:
    """Refuse a folder with rows of another environment.

    Raises:
        InputError: it names what differs.
    """
    for part in parts:
        here = environment(part.options.get("device", "cpu"))
        for row in _stored(out, part):
            for name in _ENVIRONMENT:
                if row[name] != here[name]:
                    raise InputError(
                        f"{_file(out, part)} was measured with {name} {json.dumps(row[name])}, "
                        f"here it is {json.dumps(here[name])}: name another folder with --out"
                    )
