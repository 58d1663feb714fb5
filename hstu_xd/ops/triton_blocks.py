"""What the kernels of both operators have in common: rows, time buckets, sums, and arguments.

The first functions are parts of kernels; the last ones prepare the arguments of every launch.
"""

# The body of a kernel is Triton's language; Python's types do not hold in it.
# pyrefly: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bits of the float32 number 1, and buckets of ln(2) / 0.301 per octave in steps of 1 / 1024.
_BITS_OF_ONE = tl.constexpr(0x3F800000)
_BUCKETS_PER_OCTAVE = tl.constexpr(2358)


@triton.jit
def load_rows(base, tokens, stride, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load (rows, BLOCK) rows of one head, zero where there is none and beyond WIDTH."""
    column = tl.arange(0, BLOCK)
    pointers = base + tokens[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(base, tokens, stride, valid, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store what ``load_rows`` loads, rounded to the type of ``base``."""
    column = tl.arange(0, BLOCK)
    pointers = base + tokens[:, None] * stride + column[None, :]
    rows = rows.to(base.dtype.element_ty)
    tl.store(pointers, rows, mask=valid[:, None] & (column < WIDTH)[None, :])


@triton.jit
def bucket_of(difference, edges, last_bucket):
    """Bucket time differences (int64), bit for bit as ``relative_bias.time_bucket`` does.

    The bits of a float rise almost like its logarithm: scaled, they fall short of the bucket by
    less than one, so a comparison with one edge settles it.
    """
    magnitude = tl.maximum(tl.where(difference < 0, -difference, difference), 1)
    bits = magnitude.to(tl.float32).to(tl.int32, bitcast=True)
    at_least = (((bits - _BITS_OF_ONE) >> 10) * _BUCKETS_PER_OCTAVE) >> 23
    bucket = at_least + (bits >= tl.load(edges + at_least + 1)).to(tl.int32)
    return tl.minimum(bucket, last_bucket)


@triton.jit
def add_by_bucket(sums, values, bucket, counted, last_bucket, BLOCK: tl.constexpr):
    """Add the ``values`` of pairs, 0 where a pair does not count, to ``sums`` (BLOCK,) by bucket.

    Sums stay in registers and are formed in a fixed order; only buckets that occur are visited.
    """
    buckets = tl.arange(0, BLOCK)
    lowest = tl.min(tl.where(counted, bucket, last_bucket))
    highest = tl.max(tl.where(counted, bucket, 0))
    for one in range(lowest, highest + 1):
        part = tl.sum(tl.where(bucket == one, values, 0.0))
        sums += tl.where(buckets == one, part, 0.0)
    return sums


# Triton's interpreter runs kernels on the CPU; they are no compiled functions then.
INTERPRETED = not isinstance(load_rows, triton.runtime.JITFunction)


def computable(x: Tensor) -> Tensor:
    """Return (L, H, d) with numbers of a row side by side, in a type that computes here.

    The interpreter multiplies bfloat16 wrongly and cuts instead of rounding to it: float32 there.
    """
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(2) == 1 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """Return strides of tokens and of heads, as the kernels name them."""
    named = {}
    for name, tensor in tensors.items():
        named[f"{name}_token"], named[f"{name}_head"] = tensor.stride()[:2]
    return named


def widths(q: Tensor, v: Tensor) -> dict[str, int]:
    """Return widths of heads and the powers of two that hold them, as the kernels name them."""
    width_qk, width_v = q.shape[2], v.shape[2]
    block_qk, block_v = (max(16, triton.next_power_of_2(x)) for x in (width_qk, width_v))
    return {"WIDTH_QK": width_qk, "WIDTH_V": width_v, "BLOCK_QK": block_qk, "BLOCK_V": block_v}
