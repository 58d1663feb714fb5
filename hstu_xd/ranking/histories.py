"""The histories of a store as a ranker asks them: by item and level, strictly before a time."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.store import InteractionStore
from hstu_xd.data.taxonomy import level_paths
from hstu_xd.errors import InputError, did_you_mean
from hstu_xd.search import HardIndex, search_recent
from hstu_xd.search.runs import lower_bound

_DAY, _LONGEST = 86_400.0, 3_650.0


class Questions(NamedTuple):
    """Whose history is asked, of which item, strictly before when: (Q,) int64 each."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    times: NDArray[np.int64]


class HistoryIndex:
    """All histories of a store, with a hard index of every level of its taxonomy.

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
        self._index = HardIndex.build(self.paths[self._items], self._offsets, self._times)
        # Items and times of events that came later, in rows that double as they fill up.
        self._later = np.empty((2, 0), np.int64)
        self._later_of: Counter[int] = Counter()

    @property
    def first_time(self) -> int:
        """Time of the log's first event: nobody has one before it."""
        return int(self._times.min(initial=np.iinfo(np.int64).max))

    def append(self, user: int, item: int, time: int) -> None:
        """Add an event that is not earlier than any of its user's.

        Args:
            user: number of the user, who may be new.
            item: item id.
            time: seconds.

        Raises:
            InputError: a time before the user's latest event.
        """
        place = self._index.append(user, self.paths[item], time) - len(self._items)
        if place == self._later.shape[1]:
            self._later = np.concatenate([self._later, np.empty((2, max(64, place)), np.int64)], 1)
        self._later[:, place] = item, time
        self._later_of[user] += 1

    @property
    def counts_width(self) -> int:
        """How many numbers :meth:`counts` gives."""
        return 2 * len(self.level_names)

    def counts(self, asked: Questions) -> NDArray[np.float32]:
        """Count what the user did with the candidate's node on each level, and how long ago.

        Returns:
            (Q, 2 (H + 1)) float32: log(1 + count) of each level, then of each how recent the last
            was: 1 a day ago, 0 ten years ago or never, on a scale of logarithms.
        """
        counts, latest = self._index.count(asked.users, self.paths[asked.items], asked.times)
        days = np.maximum(asked.times[:, None] - self.read(latest)[1], 1) / _DAY
        recency = np.maximum(np.log(_LONGEST / days) / np.log(_LONGEST), 0)
        found = np.concatenate([np.log1p(counts), np.where(latest < 0, 0, recency)], axis=1)
        return found.astype(np.float32)

    def recent(self, asked: Questions, k: int) -> NDArray[np.int64]:
        """Find the latest K events before each question, latest first: (Q, K) int64, -1 pads."""
        if not self._later_of:
            return search_recent(self._offsets, self._times, asked.users, asked.times, k).events
        # No candidate: nothing matches, and the latest events fill up.
        nowhere = np.full((len(asked.users), len(self.level_names)), -1)
        found = self._index.search(asked.users, nowhere, asked.times, k, levels=[0], fill="recent")
        return found.events

    def hard(
        self,
        asked: Questions,
        k: int,
        *,
        levels: tuple[str, ...] = (),
        quotas: tuple[int, ...] = (),
        skip_recent: int = 0,
        fill: bool = True,
        within_domain: bool = False,
    ) -> NDArray[np.int64]:
        """Find the K events nearest in the taxonomy, see :meth:`HardIndex.search`.

        Args:
            asked: the questions.
            k: how many.
            levels: names of those that count; (): all.
            quotas: most events of each of these; 0: any number; (): no level has one.
            skip_recent: latest events that are left out.
            fill: whether the latest events follow where fewer match.
            within_domain: whether events of other domains than the candidate's are left out.

        Returns:
            (Q, K) int64; -1 pads.

        Raises:
            InputError: a level that is not there, or quotas of another number of levels.
        """
        places, limits = self.searched(levels, quotas)
        return self._index.search(
            asked.users,
            self.paths[asked.items],
            asked.times,
            k,
            levels=places,
            quotas=limits,
            skip_recent=skip_recent,
            fill="recent" if fill else "none",
            scope="target_domain" if within_domain else "all",
        ).events

    def searched(
        self, levels: tuple[str, ...], quotas: tuple[int, ...]
    ) -> tuple[list[int], dict[int, int]]:
        """Return the places of levels, (): of all, and the quotas of those that have one.

        Raises:
            InputError: a level that is not there, or quotas of another number of levels.
        """
        names = levels or self.level_names
        places = [self.level(name) for name in names]
        if quotas and len(quotas) != len(places):
            raise InputError(
                f"xd_search.quotas = {quotas!r} are {len(quotas)}; one for each of the "
                f"{len(places)} levels is needed: {', '.join(names)}"
            )
        return places, {place: most for place, most in zip(places, quotas) if most}

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

    def read(self, events: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return item ids and times of events; of padding, -1, both are 0."""
        there = events >= 0
        places = np.where(there, events, 0)
        if not self._later_of:
            return self._items[places] * there, self._times[places] * there
        before = len(self._items)
        late, places = places >= before, np.where(places >= before, 0, places)
        items, times = self._later[:, np.where(late, events - before, 0)]
        return (
            np.where(late, items, self._items[places]) * there,
            np.where(late, times, self._times[places]) * there,
        )

    def before(
        self, users: NDArray[np.int64], times: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find all events of users strictly before times.

        Args:
            users: (R,) int64.
            times: (R,) int64.

        Returns:
            The events, oldest first in each history, end to end: (L,) int64; the offsets of the
            histories in them: (R + 1,) int64.
        """
        if self._later_of:
            return self._before_with_later(users, times)
        first = self._offsets[users]
        lengths = self.lengths(Questions(users, np.zeros_like(users), times))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], lengths), offsets

    def _before_with_later(
        self, users: NDArray[np.int64], times: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        known = len(self._offsets) - 1
        longest = 1
        for user in users.tolist():
            own = int(np.diff(self._offsets[user : user + 2])[0]) if user < known else 0
            longest = max(longest, own + self._later_of[user])
        found = self.recent(Questions(users, np.zeros_like(users), times), longest)[:, ::-1]
        there = found >= 0
        return found[there], np.concatenate([[0], np.cumsum(there.sum(1))])

    def lengths(self, asked: Questions) -> NDArray[np.int64]:
        """Return how many events of the log itself each question may read: (Q,) int64."""
        first, end = self._offsets[asked.users], self._offsets[asked.users + 1]
        return lower_bound(self._times, first, end, asked.times) - first
