"""``bench prepare``: preparing a generated log, appending to it, and a reader in plain Python."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hstu_xd.errors import HstuXdError
from hstu_xd.files import sha256_of

THREADS = "2"
DOMAINS = 5
EVENTS_PER_USER = 50
EVENTS_PER_ITEM = 40
SAMPLE = 20
CHUNK = 1 << 21
FIRST_SECOND = 1_500_000_000
SPAN = 1 << 26

APPENDED = 100

# Each provider runs in a process of its own, so that its peak memory is its own.
MEASURE = """
import json, sys, time
start = time.perf_counter()
from hstu_xd.bench.prepare import PROVIDERS, peak_bytes
counts = PROVIDERS[sys.argv[1]](sys.argv[3:], sys.argv[2])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "cpu_seconds": time.process_time(),
                  "peak_bytes": peak_bytes(), "counts": counts}))
"""
COUNTS = ("users", "items", "interactions", "delta")


def measure_prepare(rows: int, out: Path) -> list[dict[str, Any]]:
    """Time ``prepare`` on ``rows`` events, as a whole and the last hundredth by ``--append``.

    On a twentieth it is timed against a ``csv`` + ``dict`` reader. Seconds are wall clock from the
    start of the process's imports to the finished store, on two threads; ``cpu_seconds`` are those
    of all threads and of the start of Python. ``correct`` says that both readers found the same
    users, items, events and delta in the sample, and that appending wrote the bytes of reading all.

    Args:
        rows: number of events of the large log.
        out: folder for the generated files and stores; they stay there.

    Returns:
        Rows {provider, rows, seconds, cpu_seconds, events_per_second, peak_bytes, correct}.

    Raises:
        HstuXdError: a provider failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    added = max(1, rows // APPENDED)
    counts = {"sample": rows // SAMPLE, "old": rows - added, "new": added}
    files = {name: out / f"{rows}.{name}.csv" for name in counts}
    for name, count in counts.items():
        if not files[name].exists():
            write_csv(
                files[name], count, of=rows if name != "sample" else count, late=name == "new"
            )
    old, both, appended = (out / f"{rows}.{name}.store" for name in ("old", "both", "appended"))
    _measure("hstu-xd prepare", old, files["old"])
    results = [
        ("hstu-xd prepare", rows, _measure("hstu-xd prepare", both, files["old"], files["new"])),
        (APPEND, rows, _measure(APPEND, appended, old, files["new"])),
        *(
            (name, counts["sample"], _measure(name, out / f"{rows}.sample.store", files["sample"]))
            for name in ("hstu-xd prepare", "csv + dict")
        ),
    ]
    same = _contents(both) == _contents(appended)
    correct = results[2][2]["counts"] == results[3][2]["counts"]
    return [
        {
            "provider": provider,
            "rows": count,
            "seconds": round(result["seconds"], 3),
            "cpu_seconds": round(result["cpu_seconds"], 3),
            "events_per_second": round(count / result["seconds"]),
            "peak_bytes": result["peak_bytes"],
            "correct": same if count == rows else correct,
        }
        for provider, count, result in results
    ]


def _contents(store: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in store.iterdir()}


def write_csv(
    file: Path, rows: int, *, of: int | None = None, late: bool = False, seed: int = 0
) -> None:
    """Write a log of ``rows`` events in random order: the worst case for a reader's caches.

    Args:
        file: to write.
        rows: number of events.
        of: number of events of the log that they are a part of, by default all of it.
        late: whether they come after those of other parts.
        seed: of the generator.
    """
    import polars as pl

    of = of or rows
    first = FIRST_SECOND + (SPAN if late else 0)
    rng = np.random.default_rng([seed, 1] if late else seed)
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            item = rng.integers(0, max(1, of // EVENTS_PER_ITEM), count)
            numbers = pl.DataFrame(
                {
                    "user": rng.integers(0, max(1, of // EVENTS_PER_USER), count),
                    "item": item,
                    "domain": item % DOMAINS,
                    "timestamp": first + rng.integers(0, SPAN, count),
                }
            )
            texts = numbers.select(
                user=pl.format("u{}", "user"),
                item=pl.format("i{}", "item"),
                domain=pl.format("domain_{}", "domain"),
                timestamp="timestamp",
            )
            texts.write_csv(stream, include_header=start == 0)
    partial.rename(file)


def prepare_files(files: Sequence[str], out: str) -> dict[str, Any]:
    """Prepare the files with this package; return what it counted."""
    from hstu_xd.data.prepare import prepare_logs

    manifest = prepare_logs(files, Path(out), force=True)
    return {name: manifest[name] for name in COUNTS}


def append_file(files: Sequence[str], out: str) -> dict[str, Any]:
    """Append to the store that stands first; return what it counted."""
    from hstu_xd.data.append import append_logs

    manifest = append_logs(files[1:], Path(files[0]), Path(out), force=True)
    return {name: manifest[name] for name in COUNTS}


def read_with_dicts(files: Sequence[str], out: str) -> dict[str, Any]:
    """Read a file the straightforward way: ``csv`` rows into a dict of lists, sorted by user."""
    import csv

    from hstu_xd.data.statistics import DIGITS

    items: dict[str, int] = {}
    domains: dict[str, int] = {}
    histories: dict[str, list[tuple[int, int, int]]] = {}
    with Path(files[0]).open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            item = items.setdefault(row["item"], len(items) + 1)
            domain = domains.setdefault(row["domain"], len(domains))
            event = (int(row["timestamp"]), item, domain)
            histories.setdefault(row["user"], []).append(event)
    delta, events = 0.0, 0
    columns: tuple[list[int], list[int], list[int]] = ([0], [], [])
    for user in sorted(histories):
        history = sorted(histories[user])
        visits = [0] * len(domains)
        for time, item, domain in history:
            visits[domain] += 1
            columns[1].append(item)
            columns[2].append(time)
        events += len(history)
        columns[0].append(events)
        delta += sum(n * n for n in visits) / len(history) ** 2
    np.savez(Path(f"{out}.npz"), *(np.array(column) for column in columns))
    delta = round(delta / len(histories), DIGITS)
    return dict(zip(COUNTS, (len(histories), len(items), events, delta)))


APPEND = "hstu-xd prepare --append"
PROVIDERS = {
    "hstu-xd prepare": prepare_files,
    APPEND: append_file,
    "csv + dict": read_with_dicts,
}


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far.

    Linux's VmHWM starts anew with each program; getrusage would count the parent's memory.
    """
    import resource

    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _measure(provider: str, store: Path, *files: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, provider, str(store), *map(str, files)],
        env={**os.environ, "POLARS_MAX_THREADS": THREADS},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise HstuXdError(f"{provider} failed on {files[-1]}: {last}")
    return json.loads(done.stdout)
