"""Launches of the fused DDSR kernels: block sizes, output buffers, and what is left to reduce."""

from typing import Any

import torch
import triton
from torch import Tensor

from hstu_xd.ops.relative_bias import bucket_edges
from hstu_xd.ops.state_attention import triton_kernels as kernels
from hstu_xd.ops.state_attention.state_table import StateKernelInputs, StateTable, key_height
from hstu_xd.ops.triton_blocks import INTERPRETED, computable, precision, strides, widths

# Shares of the tiles in which gradients of initial states are summed, and numbers in all of them.
_MOST_SHARES, _MOST_NUMBERS = (2 if INTERPRETED else 64), 2**24


def forward(inputs: StateKernelInputs) -> tuple[Tensor, Tensor]:
    """Compute (L, H, dv) and (L, H) float32 logarithms of the softmax's denominators."""
    given = _computable(inputs)
    length, heads = given.q.shape[:2]
    out = given.v.new_empty(length, heads, given.v.shape[2])
    log_mass = out.new_empty(length, heads, dtype=torch.float32)
    table = given.table
    _launch(
        kernels.forward_kernel,
        given,
        len(table.tiles),
        TILE=table.tile,
        out=out,
        log_mass=log_mass,
        **_walk(table),
        **strides(out=out),
    )
    return out.to(inputs.v.dtype), log_mass


def gradients(
    grad_out: Tensor, out: Tensor, log_mass: Tensor, inputs: StateKernelInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute gradients of q, k, v and of the bias, (0,) where there is none."""
    given = _computable(inputs)
    out, grad_out = computable(out), computable(grad_out.to(inputs.v.dtype))
    inner = torch.empty_like(log_mass)
    grad_q, by_age = _query_gradient(grad_out, out, log_mass, inner, given)
    shared = {"log_mass": log_mass, "grad_out": grad_out, "inner": inner}
    grad_k, grad_v = _key_gradients(given, shared)
    bias = inputs.bias
    grad_bias = grad_q.new_empty(0) if bias is None else by_age.sum(0).t().to(bias.dtype)
    grads = zip((grad_q, grad_k, grad_v), (inputs.q, inputs.k, inputs.v))
    grad_q, grad_k, grad_v = (grad.to(x.dtype) for grad, x in grads)
    return grad_q, grad_k, grad_v, grad_bias.contiguous()


def _query_gradient(
    grad_out: Tensor, out: Tensor, log_mass: Tensor, inner: Tensor, given: StateKernelInputs
) -> tuple[Tensor, Tensor]:
    """Compute gradients of q and, by tile, of the bias, (G, H, C) float32; fill ``inner``."""
    table, heads = given.table, given.q.shape[1]
    classes = 0 if given.bias is None else len(given.bias)
    grad_q = given.q.new_empty(given.q.shape)
    # Empty tiles write nothing.
    by_age = log_mass.new_zeros(len(table.tiles), heads, classes)
    _launch(
        kernels.query_gradient_kernel,
        given,
        len(table.tiles),
        TILE=table.tile,
        out=out,
        log_mass=log_mass,
        grad_out=grad_out,
        grad_q=grad_q,
        by_age=by_age,
        inner=inner,
        BLOCK_AGE=triton.next_power_of_2(max(1, classes)),
        **_walk(table),
        **strides(out=out, grad_out=grad_out, grad_q=grad_q),
    )
    return grad_q, by_age


def _key_gradients(given: StateKernelInputs, shared: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute gradients of k and v: of the tokens' states, then of the initial ones."""
    table, (length, heads) = given.table, given.q.shape[:2]
    height, num_domains = key_height(table.tile), len(given.k) - length
    grad_k, grad_v = (x.new_empty(x.shape) for x in (given.k, given.v))
    _launch(
        kernels.token_gradient_kernel,
        given,
        len(table.key_tiles),
        TILE=height,
        grad_k=grad_k,
        grad_v=grad_v,
        key_tiles=table.key_tiles,
        key_tokens=table.key_tokens,
        replaced=table.replaced,
        times=table.times,
        **shared,
        **strides(grad_out=shared["grad_out"], grad_k=grad_k, grad_v=grad_v),
    )
    numbers = num_domains * heads * (given.k.shape[2] + given.v.shape[2])
    shares = max(1, min(len(table.tiles), _MOST_SHARES, _MOST_NUMBERS // numbers))
    parts_k, parts_v = (
        x.new_empty(shares * num_domains, *x.shape[1:], dtype=torch.float32)
        for x in (given.k, given.v)
    )
    _launch(
        kernels.initial_gradient_kernel,
        given,
        shares * triton.cdiv(num_domains, height),
        TILE=height,
        grad_k=parts_k,
        grad_v=parts_v,
        tiles=table.tiles,
        first_visits=table.first_visits,
        num_tiles=len(table.tiles),
        shares=shares,
        num_tokens=length,
        num_domains=num_domains,
        **shared,
        **strides(grad_out=shared["grad_out"], grad_k=parts_k, grad_v=parts_v),
    )
    for grad, parts in ((grad_k, parts_k), (grad_v, parts_v)):
        grad[length:] = parts.view(shares, num_domains, *grad.shape[1:]).sum(0)
    return grad_k, grad_v


def _computable(inputs: StateKernelInputs) -> StateKernelInputs:
    q, k, v = (computable(x) for x in (inputs.q, inputs.k, inputs.v))
    bias = None if inputs.bias is None else inputs.bias.float().contiguous()
    return inputs._replace(q=q, k=k, v=v, bias=bias)


def _walk(table: StateTable) -> dict[str, Any]:
    """Collect what a kernel needs to find the keys of a tile of tokens."""
    return {
        "tiles": table.tiles,
        "offsets": table.offsets,
        "tokens": table.tokens,
        "first_visits": table.first_visits,
        "replaced": table.replaced,
        "times": table.times,
        "num_tokens": len(table.tokens),
        "num_domains": table.tiles.shape[1] - 3,
        "depth": table.states_per_domain,
    }


def _launch(kernel: Any, given: StateKernelInputs, per_head: int, **own: Any) -> None:
    """Launch ``per_head`` programs a head with what all kernels take, beside ``own`` arguments."""
    q, k, v, bias, table = given
    blocks = widths(q, v)
    widest = max(blocks["BLOCK_QK"], blocks["BLOCK_V"])
    # What is chosen compiles for compute capability 9.0 with hardly a register spilt, but for the
    # gradient of queries in float32 with heads wider than 64.
    narrow = widest <= 64 and q.dtype != torch.float32
    if per_head == 0:
        return
    with torch.cuda.device_of(q):
        kernel[(per_head * q.shape[1],)](
            q=q, k=k, v=v, bias=bias,
            edges=None if bias is None else bucket_edges(q.device),
            next_times=table.next_times,
            heads=q.shape[1], last_bucket=0 if bias is None else len(bias) - 1,
            BIASED=bias is not None, STEP=32 if narrow and not INTERPRETED else 16,
            num_warps=4 if narrow else 8, num_stages=2,
            PRECISION=precision(q.dtype), enable_fp_fusion=True,
            **blocks, **strides(q=q, k=k, v=v), **own,
        )  # fmt: skip
