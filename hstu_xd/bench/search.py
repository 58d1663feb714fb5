"""``bench search``: hard search over an index mapped from disk, against scanning the history."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.search import Found, HardIndex

LENGTHS = (10_000, 100_000, 1_000_000)
LEVELS = 4
# Items of a type, types of a category and categories of a department.
FAN_OUT = 20
ITEMS = 50_000
SPAN = 100_000_000
APPENDS = 2_000
CHECKED = 5
# Requests of a turn, of which the index answers all and the scan a candidate of the first.
IN_A_ROW = 4

Ints = NDArray[np.int64]
Search = Callable[[Ints, int], Found]


def measure_search(
    lengths: Sequence[int], *, k: int, candidates: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Time requests to one user's history, whose items follow Zipf's law, at random times.

    Args:
        lengths: events of the user, one case each.
        k: events to find for a candidate.
        candidates: candidates of a request; they share its time.
        repeats: turns, in each of which the scan answers one candidate of a request, and the index
            that request and then others.

    Yields:
        Rows {provider, seq_len, us_per_candidate, ...}; of the index also the time in a turn's
        first request, for which the scan has just emptied the caches (``us_per_candidate_cold``),
        the speed of its building, its size, an append and the opening. ``correct`` says that both
        found the same events and levels, and nothing else is timed.
    """
    for length in lengths:
        with TemporaryDirectory() as folder:
            yield from _measure(Path(folder) / "index", length, k, candidates, repeats)


def scan(paths: NDArray[np.int32], times: Ints, candidate: Ints, at: int, k: int) -> Found:
    """Find what a hard search finds by looking at every event of one user.

    Args:
        paths: (H + 1, n) int32, node of every event, a row a level.
        times: (n,) int64, ascending.
        candidate: (H + 1,) int64 nodes.
        at: time of the request.
        k: how many events to find.
    """
    end = int(np.searchsorted(times, at))
    level_of = np.full(end, len(paths), np.int8)
    for level in reversed(range(len(paths))):
        level_of[paths[level, :end] == candidate[level]] = level
    found, filled = Found.nothing(1, k), 0
    for level in range(len(paths)):
        events = np.flatnonzero(level_of == level)[::-1][: k - filled]
        found.events[0, filled : filled + len(events)] = events
        found.levels[0, filled : filled + len(events)] = level
        filled += len(events)
    return found


def _measure(
    folder: Path, length: int, k: int, candidates: int, repeats: int
) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    items = rng.zipf(1.2, length) % ITEMS
    paths = np.stack([items // FAN_OUT**level for level in range(LEVELS)], axis=1)
    times = np.sort(rng.integers(0, SPAN, length))
    offsets = np.array([0, length])
    build_seconds = min(_seconds(lambda: HardIndex.build(paths, offsets, times)) for _ in range(3))
    HardIndex.build(paths, offsets, times).save(folder)
    open_seconds = float(np.median([_seconds(lambda: HardIndex.open(folder)) for _ in range(9)]))
    index = HardIndex.open(folder)
    columns = np.ascontiguousarray(paths.T.astype(np.int32))
    users = np.zeros(candidates, np.int64)

    def searched(nodes: Ints, at: int) -> Found:
        return index.search(users[: len(nodes)], nodes, np.full(len(nodes), at), k)

    def scanned(nodes: Ints, at: int) -> Found:
        return scan(columns, times, nodes[0], at, k)

    requests = [
        (paths[rng.integers(0, length, candidates)], int(rng.integers(SPAN // 10, SPAN)))
        for _ in range((repeats + 1) * IN_A_ROW)
    ]
    correct = _agree(searched, scanned, requests[:CHECKED])
    row = {"seq_len": length, "k": k, "candidates": candidates, "correct": correct}
    if not correct:
        yield {"provider": "index", **row}
        return
    # A scan leaves nothing of the index, nor of the interpreter, in the processor's caches.
    turns = [
        [_seconds(partial(scanned, *requests[first]))]
        + [
            _seconds(partial(searched, *asked)) / candidates
            for asked in requests[first:][:IN_A_ROW]
        ]
        for first in range(IN_A_ROW, len(requests), IN_A_ROW)
    ]
    scan_times, cold_times, *warm_times = np.array(turns).T * 1e6
    index_times = np.median(warm_times, axis=0)
    starts = np.arange(APPENDS)
    appending = _seconds(lambda: [index.append(0, paths[i % length], SPAN) for i in starts])
    yield {
        "provider": "index",
        **row,
        "us_per_candidate": float(np.median(index_times)),
        "us_per_candidate_cold": float(np.median(cold_times)),
        "times_faster_than_scan": float(np.median(scan_times / index_times)),
        "events_per_second": round(length / build_seconds),
        "bytes_per_event": index.nbytes / length,
        "append_us": appending / APPENDS * 1e6,
        "open_ms": open_seconds * 1e3,
    }
    yield {"provider": "scan", **row, "us_per_candidate": float(np.median(scan_times))}


def _agree(searched: Search, scanned: Search, requests: Sequence[tuple[Ints, int]]) -> bool:
    """Whether index and scan find the same for every candidate of some requests."""
    for nodes, at in requests:
        mine = searched(nodes, at)
        for row in range(len(nodes)):
            theirs = scanned(nodes[row : row + 1], at)
            same = np.array_equal(mine.events[row], theirs.events[0])
            if not same or not np.array_equal(mine.levels[row], theirs.levels[0]):
                return False
    return True


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
