"""Random logs and candidates, and the definition of a hard search: look at every event."""

from typing import Any, NamedTuple

import numpy as np

from hstu_xd.search.found import Found


class Log(NamedTuple):
    paths: np.ndarray
    offsets: np.ndarray
    times: np.ndarray


def draw_log(
    rng: np.random.Generator, lengths: list[int], *, levels: int = 4, is_tree: bool, nodes: int = 12
) -> Log:
    """A log with ties in time; levels are missing here and there where it is no tree."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    times = np.concatenate([np.sort(rng.integers(0, max(2, n // 2), n)) for n in [*lengths, 0]])
    items = rng.integers(0, nodes, total)
    if is_tree:
        paths = np.stack([items // 2**level for level in range(levels)], axis=1)
    else:
        paths = rng.integers(-1, np.maximum(nodes // 2 ** np.arange(levels), 1), (total, levels))
    return Log(paths.astype(np.int64), offsets, times.astype(np.int64) + 1_500_000_000)


def draw_queries(
    rng: np.random.Generator, log: Log, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users = rng.integers(0, len(log.offsets) - 1, count)
    known = log.paths[rng.integers(0, max(1, len(log.paths)), count)] if len(log.paths) else None
    paths = rng.integers(-1, 14, (count, log.paths.shape[1]))
    if known is not None:
        paths = np.where(rng.random((count, 1)) < 0.8, known, paths)
    low = int(log.times.min(initial=1_500_000_000))
    high = int(log.times.max(initial=1_500_000_000))
    return users, paths, rng.integers(low - 1, high + 3, count)


def by_definition(
    log: Log,
    user: int,
    path: np.ndarray,
    time: int,
    k: int,
    *,
    levels: Any = None,
    quotas: Any = None,
    skip_recent: int = 0,
    fill: str = "none",
    scope: str = "all",
) -> list[tuple[int, int]]:
    """(event, level) of the first K, found by sorting all events."""
    height = log.paths.shape[1]
    used = range(height) if levels is None else sorted(levels)
    first, end = int(log.offsets[user]), int(log.offsets[user + 1])
    before = [i for i in range(first, end) if log.times[i] < time]
    before = before[: max(0, len(before) - skip_recent)]
    ranked = []
    for i in before:
        in_domain = log.paths[i, -1] == path[-1] != -1
        level = next((x for x in used if log.paths[i, x] == path[x] != -1), height)
        if (scope == "all" or in_domain) and (level < height or fill == "recent"):
            ranked.append((level, -int(log.times[i]), -i))
    left = dict(quotas or {})
    chosen = []
    for level, _, negative in sorted(ranked):
        if left.get(level, k) > 0:
            left[level] = left.get(level, k) - 1
            chosen.append((-negative, level))
    return chosen[:k]


def pairs(found: Found, query: int) -> list[tuple[int, int]]:
    """(event, level) of what was found, with the padding after it checked."""
    events, levels = found.events[query].tolist(), found.levels[query].tolist()
    count = sum(event >= 0 for event in events)
    assert events[count:] == levels[count:] == [-1] * (len(events) - count)
    return list(zip(events[:count], levels[:count]))
