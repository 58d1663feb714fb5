"""The best items for a user and a goal by towers, of a domain or of all; and for many users."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.requests import RequestSet
from hstu_xd.errors import InputError
from hstu_xd.objectives.objective import DotProduct
from hstu_xd.ranking.batches import RequestBatch, RequestData
from hstu_xd.ranking.histories import HistoryIndex
from hstu_xd.ranking.run import ServedRanker
from hstu_xd.ranking.towers import TowerRanker
from hstu_xd.serving.bulk import BestItems, DomainItems, Histories
from hstu_xd.serving.ranking_session import RankingSession
from hstu_xd.serving.retrieval import ItemIndex


@dataclass(frozen=True)
class BestRequest:
    """The best items are wanted for a user, by their names in the log.

    Attributes:
        user: who is asked for; one without an event has no history.
        goal: what is wanted of the items; None: the only goal of the model.
        domain: of the items; None: all of them.
        k: how many items.
        timestamp: of the request, in seconds; events at or after it are not read. None: right
            after the user's latest event.
        exclude_seen: leave out items of the history that is read.
    """

    user: str
    goal: str | None = None
    domain: str | None = None
    k: int = 10
    timestamp: int | None = None
    exclude_seen: bool = False


@dataclass(frozen=True)
class FoundHistory:
    """What the towers read for a request, and items that are left out.

    Attributes:
        batch: one request, without candidates.
        seen: (n,) int64 items to leave out; None: none.
    """

    batch: RequestBatch
    seen: Tensor | None


class TowerSearch:
    """The items of towers, as retrieval runs search theirs: one index serves all goals.

    Example:
        >>> search = TowerSearch(ranker)  # doctest: +SKIP
        >>> search.best(session, BestRequest("u17", "deal=true", k=2))  # doctest: +SKIP
        [('soap', 0.41), ('pear', 0.38)]

    Args:
        ranker: towers, and what belongs to them.
        retrieval: as :class:`hstu_xd.serving.retrieval.ItemIndex` takes it. Vectors of items
            are of any length here, and lists find about as many of the best as among units: 0.90
            to 0.94 of the first ten of 100,000 made items.

    Raises:
        InputError: the ranker is none of towers, or as :class:`ItemIndex`.
    """

    def __init__(self, ranker: ServedRanker, retrieval: str = "exact") -> None:
        self._towers, self._catalog = towers_of(ranker), ranker.catalog
        self._index = ItemIndex(_Items(ranker.catalog, self._towers), retrieval)

    def best(self, session: RankingSession, request: BestRequest) -> list[tuple[str, float]]:
        """Return the names of the best items with the chances that they are taken, best first.

        Args:
            session: of the same ranker, which knows the histories.
            request: what is wanted.

        Raises:
            InputError: an unknown goal or domain, or ``k`` below 1.
        """
        names = self._catalog.domain_names if request.domain is None else [request.domain]
        domains = [self._catalog.domain_index(name) for name in names]
        found = self.by_domain(self.read(session, request), domains, request.k)
        together = [pair for pairs in found for pair in pairs]
        return sorted(together, key=lambda pair: -pair[1])[: request.k]

    def read(self, session: RankingSession, request: BestRequest) -> FoundHistory:
        """Find what is read for a request, whatever the domain.

        Raises:
            InputError: an unknown goal, or ``k`` below 1.
        """
        if request.k < 1:
            raise InputError(f"k is {request.k}; ask for at least one item")
        user, at = request.user, request.timestamp
        batch = session.read(user, request.goal, at)
        return FoundHistory(batch, session.seen(user, at) if request.exclude_seen else None)

    @torch.no_grad()
    def by_domain(
        self, found: FoundHistory, domains: Sequence[int], k: int
    ) -> list[list[tuple[str, float]]]:
        """Return what :meth:`best` returns, for each of some domains.

        Args:
            found: of :meth:`read`.
            domains: ids.
            k: items of a domain; fewer come back where it has no more.
        """
        goal = int(found.batch.goals[0])
        vector = self._towers.user_vectors(found.batch)[0, goal].contiguous()
        lists = []
        for domain in domains:
            best = self._index.best(vector, domain, k, found.seen)
            logits = torch.tensor([score for _, score in best]) + self._towers.bias[goal]
            names = [self._catalog.token(item) for item, _ in best]
            lists.append(list(zip(names, logits.double().sigmoid().tolist())))
        return lists


class TowersForAll:
    """The best items of several domains for many users at once, for one goal.

    Args:
        ranker: towers, and what belongs to them.
        goal: name; None: the only one.
        domains: domain ids.
        k: items of each domain; no more than the largest of them has.
        at: time of all requests, events at or after which are not read; None: right after each
            user's last event.
        exclude_seen: leave out items of the history that is read.

    Attributes:
        k: items of each domain that are returned at most.

    Raises:
        InputError: the ranker is none of towers, an unknown goal, or a domain without items.
    """

    def __init__(
        self,
        ranker: ServedRanker,
        goal: str | None,
        domains: Sequence[int],
        k: int,
        *,
        at: int | None = None,
        exclude_seen: bool = False,
    ) -> None:
        self._ranker, self._towers, self._goal = ranker, towers_of(ranker), ranker.goal(goal)
        self._num_domains, self._at, self._exclude_seen = len(domains), at, exclude_seen
        self._items = DomainItems(ranker.catalog, domains, k, DotProduct(self._towers.item_vectors))
        self.k = self._items.k

    @torch.no_grad()
    def best(self, histories: Histories) -> BestItems:
        """Rank the items of every domain for B users; scores are chances.

        Raises:
            HstuXdError: a score is not a number.
        """
        best, bias = BestItems.joined([*map(self._of, histories.batches())]), self._towers.bias
        return BestItems(best.items, (best.scores + bias[self._goal]).double().sigmoid())

    def _of(self, histories: Histories) -> BestItems:
        """Find what is best for a batch, by scores that lack the goal's bias."""
        times = self._times(histories)
        vectors = self._towers.user_vectors(self._batch(histories, times))[:, self._goal]
        vectors = vectors.unsqueeze(1).expand(-1, self._num_domains, -1)
        if not self._exclude_seen:
            return self._items.best(vectors, None)
        seen = histories.chosen(histories.timestamps < times[histories.owners])
        return self._items.best(vectors, seen)

    def _times(self, histories: Histories) -> Tensor:
        """Return the time of each user's request: (B,) int64."""
        if self._at is not None:
            return torch.full((histories.offsets.numel() - 1,), self._at)
        return histories.timestamps[histories.offsets[1:] - 1] + 1

    def _batch(self, histories: Histories, times: Tensor) -> RequestBatch:
        """Find what the towers read of users, none of whom is without events."""
        index = HistoryIndex(
            self._ranker.levels,
            histories.offsets.numpy(),
            histories.item_ids.numpy(),
            histories.timestamps.numpy(),
        )
        asked = RequestSet.unanswered(times.numpy(), self._goal, self._ranker.goals)
        return RequestData(index, asked, self._ranker.settings).batch(np.arange(len(times)))


def towers_of(ranker: ServedRanker) -> TowerRanker:
    """Return the towers of a ranker.

    Raises:
        InputError: it has none.
    """
    if isinstance(ranker.model, TowerRanker):
        return ranker.model
    raise InputError(
        f"xd_interest.kind = {ranker.settings.interest.kind!r} reads the candidate together with "
        "the history, so that no index finds its best items; rank given candidates (hstu-xd score, "
        "POST /v1/rank), or train with xd_interest.kind = 'towers'"
    )


@dataclass(frozen=True, eq=False)
class _Items:
    """The items as an index asks them."""

    catalog: DomainCatalog
    towers: TowerRanker

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        return self.towers.item_vectors(item_ids)
