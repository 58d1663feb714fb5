"""Bias and visibility of every pair of a tile as one look-up in one table.

Row ``b`` of the table belongs to time bucket ``b``. Column 0 is hugely negative, for pairs that are
not to be seen; the others hold an entry of the position table plus the bucket's. A pair's index
into the table depends on tokens and times alone, so all layers of a model share it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.grouping import DomainGrouping
from hstu_xd.ops.buckets import Buckets
from hstu_xd.ops.relative_bias import RelativeBias
from hstu_xd.ops.tiles import Tile


class _Indices(NamedTuple):
    """What all layers share: columns of the table and the pairs' indices into it."""

    first: int  # row of the position table that column 1 holds
    columns: int
    positions: Tensor  # (L,) int32
    of_tile: dict[Tile, Tensor]
    named_by_id: tuple[Tensor, ...]  # kept alive with the key that names them


@dataclass(frozen=True, eq=False)
class PairBias:
    """The tables of one layer, tied to the pairs of a batch.

    Attributes:
        bias: tables and coordinates, or None: then a pair is seen or not, and that is all.
        indices: shared by all layers whose coordinates are the same tensors.
    """

    bias: RelativeBias | None
    indices: _Indices

    @classmethod
    def of(cls, grouping: DomainGrouping, bias: RelativeBias | None) -> "PairBias":
        """For the pairs of ``grouping``, with what other layers computed of them."""
        buckets = grouping.buckets
        assert isinstance(buckets, Buckets)
        coordinates: tuple[Tensor, ...] = ()
        sizes: tuple[int, ...] = ()
        if bias is not None:
            coordinates = bias.positions, bias.timestamps, bias.next_timestamps
            sizes = bias.max_length, bias.time_weights.numel()
        key = ("indices", *map(id, coordinates), *sizes)
        if key not in buckets.memo:
            first, columns = (0, 2) if bias is None else _position_rows(grouping, bias)
            positions = (grouping if bias is None else bias).positions.int()
            buckets.memo[key] = _Indices(first, columns, positions, {}, coordinates)
        return cls(bias, buckets.memo[key])

    def table(self, like: Tensor) -> Tensor:
        """(num_buckets * columns,) the joint table, in dtype and on device of ``like``."""
        lowest = torch.finfo(like.dtype).min / 2
        if self.bias is None:
            return like.new_tensor([lowest, 0.0])
        first, columns, *_ = self.indices
        position = self.bias.position_weights[first : first + columns - 1]
        time = self.bias.time_weights.unsqueeze(1)
        unseen = time.new_full(time.shape, lowest)
        return torch.cat([unseen, time + position], dim=1).to(like.dtype).view(-1)

    def look_up(self, table: Tensor, tile: Tile) -> Tensor:
        """Bias of a tile, (G, m, n)."""
        return table.index_select(0, self._index(tile)).view(tile.shape)

    def empty_gradient(self) -> Tensor | None:
        """(num_buckets * columns,) zeros in float64: thousands of pairs meet in one entry."""
        if self.bias is None:
            return None
        time = self.bias.time_weights
        return time.new_zeros(time.numel() * self.indices.columns, dtype=torch.float64)

    def add_gradient(self, gradient: Tensor, tile: Tile, grad_scores: Tensor) -> None:
        """Add a tile's (H * G, m, n) score gradients."""
        index = self._index(tile).long()
        sum_type = torch.promote_types(grad_scores.dtype, torch.float32)
        shared = grad_scores.view(-1, index.numel()).sum(0, dtype=sum_type)
        gradient.scatter_add_(0, index, shared.double())

    def split_gradient(self, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the position table and of the time table, in their own types."""
        if self.bias is None or gradient is None:
            return None, None
        first, columns, *_ = self.indices
        position, time = self.bias.position_weights, self.bias.time_weights
        seen = gradient.view(time.numel(), columns)[:, 1:]
        grad_position = torch.zeros_like(position)
        grad_position[first : first + columns - 1] = seen.sum(0)
        return grad_position, seen.sum(1).to(time.dtype)

    def _index(self, tile: Tile) -> Tensor:
        """(G * m * n,) int32, row of the joint table for every pair."""
        known = self.indices.of_tile
        if tile in known:
            return known[tile]
        visible = tile.visible()
        if self.bias is None:
            index = visible.int().view(-1)
        else:
            bias, (first, columns, positions, *_) = self.bias, self.indices
            spare = positions.numel() - 1
            queries, keys = tile.query_tokens.clamp(max=spare), tile.key_tokens.clamp(max=spare)
            column = bias.position_index(positions[queries], positions[keys] - (first - 1))
            row = bias.time_index(bias.next_timestamps[queries], bias.timestamps[keys])
            index = column.mul_(visible).add_(row.int(), alpha=columns).view(-1)
        if tile.remembered:
            known[tile] = index
        return index


def _position_rows(grouping: DomainGrouping, bias: RelativeBias) -> tuple[int, int]:
    """The part of the position table that pairs of this batch use: first row, columns needed."""
    positions = bias.positions
    span = int(positions.max() - positions.min())
    if span >= bias.max_length:
        raise InputError(
            f"bias.positions span {span + 1} positions; bias.position_weights covers "
            f"{bias.max_length}: make the table longer or cut the histories"
        )
    rising = (positions.diff() >= 0) | (grouping.positions[1:] == 0)
    ahead = 0 if bool(rising.all()) else span
    return bias.max_length - 1 - span, 1 + span + 1 + ahead
