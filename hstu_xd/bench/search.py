"""``bench search``: hard search over a mapped index against a scan, soft search against all scores.

The index lies on disk, and a scan looks at the whole history; soft search goes through the history
in chunks, where its rival holds all scores at once.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_xd.bench.rows import environment
from hstu_xd.search import Found, HardIndex
from hstu_xd.search.soft import Requests, SoftSearch

LENGTHS = (10_000, 100_000, 1_000_000)
LEVELS = 4
# Items of a type, types of a category and categories of a department.
FAN_OUT = 20
ITEMS = 50_000
SPAN = 100_000_000
# Of the embeddings of soft search.
SOFT_WIDTH = 32
APPENDS = 2_000
CHECKED = 5
# Events of each user of a long log, and how often it is opened.
OF_A_USER = 100
OPENINGS = 9
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
        found the same events and levels, and nothing else is timed. Of soft search, whose tables
        are new, rows {provider, seq_len, width, ms_per_candidate, ...}.
    """
    for length in lengths:
        with TemporaryDirectory() as folder:
            yield from _measure(Path(folder) / "index", length, k, candidates, repeats)
        yield from _measure_soft(length, k, candidates, repeats)


def measure_opening(events: int, k: int) -> dict[str, Any]:
    """Time the opening of the index of a whole log, whose pages are not in memory.

    Args:
        events: of the log, rounded to users of 100 each.
        k: events to find for a candidate.

    Returns:
        A row: ``open_ms`` is of the opening, ``first_ms_median`` of the first search after it,
        which reads pages from the disk. ``correct`` says that the opened index finds what the built
        one does, and nothing else is timed.
    """
    rng = np.random.default_rng(0)
    users = max(1, events // OF_A_USER)
    items = (rng.zipf(1.2, users * OF_A_USER) % ITEMS).astype(np.int32)
    times = rng.integers(0, SPAN, (users, OF_A_USER))
    times.sort(axis=1)
    began = time.perf_counter()
    built = HardIndex.build(_Paths(items), np.arange(users + 1) * OF_A_USER, times.ravel())
    build_seconds = time.perf_counter() - began
    whose = rng.integers(0, users, OPENINGS + 1)
    nodes, at = _Paths(rng.integers(0, ITEMS, len(whose)))[:], np.full(len(whose), SPAN)
    wanted = built.search(whose, nodes, at, k).events
    row = {"provider": "opening", "log_events": len(items), "users": users, "k": k}
    row |= environment("cpu")
    sizes = {"bytes_per_event": built.nbytes / len(items)}
    openings, searches, correct = [], [], True
    with TemporaryDirectory() as folder:
        built.save(place := Path(folder) / "index")
        del built
        for turn in range(OPENINGS + 1):
            _leave_memory(place)
            began = time.perf_counter()
            index = HardIndex.open(place)
            opened = time.perf_counter()
            one = slice(turn, turn + 1)
            found = index.search(whose[one], nodes[one], at[one], k).events[0]
            searches.append(time.perf_counter() - opened)
            openings.append(opened - began)
            correct &= np.array_equal(found, wanted[turn])
            del index  # pages that are mapped stay in memory
    if not correct:
        return row | {"correct": False}
    return row | {
        "correct": True,
        # The first one loads code.
        "open_ms": float(np.median(openings[1:])) * 1e3,
        "first_ms_median": float(np.median(searches[1:])) * 1e3,
        "events_per_second": round(len(items) / build_seconds),
        **sizes,
    }


class _Paths:
    """Nodes of events by their items, made a slice at a time."""

    def __init__(self, items: NDArray) -> None:
        self._items = items

    def __getitem__(self, events: slice) -> Ints:
        items = self._items[events].astype(np.int64)
        return np.stack([items // FAN_OUT**level for level in range(LEVELS)], axis=1)


def _leave_memory(folder: Path) -> None:
    """Have the system forget the pages of files, where it takes advice."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.iterdir():
        number = os.open(file, os.O_RDONLY)
        try:
            os.fsync(number)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(number)


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
    row |= environment("cpu")
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


def _measure_soft(length: int, k: int, candidates: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Time requests to one user's history, whose candidates share the passes over its events."""
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SoftSearch([ITEMS], width=SOFT_WIDTH)

    def drawn(number: int) -> Tensor:
        return torch.from_numpy(rng.zipf(1.2, (number, 1)) % ITEMS)

    gaps = torch.from_numpy(rng.integers(1, SPAN, length)).sort(descending=True).values
    events = drawn(length)
    ends = torch.tensor([0, length]), torch.tensor([0, candidates])
    requests = [
        Requests(events, gaps, ends[0], drawn(candidates), ends[1]) for _ in range(repeats + 1)
    ]
    row = {"seq_len": length, "k": k, "candidates": candidates, "width": SOFT_WIDTH}
    row |= environment("cpu")
    chunks, whole = partial(model.search, k=k), partial(model.search, k=k, chunk=length)
    best, dense = (_scores(model, requests[0], find(requests[0])) for find in (chunks, whole))
    row["correct"] = torch.allclose(best, dense, rtol=0, atol=1e-5)
    if not row["correct"]:
        yield {"provider": "soft", **row}
        return
    turns = [[_seconds(partial(find, each)) for find in (chunks, whole)] for each in requests[1:]]
    soft_times, dense_times = np.array(turns).T * 1e3 / candidates
    yield {
        "provider": "soft",
        **row,
        "ms_per_candidate": float(np.median(soft_times)),
        "times_faster_than_soft-dense": float(np.median(dense_times / soft_times)),
    }
    yield {"provider": "soft-dense", **row, "ms_per_candidate": float(np.median(dense_times))}


def _scores(model: SoftSearch, asked: Requests, found: Tensor) -> Tensor:
    """Return the scores of what was found, in its order: events of equal scores may differ."""
    there, rows = found >= 0, found.clamp(min=0)
    with torch.no_grad():
        keys = model.attend(asked.events[rows.flatten()], is_candidate=False)
        query = model.attend(asked.candidates, is_candidate=True)
        scores = (keys.view(*rows.shape, -1) @ query.unsqueeze(2)).squeeze(2)
        return (scores + model.time_scores(asked.gaps[rows])).masked_fill(~there, 0)


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
