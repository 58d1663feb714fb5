"""What the kernels of domain attention and of DDSR have in common: rows, time buckets, sums."""

# The body of a kernel is Triton's language; Python's types do not hold in it.
# pyrefly: ignore-errors

import triton
import triton.language as tl

# Bits of the float32 number 1, and buckets of ln(2) / 0.301 per octave in steps of 1 / 1024.
_BITS_OF_ONE = tl.constexpr(0x3F800000)
_BUCKETS_PER_OCTAVE = tl.constexpr(2358)


@triton.jit
def load_rows(base, tokens, stride, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) rows of one head, zero where there is none and beyond WIDTH."""
    column = tl.arange(0, BLOCK)
    pointers = base + tokens[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(base, tokens, stride, valid, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of ``load_rows``, rounded to the type of ``base``."""
    column = tl.arange(0, BLOCK)
    pointers = base + tokens[:, None] * stride + column[None, :]
    rows = rows.to(base.dtype.element_ty)
    tl.store(pointers, rows, mask=valid[:, None] & (column < WIDTH)[None, :])


@triton.jit
def bucket_of(difference, edges, last_bucket):
    """Bucket of time differences (int64), bit for bit that of ``relative_bias.time_bucket``.

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
    """``sums`` (BLOCK,) plus the ``values`` of pairs, 0 where a pair does not count, by bucket.

    Sums stay in registers and are formed in a fixed order; only buckets that occur are visited.
    """
    buckets = tl.arange(0, BLOCK)
    lowest = tl.min(tl.where(counted, bucket, last_bucket))
    highest = tl.max(tl.where(counted, bucket, 0))
    for one in range(lowest, highest + 1):
        part = tl.sum(tl.where(bucket == one, values, 0.0))
        sums += tl.where(buckets == one, part, 0.0)
    return sums
