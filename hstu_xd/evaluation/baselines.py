"""Baselines that count instead of training: popular items, and the neighbours of the last item.

They are ranked as models are: their "user vector" is the id of a user's last item, and their scorer
looks up what was counted. So every protocol of :mod:`hstu_xd.evaluation.ranks` holds for them too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from hstu_xd.batch import JaggedBatch
from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.batches import SequenceData
from hstu_xd.errors import InputError
from hstu_xd.model.settings import EncoderSettings

# The value of ``xd_train.baseline`` for a model that is trained.
NO_BASELINE = "none"
BASELINES = ("popularity", "popularity-recent", "itemknn")

# Events of neighbours that are in memory at once.
_BLOCK_EVENTS = 4_000_000


class Baseline(nn.Module, ABC):
    """What was counted in a training log; it has no parameters.

    Args:
        catalog: item -> domain table.
        settings: of the encoder whose place it takes; nothing reads them but a run's record.
        counted: the tensors that :meth:`count` returns; they are stored with the run.
    """

    def __init__(
        self, catalog: DomainCatalog, settings: EncoderSettings, counted: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.catalog, self.settings = catalog, settings
        for name, tensor in counted.items():
            self.register_buffer(name, tensor)

    @staticmethod
    @abstractmethod
    def count(catalog: DomainCatalog, data: SequenceData, recent_share: float) -> dict[str, Tensor]:
        """Count the events of a training split."""

    def forward(self, batch: JaggedBatch, *, asked: Tensor | None = None) -> Tensor:
        """Return the item of each token as its vector: (L, 1) int64; (Q, 1) of Q ``asked`` ones."""
        items = batch.item_ids if asked is None else batch.item_ids[asked]
        return items[:, None]

    def encode(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        target_domains: Tensor,
        request_timestamps: Tensor | None = None,
    ) -> Tensor:
        """Return the last item of each padded history: (B, N) int64 -> (B, 1) int64.

        Raises:
            InputError: an empty history.
        """
        lengths = (item_ids != 0).sum(1)
        if not bool((lengths > 0).all()):
            raise InputError("item_ids holds an empty history; give at least one event")
        return item_ids.gather(1, lengths[:, None] - 1)

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        """Return the ids themselves: a baseline has no vectors."""
        return item_ids[..., None]

    @abstractmethod
    def scorer(self, items: Tensor) -> Callable[[Tensor], Tensor]:
        """Prepare (C,) int64 items of a domain: a function from (Q, 1) last items to (Q, C)."""


class Popularity(Baseline):
    """Rank items by their number of training events, whoever asks.

    Inside a domain the most popular of all items and those of the domain are the same order.
    """

    scores: Tensor

    @staticmethod
    def count(catalog: DomainCatalog, data: SequenceData, recent_share: float) -> dict[str, Tensor]:
        """Count the events of every item: (num_items + 1,) float64."""
        items, _, _ = data.events()
        return {"scores": torch.bincount(items, minlength=catalog.num_items + 1).double()}

    def scorer(self, items: Tensor) -> Callable[[Tensor], Tensor]:
        """Score every user alike."""
        scores = self.scores[items]
        return lambda users: scores.expand(len(users), -1).clone()


class RecentPopularity(Popularity):
    """Rank items by their number among the latest training events; the others behind them."""

    @staticmethod
    def count(catalog: DomainCatalog, data: SequenceData, recent_share: float) -> dict[str, Tensor]:
        """Count the latest share of events; all of them decide between items of equal number.

        Events of the time at which the share begins are all in it, so the order of the log among
        equal times means nothing.
        """
        items, times, _ = data.events()
        first = max(0, len(times) - max(1, round(recent_share * len(times))))
        since = times.sort().values[first]
        size = catalog.num_items + 1
        recent = torch.bincount(items[times >= since], minlength=size).double()
        overall = torch.bincount(items, minlength=size).double()
        return {"scores": recent + overall / (len(items) + 1)}


class ItemNeighbours(Baseline):
    """Rank items by their cosine with the last item over users: who has one, has the other.

    ``cos(i, j) = |users of i and j| / sqrt(|users of i| |users of j|)``, exact and over all
    neighbours. Items that share no user with the last one follow in the order of their popularity.
    Only the log is held, sorted by user and by item; the neighbours of the items that are asked
    for are counted in blocks of bounded memory.
    """

    basket_items: Tensor
    basket_offsets: Tensor
    holder_users: Tensor
    holder_offsets: Tensor

    @staticmethod
    def count(catalog: DomainCatalog, data: SequenceData, recent_share: float) -> dict[str, Tensor]:
        """Sort the log by user and by item, each pair once."""
        items, _, users = data.events()
        size, num_users = catalog.num_items + 1, int(users.max()) + 1
        pairs = torch.from_numpy(np.unique((users * size + items).numpy()))
        owners, basket = pairs // size, pairs % size
        by_item = basket.argsort(stable=True)
        return {
            "basket_items": basket,
            "basket_offsets": _offsets(owners, num_users),
            "holder_users": owners[by_item],
            "holder_offsets": _offsets(basket, size),
        }

    def scorer(self, items: Tensor) -> Callable[[Tensor], Tensor]:
        """Score users by their last item; users with the same one are counted for once."""
        popularity = self.holder_offsets.diff()
        of_items = popularity[items].double()
        behind = of_items / (of_items.max() + 1) - 1
        column = torch.full_like(popularity, -1)
        column[items] = torch.arange(items.numel(), device=items.device)

        def score(users: Tensor) -> Tensor:
            asked, of_user = users.squeeze(1).unique(return_inverse=True)
            common = self._common_users(asked, column, items.numel())
            # Squares of equal cosines are equal numbers divided: they tie to the bit.
            square = common.square() / (popularity[asked].double()[:, None] * of_items).clamp(min=1)
            cosine = square.sqrt()
            return torch.where(common > 0, cosine, behind)[of_user]

        return score

    def _common_users(self, asked: Tensor, column: Tensor, width: int) -> Tensor:
        """Count the users that items share with others.

        Args:
            asked: (A,) int64 items.
            column: (num_items + 1,) int64, column of every item; -1: none.
            width: number of columns.

        Returns:
            (A, width) float64; 0 for an item with itself.
        """
        common = torch.zeros(len(asked) * width, dtype=torch.float64, device=asked.device)
        row, entry = _runs(self.holder_offsets, asked)
        holder = self.holder_users[entry]
        before = self.basket_offsets.diff()[holder].cumsum(0)
        block = before // _BLOCK_EVENTS
        for rows, holders in zip(*(_split_at_changes(x, block) for x in (row, holder))):
            of_holder, place = _runs(self.basket_offsets, holders)
            item, of_row = self.basket_items[place], rows[of_holder]
            counts = (column[item] >= 0) & (item != asked[of_row])
            cells = (of_row * width + column[item])[counts]
            common.index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))
        return common.view(len(asked), width)


def _offsets(groups: Tensor, num_groups: int) -> Tensor:
    """Return where the runs of sorted groups begin and end: (num_groups + 1,) int64."""
    counts = torch.bincount(groups, minlength=num_groups)
    return nn.functional.pad(counts.cumsum(0), (1, 0))


def _runs(offsets: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of some runs end to end: the run's place in ``groups``, the entry."""
    lengths = offsets.diff()[groups]
    run = torch.repeat_interleave(torch.arange(len(groups), device=groups.device), lengths)
    first = lengths.cumsum(0) - lengths
    return run, torch.arange(len(run), device=groups.device) - first[run] + offsets[groups][run]


def _split_at_changes(x: Tensor, block: Tensor) -> tuple[Tensor, ...]:
    """Split a vector where the (sorted) block of its entries changes."""
    return x.split(block.unique_consecutive(return_counts=True)[1].tolist())


# Name -> class, in the order of :data:`BASELINES`.
KINDS: dict[str, type[Baseline]] = dict(
    zip(BASELINES, (Popularity, RecentPopularity, ItemNeighbours))
)
