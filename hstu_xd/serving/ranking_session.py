"""A ranker that answers requests while events come in, as it would have been asked offline."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.ranking.batches import RequestBatch, RequestData, joined
from hstu_xd.ranking.histories import HistoryIndex
from hstu_xd.ranking.run import ServedRanker, open_store
from hstu_xd.serving.items import Items
from hstu_xd.serving.state import StateCache
from hstu_xd.serving.stored_states import Versions

# All events of a user that were appended so far, oldest first: item ids and times.
History = Callable[[str], tuple[ArrayLike, ArrayLike]]


@dataclass(frozen=True)
class RankRequest:
    """Candidates to be ranked for a user, all by their names in the log.

    Attributes:
        user: who is asked for; one without an event has no history.
        candidates: items.
        goal: what is wanted of them; None: the only goal of the model.
        timestamp: of the request, in seconds; events at or after it are not read. None: right
            after the user's latest event.
    """

    user: str
    candidates: Sequence[str]
    goal: str | None = None
    timestamp: int | None = None


@dataclass
class _State:
    """A user's history, sorted for search.

    Attributes:
        index: of this user alone, who has number 0.
        last_time: of the latest event; None without events.
        version: of the history that it was made of; empty where histories have no versions.
    """

    index: HistoryIndex
    last_time: int | None
    version: bytes

    @property
    def num_bytes(self) -> int:
        """Count the bytes of the index."""
        return self.index.num_bytes


class RankingSession:
    """Ranks candidates over histories that grow.

    The history of a user is sorted when it is first asked for, and kept; an event that comes later
    is one push a level. So a session opens at once, however long the log is.

    Example:
        >>> session = RankingSession.open(Path("runs/hard"))  # doctest: +SKIP
        >>> session.append(["u17"], ["shampoo"], [1_700_000_000])  # doctest: +SKIP
        >>> session.rank([RankRequest("u17", ["soap", "pear"], "deal=true")])  # doctest: +SKIP
        [[0.41, 0.07]]

    Args:
        ranker: the model and what belongs to it.
        history: how to get the events of a user who has no state, from the first one on; it is
            called before an ``append`` takes its events, so it must not include them yet.
        versions: of these histories; a state of another version is not used but made anew. With
            them an ``append`` changes the states in memory alone, as ``history`` has the events of
            the others soon.
        max_bytes: bound on all states; the least recently used users are dropped beyond it.
            Without ``versions`` events that were appended would be lost with them.

    Attributes:
        goals: names, in the model's order.
    """

    def __init__(
        self,
        ranker: ServedRanker,
        history: History,
        *,
        versions: Versions | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.goals = ranker.goals
        self._ranker, self._items = ranker, Items(ranker.catalog)
        self._history, self._versions = history, versions
        self._cache: StateCache[_State] = StateCache(max_bytes)

    @classmethod
    def open(cls, run: Path, data: Path | None = None, *, verify: bool = False) -> "RankingSession":
        """Load the best ranker of a run, with the histories of its store.

        Args:
            run: a folder written by ``hstu-xd rank``.
            data: a store with the same items and levels, such as one with newer events; None: the
                run's own.
            verify: compare the hash of every file of the store with its manifest first.

        Raises:
            InputError: not a ranking run, or the store does not fit.
        """
        store = open_store(run, data, verify=verify)
        return cls(ServedRanker.of(run, store), history_of(store))

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all histories in memory, about."""
        return self._cache.num_bytes

    def append(self, users: Sequence[str], items: Sequence[str], timestamps: Sequence[int]) -> None:
        """Take events in the order given, which requests after their times read.

        Args:
            users: names, which may be new.
            items: name of each event's item, of the catalogue.
            timestamps: seconds of each event, not before the same user's latest one.

        Raises:
            InputError: lengths that differ, an unknown item, or a time before the user's latest
                event; nothing has changed then.
        """
        if not len(users) == len(items) == len(timestamps):
            raise InputError(
                f"{len(users)} users, {len(items)} items and {len(timestamps)} timestamps; one of "
                "each an event is needed"
            )
        item_ids = [self._items.id_of(item) for item in items]
        arriving: dict[str, list[tuple[int, int]]] = {}
        for user, item, timestamp in zip(users, item_ids, timestamps):
            arriving.setdefault(user, []).append((item, timestamp))
        states = {user: self._kept(user) for user in arriving}
        for user, events in arriving.items():
            if states[user] is None and self._versions is None:
                states[user] = self._made(user, b"")
            _check_order(user, states[user], events)
        for user, state in states.items():
            if state is not None:
                self._extend(user, state, arriving[user])
        self._cache.shrink()

    def latest_time(self, user: str) -> int | None:
        """Return the time of a user's latest event; None where there is none."""
        return self._state(user).last_time

    def rank(self, requests: Sequence[RankRequest]) -> list[list[float]]:
        """Return the chance that each candidate is taken, in the order of the candidates.

        Raises:
            InputError: a request without candidates, an unknown candidate or goal.
        """
        return self.chances([self.batch(request) for request in requests])

    def batch(self, request: RankRequest) -> RequestBatch:
        """Find what the model reads for a request.

        Raises:
            InputError: as :meth:`rank`.
        """
        if not request.candidates:
            raise InputError(f"the request for user {request.user!r} names no candidates")
        candidates = np.array([self._items.id_of(name) for name in request.candidates])
        return self._batch(request.user, candidates, request.goal, request.timestamp)

    def read(self, user: str, goal: str | None, timestamp: int | None) -> RequestBatch:
        """Find what the model reads for a user without candidates, as towers do.

        Raises:
            InputError: an unknown goal.
        """
        return self._batch(user, np.empty(0, np.int64), goal, timestamp)

    def seen(self, user: str, timestamp: int | None = None) -> Tensor:
        """Return the items of a user's events before a time: (n,) int64."""
        state = self._state(user)
        at = np.array([_time_of(state, timestamp)])
        events, _ = state.index.before(np.zeros(1, np.int64), at)
        return torch.from_numpy(state.index.read(events)[0])

    def _batch(
        self, user: str, candidates: NDArray[np.int64], goal_name: str | None, timestamp: int | None
    ) -> RequestBatch:
        goal, state = self._ranker.goal(goal_name), self._state(user)
        time = _time_of(state, timestamp)
        asked = RequestSet.unanswered(np.array([time], np.int64), goal, self.goals, candidates)
        return RequestData(state.index, asked, self._ranker.settings).batch(np.zeros(1, np.int64))

    @torch.no_grad()
    def chances(self, batches: Sequence[RequestBatch]) -> list[list[float]]:
        """Return what :meth:`rank` returns of requests, each as :meth:`batch` has made it."""
        self._cache.shrink()
        if not batches:
            return []
        batch = joined(batches)
        chances = self._ranker.model(batch)[batch.mask].double().sigmoid()
        return [part.tolist() for part in chances.split(batch.mask.sum(1).tolist())]

    def forget(self, user: str) -> bool:
        """Drop what is kept of a user; returns whether anything was."""
        return self._cache.drop(user)

    def release(self, users: Iterable[str]) -> None:
        """Let go of states: the next call makes them anew of the histories."""
        for user in users:
            self._cache.drop(user)

    def _state(self, user: str) -> _State:
        """Return a user's state, made if there is none; of unknown users none are kept."""
        state = self._kept(user)
        if state is None:
            version = b"" if self._versions is None else self._versions.present(user)
            state = self._made(user, version)
            if state.last_time is not None:
                self._cache.keep(user, state)
        return state

    def _kept(self, user: str) -> _State | None:
        """Return what is kept of a user, unless it is of another version."""
        state = self._cache.get(user)
        if state is None or self._versions is None:
            return state
        if state.version != self._versions.present(user):
            self._cache.drop(user)
            return None
        return state

    def _made(self, user: str, version: bytes) -> _State:
        items, times = (np.asarray(column, np.int64) for column in self._history(user))
        index = HistoryIndex(self._ranker.levels, np.array([0, len(items)]), items, times)
        return _State(index, int(times[-1]) if len(times) else None, version)

    def _extend(self, user: str, state: _State, events: Sequence[tuple[int, int]]) -> None:
        for item, time in events:
            state.index.append(0, item, time)
            state.last_time = time
        if self._versions is not None:
            state.version = self._versions.following(user)
        self._cache.keep(user, state)


def history_of(store: InteractionStore) -> History:
    """Return how to get the histories of a store; that of an unknown user is empty."""

    def history(user: str) -> tuple[ArrayLike, ArrayLike]:
        number = store.find_user(user)
        return ((), ()) if number is None else store.history(number)

    return history


def _time_of(state: _State, timestamp: int | None) -> int:
    """Return the time of a request: right after the user's latest event, unless it is given."""
    return (state.last_time or 0) + 1 if timestamp is None else timestamp


def _check_order(user: str, state: _State | None, events: Sequence[tuple[int, int]]) -> None:
    """Refuse events that go back in time."""
    latest = None if state is None else state.last_time
    for _, time in events:
        if latest is not None and time < latest:
            raise InputError(
                f"timestamp {time} is before the last event of user {user!r} at {latest}; "
                "events of a user come in the order of time"
            )
        latest = time
