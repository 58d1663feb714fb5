"""How popular what a model finds and recommends is: tenths of targets, coverage, Gini coefficient.

Popularity is the number of an item's events that train. A model with a popularity bias finds
popular targets and misses rare ones, and its lists hold few items of the catalogue.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.batches import SequenceData
from hstu_xd.evaluation.ranks import ListedTargets

NUM_TENTHS = 10


def training_counts(catalog: DomainCatalog, training: SequenceData) -> Tensor:
    """Count the events of every item that train: (num_items + 1,) int64, 0 for the padding.

    Args:
        catalog: of the items.
        training: the training split; a user's first event counts, too, as a model reads it.
    """
    items, _, _ = training.events()
    return torch.bincount(items, minlength=catalog.num_items + 1)


@dataclass(frozen=True)
class Tenths:
    """Targets in up to ten groups by how often training met them, the rarest first.

    Attributes:
        group_of: (Q,) int64, group of each target, from 0.
        bounds: of each group, the fewest and the most training events of its targets.
    """

    group_of: Tensor
    bounds: list[tuple[int, int]]

    def members(self) -> dict[str, Tensor]:
        """Return who is in each group, by what :meth:`labels` calls it: (Q,) bool each."""
        return {label: self.group_of == i for i, label in enumerate(self.labels())}

    def labels(self) -> list[str]:
        """Name each group by its training events: ``3`` or ``4-7``."""
        return [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high in self.bounds]


def tenths_of_targets(counts: Tensor) -> Tenths:
    """Part targets into tenths by the training events of their items.

    The tenths are of targets, not of events or items: so their errors are alike, and none of them
    is a handful of best-sellers. Targets of equal popularity stay together: theirs is the tenth in
    which the middle of their places in the sorted targets lies, ``floor(10 (below + equal / 2) /
    Q)``. So tenths are of unequal size where many targets are equally popular, and those that are
    nobody's are left out: there are never more groups than different numbers.

    Args:
        counts: (Q,) int64, training events of each target's item; at least one target.

    Example:
        >>> tenths_of_targets(torch.tensor([5, 0, 0, 9])).bounds
        [(0, 0), (5, 5), (9, 9)]
    """
    distinct, place, sizes = counts.unique(return_inverse=True, return_counts=True)
    # Twice the middle is a whole number, so no group depends on rounding.
    twice_middle = 2 * (sizes.cumsum(0) - sizes) + sizes
    tenth = NUM_TENTHS * twice_middle // (2 * len(counts))
    _, group, members = tenth.unique_consecutive(return_inverse=True, return_counts=True)
    last = members.cumsum(0) - 1  # of the different numbers of a group
    first = last - members + 1
    bounds = list(zip(distinct[first].tolist(), distinct[last].tolist()))
    return Tenths(group[place], bounds)


def gini_coefficient(counts: Tensor) -> float:
    """Return how unevenly recommendations are spread over items.

    Of ``n`` items with counts ``x_1 <= ... <= x_n`` it is ``sum_i (2 i - n - 1) x_i / (n sum_i
    x_i)``: half the mean absolute difference of two items, over the mean. Items that are never
    recommended count, with 0. It is 0 where all items are recommended equally often and ``(n - 1) /
    n`` where one has all.

    Args:
        counts: (n,) int, how often each item is recommended.

    Returns:
        The coefficient; nan where nothing is recommended.

    Example:
        >>> gini_coefficient(torch.tensor([0, 0, 0, 8]))
        0.75
    """
    ascending = counts.sort().values.double()
    size = len(ascending)
    if not size or not float(ascending.sum()):
        return float("nan")
    weights = 2 * torch.arange(1, size + 1, dtype=torch.float64) - size - 1
    return float(weights @ ascending) / (size * float(ascending.sum()))


def percentiles_in_domain(counts: Tensor, catalog: DomainCatalog) -> Tensor:
    """Tell what share of the items of its domain an item is more popular than.

    Equally popular ones count a half, the item itself included, so that the mean over the items of
    a domain is a half: a list of items drawn by lot has 0.5.

    Args:
        counts: (num_items + 1,) int64 of :func:`training_counts`.
        catalog: of the items.

    Returns:
        (num_items + 1,) float64; 0 for the padding.
    """
    percentiles = torch.zeros(len(counts), dtype=torch.float64)
    for domain in range(len(catalog.domain_names)):
        items = catalog.items_of(domain).cpu()
        _, place, sizes = counts[items].unique(return_inverse=True, return_counts=True)
        middle = sizes.cumsum(0).double() - sizes / 2
        percentiles[items] = (middle / max(1, len(items)))[place]
    return percentiles


class ListTally:
    """Counts how often each item is in the best k of a user, without keeping the lists.

    Args:
        catalog: of the items.
        ks: lengths of lists, ascending.

    Attributes:
        counts: (len(ks), num_items + 1) int64; the place of the padding stays 0.
    """

    def __init__(self, catalog: DomainCatalog, ks: Sequence[int]) -> None:
        self._catalog, self.ks = catalog, tuple(ks)
        self.counts = torch.zeros(len(self.ks), catalog.num_items + 1, dtype=torch.int64)

    def add(self, listed: ListedTargets) -> None:
        """Count the lists of some users; it is what evaluation calls with every batch."""
        for row, k in enumerate(self.ks):
            found = listed.items[:, :k].reshape(-1).cpu()
            self.counts[row] += torch.bincount(found, minlength=self.counts.shape[1])
        self.counts[:, 0] = 0

    def figures(self, percentiles: Tensor) -> dict[str, float]:
        """Return what the lists of each length are like.

        Args:
            percentiles: of :func:`percentiles_in_domain`.

        Returns:
            ``coverage@k``, the share of the catalogue's items that are in a list at all, and
            ``coverage@k[domain]``, that of a domain's; ``gini@k``, see :func:`gini_coefficient`,
            over all items; ``popularity@k``, the mean percentile of the places of lists, nan where
            there is none.
        """
        found: dict[str, float] = {}
        items = self._catalog.domain_items.cpu()  # ids may be unused
        for k, counts in zip(self.ks, self.counts):
            is_met = (counts > 0).double()
            found[f"coverage@{k}"] = float(is_met[items].mean())
            for domain, name in enumerate(self._catalog.domain_names):
                own = self._catalog.items_of(domain).cpu()
                if len(own):
                    found[f"coverage@{k}[{name}]"] = float(is_met[own].mean())
            found[f"gini@{k}"] = gini_coefficient(counts[items])
            places = int(counts.sum())
            mean = float(counts.double() @ percentiles) / places if places else float("nan")
            found[f"popularity@{k}"] = mean
        return found
