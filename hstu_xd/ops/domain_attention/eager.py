"""Regrouped domain attention in plain PyTorch: cost sum_d s_d^2 / 2, memory linear in the tokens.

Forward and backward walk over tiles (a block of query rows against the keys they may see) and keep
no tile: the backward pass computes the scores again. Scores of a tile are (H * G, m, n), with all
keys that a query may see in its row. A :class:`Normalization` makes weights of scores; nothing else
differs between SiLU and softmax.

Bias and visibility of every pair are one look-up in one table, :class:`PairBias`. Its row ``b``
belongs to time bucket ``b``, a column to a row of the position table. The last column is hugely
negative, for pairs that are not to be seen (later keys, padding, and what a rule of the grouping
hides): weights and their gradients are exactly zero there. A pair's index into the table depends on
tokens and times alone, so all layers of a model share it.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from hstu_xd.ops.domain_attention.tiles import (
    PADDING_KEY,
    PADDING_QUERY,
    Tile,
    Walk,
    at_tokens,
    walk,
)
from hstu_xd.ops.grouping import DomainGrouping, PairRule, is_later
from hstu_xd.ops.relative_bias import RelativeBias


class Normalization(Protocol):
    """Compute weights of a tile and the gradient of its scores.

    Memory is used again where that is said.
    """

    def weights(self, scores: Tensor) -> Tensor:
        """Return weights, zero where the query does not see the key; overwrites ``scores``."""
        ...

    def differentiable_weights(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and a second tensor alike, both for :meth:`score_gradient`."""
        ...

    def score_gradient(
        self, weights: Tensor, kept: Tensor, grad_out: Tensor, values: Tensor
    ) -> Tensor:
        """Return the gradient of the scores; overwrites ``weights`` and ``kept``.

        Args:
            weights, kept: of :meth:`differentiable_weights`.
            grad_out: (H * G, m, dv) gradient of the weighted sum of values.
            values: (H * G, n, dv).
        """
        ...


class SiLU:
    """``w = s sigmoid(s)``; it and its slope are exactly zero at a hugely negative score."""

    def weights(self, scores: Tensor) -> Tensor:
        """Return ``silu(s)``."""
        return silu(scores, inplace=True)

    def differentiable_weights(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``silu(s)`` and the gate ``sigmoid(s)``."""
        gate = torch.sigmoid(scores)
        return scores.mul_(gate), gate

    def score_gradient(
        self, weights: Tensor, kept: Tensor, grad_out: Tensor, values: Tensor
    ) -> Tensor:
        """Return ``dw (gate + w (1 - gate))``."""
        slope = weights.addcmul_(weights, kept, value=-1).add_(kept)
        return torch.bmm(grad_out, values.transpose(1, 2), out=kept).mul_(slope)


class Softmax:
    """``w = softmax(s)`` over the keys that a query sees; zero where it sees none."""

    def weights(self, scores: Tensor) -> Tensor:
        """Return ``softmax(s)``."""
        sees = scores.amax(2, keepdim=True) > unseen(scores.dtype) / 2
        return scores.softmax(2).mul_(sees)

    def differentiable_weights(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``softmax(s)``, and memory that is free from now on."""
        return self.weights(scores), scores

    def score_gradient(
        self, weights: Tensor, kept: Tensor, grad_out: Tensor, values: Tensor
    ) -> Tensor:
        """Return ``w (dw - sum(w dw))``."""
        grad = torch.bmm(grad_out, values.transpose(1, 2), out=kept)
        return grad.sub_((weights * grad).sum(2, keepdim=True)).mul_(weights)


def eager_domain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None = None,
    normalization: str = "silu",
) -> Tensor:
    """Compute :func:`hstu_xd.ops.domain_attention`: (L, H, dqk) twice, (L, H, dv) -> (L, H, dv)."""
    scheme: Normalization = SiLU()
    if normalization == "softmax":
        scheme, q, norm_length = Softmax(), q * q.shape[2] ** -0.5, 1
    position_weights = None if bias is None else bias.position_weights
    time_weights = None if bias is None else bias.time_weights
    out: Tensor = _GroupedAttention.apply(
        q, k, v, position_weights, time_weights, grouping, norm_length, bias, scheme
    )
    return out


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_weights: Tensor | None,
        time_weights: Tensor | None,
        grouping: DomainGrouping,
        norm_length: int,
        bias: RelativeBias | None,
        scheme: Normalization,
    ) -> Tensor:
        heads = q.shape[1]
        plan = walk(grouping, heads)
        if plan is None:
            ctx.plan = None
            ctx.save_for_backward(q, k, v, position_weights, time_weights)
            return v.new_zeros(*q.shape[:2], v.shape[2])
        pairs = PairBias.build(grouping, plan, bias)
        flat_q, flat_k, flat_v = plan.queries.gather(q), plan.keys.gather(k), plan.keys.gather(v)
        table = pairs.table(q)
        ctx.plan = plan, pairs, norm_length, scheme
        ctx.save_for_backward(flat_q, flat_k, flat_v, table)
        out = plan.queries.zeros(v, v.dtype)
        for tile in plan.tiles:
            queries, out_rows = tile.queries(flat_q, heads), tile.queries(out, heads)
            keys, values = tile.keys(flat_k, heads), tile.keys(flat_v, heads)
            scores = _scores(queries, keys, pairs.look_up(table, tile))
            torch.bmm(scheme.weights(scores), values, out=out_rows)
        return plan.queries.scatter(out).div_(norm_length)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]  # the decorator makes ctx positional only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.plan is None:
            zeros = (None if x is None else torch.zeros_like(x) for x in ctx.saved_tensors)
            return (*zeros, None, None, None, None)
        plan, pairs, norm_length, scheme = ctx.plan
        flat_q, flat_k, flat_v, table = ctx.saved_tensors
        flat_grad = plan.queries.gather(grad_outputs[0]).div_(norm_length)
        # Gradients of keys and values are sums over tiles.
        sum_type = torch.promote_types(flat_q.dtype, torch.float32)
        dq = plan.queries.zeros(flat_q, flat_q.dtype)
        dk, dv = (plan.keys.zeros(x, sum_type) for x in (flat_k, flat_v))
        gradient = pairs.empty_gradient()
        for tile in plan.tiles:
            queries, grad_out = (tile.queries(x, plan.heads) for x in (flat_q, flat_grad))
            keys, values = (tile.keys(x, plan.heads) for x in (flat_k, flat_v))
            dk_rows, dv_rows = (tile.keys(x, plan.heads) for x in (dk, dv))
            scores = _scores(queries, keys, pairs.look_up(table, tile))
            weights, kept = scheme.differentiable_weights(scores)
            _add_product(dv_rows, weights.transpose(1, 2), grad_out, tile.is_first)
            grad_scores = scheme.score_gradient(weights, kept, grad_out, values)
            torch.bmm(grad_scores, keys, out=tile.queries(dq, plan.heads))
            _add_product(dk_rows, grad_scores.transpose(1, 2), queries, tile.is_first)
            if gradient is not None:
                pairs.add_gradient(gradient, tile, grad_scores)
        return (
            plan.queries.scatter(dq),
            plan.keys.scatter(dk).to(flat_k.dtype),
            plan.keys.scatter(dv).to(flat_v.dtype),
            *pairs.split_gradient(gradient),
            None,
            None,
            None,
            None,
        )


