"""DDSR's attention by fused Triton kernels: memory linear in the tokens, no wait of the host.

``triton_kernels`` holds the kernels, ``state_table`` what they walk over, ``triton_launch`` their
block sizes. Here stand the operators ``torch.ops.hstu_xd.state_attention`` and its gradients, which
compiled and exported code calls, and a plain function of the same parts, which costs other code
less. Loading this module does not load triton; the first call does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from hstu_xd.ops.state_attention.state_reads import StateReads
from hstu_xd.ops.state_attention.state_table import StateKernelInputs, StateTable
from hstu_xd.ops.triton_support import check_kernels_take, plain, traced


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    table: Sequence[Tensor],
    tile: int,
    states_per_domain: int,
) -> tuple[Tensor, Tensor]:
    """Compute (L, H, dv) and (L, H) float32 logarithms of the softmax's denominators, contiguous.

    The arguments are those of :class:`StateKernelInputs`, ``table`` by its tensors.
    """
    from hstu_xd.ops.state_attention import triton_launch

    layout = StateTable(*table, tile=tile, states_per_domain=states_per_domain)
    return triton_launch.forward(StateKernelInputs(q, k, v, bias, layout))


state_attention = custom_op("hstu_xd::state_attention", mutates_args=())(_attention)


@state_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    length, heads, _ = q.shape
    return v.new_empty(length, heads, v.shape[2]), q.new_empty(length, heads, dtype=torch.float32)


def _gradients(
    grad_out: Tensor,
    out: Tensor,
    log_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    table: Sequence[Tensor],
    tile: int,
    states_per_domain: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute gradients of q, k, v and the bias, (0,) where there is none; contiguous."""
    from hstu_xd.ops.state_attention import triton_launch

    layout = StateTable(*table, tile=tile, states_per_domain=states_per_domain)
    inputs = StateKernelInputs(q, k, v, bias, layout)
    return triton_launch.gradients(grad_out, out, log_mass, inputs)


state_attention_gradients = custom_op("hstu_xd::state_attention_gradients", mutates_args=())(
    _gradients
)


@state_attention_gradients.register_fake
def _(
    grad_out: Tensor,
    out: Tensor,
    log_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, table, ctx.tile, ctx.states_per_domain = inputs
    ctx.save_for_backward(*output, q, k, v, bias, *table)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_out: Tensor | None,
    _grad_log_mass: Tensor | None,
    *,
    by: Any = state_attention_gradients,
) -> tuple:
    # Activation checkpointing allows one look at them.
    out, log_mass, q, k, v, bias, *table = ctx.saved_tensors
    no_table = [None] * len(table)
    if grad_out is None:
        return None, None, None, None, no_table, None, None
    *grads, grad_bias = by(
        grad_out, out, log_mass, q, k, v, bias, table, ctx.tile, ctx.states_per_domain
    )
    return *grads, None if bias is None else grad_bias, no_table, None, None


state_attention.register_autograd(_backward, setup_context=_remember)


_plain = plain(_attention, _remember, _backward, _gradients)


def fused_state_attention(
    q: Tensor, k: Tensor, v: Tensor, reads: StateReads, *, bias: Tensor | None = None
) -> Tensor:
    """Compute :func:`hstu_xd.ops.state_attention` by the kernels; see there for the arguments.

    Raises:
        InputError: a dtype or a head width that the kernels do not have, or tensors on a CPU
            without the interpreter.
    """
    check_kernels_take(q, v)
    table = reads.table
    attend = state_attention if traced(q) else _plain
    out, _ = attend(q, k, v, bias, table.tensors(), table.tile, table.states_per_domain)
    return out
