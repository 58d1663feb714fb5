"""``bench encoder`` and ``bench attention``: gate, interleaved timing, memory, one row each."""

import time
from collections.abc import Iterable, Iterator

import torch

from hstu_xd.bench import gate, memory, providers
from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.rows import Row, empty_row, time_columns, times_faster


def measure(
    cases: Iterable[Case], names: Iterable[str], *, threads: int, repeats: int
) -> Iterator[Row]:
    """Rows of all cases, one a provider.

    Providers take turns (A B A B ...) in this process, so that what disturbs the machine disturbs
    all of them and ratios hold. A provider that fails the gate has ``correct`` false and no time;
    one that is not installed says so under ``absent``.

    Args:
        cases: what to measure.
        names: providers.
        threads: of PyTorch.
        repeats: timed passes of each provider.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in cases:
            yield from _rows(case, list(names), threads, repeats)
    finally:
        torch.set_num_threads(before)


def _rows(case: Case, names: list[str], threads: int, repeats: int) -> Iterator[Row]:
    absent = {name: reason for name in names if (reason := providers.missing(name))}
    errors = {name: gate.largest_error(name, case) for name in names if name not in absent}
    timed = [name for name, error in errors.items() if error <= 1]
    times = _take_turns(case, timed, repeats)
    for name in names:
        row = empty_row(name, case, threads=threads, repeats=repeats)
        row["inside_domains"] = case.num_domains > 1 and providers.knows_domains(name)
        if name in absent:
            row["absent"] = absent[name]
        else:
            row["correct"] = name in times
            row["error_of_budget"] = errors[name]
        if name in times:
            row |= time_columns(times[name]) | times_faster(times, name, "reference")
            row["peak_bytes"] = memory.peak_bytes(name, case, threads)
        yield row


def _take_turns(case: Case, names: list[str], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every pass after one that warms up."""
    draw = Draw.of(case)
    runs = {name: providers.build(name, draw, torch.float32) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            _wait(case)
            start = time.perf_counter()
            run()
            _wait(case)
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _wait(case: Case) -> None:
    if case.device != "cpu":
        torch.cuda.synchronize()
