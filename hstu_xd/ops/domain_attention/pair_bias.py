"""Bias and visibility of every pair of a tile as one look-up in one table.

Row ``b`` of the table belongs to time bucket ``b``, a column to a row of the position table. The
last column is hugely negative, for pairs that are not to be seen: later keys, padding, and what a
rule of the grouping hides. A pair's index into the table depends on tokens and times alone, so all
layers of a model share it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.ops.domain_attention.tiles import PADDING_KEY, PADDING_QUERY, Tile, Walk, at_tokens
from hstu_xd.ops.grouping import DomainGrouping, PairRule
from hstu_xd.ops.relative_bias import RelativeBias
from hstu_xd.ops.visibility import is_later


@dataclass(frozen=True, eq=False)
class _Coordinates:
    """Positions and times in the order of a walk, and what the pairs of a batch need of a table.

    Attributes:
        positions: of queries and of keys, (S,) int32 each, with the bias's padding positions.
        times: next times of queries and times of keys, (S,) int64 each; none without bias.
        order: positions that decide causality, where those of the bias do not; else empty.
        tokens: of queries and of keys, where a rule has to be asked; else empty.
        first: row of the position table in column 0.
        columns: columns of the joint table, the unseen one included.
        indices: what was computed for each tile so far.
        rule: narrows what queries see, or None.
        named_by_id: tensors that the key in a memo names, to keep them alive.
    """

    positions: tuple[Tensor, Tensor]
    times: tuple[Tensor, ...]
    order: tuple[Tensor, ...]
    first: int
    columns: int
    tokens: tuple[Tensor, ...]
    rule: PairRule | None
    named_by_id: tuple[Tensor, ...]
    indices: dict[Tile, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PairBias:
    """The tables of one layer, tied to the pairs of a walk.

    Attributes:
        bias: tables and coordinates, or None: then a pair is seen or not, and that is all.
        coordinates: shared by all layers whose bias has the same coordinates.
    """

    bias: RelativeBias | None
    coordinates: _Coordinates

    @classmethod
    def build(cls, grouping: DomainGrouping, walk: Walk, bias: RelativeBias | None) -> "PairBias":
        """Tie a bias to the pairs of ``walk``, with what other layers computed of them."""
        named: tuple[Tensor, ...] = ()
        sizes: tuple[int, ...] = ()
        if bias is not None:
            named = bias.positions, bias.timestamps, bias.next_timestamps
            sizes = bias.max_length, bias.time_weights.numel()
        key = (*map(id, named), *sizes)
        if key not in walk.memo:
            walk.memo[key] = _coordinates(grouping, walk, bias, named)
        return cls(bias, walk.memo[key])

    def table(self, like: Tensor) -> Tensor:
        """Join the tables: (num_buckets * columns,), in dtype and on device of ``like``."""
        if self.bias is None:
            return like.new_tensor([0.0, unseen(like.dtype)])
        position, time = self._used_positions(self.bias.position_weights), self.bias.time_weights
        seen = time.unsqueeze(1) + position
        last = seen.new_full((time.numel(), 1), unseen(like.dtype))
        return torch.cat([seen, last], dim=1).to(like.dtype).view(-1)

    def look_up(self, table: Tensor, tile: Tile) -> Tensor:
        """Look up the bias of a tile, (G, m, n)."""
        found = table.index_select(0, self._index(tile))
        return found.view(tile.groups, tile.rows, tile.columns)

    def empty_gradient(self) -> Tensor | None:
        """Return (num_buckets * columns,) zeros for the gradient of the joint table.

        They are float64: thousands of pairs meet in one entry.
        """
        if self.bias is None:
            return None
        time = self.bias.time_weights
        return time.new_zeros(time.numel() * self.coordinates.columns, dtype=torch.float64)

    def add_gradient(self, gradient: Tensor, tile: Tile, grad_scores: Tensor) -> None:
        """Add a tile's (H * G, m, n) score gradients."""
        index = self._index(tile).long()
        sum_type = torch.promote_types(grad_scores.dtype, torch.float32)
        shared = grad_scores.view(-1, index.numel()).sum(0, dtype=sum_type)
        gradient.scatter_add_(0, index, shared.double())

    def split_gradient(self, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Split into gradients of the position table and of the time table, in their own types."""
        if self.bias is None or gradient is None:
            return None, None
        position, time = self.bias.position_weights, self.bias.time_weights
        seen = gradient.view(time.numel(), -1)[:, :-1]
        grad_position = torch.zeros_like(position)
        self._used_positions(grad_position).copy_(seen.sum(0))
        return grad_position, seen.sum(1).to(time.dtype)

    def _used_positions(self, position_table: Tensor) -> Tensor:
        first = self.coordinates.first
        return position_table[first : first + self.coordinates.columns - 1]

    def _index(self, tile: Tile) -> Tensor:
        """Return the place in the joint table of every pair, (G * m * n,) int32."""
        known = self.coordinates.indices
        if tile in known:
            return known[tile]
        at, last = self.coordinates, self.coordinates.columns - 1
        queries, keys = _of_tile(tile, *at.positions)
        if self.bias is None:
            index = (keys.unsqueeze(1) - queries.unsqueeze(2)).clamp_(0, last)
        else:
            index = self.bias.position_index(queries, keys - at.first)
            if at.order:
                queries, keys = _of_tile(tile, *at.order)
                index.masked_fill_(is_later(queries.unsqueeze(2), keys.unsqueeze(1)), last)
            index.clamp_(0, last)
        if at.rule is not None:
            queries, keys = _of_tile(tile, *at.tokens)
            index.masked_fill_(~at.rule(queries.unsqueeze(2), keys.unsqueeze(1)), last)
        if self.bias is not None:
            row = self.bias.time_index(*_of_tile(tile, *at.times)).int()
            index = index.add_(row, alpha=at.columns)
        index = index.view(-1)
        if tile.remembered:
            known[tile] = index
        return index


def unseen(dtype: torch.dtype) -> float:
    """Return the bias of a pair that is not to be seen; scores may still be added to it."""
    return torch.finfo(dtype).min / 2


def _of_tile(tile: Tile, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Take what a tile's queries (G, m) and keys (G, n) have, out of all (S,) of each."""
    m, n, width = tile.rows, tile.columns, tile.width
    return (
        queries.as_strided((tile.groups, m), (m, 1), tile.first_query),
        keys.as_strided((tile.groups, n), (width, 1), tile.first_key),
    )


def _coordinates(
    grouping: DomainGrouping, walk: Walk, bias: RelativeBias | None, named: tuple[Tensor, ...]
) -> _Coordinates:
    def of_walk(queries: Tensor, keys: Tensor, padding: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return (
            at_tokens(queries, walk.queries.tokens, padding[0]),
            at_tokens(keys, walk.keys.tokens, padding[1]),
        )

    padding = PADDING_QUERY, PADDING_KEY
    tokens: tuple[Tensor, ...] = ()
    if grouping.rule is not None:
        # A rule knows no padding; hidden it is anyway.
        last_token = grouping.num_tokens - 1
        tokens = tuple(x.tokens.clamp(max=last_token) for x in (walk.queries, walk.keys))
    order = of_walk(grouping.positions.int(), grouping.keys.positions.int(), padding)
    if bias is None:
        return _Coordinates(
            order,
            (),
            (),
            first=0,
            columns=2,
            tokens=tokens,
            rule=grouping.rule,
            named_by_id=named,
        )
    positions = bias.positions
    span = int(positions.max() - positions.min())
    if span >= bias.max_length:
        raise InputError(
            f"bias.positions span {span + 1} positions; bias.position_weights covers "
            f"{bias.max_length}: make the table longer or cut the histories"
        )
    # Where the bias has the positions that decide causality, its own index shows a later key.
    alike = all(torch.equal(positions, x.positions) for x in (grouping, grouping.keys))
    return _Coordinates(
        order if alike else of_walk(positions.int(), positions.int(), padding),
        of_walk(bias.next_timestamps, bias.timestamps, (0, 0)),
        () if alike else order,
        first=bias.max_length - 1 - span,
        columns=1 + span + (0 if alike else span) + 1,
        tokens=tokens,
        rule=grouping.rule,
        named_by_id=named,
    )
