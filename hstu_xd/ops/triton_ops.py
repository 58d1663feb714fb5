"""The fused kernels as operators of torch.library: eager, compiled and exported code call the same.

``torch.ops.hstu_xd.domain_attention`` and its gradients. Loading this module does not load triton;
the first call does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Integer tensors that say which pairs meet, and what the bias of a pair depends on.

    Attributes:
        query_tiles: (T, 4) int32, see :func:`hstu_xd.ops.tile_table.query_tiles`.
        key_tiles: (T, 4) int32, see :func:`hstu_xd.ops.tile_table.key_tiles`.
        query_tokens: (L,) int64, grouped order of the queries -> token of the batch.
        key_tokens: (L,) int64, grouped order of the keys -> token.
        query_order: (L,) int64, position of each token as a query, which decides causality.
        key_order: (L,) int64, position of each token as a key.
        positions: (L,) int64, position of each token for the bias; None without bias.
        next_times: (L,) int64, time of the event after each token; None without bias.
        times: (L,) int64, time of each token; None without bias.
    """

    query_tiles: Tensor
    key_tiles: Tensor
    query_tokens: Tensor
    key_tokens: Tensor
    query_order: Tensor
    key_order: Tensor
    positions: Tensor | None = None
    next_times: Tensor | None = None
    times: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """As an operator takes it: six tensors, or nine with a bias."""
        return [x for x in self if x is not None]


class Inputs(NamedTuple):
    """What every kernel is given.

    Attributes:
        q: (L, H, dqk) float.
        k: (L, H, dqk) float.
        v: (L, H, dv) float.
        position_weights: (2 N - 1,) float, or None.
        time_weights: (num_buckets + 1,) float, or None.
        plan: pairs and their coordinates.
        norm_length: the divisor ``N``.
        tile: rows of the tiles in ``plan``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    position_weights: Tensor | None
    time_weights: Tensor | None
    plan: Plan
    norm_length: int
    tile: int


@torch.library.custom_op("hstu_xd::domain_attention", mutates_args=())
def domain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    plan: Sequence[Tensor],
    norm_length: int,
    tile: int,
) -> Tensor:
    """Output (L, H, dv), contiguous; for the arguments see :class:`Inputs`."""
    from hstu_xd.ops import triton_launch

    tables = position_weights, time_weights
    return triton_launch.forward(Inputs(q, k, v, *tables, Plan(*plan), norm_length, tile))


@domain_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("hstu_xd::domain_attention_gradients", mutates_args=())
def domain_attention_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    plan: Sequence[Tensor],
    norm_length: int,
    tile: int,
    of_tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, contiguous, and of both tables, (0,) unless ``of_tables``."""
    from hstu_xd.ops import triton_launch

    tables = position_weights, time_weights
    inputs = Inputs(q, k, v, *tables, Plan(*plan), norm_length, tile)
    return triton_launch.gradients(grad_out, inputs, of_tables=of_tables)


@domain_attention_gradients.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    plan: Sequence[Tensor],
    norm_length: int,
    tile: int,
    of_tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(table: Tensor | None) -> Tensor:
        return table.new_empty(table.shape) if of_tables and table is not None else q.new_empty(0)

    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    return grad_q, grad_k, grad_v, like(position_weights), like(time_weights)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, plan, ctx.norm_length, ctx.tile = inputs
    ctx.save_for_backward(*tensors, *plan)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    # Nothing of the walk over pairs was kept: the gradients compute the scores again.
    # Activation checkpointing allows one look at the saved tensors.
    q, k, v, position_weights, time_weights, *plan = ctx.saved_tensors
    tables = position_weights, time_weights
    of_tables = any(ctx.needs_input_grad[3:5])
    *grads, by_position, by_time = domain_attention_gradients(
        grad_out, q, k, v, *tables, plan, ctx.norm_length, ctx.tile, of_tables
    )
    table_grads = (by_position, by_time) if of_tables else (None, None)
    return *grads, *table_grads, [None] * len(plan), None, None


domain_attention.register_autograd(_backward, setup_context=_remember)
