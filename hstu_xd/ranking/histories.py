"""Find in every user's whole history what has to do with a candidate: exact, by level.

Of every level of the taxonomy there is one sorted array of (user, node, event). What a user did
with a node before an event is a slice of it, so that counting and finding are two binary searches.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.store import InteractionStore
from hstu_xd.data.taxonomy import NO_NODE, level_paths
from hstu_xd.errors import InputError, did_you_mean

_LAST = np.iinfo(np.int64).max
_DAY, _LONGEST = 86_400.0, 3_650.0


class Questions(NamedTuple):
    """Whose history is asked, of which item, strictly before when: (Q,) int64 each."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    times: NDArray[np.int64]


class HistoryIndex:
    """All histories of a store, sorted by every level of its taxonomy.

    Attributes:
        level_names: the item, the taxonomy's levels, and the domain where there is more than one.
        paths: (I + 1, H + 1) int64 node of every item id on each level; -1 where it has none.

    Args:
        store: the log.
    """

    def __init__(self, store: InteractionStore) -> None:
        item_domains = store.catalog.item_domains.numpy(force=True)
        self.level_names, self.paths = level_paths(store.taxonomy, item_domains, store.num_domains)
        self._items = np.asarray(store.item_ids).astype(np.int64)
        self._offsets, self._times = np.asarray(store.offsets), np.asarray(store.timestamps)
        self._events = max(1, len(self._items))
        self._users = np.repeat(np.arange(store.num_users), np.diff(self._offsets))
        self._strides = self.paths.max(axis=0) + 1
        self._sorted = [self._sort(level) for level in range(len(self.level_names))]
        span = int(self._times.max(initial=0)) + 2
        self._moments, self._span = self._users * span + self._times, span

    def _sort(self, level: int) -> NDArray[np.int64]:
        nodes = self.paths[self._items, level]
        there = np.flatnonzero(nodes != NO_NODE)
        keys = self._users[there] * self._strides[level] + nodes[there]
        packed = keys * self._events + there
        packed.sort()
        return packed

    def ends(self, asked: Questions) -> NDArray[np.int64]:
        """Return of each question the first event that is too late to be read: (Q,) int64."""
        times = np.clip(asked.times, 0, self._span - 1)
        found = np.searchsorted(self._moments, asked.users * self._span + times)
        return np.clip(found, self._offsets[asked.users], self._offsets[asked.users + 1])

    def counts(self, asked: Questions) -> NDArray[np.float32]:
        """Count what the user did with the candidate's node on each level, and how long ago.

        Returns:
            (Q, 2 (H + 1)) float32: log(1 + count) of each level, then of each how recent the last
            was: 1 a day ago, 0 ten years ago or never, on a scale of logarithms.
        """
        ends, levels = self.ends(asked), len(self.level_names)
        found = np.zeros((len(ends), 2 * levels), np.float32)
        for level in range(levels):
            low, high = self._slices(asked, ends, level)
            found[:, level] = np.log1p(high - low)
            met = np.flatnonzero(high > low)
            last = self._sorted[level][high[met] - 1] % self._events
            days = np.maximum(asked.times[met] - self._times[last], 1) / _DAY
            recency = np.log(_LONGEST / days) / np.log(_LONGEST)
            found[met, levels + level] = np.maximum(recency, 0)
        return found

    def recent(self, asked: Questions, k: int) -> NDArray[np.int64]:
        """Find the latest K events before each question, latest first: (Q, K) int64, -1 pads."""
        events = self.ends(asked)[:, None] - 1 - np.arange(k)
        return np.where(events >= self._offsets[asked.users][:, None], events, -1)

    def hard(
        self,
        asked: Questions,
        k: int,
        *,
        levels: tuple[str, ...] = (),
        skip_recent: int = 0,
        fill: bool = True,
    ) -> NDArray[np.int64]:
        """Find the K events nearest in the taxonomy, the latest of those of one level first.

        An event's level is the first, from the item on, whose node is the candidate's.

        Args:
            asked: the questions.
            k: how many.
            levels: that count; (): all.
            skip_recent: latest events that are left out.
            fill: whether the latest events follow where fewer match.

        Returns:
            (Q, K) int64; -1 pads.

        Raises:
            InputError: a level that is not there.
        """
        chosen = [self.level(name) for name in levels or self.level_names]
        starts = self._offsets[asked.users]
        ends = np.maximum(self.ends(asked) - skip_recent, starts)
        nodes = self.paths[asked.items]
        columns, back = [], np.arange(1, k + 1)
        for place, level in enumerate(sorted(chosen)):
            low, high = self._slices(asked, ends, level)
            rows = high[:, None] - back
            there = rows >= low[:, None]
            events = self._sorted[level][np.where(there, rows, 0)] % self._events
            for finer in sorted(chosen)[:place]:
                same = self.paths[self._items[events], finer] == nodes[:, finer, None]
                there &= ~same | (nodes[:, finer, None] == NO_NODE)
            columns.append(self._packed(place, events, there))
        if fill:
            events = ends[:, None] - back
            there = events >= starts[:, None]
            for level in chosen:
                same = self.paths[self._items[np.where(there, events, 0)], level]
                there &= (same != nodes[:, level, None]) | (same == NO_NODE)
            columns.append(self._packed(len(chosen), events, there))
        packed = np.sort(np.concatenate(columns, axis=1), axis=1)[:, :k]
        return np.where(packed == _LAST, -1, self._events - 1 - packed % self._events)

    def level(self, name: str) -> int:
        """Return the place of a level.

        Raises:
            InputError: there is no such level.
        """
        if name not in self.level_names:
            raise InputError(
                f"xd_search.levels names {name!r}; the store has {', '.join(self.level_names)}"
                + did_you_mean(name, self.level_names)
            )
        return self.level_names.index(name)

    def _packed(
        self, place: int, events: NDArray[np.int64], there: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        return np.where(there, (place + 1) * self._events - 1 - events, _LAST)

    def _slices(
        self, asked: Questions, ends: NDArray[np.int64], level: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the events of each question's node lie in a level: first, and end."""
        nodes = self.paths[asked.items, level]
        keys = (asked.users * self._strides[level] + nodes) * self._events
        low = np.searchsorted(self._sorted[level], keys)
        high = np.searchsorted(self._sorted[level], keys + ends)
        return low, np.where(nodes == NO_NODE, low, high)

    def read(self, events: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return item ids and times of events; of padding, -1, both are 0."""
        there = events >= 0
        places = np.where(there, events, 0)
        return self._items[places] * there, self._times[places] * there

    def lengths(self, asked: Questions) -> NDArray[np.int64]:
        """Return how many events each question may read: (Q,) int64."""
        return self.ends(asked) - self._offsets[asked.users]
