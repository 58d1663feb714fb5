"""A ranker that answers requests while events come in, as it would have been asked offline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError, did_you_mean
from hstu_xd.evaluation.protocol import RANKING
from hstu_xd.ranking.batches import RequestData
from hstu_xd.ranking.histories import HistoryIndex
from hstu_xd.ranking.model import Ranker
from hstu_xd.ranking.run import open_store, with_weights
from hstu_xd.ranking.settings import RankingSettings, load_ranking_settings
from hstu_xd.ranking.task import training_events
from hstu_xd.training.run_facts import CONFIG_FILE, read_run_of


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


class RankingSession:
    """Ranks candidates over histories that grow.

    Example:
        >>> session = RankingSession.open(Path("runs/hard"))  # doctest: +SKIP
        >>> session.append("u17", "shampoo", 1_700_000_000)  # doctest: +SKIP
        >>> session.rank([RankRequest("u17", ["soap", "pear"], "deal=true")])  # doctest: +SKIP
        [[0.41, 0.07]]

    Args:
        store: the log that is known at the beginning.
        model: in evaluation mode, of the store's items.
        index: of the store's histories; later events go there.
        goals: names, in the model's order.
        settings: of the model.

    Attributes:
        goals: as given.
    """

    def __init__(
        self,
        store: InteractionStore,
        model: Ranker,
        index: HistoryIndex,
        goals: Sequence[str],
        settings: RankingSettings,
    ) -> None:
        self.goals = tuple(goals)
        self._store, self._model, self._index, self._settings = store, model, index, settings
        catalog = store.catalog
        self._items = {catalog.token(i): i for i in range(1, store.num_items + 1)}
        self._new_users: dict[str, int] = {}
        self._latest: dict[str, int] = {}

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
        facts, settings = read_run_of(RANKING, run), load_ranking_settings([run / CONFIG_FILE])
        store = open_store(run, data, verify=verify)
        index = HistoryIndex(store)
        trained = training_events(store, facts["trained_before"])
        model = Ranker.of(index, trained, len(facts["goals"]), settings)
        return cls(store, with_weights(model, run), index, facts["goals"], settings)

    def append(self, user: str, item: str, timestamp: int) -> None:
        """Take an event, which requests after its time read.

        Args:
            user: name, which may be new.
            item: name of an item of the catalogue.
            timestamp: seconds, not before the user's latest event.

        Raises:
            InputError: an unknown item, or a time before the user's latest event.
        """
        item_id, latest = self._item(item), self.latest_time(user)
        if latest is not None and timestamp < latest:
            raise InputError(
                f"timestamp {timestamp} is before the last event of user {user!r} at {latest}; "
                "events of a user come in the order of time"
            )
        number = self._number_of(user)
        if number is None:
            number = self._store.num_users + len(self._new_users)
            self._new_users[user] = number
        self._index.append(number, item_id, timestamp)
        self._latest[user] = timestamp

    def latest_time(self, user: str) -> int | None:
        """Return the time of a user's latest event; None where there is none."""
        if user in self._latest:
            return self._latest[user]
        number = self._store.find_user(user)
        if number is None:
            return None
        times = self._store.history(number)[1]
        return int(times[-1]) if len(times) else None

    @torch.no_grad()
    def rank(self, requests: Sequence[RankRequest]) -> list[list[float]]:
        """Return the chance that each candidate is taken, in the order of the candidates.

        Raises:
            InputError: a request without candidates, an unknown candidate or goal.
        """
        if not requests:
            return []
        asked = self._translated(requests)
        batch = RequestData(self._index, asked, self._settings).batch(np.arange(len(requests)))
        chances = self._model(batch)[batch.mask].double().sigmoid().numpy()
        return [part.tolist() for part in np.split(chances, asked.offsets[1:-1])]

    def _translated(self, requests: Sequence[RankRequest]) -> RequestSet:
        users, times, goals = [], [], []
        candidates = [[self._item(name) for name in each.candidates] for each in requests]
        for request, items in zip(requests, candidates, strict=True):
            if not items:
                raise InputError(f"the request for user {request.user!r} names no candidates")
            number, time, latest = (
                self._number_of(request.user),
                request.timestamp,
                self.latest_time(request.user),
            )
            if number is None:  # anybody's history before the first event of the log is empty
                number, time, latest = 0, self._index.first_time, None
            users.append(number)
            times.append(time if time is not None else (latest or 0) + 1)
            goals.append(self._goal(request.goal))
        sizes = np.array([len(items) for items in candidates])
        flat = np.concatenate([np.array(items, np.int64) for items in candidates])
        return RequestSet(
            users=np.array(users, np.int64),
            times=np.array(times, np.int64),
            goals=np.array(goals, np.int64),
            splits=np.zeros(len(requests), np.int8),
            offsets=np.concatenate([[0], np.cumsum(sizes)]),
            candidates=flat,
            labels=np.zeros(len(flat), np.float32),
            goal_names=self.goals,
        )

    def _number_of(self, user: str) -> int | None:
        found = self._new_users.get(user)
        return self._store.find_user(user) if found is None else found

    def _item(self, name: str) -> int:
        found = self._items.get(name)
        if found is None:
            raise InputError(
                f"unknown item {name!r}; take one of the {len(self._items):,} items of the "
                "catalogue the model was trained on"
            )
        return found

    def _goal(self, name: str | None) -> int:
        if name is None and len(self.goals) == 1:
            return 0
        if name not in self.goals:
            told = "no goal is named" if name is None else f"unknown goal {name!r}"
            hint = "" if name is None else did_you_mean(name, self.goals)
            raise InputError(f"{told}; the model has {', '.join(self.goals)}{hint}")
        return self.goals.index(name)
