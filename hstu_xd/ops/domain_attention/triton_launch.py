"""Launches of the fused kernels: block sizes, output buffers, and what is left to reduce."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.ops.domain_attention import triton_kernels as kernels
from hstu_xd.ops.domain_attention.tile_table import KernelInputs
from hstu_xd.ops.relative_bias import LAST_BUCKET, bucket_edges
from hstu_xd.ops.triton_blocks import INTERPRETED, computable, precision, strides, widths
from hstu_xd.ops.triton_support import rounds_to_tf32

# Programs that share out the tiles of the bias gradient: a few for each processor of a large GPU.
_BIAS_PROGRAMS = 3 if INTERPRETED else 512
# Copies of the position table's sums at most, and entries in all of them (8 bytes each).
_MOST_COPIES, _MOST_ENTRIES = 64, 2**21
# SiLU's derivative is nowhere larger.
_STEEPEST = 1.1


class Shape(NamedTuple):
    """How a kernel is cut.

    Attributes:
        step: rows of the other side in a step.
        warps: warps of a program.
        stages: stages of its pipeline.
        heads: heads of a program at most; what is looked up for a pair serves all of them.
    """

    step: int
    warps: int
    stages: int
    heads: int = 1


# Half precisions and heads at most 64 wide, with a bias and without, as measured on an H200: what
# is looked up for a pair takes as long as several heads, and their sums have to fit the registers.
_HALF = {
    "forward": (Shape(32, 4, 3, 4), Shape(64, 4, 3)),
    "query_gradient": (Shape(64, 4, 2, 2), Shape(64, 4, 3)),
    "key_value_gradient": (Shape(32, 4, 3, 2), Shape(32, 4, 3)),
    "bias_gradient": (Shape(32, 4, 3), Shape(32, 4, 3)),
}


def shape_of(kernel: str, tile: int, width: int, dtype: torch.dtype, *, biased: bool) -> Shape:
    """Choose how to cut a kernel for tiles of ``tile`` rows and heads at most ``width`` wide.

    What is chosen compiles for compute capability 9.0 with hardly a register spilt.
    ``kernel``: its name without ``_kernel``.
    """
    if INTERPRETED:
        return Shape(16, 1, 1, 2)
    if width > 128:
        return Shape(16 if dtype == torch.float32 else 32, 8, 2)
    if dtype == torch.float32:
        few = width <= 32 or (rounds_to_tf32(dtype) and width <= 64)
        return Shape(32, 4, 2, 2) if few else Shape(32, 8, 2)
    shape = _HALF[kernel][0 if biased else 1]
    return Shape(min(tile, 64), 8, 2) if width > 64 else shape


def forward(inputs: KernelInputs) -> Tensor:
    """Compute the output, (L, H, dv)."""
    given = _computable(inputs)
    out = given.v.new_empty(given.v.shape)
    _launch(
        kernels.forward_kernel,
        given,
        tiles=given.plan.query_tiles,
        out=out,
        norm=float(given.norm_length),
        **strides(out=out),
    )
    return out.to(inputs.v.dtype)


def gradients(
    grad_out: Tensor, inputs: KernelInputs, *, of_tables: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute gradients of q, k, v and of both tables, (0,) unless ``of_tables``."""
    given = _computable(inputs)
    grad_out = computable(grad_out.to(given.v.dtype))
    grads = _query_gradient(grad_out, given), *_key_value_gradients(grad_out, given)
    grad_q, grad_k, grad_v = (
        grad.to(x.dtype) for grad, x in zip(grads, (inputs.q, inputs.k, inputs.v))
    )
    none = grad_q.new_empty(0), grad_q.new_empty(0)
    tables = _table_gradients(grad_out, given, inputs) if of_tables else none
    return grad_q, grad_k, grad_v, *tables


def _query_gradient(grad_out: Tensor, given: KernelInputs) -> Tensor:
    grad_q = given.q.new_empty(given.q.shape)
    _launch(
        kernels.query_gradient_kernel,
        given,
        tiles=given.plan.query_tiles,
        grad_out=grad_out,
        grad_q=grad_q,
        norm=float(given.norm_length),
        **strides(out=grad_out, grad=grad_q),
    )
    return grad_q


def _key_value_gradients(grad_out: Tensor, given: KernelInputs) -> tuple[Tensor, Tensor]:
    grad_k, grad_v = given.k.new_empty(given.k.shape), given.v.new_empty(given.v.shape)
    _launch(
        kernels.key_value_gradient_kernel,
        given,
        tiles=given.plan.key_tiles,
        grad_out=grad_out,
        grad_k=grad_k,
        grad_v=grad_v,
        norm=float(given.norm_length),
        **strides(out=grad_out, grad_k=grad_k, grad_v=grad_v),
    )
    return grad_k, grad_v


