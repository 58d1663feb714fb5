"""Hierarchical hard search: the events nearest to a candidate in the taxonomy, exactly.

Level 0 is the item, the last one the domain. An event matches a candidate at the lowest level at
which both have the same node; a search gives the first K events by (level, latest first). That
there is such a search is stated in arXiv 2510.21714; the order, the options and the index are
decisions of this project.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hstu_xd.errors import InputError
from hstu_xd.files import check_output, replaced_folder
from hstu_xd.search.appended import AppendedEvents
from hstu_xd.search.directory import (
    Paths,
    RunDirectory,
    build_directory,
    check_log,
    count_levels,
)
from hstu_xd.search.found import Found, choose_first
from hstu_xd.search.recent import check_users
from hstu_xd.search.request import Request
from hstu_xd.search.runs import Ints, Runs, lower_bound

MANIFEST = "hard_index.json"
FORMAT_VERSION = 1
# Queries are answered so many collected rows at a time, which stay in a processor's cache.
CELLS = 1 << 17
_ARRAYS = ("keys", "starts", "events", "offsets", "times")


class HardIndex:
    """Events of every user by node of every level, in memory or mapped from disk.

    Example:
        >>> paths = np.array([[0, 0], [1, 0], [2, 1], [0, 0]])  # item and domain of four events
        >>> index = HardIndex.build(paths, np.array([0, 4]), np.array([10, 20, 30, 40]))
        >>> found = index.search(np.array([0]), np.array([[0, 0]]), np.array([40]), 3)
        >>> found.events, found.levels
        (array([[ 0,  1, -1]]), array([[ 0,  1, -1]], dtype=int8))
    """

    def __init__(
        self, directory: RunDirectory, offsets: Ints, times: NDArray, first_time: int, levels: int
    ) -> None:
        self._directory, self._offsets = directory, offsets
        self._times, self._first_time = times, first_time
        self._levels = levels
        self._appended = AppendedEvents(len(times))

    @property
    def num_levels(self) -> int:
        """Return the number of levels, H + 1."""
        return self._levels

    @property
    def num_users(self) -> int:
        """Return the number of users, those included that only have appended events."""
        return max(len(self._offsets) - 1, self._appended.num_users)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the index's arrays, without appended events."""
        return sum(array.nbytes for array in self._arrays().values())

    @classmethod
    def build(cls, paths: Paths, offsets: Ints, times: NDArray[np.int64]) -> "HardIndex":
        """Sort a log; takes O(L log L) a level, and memory for some millions of events beside it.

        Args:
            paths: (L, H + 1) int64, node of every event from the item's level to the domain's, -1
                where the level is missing; or an object whose slices are such arrays.
            offsets: (B + 1,) int64, user ``b`` owns events ``offsets[b]:offsets[b + 1]``.
            times: (L,) int64, ascending within a user; events of one time stand in their order.

        Raises:
            InputError: shapes that do not fit, nodes below -1, offsets or times that descend.
        """
        offsets, times = np.asarray(offsets), np.asarray(times)
        check_log(offsets, times)
        levels = count_levels(paths)
        directory = build_directory(paths, offsets, levels)
        first_time = int(times.min(initial=0)) if times.size else 0
        span = int(times.max(initial=first_time)) - first_time
        compact = np.uint32 if span < np.iinfo(np.uint32).max else np.int64
        relative = (times - first_time).astype(compact)
        return cls(directory, offsets.astype(np.int64), relative, first_time, levels)

    def save(self, folder: Path | str, *, force: bool = False) -> None:
        """Write the index into a folder, whole or not at all.

        Args:
            folder: where to write.
            force: whether an index that is there may be replaced.

        Raises:
            InputError: the folder is there, or events were appended, which have no place in it.
        """
        if len(self._appended):
            raise InputError(
                f"{folder}: the index holds {len(self._appended)} appended events, which are not "
                "saved; build it again from the whole log"
            )
        out, arrays = Path(folder), self._arrays()
        check_output(
            out,
            force=force,
            ours=lambda at: (at / MANIFEST).is_file(),
            kind="hard index",
            parts=(MANIFEST, *(f"{name}.npy" for name in arrays)),
        )
        manifest = {
            "format_version": FORMAT_VERSION,
            "levels": self._levels,
            "users": self._directory.users,
            "nodes": self._directory.nodes,
            "first_time": self._first_time,
            "sizes": {name: len(array) for name, array in arrays.items()},
        }
        with replaced_folder(out, force=force) as partial:
            for name, array in arrays.items():
                np.save(partial / f"{name}.npy", array)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def open(cls, folder: Path | str) -> "HardIndex":
        """Map an index that :meth:`save` wrote; what is read of it comes with the searches.

        Raises:
            InputError: no index there, one of another version, or a damaged one.
        """
        at = Path(folder)
        manifest = _read_manifest(at)
        arrays = {name: _mapped(at / f"{name}.npy", manifest["sizes"][name]) for name in _ARRAYS}
        directory = RunDirectory(
            *(arrays[name] for name in ("keys", "starts", "events")),
            users=manifest["users"],
            nodes=manifest["nodes"],
        )
        first_time, levels = manifest["first_time"], manifest["levels"]
        return cls(directory, arrays["offsets"], arrays["times"], first_time, levels)

    def append(self, user: int, path: Sequence[int] | NDArray[np.int64], time: int) -> int:
        """Add an event that is not earlier than any of its user's.

        Args:
            user: number of the user, who may be new.
            path: H + 1 nodes, -1 where a level is missing; nodes may be new.
            time: time of the event.

        Returns:
            The event's row in results: appended events count on from the log's last row.

        Raises:
            InputError: a negative user, a path of another length or with nodes below -1, or a time
                before the user's latest event.
        """
        nodes = [int(node) for node in path]
        if user < 0 or len(nodes) != self._levels or min(nodes) < -1:
            raise InputError(
                f"user {user} with path {nodes} cannot be appended; a user counts from 0, a path "
                f"has {self._levels} nodes from 0, or -1 where the level is missing"
            )
        latest = self._latest_time(user)
        if latest is not None and time < latest:
            raise InputError(
                f"an event of user {user} at {time} is before the latest one, at {latest}; append "
                "in the order of time, or build the index again"
            )
        return self._appended.push(user, nodes, time)

    def search(
        self,
        users: Ints,
        paths: Ints,
        times: Ints,
        k: int,
        *,
        levels: Sequence[int] | None = None,
        quotas: Mapping[int, int] | None = None,
        skip_recent: int = 0,
        fill: Literal["none", "recent"] = "none",
        scope: Literal["all", "target_domain"] = "all",
    ) -> Found:
        """Find the K events nearest to each candidate, strictly before the time of its request.

        Args:
            users: (Q,) int64, whose history is searched.
            paths: (Q, H + 1) int64, the candidate's node at each level; -1 where it has none, which
                matches nothing.
            times: (Q,) int64, time of the request, in the unit of the log.
            k: how many events to find.
            levels: the levels that count; all of them by default.
            quotas: level -> how many of its events at most; the others of it are left out.
            skip_recent: how many of the latest events are left out, for a model that reads them
                anyway.
            fill: "recent" puts the latest events that match nowhere after all others, with level
                H + 1.
            scope: "target_domain" leaves out events whose node at the last level is not the
                candidate's.

        Raises:
            InputError: shapes that differ, an unknown user, level, fill or scope, or a number that
                makes no sense.
        """
        request = Request(self._levels, k, levels, quotas, skip_recent, fill, scope)
        users, paths, times = self._checked(users, paths, times)
        found = Found.nothing(len(users), k)
        step = max(1, CELLS // (k * (self._levels + 1)))
        for start in range(0, len(users), step):
            block = slice(start, start + step)
            matches = self._matches(users[block], paths[block], times[block], request)
            part = _filtered(matches, request) if request.is_filtered else _first(matches, request)
            found.events[block], found.levels[block] = part.events, part.levels
        return found

    def count(self, users: Ints, paths: Ints, times: Ints) -> tuple[Ints, Ints]:
        """Count the events of each candidate's node on every level, strictly before a time.

        Args:
            users, paths, times: as :meth:`search` takes them.

        Returns:
            (Q, H + 1) int64, how many there are; (Q, H + 1) int64, row of the latest, -1 for none.

        Raises:
            InputError: shapes that differ, or an unknown user.
        """
        users, paths, times = self._checked(users, paths, times)
        counts, latest = np.zeros_like(paths), np.full_like(paths, -1)
        # As deep as all that was appended, of which a search looks at K a run.
        depth = max(1, len(self._appended))
        request = Request(self._levels, depth, None, None, 0, "none", "all")
        step = max(1, CELLS // self._levels)
        for start in range(0, len(users), step):
            block = slice(start, start + step)
            runs = self._matches(users[block], paths[block], times[block], request).runs
            counts[block] = sum(run.lengths for run in runs)
            latest[block] = _latest(runs, 1).max(axis=2)
        return counts, latest

    def _checked(self, users: Ints, paths: Ints, times: Ints) -> tuple[Ints, Ints, Ints]:
        users, paths, times = (np.asarray(array, np.int64) for array in (users, paths, times))
        check_users(users, times, self.num_users)
        if paths.shape != (len(users), self._levels):
            raise InputError(
                f"paths of candidates have shape {paths.shape}; ({len(users)}, {self._levels}) is "
                "needed, a node of each level"
            )
        return users, paths, times

    def _matches(self, users: Ints, paths: Ints, times: Ints, request: Request) -> "_Matches":
        """Find the runs of the candidates' nodes, cut off at the times of the requests."""
        known = users < len(self._offsets) - 1
        user = np.where(known, users, 0)
        start = np.where(known, self._offsets.take(user), 0)
        stop = np.where(known, self._offsets.take(user + known), 0)
        before = lower_bound(self._times, start, stop, times - self._first_time) - start
        appended = self._appended.count_before(users, times)
        skipped = np.minimum(appended, request.skip_recent)
        appended -= skipped
        before = np.maximum(before - (request.skip_recent - skipped), 0)
        levels = request.levels
        if request.in_domain:  # the domain's runs are a column more, which nothing is taken from
            levels = np.append(levels, request.domain)
        nodes = paths[:, levels]
        first, end = self._directory.find(users, nodes, levels)
        bounds = np.broadcast_to(before[:, None], end.shape)
        end = lower_bound(self._directory.events, first, end, bounds)
        nothing = np.zeros_like(start)[:, None]
        runs = [Runs(self._directory.events, first, end, start[:, None])]
        everything = [Runs(None, nothing, before[:, None], start[:, None])]
        if appended.any():
            depth = None if request.is_filtered else request.k
            runs.append(self._appended.runs(users, nodes, levels.tolist(), appended, depth))
            everything.append(self._appended.all_of(users, appended, depth))
        return _Matches(runs, everything if request.fills else [])

    def _latest_time(self, user: int) -> int | None:
        latest = self._appended.last_time(user)
        if latest is not None or user >= len(self._offsets) - 1:
            return latest
        first, end = self._offsets[user], self._offsets[user + 1]
        return int(self._times[end - 1]) + self._first_time if first < end else None

    def _arrays(self) -> dict[str, NDArray]:
        directory = self._directory
        return {
            "keys": directory.keys,
            "starts": directory.starts,
            "events": directory.events,
            "offsets": self._offsets,
            "times": self._times,
        }


@dataclass(frozen=True)
class _Matches:
    """Runs that candidates match, each in parts: what the index was built of, what was appended.

    Attributes:
        runs: of shape (Q, J), a column a level; with a scope one more, the candidate's domain.
        everything: of shape (Q, 1), all events before the requests; empty where nothing fills.
    """

    runs: list[Runs]
    everything: list[Runs]

    def at(self, queries: Ints) -> "_Matches":
        """Return those of some of the queries."""
        parts = ([run[queries] for run in runs] for runs in (self.runs, self.everything))
        return _Matches(*parts)


def _latest(runs: Sequence[Runs], depth: int) -> Ints:
    """(Q, J, parts x depth) latest rows of every run, all parts of it."""
    return np.concatenate([run.latest(depth) for run in reversed(runs)], axis=2)


def _first(matches: _Matches, request: Request) -> Found:
    """Choose among the K latest events of every level.

    They suffice: what a lower level may hide of a run's latest K is as many events as were found.
    """
    rows = _latest(matches.runs, request.k)
    if matches.everything:
        rows = np.concatenate([rows, _latest(matches.everything, request.k)], axis=1)
    return choose_first(rows.reshape(len(rows), -1), _columns(rows, request), request.k)


def _columns(rows: Ints, request: Request) -> Ints:
    """Return the level of each column of collected rows, laid flat."""
    levels = np.append(request.levels, request.domain + 1)[: rows.shape[1]]
    return np.repeat(levels, rows.shape[2])


def _filtered(matches: _Matches, request: Request) -> Found:
    """Choose under quotas or a scope, which may leave out any number of a run's latest events.

    Runs are walked back as far as a query needs: again and deeper, until it has K events or nothing
    is left.
    """
    queries = np.arange(len(matches.runs[0].first))
    found = Found.nothing(len(queries), request.k)
    depth = request.k
    while len(queries):
        unfinished = []
        step = max(1, CELLS // (depth * (len(request.levels) + 1)))
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            mine = matches.at(part)
            rows, is_done = _walked(mine, request, depth)
            chosen = choose_first(rows.reshape(len(rows), -1), _columns(rows, request), request.k)
            found.events[part], found.levels[part] = chosen.events, chosen.levels
            unfinished.append(part[~is_done])
        queries = np.concatenate(unfinished)
        depth *= 4
    return found


def _walked(matches: _Matches, request: Request, depth: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Collect the events of each level that no lower one matches, within quotas and scope.

    Returns:
        (Q, J, depth) rows, -1 where one is left out; (Q,) bool, whether a deeper walk
        would find the same.
    """
    count = len(request.levels)
    levels = [[run[:, j] for run in matches.runs] for j in range(matches.runs[0].first.shape[1])]
    walks = [
        *levels[:count],
        *[[run[:, 0] for run in matches.everything]] * bool(matches.everything),
    ]
    caps = np.append(request.caps, request.k)
    all_rows, totals = [], np.zeros(len(matches.runs[0].first), np.int64)
    is_done, is_whole = np.zeros(len(totals), bool), np.ones(len(totals), bool)
    for j, walk in enumerate(walks):
        rows = _latest([run[:, None] for run in walk], depth)[:, 0]
        if len(walk) > 1:  # what was appended comes first, and is not all of it where it is long
            rows = -np.sort(-rows, axis=1)[:, :depth]
        kept = rows >= 0
        for lower in levels[: min(j, count)]:
            kept &= ~_contained(lower, rows)
        if request.in_domain:
            kept &= _contained(levels[-1], rows)
        kept &= kept.cumsum(axis=1) <= caps[j]
        here = kept.sum(axis=1)
        totals += np.where(is_whole, here, 0)
        is_done |= totals >= request.k
        exhausted = np.sum([run.lengths for run in walk], axis=0) <= depth
        is_whole &= exhausted | (here >= caps[j])
        all_rows.append(np.where(kept, rows, -1))
    return np.stack(all_rows, axis=1), is_done | is_whole


def _contained(runs: Sequence[Runs], rows: Ints) -> NDArray[np.bool_]:
    """Return which of the (Q, M) rows are in the run of their query, in any part of it."""
    return np.any([run[:, None].contain(rows) for run in runs], axis=0)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no hard index there; write one with HardIndex.save") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder}: a hard index of version {manifest.get('format_version')}, this package "
            f"reads {FORMAT_VERSION}; build it again"
        )
    return manifest


def _mapped(file: Path, size: int) -> NDArray:
    """Map an array; a view of its base class is several times faster to slice."""
    try:
        mapped = np.asarray(np.load(file, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: cannot be read as an array; build the index again") from error
    if mapped.shape != (size,):
        raise InputError(
            f"{file}: shape {mapped.shape}, {size} entries belong there; build it again"
        )
    return mapped
