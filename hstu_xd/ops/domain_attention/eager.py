"""Regrouped domain attention in plain PyTorch: cost sum_d s_d^2 / 2, memory linear in the tokens.

Forward and backward walk over tiles (a block of query rows against the keys they may see) and keep
no tile: the backward pass computes the scores again. Scores of a tile are (H * G, m, n), with all
keys that a query may see in its row. What is not to be seen gets a large negative bias: weights and
their gradients are exactly zero there. A :class:`Normalization` makes weights of scores; nothing
else differs between SiLU and softmax.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from hstu_xd.ops.domain_attention.pair_bias import PairBias, unseen
from hstu_xd.ops.domain_attention.tiles import walk
from hstu_xd.ops.grouping import DomainGrouping
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
            return torch.zeros_like(v)
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
