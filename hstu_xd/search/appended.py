"""Events that came after a hard index was built: per level one push into the run of a node."""

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from hstu_xd.search.runs import Ints, Runs

# What stands after all rows of a log.
_NO_ROW = np.iinfo(np.int64).max


def _rows() -> "array[int]":
    return array("q")


class AppendedEvents:
    """Appended events of users, each later than all that the user had before.

    Args:
        first_row: row of the first appended event; the others count on, whoever they are of.
    """

    def __init__(self, first_row: int) -> None:
        self._next_row = first_row
        self._times: dict[int, list[int]] = {}
        self._rows: dict[int, array[int]] = defaultdict(_rows)
        self._runs: dict[tuple[int, int, int], array[int]] = defaultdict(_rows)

    def __len__(self) -> int:
        return sum(map(len, self._times.values()))

    @property
    def num_users(self) -> int:
        """Return one more than the largest user that has an appended event."""
        return max(self._times, default=-1) + 1

    def last_time(self, user: int) -> int | None:
        """Return the time of a user's latest appended event, if there is one."""
        return self._times[user][-1] if user in self._times else None

    def push(self, user: int, path: Sequence[int], time: int) -> int:
        """Add an event, which the caller has checked, and return its row."""
        row = self._next_row
        self._next_row += 1
        self._times.setdefault(user, []).append(time)
        self._rows[user].append(row)
        for level, node in enumerate(path):
            if node >= 0:
                self._runs[level, node, user].append(row)
        return row

    def count_before(self, users: Ints, times: Ints) -> Ints:
        """Return how many appended events each user has strictly before a time: (Q,) int64."""
        mine = self._times
        if not mine:
            return np.zeros_like(users)
        pairs = zip(users.tolist(), times.tolist())
        return np.array([bisect_left(mine.get(user, ()), time) for user, time in pairs], np.int64)

    def runs(
        self, users: Ints, nodes: Ints, levels: Sequence[int], counts: Ints, depth: int | None
    ) -> Runs:
        """Return the appended part of the runs of users' nodes.

        Args:
            users: (Q,) int64.
            nodes: (Q, J) int64, a node of each level.
            levels: J levels.
            counts: (Q,) int64; of a user's appended events the first so many count.
            depth: rows of a run that are wanted, the latest; None: all of them.

        Returns:
            Of shape (Q, J).
        """
        wanted = (
            (self._runs.get((level, node, user)) if node >= 0 else None, bound)
            for user, path, bound in zip(users.tolist(), nodes.tolist(), self._ends(users, counts))
            for level, node in zip(levels, path)
        )
        return _laid_out(wanted, (len(users), len(levels)), depth)

    def all_of(self, users: Ints, counts: Ints, depth: int | None) -> Runs:
        """Return the first ``counts`` appended events of each user, all nodes: of shape (Q, 1)."""
        wanted = zip(map(self._rows.get, users.tolist()), self._ends(users, counts))
        return _laid_out(wanted, (len(users), 1), depth)

    def _ends(self, users: Ints, counts: Ints) -> list[int]:
        """Return the row before which a user's first so many appended events stand."""
        mine: dict[int, array[int]] = self._rows
        pairs = (
            (mine.get(user, ()), count) for user, count in zip(users.tolist(), counts.tolist())
        )
        return [rows[count] if count < len(rows) else _NO_ROW for rows, count in pairs]


def _laid_out(
    wanted: "Iterable[tuple[array[int] | None, int]]", shape: tuple[int, int], depth: int | None
) -> Runs:
    """Copy the wanted part of some runs, up to a row each, into one array."""
    values, ends = _rows(), [0]
    for rows, bound in wanted:
        if rows:
            end = bisect_left(rows, bound)
            values.extend(rows[0 if depth is None else max(0, end - depth) : end])
        ends.append(len(values))
    places = np.array(ends)
    flat = np.frombuffer(values, np.int64) if values else np.zeros(0, np.int64)
    return Runs(
        flat, places[:-1].reshape(shape), places[1:].reshape(shape), np.zeros(shape, np.int64)
    )
