"""Softmax attention of tiles of queries on rows of a memory, with a learned bias a pair class.

The backward pass is written out: autograd's own gives the gradients of the keys transposed, and
turning them costs as much as the products. It sums in float32 or better.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def state_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    pairs: Tensor,
    *,
    num_heads: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend head by head: ``softmax_s(<q_t, k_s> + bias[pairs_ts]) v_s`` over what is seen.

    Args:
        query: (G, T, H * dqk) float, scaled.
        key: (W, H * dqk) float.
        value: (W, H * dv) float.
        rows: (G, S) int64, rows of ``key`` and ``value`` that a tile reads.
        pairs: (G, T, S) uint8, row of ``bias`` of each pair, the number of its rows where a key is
            not seen; without ``bias`` bool, True where a key is not seen. Every query sees a key.
        num_heads: heads ``H``.
        bias: (C, H) float, or None.

    Returns:
        (G, T, H * dv) of the type of ``key``.
    """
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _StateAttention.apply(
            query.to(key.dtype), key, value, bias, rows, pairs, num_heads
        )
    return out


class _StateAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        pairs: Tensor,
        num_heads: int,
    ) -> Tensor:
        queries = _heads_first(query, num_heads)
        keys, values = (_heads_first(_take(x, rows), num_heads) for x in (key, value))
        if bias is None:
            scores = queries.bmm(keys.transpose(1, 2))
            scores.view(num_heads, *pairs.shape).masked_fill_(pairs, float("-inf"))
        else:
            unseen = bias.new_full((1, num_heads), float("-inf"))
            table = torch.cat([bias, unseen]).t().to(key.dtype).contiguous()
            scores = table.index_select(1, pairs.flatten().long())
            scores = scores.view(-1, *pairs.shape[1:]).baddbmm_(queries, keys.transpose(1, 2))
        weights = scores.softmax(2)
        ctx.num_heads, ctx.num_rows = num_heads, key.shape[0]
        ctx.save_for_backward(queries, keys, values, bias, rows, pairs, weights)
        return _heads_last(weights.bmm(values), num_heads)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]  # the decorator makes ctx positional only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, bias, rows, pairs, weights = ctx.saved_tensors
        heads = ctx.num_heads
        grad = _heads_first(grad_outputs[0], heads)
        grad_values = weights.transpose(1, 2).bmm(grad)
        grad_scores = grad.bmm(values.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_scores, weights, 2, weights.dtype)
        grad_query = _heads_last(grad_scores.bmm(keys), heads)
        grad_keys = grad_scores.transpose(1, 2).bmm(queries)
        grad_key, grad_value = (
            _sum_rows(_heads_last(x, heads), rows, ctx.num_rows) for x in (grad_keys, grad_values)
        )
        grad_bias = None
        if bias is not None:
            grad_scores = _wide(grad_scores)
            # One column more than the bias has rows: what is not seen.
            sums = grad_scores.new_zeros(heads, len(bias) + 1)
            sums.index_add_(1, pairs.flatten().long(), grad_scores.view(heads, -1))
            # Laid out as the table is, or DDP would copy it in every step.
            grad_bias = sums[:, :-1].t().to(bias.dtype).contiguous()
        return grad_query, grad_key, grad_value, grad_bias, None, None, None


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """(G, n, H * d) -> (H * G, n, d), contiguous."""
    groups, n, width = x.shape
    split = x.reshape(groups, n, heads, width // heads).permute(2, 0, 1, 3)
    return split.reshape(heads * groups, n, width // heads)


def _heads_last(x: Tensor, heads: int) -> Tensor:
    """(H * G, n, d) -> (G, n, H * d), contiguous."""
    groups, n, width = x.shape[0] // heads, x.shape[1], x.shape[2]
    return x.view(heads, groups, n, width).permute(1, 2, 0, 3).reshape(groups, n, heads * width)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """(W, d), (G, n) -> (G, n, d)."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, x.shape[1])


def _sum_rows(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Transpose of :func:`_take`: (G, n, d), (G, n) -> (W, d)."""
    wide = _wide(x).flatten(0, 1)
    sums = wide.new_zeros(num_rows, x.shape[2])
    return sums.index_add_(0, rows.flatten(), wide).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """At least float32, for sums over tiles."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
