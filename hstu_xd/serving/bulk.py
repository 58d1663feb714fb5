"""The best items of every domain for many users at once: one encoding a history, all domains of it.

The histories may come from a later log than the one that the model was trained on; items that the
model does not know are then left out of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hstu_xd.batch import JaggedBatch, Questions
from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.window import Window
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.evaluation.baselines import Baseline
from hstu_xd.evaluation.protocol import Protocol
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.objective import Scorer
from hstu_xd.parts import Part
from hstu_xd.training.run import TrainedRun

# Scores that are in memory at once (float32: 16 MB), for a domain of any size.
BLOCK_SCORES = 4_000_000
# Users that are encoded at once.
BATCH_USERS = 256


@dataclass(frozen=True)
class Histories:
    """Whole histories of some users, end to end, oldest event first.

    Attributes:
        item_ids: (E,) int64, ids of the model's catalogue.
        timestamps: (E,) int64.
        offsets: (B + 1,) int64, user ``b`` owns ``offsets[b]:offsets[b + 1]``.
    """

    item_ids: Tensor
    timestamps: Tensor
    offsets: Tensor

    @property
    def owners(self) -> Tensor:
        """Return the user of each event: (E,) int64."""
        users = torch.arange(self.offsets.numel() - 1)
        return torch.repeat_interleave(users, self.offsets.diff())

    def chosen(self, keep: Tensor) -> "Histories":
        """Return the events that (E,) bool tells to keep."""
        kept = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
        return Histories(self.item_ids[keep], self.timestamps[keep], kept[self.offsets])

    def read_by(self, window: Window, catalog: DomainCatalog) -> "Histories":
        """Return the events of every user that are in their window."""
        return self.chosen(window.kept(catalog.domain_of(self.item_ids), self.offsets))

    def batches(self) -> Iterator["Histories"]:
        """Yield those of as many users as are encoded at once, one batch after the other."""
        number = self.offsets.numel() - 1
        for start in range(0, number, BATCH_USERS):
            offsets = self.offsets[start : start + BATCH_USERS + 1]
            first, last = offsets[[0, -1]].tolist()
            items, times = self.item_ids[first:last], self.timestamps[first:last]
            yield Histories(items, times, offsets - first)


class HistoryReader:
    """Reads histories of a store as a model knows its items.

    Args:
        store: the log.
        catalog: of the model; items that it lacks are left out.

    Attributes:
        store, catalog: as given.

    Raises:
        InputError: an item that the model knows in another domain.
    """

    def __init__(self, store: InteractionStore, catalog: DomainCatalog) -> None:
        self.store, self.catalog = store, catalog
        self._ids = store.catalog.ids_in(catalog)

    @cached_property
    def unknown_items(self) -> int:
        """Count the items of the store that the model does not know."""
        return int((self._ids[1:] == 0).sum())

    def read(self, users: np.ndarray) -> Histories:
        """Return the whole histories of (B,) user indices."""
        first, end = (np.asarray(self.store.offsets)[users + i] for i in (0, 1))
        offsets = np.concatenate([[0], np.cumsum(end - first)])
        rows = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], end - first)
        items = self._ids[torch.from_numpy(self.store.item_ids[rows].astype(np.int64))]
        times = torch.from_numpy(self.store.timestamps[rows])
        return Histories(items, times, torch.from_numpy(offsets)).chosen(items > 0)

    def has_known_items(self, users: np.ndarray) -> np.ndarray:
        """Tell which of (B,) users have an event that is read: (B,) bool."""
        if not self.unknown_items:
            return np.ones(len(users), bool)
        parts = np.split(users, range(BATCH_USERS, len(users), BATCH_USERS))
        return np.concatenate([(self.read(part).offsets.diff() > 0).numpy() for part in parts])

    def users_after(self, time: int, users: np.ndarray) -> np.ndarray:
        """Return those of (B,) users who have an event later than a time."""
        last = np.asarray(self.store.offsets)[users + 1] - 1
        return users[self.store.timestamps[last] > time]


@dataclass(frozen=True)
class BestItems:
    """The best items of B users in D domains, best first.

    Attributes:
        items: (B, D, k) int64, 0 where a domain has no more candidates.
        scores: (B, D, k) float, -inf there.
    """

    items: Tensor
    scores: Tensor

    @classmethod
    def joined(cls, parts: Sequence["BestItems"]) -> "BestItems":
        """Return what was found for the users of several parts, one after the other."""
        return cls(torch.cat([x.items for x in parts]), torch.cat([x.scores for x in parts]))


class DomainItems:
    """The items of several domains, ranked for users who share nothing but the model.

    Args:
        catalog: of the model.
        domains: domain ids, in the order of what is found.
        k: items of each domain; no more than the largest of them has.
        scorer: scores users against items.

    Attributes:
        k: items of each domain that are returned at most.

    Raises:
        InputError: a domain without items.
    """

    def __init__(
        self, catalog: DomainCatalog, domains: Sequence[int], k: int, scorer: Scorer
    ) -> None:
        self._catalog, self._domains = catalog, list(domains)
        self._pools = [catalog.items_of(domain) for domain in self._domains]
        for domain, pool in zip(self._domains, self._pools):
            if not pool.numel():
                raise InputError(
                    f"domain {catalog.domain_names[domain]!r} has no items to recommend; leave it "
                    "out"
                )
        self.k = min(k, max(pool.numel() for pool in self._pools))
        with torch.no_grad():
            self._scores = [scorer(pool) for pool in self._pools]

    def best(self, vectors: Tensor, seen: Histories | None) -> BestItems:
        """Rank the items of every domain.

        Args:
            vectors: (B, D, K) what each user is scored by in each domain.
            seen: of the same users, whose items are no candidates; None: all items are.

        Raises:
            HstuXdError: a score is not a number.
        """
        found = [self._rank(seen, vectors[:, n], n) for n in range(len(self._domains))]
        items, scores = (torch.stack(each, dim=1) for each in zip(*found, strict=True))
        return BestItems(items, scores)

    def _rank(self, seen: Histories | None, vectors: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return the (B, k) best items of one of the domains and their scores."""
        pool = self._pools[number]
        k = min(self.k, pool.numel())
        items = torch.zeros(len(vectors), self.k, dtype=torch.int64)
        owners, met = items.new_empty(0), items.new_empty(0)
        if seen is not None:
            inside = self._catalog.domain_of(seen.item_ids) == self._domains[number]
            owners, met = seen.owners[inside], torch.searchsorted(pool, seen.item_ids[inside])
        found, size = [], max(1, BLOCK_SCORES // pool.numel())
        for start in range(0, len(vectors), size):
            scores = self._scores[number](vectors[start : start + size])
            first, last = torch.searchsorted(owners, torch.tensor([start, start + size])).tolist()
            scores[owners[first:last] - start, met[first:last]] = float("-inf")
            found.append(scores.topk(k))
        best = torch.cat([each.values for each in found])
        if bool(best.isnan().any()):
            raise HstuXdError(
                "scores are not numbers: the model has diverged; train again with a lower "
                "learning rate or take an earlier checkpoint"
            )
        places = torch.cat([each.indices for each in found])
        items[:, :k] = pool[places].masked_fill_(best == float("-inf"), 0)
        return items, torch.nn.functional.pad(best, (0, self.k - k), value=float("-inf"))


class BulkRecommender:
    """Encodes histories and ranks the items of several domains for them.

    Args:
        trained: the run.
        domains: domain ids to recommend from.
        k: items of each domain; no more than the largest of them has.
        window: which events are read, the run's; a number: so many latest ones.
        protocol: whether items of a history are candidates.
        at: time of every request, in the log's unit; None: that of each user's last event.

    Attributes:
        k: items of each domain that are returned at most.

    Raises:
        InputError: a domain without items.
    """

    def __init__(
        self,
        trained: TrainedRun,
        domains: Sequence[int],
        k: int,
        *,
        window: Window | int,
        protocol: Protocol,
        at: int | None = None,
    ) -> None:
        self._model, self._domains = trained.ranker, list(domains)
        self._window, self._protocol, self._at = Window.of(window), protocol, at
        self._items = DomainItems(trained.ranker.catalog, self._domains, k, trained.scorer)
        self.k = self._items.k

    @torch.no_grad()
    def best(self, histories: Histories) -> BestItems:
        """Rank the items of every domain for B users with at least one event each.

        Raises:
            HstuXdError: a score is not a number.
        """
        found = []
        for part in histories.batches():
            windows = part.read_by(self._window, self._model.catalog)
            vectors = user_vectors(self._model, windows, self._domains, at=self._at)
            found.append(self._items.best(vectors, part if self._protocol.exclude_seen else None))
        return BestItems.joined(found)


def user_vectors(
    model: CrossDomainHSTU | Baseline,
    windows: Histories,
    domains: Sequence[int],
    *,
    at: int | None = None,
) -> Tensor:
    """Encode histories once, and ask each for several domains.

    The last event of a history is asked for the first domain and, by :class:`Questions`, for the
    others. A model that does not read what it is asked for answers once; one that takes no
    questions encodes the history for every domain anew.

    Args:
        model: in evaluation mode, on the CPU.
        windows: of B users, none empty and none longer than the model's window.
        domains: D ids.
        at: time of the requests; None: that of each last event.

    Returns:
        (B, D, K): what ``model.encode`` returns for each domain.
    """
    last = windows.offsets[1:] - 1
    asked = windows.timestamps[last] if at is None else torch.full_like(last, at)
    next_times = windows.timestamps.roll(-1).index_copy(0, last, asked)
    following = model.catalog.domain_of(windows.item_ids).roll(-1)

    def batch_of(domain: int) -> JaggedBatch:
        targets = following.index_fill(0, last, domain)
        return JaggedBatch(
            windows.item_ids, windows.timestamps, next_times, targets, windows.offsets
        )

    if isinstance(model, Baseline) or not _reads_domain(model):
        return model(batch_of(domains[0]), asked=last).unsqueeze(1).expand(-1, len(domains), -1)
    if len(domains) == 1 or not _takes_questions(model):
        return torch.stack([model(batch_of(domain), asked=last) for domain in domains], dim=1)
    others = torch.tensor(domains[1:])
    questions = Questions(
        rows=last.repeat_interleave(others.numel()),
        target_domains=others.repeat(last.numel()),
        timestamps=asked.repeat_interleave(others.numel()),
    )
    answers = windows.item_ids.numel() + torch.arange(questions.rows.numel())
    asked = torch.cat([last.unsqueeze(1), answers.view(last.numel(), -1)], dim=1)
    vectors = model(batch_of(domains[0]), questions=questions, asked=asked.flatten())
    return vectors.view(*asked.shape, -1)


def _reads_domain(model: CrossDomainHSTU) -> bool:
    """Whether the answer may depend on the domain asked for; nobody knows of a foreign layer."""
    return model.settings.reads_target_domain or isinstance(model.settings.layer, Part)


def _takes_questions(model: CrossDomainHSTU) -> bool:
    """Whether the layers are known to keep questions apart from what they are put to."""
    return model.settings.normalization == "silu" and not isinstance(model.settings.layer, Part)
