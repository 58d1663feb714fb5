"""Domain attention by fused Triton kernels, as operators that PyTorch knows.

``triton_kernels`` holds the kernels and ``triton_launch`` their block sizes. Here stand the
operators ``torch.ops.hstu_xd.domain_attention`` and its gradients, which eager, compiled and
exported code call alike, and what they need, prepared without a wait of the host. Loading this
module does not load triton; the first call does.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hstu_xd.errors import InputError
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.relative_bias import RelativeBias
from hstu_xd.ops.row_tiles import key_tiles, query_tiles


class Plan(NamedTuple):
    """Integer tensors that say which pairs meet, and what the bias of a pair depends on.

    Attributes:
        query_tiles: (T, 4) int32, see :func:`hstu_xd.ops.row_tiles.query_tiles`.
        key_tiles: (T, 4) int32, see :func:`hstu_xd.ops.row_tiles.key_tiles`.
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
    from hstu_xd.ops.domain_attention import triton_launch

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
    from hstu_xd.ops.domain_attention import triton_launch

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


_FOUND = find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD = 256

# Of every grouping in use, its tile tables by tile height: all layers of a model share them.
_tile_tables = WeakIdKeyDictionary()


def installed() -> bool:
    """Whether the kernels can run here: triton, and a CUDA device or Triton's interpreter."""
    return _FOUND and (torch.cuda.is_available() or _interpreting())


def suits(q: Tensor, v: Tensor) -> bool:
    """Whether "auto" takes the kernels: for tensors on a CUDA device that they accept."""
    width = max(q.shape[2], v.shape[2])
    return q.is_cuda and q.dtype in DTYPES and width <= WIDEST_HEAD and installed()


def fused_domain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None = None,
) -> Tensor:
    """See :func:`hstu_xd.ops.domain_attention`; q, k (L, H, dqk), v (L, H, dv) -> (L, H, dv).

    Raises:
        InputError: a dtype or a head width that the kernels do not have, tensors on a CPU without
            the interpreter, or (on CPU, where looking costs no wait) positions that the position
            table does not cover. On CUDA the rows of such positions come out as NaN.
    """
    check_kernels_take(q, v)
    _check_positions(bias)
    if not grouping.num_tokens:
        # No tokens: nothing to launch, but still part of the graph.
        return v.clone()
    keys = grouping.keys
    tile = _tile_height(q, v, grouping)
    plan = Plan(
        *_tables(grouping, tile),
        query_tokens=grouping.permutation,
        key_tokens=keys.permutation,
        query_order=grouping.positions,
        key_order=keys.positions,
    )
    position_weights = time_weights = None
    if bias is not None:
        position_weights, time_weights = bias.position_weights, bias.time_weights
        plan = plan._replace(
            positions=bias.positions, next_times=bias.next_timestamps, times=bias.timestamps
        )
    return domain_attention(
        q, k, v, position_weights, time_weights, plan.tensors(), norm_length, tile
    )


def check_kernels_take(q: Tensor, v: Tensor) -> None:
    """Refuse (L, H, d) tensors of a type, a width or a device that the kernels do not have."""
    if q.dtype not in DTYPES:
        raise InputError(
            f"q is {q.dtype}; impl 'triton' needs float32, float16 or bfloat16: "
            "convert q, k and v or use impl='eager'"
        )
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[2] > WIDEST_HEAD:
            raise InputError(
                f"{name} has heads of width {tensor.shape[2]}; impl 'triton' takes up to "
                f"{WIDEST_HEAD}: use more heads or impl='eager'"
            )
    if q.device.type == "cpu" and not _interpreting():
        raise InputError(
            f"q is on {q.device}; impl 'triton' needs a CUDA device, or TRITON_INTERPRET=1 set "
            "before triton is imported: use impl='eager'"
        )


def _check_positions(bias: RelativeBias | None) -> None:
    if bias is None or bias.positions.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bias.positions.numel():
        span = int(bias.positions.max() - bias.positions.min())
        if span >= bias.max_length:
            raise InputError(
                f"bias.positions span {span + 1} positions; bias.position_weights covers "
                f"{bias.max_length}: make the table longer or cut the histories"
            )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _tile_height(q: Tensor, v: Tensor, grouping: DomainGrouping) -> int:
    """Rows of a tile, from what the host knows: nothing here may wait for the device."""
    if q.device.type == "cpu":
        return 32
    wide = max(q.shape[2], v.shape[2]) > 128
    if wide or q.dtype == torch.float32:
        return 32
    if torch.compiler.is_compiling():
        # The mean length differs from batch to batch: it must not lead to another compilation.
        return 64
    mean_length = grouping.num_tokens / max(1, grouping.offsets.numel() - 1)
    return 32 if mean_length < 40 else 64


def _tables(grouping: DomainGrouping, tile: int) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return query_tiles(grouping, tile), key_tiles(grouping, tile)
    known = _tile_tables.setdefault(grouping, {})
    if tile not in known:
        known[tile] = query_tiles(grouping, tile), key_tiles(grouping, tile)
    return known[tile]