def _scores(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Compute scores with bias: (H * G, m, d), (H * G, n, d), (G, m, n) -> (H * G, m, n)."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    scores.view(-1, *bias.shape).add_(bias)  # all heads share it
    return scores


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """Add ``a @ b`` to the total; ``is_first``: it is still zero."""
    if is_first and total.dtype == a.dtype:
        torch.bmm(a, b, out=total)
    else:
        total.add_(torch.bmm(a, b))


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
    def build(cls, grouping: DomainGrouping, plan: Walk, bias: RelativeBias | None) -> "PairBias":
        """Tie a bias to the pairs of a walk, with what other layers computed of them."""
        named: tuple[Tensor, ...] = ()
        sizes: tuple[int, ...] = ()
        if bias is not None:
            named = bias.positions, bias.timestamps, bias.next_timestamps
            sizes = bias.max_length, bias.time_weights.numel()
        key = (*map(id, named), *sizes)
        if key not in plan.memo:
            plan.memo[key] = _coordinates(grouping, plan, bias, named)
        return cls(bias, plan.memo[key])

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
        index = self._index(tile)
        sum_type = torch.promote_types(grad_scores.dtype, torch.float32)
        shared = grad_scores.view(-1, index.numel()).sum(0, dtype=sum_type)
        gradient.index_add_(0, index, shared.double())

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
            row = self.bias.time_index(*_of_tile(tile, *at.times))
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
    grouping: DomainGrouping, plan: Walk, bias: RelativeBias | None, named: tuple[Tensor, ...]
) -> _Coordinates:
    def of_walk(queries: Tensor, keys: Tensor, padding: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return (
            at_tokens(queries, plan.queries.tokens, padding[0]),
            at_tokens(keys, plan.keys.tokens, padding[1]),
        )

    padding = PADDING_QUERY, PADDING_KEY
    tokens: tuple[Tensor, ...] = ()
    if grouping.rule is not None:
        # A rule knows no padding; hidden it is anyway.
        both = (plan.queries, grouping), (plan.keys, grouping.keys)
        tokens = tuple(x.tokens.clamp(max=of.num_tokens - 1) for x, of in both)
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
    keys = grouping.keys
    positions = grouping.of_tokens(bias.positions), keys.of_tokens(bias.positions)
    times = grouping.of_tokens(bias.next_timestamps), keys.of_tokens(bias.timestamps)
    span = bias.check_span()
    # Where the bias has the positions that decide causality, its own index shows a later key.
    alike = all(torch.equal(own, x.positions) for own, x in zip(positions, (grouping, keys)))
    return _Coordinates(
        order if alike else of_walk(positions[0].int(), positions[1].int(), padding),
        of_walk(times[0], times[1], (0, 0)),
        () if alike else order,
        first=bias.max_length - 1 - span,
        columns=1 + span + (0 if alike else span) + 1,
        tokens=tokens,
        rule=grouping.rule,
        named_by_id=named,
    )
