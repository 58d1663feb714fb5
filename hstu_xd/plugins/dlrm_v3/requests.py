"""Ranking requests of a prepared store: histories, the true next item, and drawn candidates."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_xd.data.cuts import TimeCuts, events_before
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.plugins.bridge import draw_places

_logger = logging.getLogger(__name__)

# Events of a user that evaluation keeps from training: the last is "test", the one before "valid".
_HELD_OUT = {"valid": 2, "test": 1}


@dataclass(frozen=True, eq=False)
class RequestBatch:
    """Requests of several users, their histories and candidates one after the other.

    Attributes:
        users: (B,) int64, number of each request's user.
        history_lengths: (B,) int64.
        items, times, domains: (sum of the lengths,) int64, of the histories, oldest first.
        candidate_lengths: (B,) int64.
        candidates, candidate_domains: int64; the true next item comes first in each request.
        request_times: int64, when the true next event took place, for every candidate.
        labels: int64, 1 for the true next item, or what was taken, and 0 for the others.
        actions: (sum of the lengths,) int64, bits of what an event of a history was.
        goals: (B,) int64; None where there is one goal.
    """

    users: Tensor
    history_lengths: Tensor
    items: Tensor
    times: Tensor
    domains: Tensor
    candidate_lengths: Tensor
    candidates: Tensor
    candidate_domains: Tensor
    request_times: Tensor
    labels: Tensor
    actions: Tensor
    goals: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EvaluatedRequests:
    """The requests of evaluation, Q of them.

    Attributes:
        numbers: (Q,) int64, of the requests.
        users: (Q,) int64.
        places: (Q,) int64, row of the store that each request asks for.
        domains: (Q,) int64, domain that each request asks for.
        switched: (Q,) bool, whether it differs from that of the event before.
    """

    numbers: NDArray[np.int64]
    users: NDArray[np.int64]
    places: NDArray[np.int64]
    domains: Tensor
    switched: Tensor


class StoreRequests:
    """Several requests of every user, those of evaluation after all those of training.

    A request asks for one event of a user: it shows the events before it, at most the latest
    ``max_history``, and candidates of the event's domain. Training asks for all events of a user
    but the last two, evaluation for one of those two. Where the log is cut in time, training asks
    for all events before validation begins, and evaluation for the last event of its period.
    Candidates are drawn uniformly, the same ones every time in evaluation, new ones every time in
    training.

    Args:
        store: prepared by ``hstu-xd prepare``.
        split: "valid" or "test".
        max_history: longest history.
        cut_points: latest events of a user that training asks for; 0: all.
        num_candidates: the true item and the drawn ones together.
        seed: of the candidates in evaluation; those of training are PyTorch's.
        cuts: where the log is cut in time; None: leave-one-out.

    Attributes:
        num_train: requests ``0..num_train - 1`` are of training.
        max_candidates: of a request.
        goal_names: one.

    Raises:
        InputError: no user has enough events.
    """

    goal_names = ("next",)

    def __init__(
        self,
        store: InteractionStore,
        *,
        split: str,
        max_history: int,
        cut_points: int,
        num_candidates: int,
        seed: int,
        cuts: TimeCuts | None = None,
    ) -> None:
        self.store = store
        # Not as mapped files, whose every look-up costs more than it reads.
        self._items, self._times, self._offsets = (
            np.asarray(each).view(np.ndarray)
            for each in (store.item_ids, store.timestamps, store.offsets)
        )
        self._max_history, self.max_candidates = max_history, num_candidates
        self._num_drawn = num_candidates - 1
        self._domains = store.catalog.item_domains.numpy()
        last, evaluated = _held_out(store, split, cuts)
        # The first event of a user has no history to be ranked by.
        starts = np.asarray(store.offsets[:-1]) + 1
        first = np.maximum(starts, last - cut_points) if cut_points else starts
        train = _runs(first, np.maximum(last - first, 0))
        train, evaluated = self._rankable(train), self._rankable(evaluated)
        self._places = np.concatenate([train, evaluated])
        self.num_train = train.size
        short = int((last <= first).sum())
        if short:
            _logger.warning(
                "%s: %d of %d users have fewer than %s and give no training request",
                store.path,
                short,
                store.num_users,
                "4 events" if cuts is None else f"2 events before {cuts.valid_from}",
            )
        if not 0 < self.num_train < len(self):
            raise InputError(
                f"{store.path}: {self.num_train} requests of training and "
                f"{len(self) - self.num_train} of evaluation; users with "
                f"{'four events' if cuts is None else 'two events before each cut'} and domains of "
                "two items are needed"
            )
        asked = store.catalog.item_domains[torch.from_numpy(store.item_ids[evaluated]).long()]
        self._evaluated = self._draw(asked, torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return self._places.size

    def _rankable(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leave out events whose item is alone in its domain."""
        counts = self.store.catalog.domain_offsets.diff().numpy()
        return places[counts[self._domains[self.store.item_ids[places]]] > 1]

    def evaluated(self) -> "EvaluatedRequests":
        """Describe the requests of evaluation."""
        store, places = self.store, self._places[self.num_train :]
        domains = self._domains[store.item_ids[places]]
        return EvaluatedRequests(
            numbers=np.arange(self.num_train, len(self)),
            users=np.searchsorted(store.offsets, places, side="right") - 1,
            places=places,
            domains=torch.from_numpy(domains),
            switched=torch.from_numpy(domains != self._domains[store.item_ids[places - 1]]),
        )

    def batch(self, requests: NDArray[np.int64], candidates: Tensor | None = None) -> RequestBatch:
        """Read requests by their numbers.

        Args:
            requests: (B,) int64.
            candidates: (C,) int64, items to score for all of them in place of their own candidates;
                labels then mark the first and tell nothing.
        """
        asked = self._places[requests]
        users = np.searchsorted(self._offsets, asked, side="right") - 1
        first = np.maximum(self._offsets[users], asked - self._max_history)
        rows = _runs(first, asked - first)
        items = torch.from_numpy(self._items[rows].astype(np.int64))
        targets = torch.from_numpy(self._items[asked].astype(np.int64))
        domains = self.store.catalog.item_domains
        if candidates is None:
            candidates = self._candidates(requests, targets)
        else:
            candidates = candidates.expand(len(asked), -1)
        width = candidates.shape[1]
        labels = torch.zeros_like(candidates)
        labels[:, 0] = 1
        return RequestBatch(
            users=torch.from_numpy(users),
            history_lengths=torch.from_numpy(asked - first),
            items=items,
            times=torch.from_numpy(self._times[rows].astype(np.int64)),
            domains=domains[items],
            candidate_lengths=torch.full((len(asked),), width),
            candidates=candidates.flatten(),
            candidate_domains=domains[candidates].flatten(),
            request_times=torch.from_numpy(self._times[asked].astype(np.int64)).repeat_interleave(
                width
            ),
            labels=labels.flatten(),
            actions=torch.ones_like(items),
        )

    def _draw(self, domains: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw places in the table of items of all domains: (B,) -> (B, R).

        As if every domain lacked its last item: whoever draws the target itself gets that one, and
        so all others are equally likely.
        """
        offsets = self.store.catalog.domain_offsets
        shortened = offsets - torch.arange(offsets.numel())
        places = draw_places(domains, shortened, self._num_drawn, generator)
        return places + domains.unsqueeze(1)

    def _candidates(self, requests: NDArray[np.int64], targets: Tensor) -> Tensor:
        """Return the target of each request and what it is ranked against: (B, 1 + R)."""
        catalog = self.store.catalog
        domains = catalog.item_domains[targets]
        numbers = torch.from_numpy(requests) - self.num_train
        is_train = numbers < 0
        places = self._evaluated[numbers.clamp(min=0)]
        if is_train.any():
            places[is_train] = self._draw(domains[is_train])
        drawn = catalog.domain_items[places]
        last = catalog.domain_items[catalog.domain_offsets[domains + 1] - 1].unsqueeze(1)
        others = torch.where(drawn == targets.unsqueeze(1), last, drawn)
        return torch.cat([targets.unsqueeze(1), others], dim=1)


def _held_out(
    store: InteractionStore, split: str, cuts: TimeCuts | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the row of the store where each user's training ends, and rows that are evaluated.

    Returns:
        (U,) int64; (Q,) int64, of users who have an event before.
    """
    starts, ends = (np.asarray(x).astype(np.int64) for x in (store.offsets[:-1], store.offsets[1:]))
    if cuts is None:
        asked = ends - _HELD_OUT[split]
        return ends - max(_HELD_OUT.values()), asked[asked > starts]
    valid, test = (
        starts + events_before(store.timestamps, store.offsets, cut)
        for cut in (cuts.valid_from, cuts.test_from)
    )
    begin, end = (valid, test) if split == "valid" else (test, ends)
    return valid, (end - 1)[(end > begin) & (begin > starts)]


def _runs(first: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``first[i], first[i] + 1, ...`` of every run, ``lengths[i]`` numbers of each."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(first - before, lengths) + np.arange(lengths.sum())
