"""The histories of a store as a ranker asks them: by item and level, strictly before a time."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.store import InteractionStore
from hstu_xd.data.taxonomy import level_paths
from hstu_xd.errors import InputError, did_you_mean
from hstu_xd.search import HardIndex, search_recent
from hstu_xd.search.runs import lower_bound

_DAY, _LONGEST = 86_400.0, 3_650.0
# Bytes of an appended event beside its item and time: places in lists and in runs of nodes.
_APPENDED_BYTES = 100


class Questions(NamedTuple):
    """Whose history is asked, of which item, strictly before when: (Q,) int64 each."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    times: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Levels:
    """The levels at which events match a candidate, with the node of every item on each.

    Attributes:
        names: the item, the taxonomy's levels, and the domain where there is more than one.
        paths: (I + 1, H + 1) int64 node of every item id on each level; -1 where it has none.
        domains: (I + 1,) int64 domain of every item id; -1 of id 0, which is no item.
        num_domains: of the store.
    """

    names: tuple[str, ...]
    paths: NDArray[np.int64]
    domains: NDArray[np.int64]
    num_domains: int

    @classmethod
    def of(cls, store: InteractionStore) -> "Levels":
        """Return those of a store's items."""
        domains = store.catalog.item_domains.numpy(force=True).astype(np.int64)
        domains[:1] = -1
        paths = level_paths(store.taxonomy, domains, store.num_domains)
        return cls(*paths, domains, store.num_domains)

    @property
    def counts_width(self) -> int:
        """How many numbers :meth:`HistoryIndex.counts` gives."""
        return 2 * len(self.names)

    def searched(
        self, levels: tuple[str, ...], quotas: tuple[int, ...]
    ) -> tuple[list[int], dict[int, int]]:
        """Return the places of levels, (): of all, and the quotas of those that have one.

        Raises:
            InputError: a level that is not there, or quotas of another number of levels.
        """
        names = levels or self.names
        places = [self.place(name) for name in names]
        if quotas and len(quotas) != len(places):
            raise InputError(
                f"xd_search.quotas = {quotas!r} are {len(quotas)}; one for each of the "
                f"{len(places)} levels is needed: {', '.join(names)}"
            )
        return places, {place: most for place, most in zip(places, quotas) if most}

    def place(self, name: str) -> int:
        """Return the place of a level.

        Raises:
            InputError: there is no such level.
        """
        if name not in self.names:
            raise InputError(
                f"xd_search.levels names {name!r}; the store has {', '.join(self.names)}"
                + did_you_mean(name, self.names)
            )
        return self.names.index(name)


