"""Domain attention by fused Triton kernels, as operators that PyTorch knows.

``triton_kernels`` holds the kernels and ``triton_launch`` their block sizes. Here stand the
operators ``torch.ops.hstu_xd.domain_attention`` and its gradients, which compiled and exported code
calls, a plain function of the same parts, which costs other code less, and what they need, prepared
without a wait of the host. Loading this module does not load triton; the first call does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.weak import WeakIdKeyDictionary

from hstu_xd.errors import InputError
from hstu_xd.ops.domain_attention.tile_table import KernelInputs, PairPlan
from hstu_xd.ops.grouping import DomainGrouping, outside_inference_mode
from hstu_xd.ops.relative_bias import RelativeBias
from hstu_xd.ops.triton_support import check_kernels_take, plain, rounds_to_tf32, traced


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    plan: Sequence[Tensor],
    norm_length: int,
    tile: int,
) -> Tensor:
    """Compute (L, H, dv), contiguous; for the arguments see :class:`KernelInputs`."""
    from hstu_xd.ops.domain_attention import triton_launch

    tables = position_weights, time_weights
    return triton_launch.forward(KernelInputs(q, k, v, *tables, PairPlan(*plan), norm_length, tile))


domain_attention = custom_op("hstu_xd::domain_attention", mutates_args=())(_attention)


@domain_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return v.new_empty(v.shape)


def _gradients(
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
    """Compute gradients of q, k, v, contiguous, and of both tables, (0,) unless ``of_tables``."""
    from hstu_xd.ops.domain_attention import triton_launch

    tables = position_weights, time_weights
    inputs = KernelInputs(q, k, v, *tables, PairPlan(*plan), norm_length, tile)
    return triton_launch.gradients(grad_out, inputs, of_tables=of_tables)


domain_attention_gradients = custom_op("hstu_xd::domain_attention_gradients", mutates_args=())(
    _gradients
)


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


def _backward(ctx: Any, grad_out: Tensor, *, by: Any = domain_attention_gradients) -> tuple:
    # Nothing of the walk over pairs was kept: the gradients compute the scores again.
    # Activation checkpointing allows one look at the saved tensors.
    q, k, v, position_weights, time_weights, *plan = ctx.saved_tensors
    tables = position_weights, time_weights
    of_tables = any(ctx.needs_input_grad[3:5])
    *grads, by_position, by_time = by(
        grad_out, q, k, v, *tables, plan, ctx.norm_length, ctx.tile, of_tables
    )
    table_grads = (by_position, by_time) if of_tables else (None, None)
    return *grads, *table_grads, [None] * len(plan), None, None


domain_attention.register_autograd(_backward, setup_context=_remember)


_plain = plain(_attention, _remember, _backward, _gradients)


# Of every grouping in use, its plans by tile height, with and without bias.
_plans = WeakIdKeyDictionary()


def fused_domain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None = None,
) -> Tensor:
    """Compute :func:`hstu_xd.ops.domain_attention` by the kernels: (L, H, dv).

    Raises:
        InputError: a dtype or a head width that the kernels do not have, tensors on a CPU without
            the interpreter, a grouping with a rule of its own, or (on CPU, where looking costs no
            wait) positions that the position table does not cover. On CUDA the rows of such
            positions come out as NaN.
    """
    check_kernels_take(q, v)
    if grouping.rule is not None:
        raise InputError(
            "grouping.rule narrows what queries see; impl 'triton' does not know such rules: use "
            "impl='eager'"
        )
    _check_positions(bias)
    if not grouping.num_tokens:
        # No tokens: nothing to launch, but still part of the graph.
        return v.clone()
    tile = _tile_height(q, v, grouping)
    plan = _plan(grouping, bias, tile)
    position_weights = time_weights = None
    if bias is not None:
        position_weights, time_weights = bias.position_weights, bias.time_weights
    attend = domain_attention if traced(q) else _plain
    return attend(q, k, v, position_weights, time_weights, plan.tensors(), norm_length, tile)


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


def _tile_height(q: Tensor, v: Tensor, grouping: DomainGrouping) -> int:
    """Choose the rows of a tile by what the host knows: nothing may wait for the device."""
    if q.device.type == "cpu":
        return 32
    wide = max(q.shape[2], v.shape[2]) > 128
    if wide or (q.dtype == torch.float32 and not rounds_to_tf32(q.dtype)):
        return 32
    if torch.compiler.is_compiling():
        # The mean length differs from batch to batch: it must not lead to another compilation.
        return 64
    mean_length = grouping.num_tokens / max(1, grouping.offsets.numel() - 1)
    return 32 if mean_length < 40 else 64


def _plan(grouping: DomainGrouping, bias: RelativeBias | None, tile: int) -> PairPlan:
    """Return the plan of a batch, made once for all layers of a model: they see the same pairs."""
    if torch.compiler.is_compiling():
        return PairPlan.build(grouping, bias, tile)
    known = _plans.setdefault(grouping, {})
    source = () if bias is None else (bias.positions, bias.timestamps, bias.next_timestamps)
    made_of, plan = known.get((tile, bias is None), (None, None))
    if plan is None or any(a is not b for a, b in zip(made_of, source)):
        with outside_inference_mode():
            plan = PairPlan.build(grouping, bias, tile)
        known[tile, bias is None] = source, plan
    return plan
