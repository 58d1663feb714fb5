"""Item vectors of own rows and features, so that an item without events ranks by its features.

An item's vector is the sum of its row in the table of items, of an embedding for each of its
categories, and of a linear projection of its numbers and vectors. An item that training never met
has no row; in training the rows of others are dropped at random, so that features learn to stand
for them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hstu_xd.declaration import check, setting
from hstu_xd.model.inputs import ItemEmbedding

BLOCK = "xd_item"


@dataclass(frozen=True)
class ItemSettings:
    """What ``xd_item.*`` bindings set: what items are told by beside their own row.

    Attributes:
        features: levels and features of the store (``prepare --item-features``) that item vectors
            are made of beside the item's own row; (): of none, the row alone.
        row_dropout: share of the rows that are dropped in training, so that features learn to stand
            for them; 1: all of them, also when it ranks, so that items are told by their features
            alone and those without events compete on equal terms.
    """

    features: tuple[str, ...] = setting((), also=("side_information", "cold_start", "metadata"))
    row_dropout: float = setting(0.3, at_least=0, at_most=1, needs={"features": ...})

    def __post_init__(self) -> None:
        check(self, BLOCK + ".{name} = {value!r}; it must be {needed}")


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """What a model reads of the items of a catalogue beside their ids.

    Attributes:
        categories: name -> its values; all of them in a row number the values from 1.
        widths: name -> number of numbers, of those features that are numbers.
        codes: (I + 1, C) int64, the value of each item in each category, 0 where it has none.
        numbers: (I + 1, W) float32, NaN where an item has none.
        is_met: (I + 1,) bool, whether training meets the item.
    """

    categories: Mapping[str, Sequence[str]]
    widths: Mapping[str, int]
    codes: Tensor
    numbers: Tensor
    is_met: Tensor

    @property
    def values(self) -> list[tuple[str, str]]:
        """Return every category's values in the order of their numbers, each with its category."""
        return [(name, value) for name, values in self.categories.items() for value in values]

    def value_rows_in(self, other: "FeatureTable") -> Tensor:
        """Find the values in another table: (V + 1,) int64, -1 where it lacks one; 0 is none."""
        known = {value: number for number, value in enumerate(other.values, start=1)}
        return torch.tensor([0, *(known.get(value, -1) for value in self.values)])


class FeaturedItemEmbedding(ItemEmbedding):
    """The table of items with features: rows that training met, and what features add.

    Args:
        num_items: items ``1..num_items``.
        embedding_dim: model width ``K``.
        table: features of these items.
        row_dropout: share of the rows that are dropped in training; those of items without any
            feature never are.
    """

    _codes: Tensor
    _numbers: Tensor
    _known: Tensor
    _met: Tensor
    _droppable: Tensor
    _center: Tensor
    _scale: Tensor

    def __init__(
        self, num_items: int, embedding_dim: int, table: FeatureTable, row_dropout: float
    ) -> None:
        super().__init__(num_items, embedding_dim)
        self.table, self._row_dropout = table, row_dropout
        known = table.numbers.isnan().logical_not()
        numbers = table.numbers.nan_to_num()
        # A value that training never meets would add what it began with, which says nothing.
        is_met = torch.zeros(len(table.values) + 1, dtype=torch.bool)
        is_met[table.codes[table.is_met].flatten()] = True
        codes = table.codes * is_met[table.codes]
        has_any = (codes > 0).any(1) | known.any(1)
        for name, value in {
            "_codes": codes,
            "_numbers": numbers,
            "_known": known.float(),
            "_met": table.is_met.float(),
            "_droppable": has_any.float(),
        }.items():
            self.register_buffer(name, value, persistent=False)
        # Kept with the weights, which were learnt with them: a newer store has other means.
        center, scale = _spread(numbers, known & table.is_met.unsqueeze(1))
        self.register_buffer("_center", center)
        self.register_buffer("_scale", scale)
        self._values = self._projection = None
        if table.categories:
            self._values = nn.Embedding(len(table.values) + 1, embedding_dim, padding_idx=0)
            nn.init.trunc_normal_(self._values.weight, std=0.02)
            with torch.no_grad():
                self._values.weight[0] = 0
        if width := numbers.shape[1]:
            self._projection = nn.Linear(width, embedding_dim, bias=False)
            nn.init.normal_(self._projection.weight, std=0.02 / math.sqrt(width))

    @property
    def is_met(self) -> Tensor:
        """(I + 1,) bool, whether training meets the item."""
        return self._met > 0

    def forward(self, item_ids: Tensor) -> Tensor:
        """Add up rows and features: (...) int64 -> (..., K) float."""
        kept = self._met[item_ids]
        if self._row_dropout == 1:
            kept = kept * (1 - self._droppable[item_ids])
        elif self.training and self._row_dropout:
            dropped = torch.rand(item_ids.shape, device=item_ids.device) < self._row_dropout
            kept = kept * (1 - dropped * self._droppable[item_ids])
        vectors = super().forward(item_ids) * kept.unsqueeze(-1)
        if self._values is not None:
            vectors = vectors + self._values(self._codes[item_ids]).sum(-2)
        if self._projection is not None:
            numbers = (self._numbers[item_ids] - self._center) / self._scale
            vectors = vectors + self._projection(numbers * self._known[item_ids])
        return vectors


# The parameter that has a row for each value of a category, none being the first.
VALUES = "_values.weight"


def _spread(numbers: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of (I, W) numbers where they are known: (W,) each."""
    count = known.sum(0).clamp(min=1)
    center = (numbers * known).sum(0) / count
    variance = ((numbers - center).square() * known).sum(0) / count
    scale = variance.sqrt()
    return center, torch.where(scale > 0, scale, torch.ones_like(scale))