class HistoryIndex:
    """Histories of users, with a hard index of every level, which grow by appended events.

    Args:
        levels: at which events match.
        offsets: (B + 1,) integers, user ``b`` owns events ``offsets[b]:offsets[b + 1]``.
        items: (L,) integers, item ids.
        times: (L,) int64 seconds, ascending within a user.

    Attributes:
        levels: as given.
    """

    def __init__(self, levels: Levels, offsets: NDArray, items: NDArray, times: NDArray) -> None:
        self.levels = levels
        self._items = np.asarray(items).astype(np.int64)
        self._offsets, self._times = np.asarray(offsets), np.asarray(times)
        self._index = HardIndex.build(levels.paths[self._items], self._offsets, self._times)
        # Items and times of events that came later, in rows that double as they fill up.
        self._later = np.empty((2, 0), np.int64)
        self._later_of: Counter[int] = Counter()

    @classmethod
    def of(cls, store: InteractionStore) -> "HistoryIndex":
        """Index all histories of a store."""
        return cls(Levels.of(store), store.offsets, store.item_ids, store.timestamps)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all events, about."""
        built = self._index.nbytes + self._items.nbytes + self._times.nbytes
        return built + self._later.nbytes + _APPENDED_BYTES * self._later_of.total()

    def append(self, user: int, item: int, time: int) -> None:
        """Add an event that is not earlier than any of its user's.

        Args:
            user: number of the user, who may be new.
            item: item id.
            time: seconds.

        Raises:
            InputError: a time before the user's latest event.
        """
        place = self._index.append(user, self.levels.paths[item], time) - len(self._items)
        if place == self._later.shape[1]:
            self._later = np.concatenate([self._later, np.empty((2, max(64, place)), np.int64)], 1)
        self._later[:, place] = item, time
        self._later_of[user] += 1

    def counts(self, asked: Questions) -> NDArray[np.float32]:
        """Count what the user did with the candidate's node on each level, and how long ago.

        Returns:
            (Q, 2 (H + 1)) float32: log(1 + count) of each level, then of each how recent the last
            was: 1 a day ago, 0 ten years ago or never, on a scale of logarithms.
        """
        counts, latest = self._index.count(asked.users, self.levels.paths[asked.items], asked.times)
        days = np.maximum(asked.times[:, None] - self.read(latest)[1], 1) / _DAY
        recency = np.maximum(np.log(_LONGEST / days) / np.log(_LONGEST), 0)
        found = np.concatenate([np.log1p(counts), np.where(latest < 0, 0, recency)], axis=1)
        return found.astype(np.float32)

    def recent(self, asked: Questions, k: int) -> NDArray[np.int64]:
        """Find the latest K events before each question, latest first: (Q, K) int64, -1 pads."""
        if not self._later_of:
            return search_recent(self._offsets, self._times, asked.users, asked.times, k).events
        # No candidate: nothing matches, and the latest events fill up.
        nowhere = np.full((len(asked.users), len(self.levels.names)), -1)
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
        places, limits = self.levels.searched(levels, quotas)
        return self._index.search(
            asked.users,
            self.levels.paths[asked.items],
            asked.times,
            k,
            levels=places,
            quotas=limits,
            skip_recent=skip_recent,
            fill="recent" if fill else "none",
            scope="target_domain" if within_domain else "all",
        ).events

    def read(self, events: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return item ids and times of events; of padding, -1, both are 0."""
        there, before = events >= 0, len(self._items)
        if before and not self._later_of:
            places = np.where(there, events, 0)
            return self._items[places] * there, self._times[places] * there
        found = np.zeros((2, *events.shape), np.int64)
        late, built = events >= before, there & (events < before)
        found[:, built] = self._items[events[built]], self._times[events[built]]
        found[:, late] = self._later[:, events[late] - before]
        return found[0], found[1]

    def before(
        self, users: NDArray[np.int64], times: NDArray[np.int64], most: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find all events of users strictly before times, or the latest of them.

        Args:
            users: (R,) int64.
            times: (R,) int64.
            most: events of a history; None: all.

        Returns:
            The events, oldest first in each history, end to end: (L,) int64; the offsets of the
            histories in them: (R + 1,) int64.
        """
        if self._later_of:
            return self._before_with_later(users, times, most)
        lengths = self.lengths(Questions(users, np.zeros_like(users), times))
        ends = self._offsets[users] + lengths
        kept = lengths if most is None else np.minimum(lengths, most)
        offsets = np.concatenate([[0], np.cumsum(kept)])
        return np.arange(offsets[-1]) + np.repeat(ends - kept - offsets[:-1], kept), offsets

    def _before_with_later(
        self, users: NDArray[np.int64], times: NDArray[np.int64], most: int | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        known = len(self._offsets) - 1
        longest = 1
        for user in users.tolist():
            own = int(np.diff(self._offsets[user : user + 2])[0]) if user < known else 0
            longest = max(longest, own + self._later_of[user])
        longest = longest if most is None else min(longest, most)
        found = self.recent(Questions(users, np.zeros_like(users), times), longest)[:, ::-1]
        there = found >= 0
        return found[there], np.concatenate([[0], np.cumsum(there.sum(1))])

    def lengths(self, asked: Questions) -> NDArray[np.int64]:
        """Return how many events of the log itself each question may read: (Q,) int64."""
        first, end = self._offsets[asked.users], self._offsets[asked.users + 1]
        return lower_bound(self._times, first, end, asked.times) - first
