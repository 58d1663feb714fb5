"""What the kernels of both operators have in common: rows, time buckets, sums, and arguments.

The first functions are parts of kernels; the last ones prepare the arguments of every launch.
"""

# The body of a kernel is Triton's language; Python's types do not hold in it.
# pyrefly: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_xd.ops import triton_support

# Bits of the float32 number 1, and buckets of ln(2) / 0.301 per octave in steps of 1 / 1024.
_BITS_OF_ONE = tl.constexpr(0x3F800000)
_BUCKETS_PER_OCTAVE = tl.constexpr(2358)


# Triton's interpreter runs kernels on the CPU; they are no compiled functions then.
INTERPRETED = triton.knobs.runtime.interpret
_COMPILED = tl.constexpr(not INTERPRETED)


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
def look_up(table, index):
    """Look up 4-byte numbers of a small table, a number to each pair.

    Compiled, by an instruction of its own: ``tl.load`` would choose a layout by what lies side by
    side in memory, and bring every number from there into that of the scores through shared memory.
    """
    if _COMPILED:
        found = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];",
            "=r,l",
            [table + index.to(tl.uint32)],
            tl.int32,
            is_pure=True,
            pack=1,
        ).to(table.dtype.element_ty, bitcast=True)
    else:
        found = tl.load(table + index)
    return found


@triton.jit
def bucket_of(difference, edges):
    """Bucket time differences (int64), bit for bit as ``relative_bias.time_bucket`` does.

    The bits of a float rise almost like its logarithm: scaled, they fall short of the bucket by
    less than one, so a comparison with one edge settles it.
    """
    magnitude = tl.maximum(tl.abs(difference.to(tl.float32)), 1.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    at_least = (((bits - _BITS_OF_ONE) >> 10) * _BUCKETS_PER_OCTAVE) >> 23
    return at_least + (bits >= look_up(edges, at_least + 1)).to(tl.int32)


@triton.jit
def gate(scores, FAST: tl.constexpr):
    """Return the sigmoid: SiLU is ``scores * gate``.

    FAST: by the hyperbolic tangent that a GPU has an instruction for, right to 2^-12 of 1. A score
    far below 0 has a gate that is not much larger: it is for bfloat16, which holds no more of what
    is added up there, and not for float16.
    """
    if FAST:
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * scores], tl.float32, is_pure=True, pack=1
        )
        opened = 0.5 * half + 0.5
    else:
        opened = 1.0 / (1.0 + tl.exp(-scores))
    return opened


@triton.jit
def slope(scores, opened):
    """Return the derivative of SiLU, whose gate at the scores is ``opened``."""
    return opened * (1.0 + scores * (1.0 - opened))


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


def computable(x: Tensor) -> Tensor:
    """Return (L, H, d) with numbers of a row side by side, in a type that computes here.

    The interpreter multiplies bfloat16 wrongly and cuts instead of rounding to it: float32 there.
    """
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(2) == 1 else x.contiguous()


def precision(dtype: torch.dtype) -> str:
    """Return how products of matrices are computed: as those of PyTorch, by its own switch."""
    return "tf32" if triton_support.rounds_to_tf32(dtype) else "ieee"


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