def _table_gradients(
    grad_out: Tensor, given: KernelInputs, inputs: KernelInputs
) -> tuple[Tensor, Tensor]:
    position_weights, time_weights = inputs.position_weights, inputs.time_weights
    assert position_weights is not None
    assert time_weights is not None
    positions = position_weights.numel()
    times = min(time_weights.numel(), LAST_BUCKET + 1)
    tiles = len(given.plan.query_tiles)
    programs = min(tiles, _BIAS_PROGRAMS)
    copies = max(1, min(programs, _MOST_COPIES, _MOST_ENTRIES // positions))
    device = given.q.device
    position_sums = torch.zeros(copies, positions, dtype=torch.int64, device=device)
    time_sums = torch.empty(programs, times, dtype=torch.float32, device=device)
    scale = _integer_scale(grad_out, given.v)
    _launch(
        kernels.bias_gradient_kernel,
        given,
        programs=programs,
        tiles=given.plan.query_tiles,
        num_tiles=tiles,
        grad_out=grad_out,
        position_sums=position_sums,
        time_sums=time_sums,
        scale=scale,
        copies=copies,
        BLOCK_TIME=triton.next_power_of_2(times),
        **strides(out=grad_out),
    )
    by_position = position_sums.sum(0).double() / (scale.double() * given.norm_length)
    by_time = time_sums.sum(0, dtype=torch.float64) / given.norm_length
    by_time = pad(by_time, (0, time_weights.numel() - times))
    return by_position.to(position_weights.dtype), by_time.to(time_weights.dtype)


def _integer_scale(grad_out: Tensor, v: Tensor) -> Tensor:
    """Choose the power of two by which score gradients become integers, () float32.

    No gradient, summed over heads, exceeds the bound below, and a position difference occurs at
    most once a query: L such terms fit 63 bits. What is cut off is 2^-(62 - log2 L) of the bound.
    Infinities and NaN end in a scale of 0 or NaN, and gradients that are not finite.
    """
    largest = (torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32) for x in (grad_out, v))
    bound = _STEEPEST * v[0].numel() * next(largest) * next(largest)
    room = 61 - len(v).bit_length()
    return torch.exp2((room - bound.log2().floor()).clamp(max=126))


def _computable(inputs: KernelInputs) -> KernelInputs:
    q, k, v = (computable(x) for x in inputs[:3])
    tables = inputs.position_weights, inputs.time_weights
    position_weights, time_weights = (None if x is None else x.float() for x in tables)
    return inputs._replace(
        q=q, k=k, v=v, position_weights=position_weights, time_weights=time_weights
    )


def _launch(
    kernel: Any, given: KernelInputs, *, tiles: Tensor, programs: int | None = None, **own: Any
) -> None:
    """Launch with what all kernels take, beside the ``own`` arguments of this one.

    ``programs``: of a kernel that shares out tiles itself, always with bias and over all heads.
    """
    q, k, v, position_weights, time_weights, plan, _, tile = given
    heads, blocks = q.shape[1], widths(q, v)
    name = kernel.fn.__name__.removesuffix("_kernel")
    biased = position_weights is not None and time_weights is not None
    widest = max(blocks["BLOCK_QK"], blocks["BLOCK_V"])
    shape = shape_of(name, tile, widest, q.dtype, biased=biased)
    if programs is None:
        together = math.gcd(heads, shape.heads)
        programs = len(tiles) * (heads // together)
        own |= {"BIASED": biased, "HEADS": together}
    if programs == 0:
        return
    with torch.cuda.device_of(q):
        kernel[(programs,)](
            q=q, k=k, v=v,
            position_weights=position_weights, time_weights=time_weights,
            edges=bucket_edges(q.device) if biased else None,
            tiles=tiles, query_tokens=plan.query_tokens, key_tokens=plan.key_tokens,
            query_places=plan.query_places, key_places=plan.key_places,
            query_positions=plan.query_positions, key_positions=plan.key_positions,
            next_times=plan.next_times, times=plan.times,
            heads=heads, num_positions=position_weights.numel() if biased else 0,
            last_bucket=min(time_weights.numel() - 1, LAST_BUCKET) if biased else 0,
            TILE=tile, STEP=shape.step,
            FAST=q.dtype == torch.bfloat16 and not INTERPRETED, PRECISION=precision(q.dtype),
            num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=True,
            **blocks, **strides(q=q, k=k, v=v), **own,
        )  # fmt: skip
