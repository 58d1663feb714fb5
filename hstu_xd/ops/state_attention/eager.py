"""DDSR's attention in plain PyTorch: tiles of queries on the rows of states that they may see.

A few consecutive tokens of a user read a small set of states, so that scores are matrix products;
see ``state_tiles``. The backward pass is written out: autograd's own gives the gradients of the
keys transposed, and turning them costs as much as the products. It sums in float32 or better.
"""

from typing import Any

import torch
from torch import Tensor
from torch import _softmax_backward_data as softmax_backward  # it has no public name
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hstu_xd.ops.state_attention.state_reads import QuestionReads, StateReads
from hstu_xd.ops.state_attention.state_tiles import StateTiles

# Gathered states and scores of one chunk of tiles: bounds memory at hundreds of domains (floats).
_CHUNK_FLOATS = 16_000_000


def eager_state_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: StateReads | QuestionReads,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute :func:`hstu_xd.ops.state_attention` tile by tile; see there for the arguments."""
    tiles, heads = reads.tiles, q.shape[1]
    key, value = k.flatten(1), v.flatten(1)
    queries = q.flatten(1).index_select(0, tiles.tokens.flatten())
    queries = queries.view(-1, tiles.tokens.shape[1], queries.shape[1])
    pairs = tiles.unseen if bias is None else tiles.ages
    # With padding kept one graph serves all sizes, so none of them may shape it.
    step = None if tiles.padded else _tiles_of_a_chunk(tiles, heads, q.shape[2] + v.shape[2])
    if step is None or step >= len(queries):
        answers = _attend(queries, key, value, tiles.rows, pairs, bias, heads)
    else:
        answers = torch.cat(
            [
                checkpoint(_attend, x, key, value, r, p, bias, heads, use_reentrant=False)
                for x, r, p in zip(*(x.split(step) for x in (queries, tiles.rows, pairs)))
            ]
        )
    return answers.flatten(0, 1).index_select(0, tiles.slots).unflatten(1, (heads, -1))


def _tiles_of_a_chunk(tiles: StateTiles, heads: int, widths: int) -> int:
    height, num_keys = tiles.tokens.shape[1], tiles.rows.shape[1]
    floats = heads * num_keys * (2 * widths + 3 * height)
    return max(1, _CHUNK_FLOATS // floats)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    pairs: Tensor,
    bias: Tensor | None,
    num_heads: int,
) -> Tensor:
    """Attend head by head: ``softmax_s(<q_t, k_s> + bias[pairs_ts]) v_s`` over what is seen.

    Args:
        query: (G, T, H * dqk) float, scaled.
        key: (W, H * dqk) float.
        value: (W, H * dv) float.
        rows: (G, S) int64, rows of ``key`` and ``value`` that a tile reads.
        pairs: (G, T, S) uint8, row of ``bias`` of each pair, the number of its rows where a key is
            not seen; without ``bias`` bool, True where a key is not seen. Every query sees a key.
        bias: (C, H) float, or None.
        num_heads: heads ``H``.

    Returns:
        (G, T, H * dv) of the type of ``key``.
    """
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _StateAttention.apply(query, key, value, bias, rows, pairs, num_heads)
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
        keys, values = (_take(x, rows, num_heads) for x in (key, value))
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
        grad_scores = softmax_backward(grad_scores, weights, 2, weights.dtype)
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
    """Bring the heads to the front: (G, n, H * d) -> (H * G, n, d), contiguous."""
    groups, n, width = x.shape
    split = x.reshape(groups, n, heads, width // heads).permute(2, 0, 1, 3)
    return split.reshape(heads * groups, n, width // heads)


def _heads_last(x: Tensor, heads: int) -> Tensor:
    """Bring the heads back: (H * G, n, d) -> (G, n, H * d), contiguous."""
    groups, n, width = x.shape[0] // heads, x.shape[1], x.shape[2]
    return x.view(heads, groups, n, width).permute(1, 2, 0, 3).reshape(groups, n, heads * width)


def _take(x: Tensor, rows: Tensor, heads: int) -> Tensor:
    """Take rows, the heads in front: (W, H * d), (G, n) -> (H * G, n, d)."""
    by_head = x.reshape(x.shape[0] * heads, x.shape[1] // heads)
    numbers = rows.flatten() * heads + torch.arange(heads, device=rows.device).unsqueeze(1)
    taken = by_head.index_select(0, numbers.flatten())
    return taken.view(heads * rows.shape[0], rows.shape[1], by_head.shape[1])


def _sum_rows(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sum what was taken from each row: (G, n, d), (G, n) -> (W, d)."""
    wide = _wide(x).flatten(0, 1)
    sums = wide.new_zeros(num_rows, x.shape[2])
    return sums.index_add_(0, rows.flatten(), wide).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Widen to float32 or better, for sums over tiles."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
