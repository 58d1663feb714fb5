"""Regrouped domain attention in plain PyTorch: cost sum_d s_d^2 / 2, memory linear in the tokens.

Forward and backward walk over tiles (a block of query rows against the keys they may see) and keep
no tile: the backward pass computes the scores again. Causality is a large negative number added
to the bias of a tile, shared by all heads: SiLU and its derivative are exactly zero there. Padding
needs no mask at all, since padded values and padded output gradients are zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.grouping import DomainGrouping
from hstu_xd.ops.buckets import Bucket
from hstu_xd.ops.relative_bias import RelativeBias

# Rows of a query block: half a block of every row's keys is wasted on the causal diagonal.
_BLOCK_ROWS = 64
# Scores of one tile, so that the few tiles alive at once stay in the processor's cache.
_TILE_SCORES = 200_000


def eager_domain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None = None,
) -> Tensor:
    """See :func:`hstu_xd.ops.domain_attention`; (L, H, dqk), (L, H, dqk), (L, H, dv) -> (L, H, dv)."""
    position_weights = None if bias is None else bias.position_weights
    time_weights = None if bias is None else bias.time_weights
    out: Tensor = _GroupedAttention.apply(
        q, k, v, position_weights, time_weights, grouping, norm_length, bias
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
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position_weights, time_weights)
        ctx.plan = grouping, norm_length, bias
        heads = q.shape[1]
        queries, keys, values = _head_major(q), _head_major(k), _head_major(v)
        out = torch.zeros_like(values)
        for chunk in _chunks(grouping.buckets, heads):
            chunk_q = chunk.gather(queries, chunk.query_tokens)
            chunk_k = chunk.gather(keys, chunk.key_tokens)
            chunk_v = chunk.gather(values, chunk.key_tokens)
            chunk_out = chunk_v.new_zeros(*chunk_q.shape[:2], v.shape[2])
            for rows, columns in chunk.tiles():
                scores = _scores(chunk, rows, columns, chunk_q, chunk_k, bias)
                weights = torch.sigmoid(scores).mul_(scores)
                torch.bmm(weights, chunk_v[:, :columns], out=chunk_out[:, rows])
            chunk.scatter(out, chunk.query_tokens, chunk_out)
        return out[:, :-1].transpose(0, 1).div(norm_length)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position_weights, time_weights = ctx.saved_tensors
        grouping, norm_length, bias = ctx.plan
        queries, keys, values = _head_major(q), _head_major(k), _head_major(v)
        grad_out = _head_major(grad_outputs[0] / norm_length)
        grad_q, grad_k, grad_v = map(torch.zeros_like, (queries, keys, values))
        tables = _TableGradients.like(position_weights, time_weights)
        for chunk in _chunks(grouping.buckets, q.shape[1]):
            chunk_q = chunk.gather(queries, chunk.query_tokens)
            chunk_k = chunk.gather(keys, chunk.key_tokens)
            chunk_v = chunk.gather(values, chunk.key_tokens)
            chunk_grad = chunk.gather(grad_out, chunk.query_tokens)
            dq, dk, dv = map(torch.zeros_like, (chunk_q, chunk_k, chunk_v))
            for rows, columns in chunk.tiles():
                row_q, row_grad = chunk_q[:, rows], chunk_grad[:, rows]
                scores = _scores(chunk, rows, columns, chunk_q, chunk_k, bias)
                gate = torch.sigmoid(scores)
                weights = scores.mul_(gate)
                dv[:, :columns].baddbmm_(weights.transpose(1, 2), row_grad)
                # d SiLU(s) / ds = gate + s gate (1 - gate), built in place.
                slope = weights.addcmul_(weights, gate, value=-1).add_(gate)
                grad_scores = torch.bmm(row_grad, chunk_v[:, :columns].transpose(1, 2)).mul_(slope)
                torch.bmm(grad_scores, chunk_k[:, :columns], out=dq[:, rows])
                dk[:, :columns].baddbmm_(grad_scores.transpose(1, 2), row_q)
                if bias is not None:
                    tables.add(chunk, rows, columns, bias, grad_scores)
            chunk.scatter(grad_q, chunk.query_tokens, dq)
            chunk.scatter(grad_k, chunk.key_tokens, dk)
            chunk.scatter(grad_v, chunk.key_tokens, dv)
        tokens_first = (x[:, :-1].transpose(0, 1) for x in (grad_q, grad_k, grad_v))
        return (*tokens_first, *tables.cast(bias), None, None, None)


def _head_major(x: Tensor) -> Tensor:
    """(L, H, d) -> (H, L + 1, d) contiguous, with a zero row that padding slots point at."""
    return pad(x.transpose(0, 1), (0, 0, 0, 1))


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some groups of a bucket, few enough for their tiles to stay small. Row views share memory."""

    bucket: Bucket
    first: int
    last: int
    heads: int

    @property
    def groups(self) -> slice:
        return slice(self.first, self.last)

    @property
    def query_tokens(self) -> Tensor:
        return self.bucket.query_tokens[self.groups]

    @property
    def key_tokens(self) -> Tensor:
        return self.bucket.key_tokens[self.groups]

    def gather(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(H, L + 1, d) -> (H * G, m, d), head-major so that a bias is shared by expansion."""
        rows = x.index_select(1, tokens.reshape(-1))
        return rows.view(self.heads * tokens.shape[0], tokens.shape[1], x.shape[2])

    def scatter(self, x: Tensor, tokens: Tensor, rows: Tensor) -> None:
        """Inverse of gather; a token stands in one chunk only. Padding lands in the spare row."""
        x.index_copy_(1, tokens.reshape(-1), rows.view(self.heads, -1, x.shape[2]))

    def tiles(self) -> Iterator[tuple[slice, int]]:
        """Blocks of query rows with the number of leading key columns that they may see."""
        num_rows = self.bucket.query_tokens.shape[1]
        for start in range(0, num_rows, _BLOCK_ROWS):
            rows = slice(start, min(start + _BLOCK_ROWS, num_rows))
            columns = self.bucket.key_end(rows.stop)
            if columns:
                yield rows, columns


def _chunks(buckets: list[Bucket], heads: int) -> Iterator[_Chunk]:
    for bucket in buckets:
        num_groups, num_rows = bucket.query_tokens.shape
        tile = heads * min(num_rows, _BLOCK_ROWS) * bucket.key_tokens.shape[1]
        step = max(1, _TILE_SCORES // tile)
        for first in range(0, num_groups, step):
            yield _Chunk(bucket, first, min(first + step, num_groups), heads)


def _scores(
    chunk: _Chunk,
    rows: slice,
    columns: int,
    chunk_q: Tensor,
    chunk_k: Tensor,
    bias: RelativeBias | None,
) -> Tensor:
    """Scores of a tile with bias, (H * G, rows, columns); hugely negative where j > i."""
    shared = _shared_bias(chunk, rows, columns, bias, chunk_q)
    row_q, key_t = chunk_q[:, rows], chunk_k[:, :columns].transpose(1, 2)
    shape = (chunk.heads, chunk.last - chunk.first, *shared.shape[1:])
    scores = shared.new_empty(shape).copy_(shared).view(-1, *shared.shape[1:])
    return scores.baddbmm_(row_q, key_t)


def _shared_bias(
    chunk: _Chunk, rows: slice, columns: int, bias: RelativeBias | None, like: Tensor
) -> Tensor:
    """What all heads of a tile share, bias and causal mask: (G or 1, rows, columns)."""
    bucket = chunk.bucket
    lowest = torch.finfo(like.dtype).min / 2
    if bias is None:
        num_groups = 1 if bucket.aligned else chunk.last - chunk.first
        shared = like.new_zeros(num_groups, rows.stop - rows.start, columns)
    else:
        position, time = _bias_indices(chunk, rows, columns, bias)
        shared = _lookup(bias.position_weights, position).add_(_lookup(bias.time_weights, time))
        shared = shared.to(like.dtype)
    if bucket.aligned:
        diagonal = torch.ones(
            rows.stop - rows.start, columns - rows.start, dtype=torch.bool, device=like.device
        )
        shared[:, :, rows.start :].masked_fill_(diagonal.triu(1), lowest)
        return shared
    query_positions = bucket.query_positions[chunk.groups, rows]
    later = bucket.key_positions[chunk.groups, None, :columns] > query_positions.unsqueeze(2)
    return shared.masked_fill_(later, lowest)


def _lookup(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1).int()).view(index.shape)


def _bias_indices(
    chunk: _Chunk, rows: slice, columns: int, bias: RelativeBias
) -> tuple[Tensor, Tensor]:
    """Rows of both bias tables for a tile, computed once a batch: one small integer a pair."""
    num_buckets = bias.time_weights.numel() - 1
    key = (
        id(bias.timestamps),
        id(bias.next_timestamps),
        bias.max_length,
        num_buckets,
        chunk.first,
        chunk.last,
        rows.start,
    )
    memo = chunk.bucket.memo
    if key not in memo:
        spare = bias.timestamps.numel() - 1
        query_tokens = chunk.query_tokens[:, rows].clamp(max=spare)
        key_tokens = chunk.key_tokens[:, :columns].clamp(max=spare)
        time = bias.time_index(bias.next_timestamps[query_tokens], bias.timestamps[key_tokens])
        position = bias.position_index(bias.positions[query_tokens], bias.positions[key_tokens])
        position_type = torch.int16 if bias.max_length < 2**14 else torch.int32
        time_type = torch.uint8 if num_buckets < 2**8 else torch.int32
        # The tensors that the key names by id are kept alive with it.
        memo[key] = (
            position.to(position_type),
            time.to(time_type),
            bias.timestamps,
            bias.next_timestamps,
        )
    position, time, *_ = memo[key]
    return position, time


@dataclass(frozen=True, eq=False)
class _TableGradients:
    """Gradients of the two bias tables, summed in float64: thousands of pairs meet in one row."""

    position: Tensor | None
    time: Tensor | None

    @classmethod
    def like(cls, position: Tensor | None, time: Tensor | None) -> "_TableGradients":
        tables = (position, time)
        return cls(*(None if x is None else torch.zeros_like(x, dtype=torch.float64) for x in tables))

    def cast(self, bias: RelativeBias | None) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients in the tables' own types."""
        if bias is None or self.position is None or self.time is None:
            return None, None
        return self.position.to(bias.position_weights.dtype), self.time.to(bias.time_weights.dtype)

    def add(
        self, chunk: _Chunk, rows: slice, columns: int, bias: RelativeBias, grad_scores: Tensor
    ) -> None:
        """Add a tile's (H * G, rows, columns) score gradients."""
        num_groups = chunk.last - chunk.first
        shared = grad_scores.view(chunk.heads, num_groups, *grad_scores.shape[1:]).sum(0).double()
        for table, index in zip(
            (self.position, self.time), _bias_indices(chunk, rows, columns, bias)
        ):
            assert table is not None
            table.scatter_add_(0, index.reshape(-1).long(), shared.view(-1))
