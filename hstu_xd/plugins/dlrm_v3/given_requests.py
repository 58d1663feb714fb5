"""Requests that ``hstu-xd requests`` has made, as the production path reads them.

Their candidates and what was taken of them are given, and so is the goal that each was made for.
Goals become a contextual feature, and the actions of history rows: which goal an event served.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_xd.data.batches import Split
from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.ranking import Grouping, ScoredRows
from hstu_xd.plugins.dlrm_v3.requests import RequestBatch
from hstu_xd.ranking.histories import HistoryIndex, Questions
from hstu_xd.ranking.settings import SearchSettings

# Upstream tells actions by the bits of an int64 and embeds each.
_MOST_GOALS = 32


class GivenRequests:
    """Requests of a store with their candidates, those of evaluation after all those of training.

    A request shows events strictly before its time: the latest ones, or under hard search those
    that are found for any of its candidates; in both cases at most the latest ``max_history`` of
    these. What is found depends on all candidates, so a score moves when others are replaced.

    Args:
        store: the log.
        given: made of it.
        split: that evaluation reads, "valid" or "test".
        max_history: most events that a request shows.
        search: of kind "recent", or "hard" with ``k`` events a candidate.

    Attributes:
        store: as given.
        num_train: requests ``0..num_train - 1`` are of training.
        goal_names: of the goals.
        max_candidates: most candidates of a request.

    Raises:
        InputError: too many goals, soft search, or a level that the store does not have.
    """

    def __init__(
        self,
        store: InteractionStore,
        given: RequestSet,
        *,
        split: str,
        max_history: int,
        search: SearchSettings,
    ) -> None:
        self.store, self.goal_names = store, given.goal_names
        if len(self.goal_names) > _MOST_GOALS:
            raise InputError(
                f"the requests have {len(self.goal_names)} goals; the production path tells up to "
                f"{_MOST_GOALS} apart"
            )
        if search.soft != "none":
            raise InputError(
                f"xd_search.soft = {search.soft!r}: the host dlrm_v3 has hard search only; remove "
                "the binding"
            )
        self._given, self._max_history, self._search = given, max_history, search
        self._index = HistoryIndex.of(store)
        self._index.levels.searched(search.levels, search.quotas)
        train, evaluated = given.of_split(Split.TRAIN), given.of_split(Split(split))
        self._numbers, self.num_train = np.concatenate([train, evaluated]), train.size
        self.max_candidates = int(np.diff(given.offsets).max())
        self._actions = _actions(store, given)

    def __len__(self) -> int:
        return self._numbers.size

    def batch(self, requests: NDArray[np.int64]) -> RequestBatch:
        """Read requests by their numbers: (B,) int64."""
        given, domains = self._given, self.store.catalog.item_domains
        numbers = self._numbers[requests]
        rows, widths = given.rows(numbers), np.diff(given.offsets)[numbers]
        events, lengths = self._events(numbers, rows, widths)
        items, times = map(torch.from_numpy, self._index.read(events))
        candidates = torch.from_numpy(given.candidates[rows])
        goals = torch.from_numpy(given.goals[numbers]) if len(self.goal_names) > 1 else None
        return RequestBatch(
            users=torch.from_numpy(given.users[numbers]),
            history_lengths=torch.from_numpy(lengths),
            items=items,
            times=times,
            domains=domains[items],
            candidate_lengths=torch.from_numpy(widths),
            candidates=candidates,
            candidate_domains=domains[candidates],
            request_times=torch.from_numpy(np.repeat(given.times[numbers], widths)),
            labels=torch.from_numpy(given.labels[rows].astype(np.int64)),
            actions=torch.from_numpy(self._actions[events]),
            goals=goals,
        )

    def evaluated(self) -> NDArray[np.int64]:
        """Return the numbers of the requests of evaluation."""
        return np.arange(self.num_train, len(self))

    def scored(self, scores: NDArray[np.float64]) -> tuple[ScoredRows, list[Grouping]]:
        """Put the scores of all candidates of evaluation beside what was taken.

        Returns:
            The rows, and how they are grouped: by goal, and by the candidate's domain.
        """
        given, numbers = self._given, self._numbers[self.num_train :]
        rows, widths = given.rows(numbers), np.diff(given.offsets)[numbers]
        domains = self.store.catalog.item_domains.numpy()[given.candidates[rows]]
        of_requests = np.repeat(numbers, widths)
        groupings: list[Grouping] = [(self.store.domain_names, domains)]
        if len(self.goal_names) > 1:
            groupings.append((self.goal_names, given.goals[of_requests]))
        users = given.users[of_requests]
        return ScoredRows(scores, given.labels[rows], of_requests, users), groupings

    def _events(
        self, numbers: NDArray[np.int64], rows: NDArray[np.int64], widths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the events that each request shows: rows of the store (L,), lengths (B,)."""
        given, search = self._given, self._search
        users, times = given.users[numbers], given.times[numbers]
        if search.kind == "recent":
            asked = Questions(users, np.zeros_like(users), times)
            found = self._index.recent(asked, self._max_history)[:, ::-1]
            return found[found >= 0], (found >= 0).sum(1)
        found = self._index.hard(
            Questions(np.repeat(users, widths), given.candidates[rows], np.repeat(times, widths)),
            search.k,
            levels=search.levels,
            quotas=search.quotas,
            skip_recent=search.skip_recent,
            fill=search.fill,
            within_domain=search.scope == "target_domain",
        )
        request = np.repeat(np.arange(len(numbers)), widths)
        pairs = np.stack([np.broadcast_to(request[:, None], found.shape), found])
        # Events of a user ascend in time, and several candidates may find the same.
        request, events = np.unique(pairs[:, found >= 0], axis=1)
        behind = np.searchsorted(request, request, side="right") - np.arange(len(request))
        kept = behind <= self._max_history
        return events[kept], np.bincount(request[kept], minlength=len(numbers))


def _actions(store: InteractionStore, given: RequestSet) -> NDArray[np.int64]:
    """Return a bit of each event's goal: (L,) int64; 0 where its field has no value."""
    field = given.manifest["options"]["goal"]
    if field is None:
        return np.ones(store.num_interactions, np.int64)
    codes = store.fields.of(field, "--goal")[0].astype(np.int64)
    return np.where(codes > 0, 1 << np.maximum(codes - 1, 0), 0)
