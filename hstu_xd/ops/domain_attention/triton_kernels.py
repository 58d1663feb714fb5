"""Triton kernels of domain attention, forward and backward.

A program owns one tile: up to ``TILE`` consecutive rows of one group, in grouped order, for
``HEADS`` heads, which share what is looked up for a pair. It walks over the rows of the other side
of its group, ``STEP`` at a time, and only over those that any row of the tile can meet (see
tile_table.py). Rows are fetched from where they lie in the batch, by token, so that nothing is
copied into grouped order before.

Which pairs are seen is a matter of original positions, see ``sees``. Rows past the end of a tile
get positions that make them see, and be seen by, nothing. Scores, sums and biases are
float32; only operands of matrix products have the type of the inputs.

Programs of one kernel never write to the same place, except for integer sums in
``bias_gradient_kernel``, which come out the same in any order.
"""

# The body of a kernel is Triton's language; Python's types do not hold in it.
# pyrefly: ignore-errors

import triton
import triton.language as tl

from hstu_xd.ops.triton_blocks import (
    add_by_bucket,
    bucket_of,
    gate,
    load_rows,
    look_up,
    slope,
    store_rows,
)

# Positions of rows that are not there: a query before all keys, a key after all queries.
_NO_QUERY = tl.constexpr(-(2**31))
_NO_KEY = tl.constexpr(2**31 - 1)
# The bias of pairs that are not seen: their gate is 0 whatever the product of query and key.
_UNSEEN = tl.constexpr(-1e30)


@triton.jit
def _tile(tiles, index):
    """Load first row and end of a tile, and of the other side's rows that it meets."""
    entry = tiles + index * 4
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _share(tiles, heads, HEADS: tl.constexpr):
    """Return the first of the heads that a program computes, and the entries of its tile."""
    program = tl.program_id(0)
    shares = heads // HEADS
    head = ((program % shares) * HEADS).to(tl.int64)
    first, stop, other_first, other_stop = _tile(tiles, program // shares)
    return head, first, stop, other_first, other_stop


@triton.jit
def _rows(
    base, head, head_stride, token, stride, here,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Load rows (TILE, BLOCK) of each of a program's heads."""
    rows = ()
    for one in tl.static_range(HEADS):
        place = base + (head + one) * head_stride
        rows += (load_rows(place, token, stride, here, WIDTH, BLOCK),)
    return rows


@triton.jit
def _zeros(TILE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """Return sums (TILE, BLOCK) of each of a program's heads, to be added to."""
    sums = ()
    for _ in tl.static_range(HEADS):
        sums += (tl.zeros([TILE, BLOCK], tl.float32),)
    return sums


@triton.jit
def _store(
    base, head, head_stride, token, stride, here, sums, norm,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Store the sums of each of a program's heads, divided by ``norm``."""
    for one in tl.static_range(HEADS):
        place = base + (head + one) * head_stride
        store_rows(place, token, stride, here, sums[one] / norm, WIDTH, BLOCK)


@triton.jit
def _side(row, stop, tokens, places, positions, times, ABSENT: tl.constexpr, BIASED: tl.constexpr):
    """Load of each row: is it there, its token, its place in causal order, position and time."""
    here = row < stop
    token = tl.load(tokens + row, mask=here, other=0)
    place = tl.load(places + row, mask=here, other=ABSENT)
    position, time = place, token
    if BIASED:
        position = tl.load(positions + row, mask=here, other=0)
        time = tl.load(times + row, mask=here, other=0)
    return here, token, place, position, time


@triton.jit
def sees(query_place, key_place):
    """Return whether queries see keys of their group: the rule of visibility.py, by pairs."""
    return key_place <= query_place


@triton.jit
def _places(query_position, next_time, key_position, key_time, edges, num_positions, last_bucket):
    """Find rows of pairs in the tables of position (``2 N - 1`` long) and of time.

    Returns whether the position table holds a row for a pair, the row, else its last one, and the
    bucket of the time difference.
    """
    row = (key_position + (num_positions // 2 - query_position)).to(tl.uint32, bitcast=True)
    last = tl.cast(num_positions - 1, tl.uint32)
    bucket = tl.minimum(bucket_of(next_time - key_time, edges), last_bucket)
    return row <= last, tl.minimum(row, last), bucket


@triton.jit
def _bias(known, row, bucket, position_weights, time_weights):
    """Look up the bias of pairs, the same in all heads.

    It is NaN where the position table ends too early: nothing can be raised here, and a wrong
    number must not pass for a right one.
    """
    position = tl.where(known, look_up(position_weights, row), float("nan"))
    return position + look_up(time_weights, bucket)


@triton.jit
def _begin(
    query_position, next_time, key_position, key_time, seen,
    position_weights, time_weights, edges, num_positions, last_bucket, BIASED: tl.constexpr,
):  # fmt: skip
    """Return what the scores of pairs begin with in all heads; unseen pairs then weigh nothing."""
    begun = tl.zeros(seen.shape, tl.float32)
    if BIASED:
        known, row, bucket = _places(
            query_position, next_time, key_position, key_time, edges, num_positions, last_bucket
        )
        begun = _bias(known, row, bucket, position_weights, time_weights)
    return tl.where(seen, begun, _UNSEEN)


@triton.jit
def forward_kernel(
    q, k, v, out,
    position_weights, time_weights, edges,
    tiles, query_tokens, key_tokens, query_places, key_places,
    query_positions, key_positions, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    heads, norm, num_positions, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, HEADS: tl.constexpr,
    BIASED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk a tile of queries over its keys: ``out = sum_j SiLU(<q, k_j> + bias_j) v_j / norm``."""
    head, first, stop, key_first, key_stop = _share(tiles, heads, HEADS)
    if first >= stop:
        return
    row = first + tl.arange(0, TILE)
    here, token, place, position, next_time = _side(
        row, stop, query_tokens, query_places, query_positions, next_times, _NO_QUERY, BIASED
    )
    query = _rows(q, head, q_head, token, q_token, here, WIDTH_QK, BLOCK_QK, HEADS)
    total = _zeros(TILE, BLOCK_V, HEADS)
    for start in range(key_first, key_stop, STEP):
        key_row = start + tl.arange(0, STEP)
        there, key_token, key_place, key_position, key_time = _side(
            key_row, key_stop, key_tokens, key_places, key_positions, times, _NO_KEY, BIASED
        )
        seen = sees(place[:, None], key_place[None, :])
        begun = _begin(
            position[:, None], next_time[:, None], key_position[None, :], key_time[None, :], seen,
            position_weights, time_weights, edges, num_positions, last_bucket, BIASED,
        )  # fmt: skip
        sums = ()
        for one in tl.static_range(HEADS):
            base = k + (head + one) * k_head
            key = load_rows(base, key_token, k_token, there, WIDTH_QK, BLOCK_QK)
            scores = tl.dot(query[one], tl.trans(key), begun, input_precision=PRECISION)
            weights = scores * gate(scores, FAST)
            base = v + (head + one) * v_head
            value = load_rows(base, key_token, v_token, there, WIDTH_V, BLOCK_V)
            sums += (tl.dot(weights.to(value.dtype), value, total[one], input_precision=PRECISION),)
        total = sums
    _store(out, head, out_head, token, out_token, here, total, norm, WIDTH_V, BLOCK_V, HEADS)


@triton.jit
def query_gradient_kernel(
    q, k, v, grad_out, grad_q,
    position_weights, time_weights, edges,
    tiles, query_tokens, key_tokens, query_places, key_places,
    query_positions, key_positions, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head,
    out_token, out_head, grad_token, grad_head,
    heads, norm, num_positions, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, HEADS: tl.constexpr,
    BIASED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk a tile of queries over its keys: ``dq = sum_j ds_j k_j / norm``."""
    head, first, stop, key_first, key_stop = _share(tiles, heads, HEADS)
    if first >= stop:
        return
    row = first + tl.arange(0, TILE)
    here, token, place, position, next_time = _side(
        row, stop, query_tokens, query_places, query_positions, next_times, _NO_QUERY, BIASED
    )
    query = _rows(q, head, q_head, token, q_token, here, WIDTH_QK, BLOCK_QK, HEADS)
    grad = _rows(grad_out, head, out_head, token, out_token, here, WIDTH_V, BLOCK_V, HEADS)
    total = _zeros(TILE, BLOCK_QK, HEADS)
    for start in range(key_first, key_stop, STEP):
        key_row = start + tl.arange(0, STEP)
        there, key_token, key_place, key_position, key_time = _side(
            key_row, key_stop, key_tokens, key_places, key_positions, times, _NO_KEY, BIASED
        )
        seen = sees(place[:, None], key_place[None, :])
        begun = _begin(
            position[:, None], next_time[:, None], key_position[None, :], key_time[None, :], seen,
            position_weights, time_weights, edges, num_positions, last_bucket, BIASED,
        )  # fmt: skip
        sums = ()
        for one in tl.static_range(HEADS):
            base = k + (head + one) * k_head
            key = load_rows(base, key_token, k_token, there, WIDTH_QK, BLOCK_QK)
            scores = tl.dot(query[one], tl.trans(key), begun, input_precision=PRECISION)
            base = v + (head + one) * v_head
            value = load_rows(base, key_token, v_token, there, WIDTH_V, BLOCK_V)
            grad_weights = tl.dot(grad[one], tl.trans(value), input_precision=PRECISION)
            grad_scores = grad_weights * slope(scores, gate(scores, FAST))
            sums += (tl.dot(grad_scores.to(key.dtype), key, total[one], input_precision=PRECISION),)
        total = sums
    _store(grad_q, head, grad_head, token, grad_token, here, total, norm, WIDTH_QK, BLOCK_QK, HEADS)


@triton.jit
def key_value_gradient_kernel(
    q, k, v, grad_out, grad_k, grad_v,
    position_weights, time_weights, edges,
    tiles, query_tokens, key_tokens, query_places, key_places,
    query_positions, key_positions, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head,
    out_token, out_head, grad_k_token, grad_k_head, grad_v_token, grad_v_head,
    heads, norm, num_positions, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, HEADS: tl.constexpr,
    BIASED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk a tile of keys over its queries: ``dk = sum_i ds_i q_i / norm, dv = sum_i w_i do_i``.

    Pairs are transposed, a key to a row, so that they enter the sums as they are.
    """
    head, first, stop, query_first, query_stop = _share(tiles, heads, HEADS)
    if first >= stop:
        return
    row = first + tl.arange(0, TILE)
    here, token, place, position, time = _side(
        row, stop, key_tokens, key_places, key_positions, times, _NO_KEY, BIASED
    )
    key = _rows(k, head, k_head, token, k_token, here, WIDTH_QK, BLOCK_QK, HEADS)
    value = _rows(v, head, v_head, token, v_token, here, WIDTH_V, BLOCK_V, HEADS)
    total_k = _zeros(TILE, BLOCK_QK, HEADS)
    total_v = _zeros(TILE, BLOCK_V, HEADS)
    for start in range(query_first, query_stop, STEP):
        query_row = start + tl.arange(0, STEP)
        there, query_token, query_place, query_position, next_time = _side(
            query_row, query_stop, query_tokens, query_places, query_positions, next_times,
            _NO_QUERY, BIASED,
        )  # fmt: skip
        seen = sees(query_place[None, :], place[:, None])
        begun = _begin(
            query_position[None, :], next_time[None, :], position[:, None], time[:, None], seen,
            position_weights, time_weights, edges, num_positions, last_bucket, BIASED,
        )  # fmt: skip
        sums_k = ()
        sums_v = ()
        for one in tl.static_range(HEADS):
            base = q + (head + one) * q_head
            query = load_rows(base, query_token, q_token, there, WIDTH_QK, BLOCK_QK)
            scores = tl.dot(key[one], tl.trans(query), begun, input_precision=PRECISION)
            opened = gate(scores, FAST)
            weights = scores * opened
            base = grad_out + (head + one) * out_head
            grad = load_rows(base, query_token, out_token, there, WIDTH_V, BLOCK_V)
            sums_v += (
                tl.dot(weights.to(grad.dtype), grad, total_v[one], input_precision=PRECISION),
            )
            grad_weights = tl.dot(value[one], tl.trans(grad), input_precision=PRECISION)
            grad_scores = (grad_weights * slope(scores, opened)).to(query.dtype)
            sums_k += (tl.dot(grad_scores, query, total_k[one], input_precision=PRECISION),)
        total_k = sums_k
        total_v = sums_v
    _store(
        grad_k, head, grad_k_head, token, grad_k_token, here, total_k, norm,
        WIDTH_QK, BLOCK_QK, HEADS,
    )  # fmt: skip
    _store(
        grad_v, head, grad_v_head, token, grad_v_token, here, total_v, norm,
        WIDTH_V, BLOCK_V, HEADS,
    )  # fmt: skip


# The number of tiles differs from batch to batch: a kernel compiled once serves all.
@triton.jit(do_not_specialize=["num_tiles"])
def bias_gradient_kernel(
    q, k, v, grad_out, position_sums, time_sums, scale,
    position_weights, time_weights, edges,
    tiles, query_tokens, key_tokens, query_places, key_places,
    query_positions, key_positions, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    num_tiles, heads, copies, num_positions, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_TIME: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum ``ds`` in parts by position difference and by time bucket, all heads together.

    A program takes every so many-th tile. Heads share a pair's bias, so their ``ds`` are added up
    before any look-up is made. A position difference may lie anywhere in the table: its sums are
    integers, ``ds`` times ``scale``, which atomics add in any order to the same bits, spread over
    ``copies`` of the table. A program keeps sums by time bucket to itself, in registers.

    position_sums: (copies, num_positions) int64 zeros; time_sums: (programs, last_bucket + 1)
    float32; scale: one float32 in memory of the device.
    """
    program = tl.program_id(0)
    factor = tl.load(scale)
    own_sums = position_sums + (program % copies).to(tl.int64) * num_positions
    buckets = tl.arange(0, BLOCK_TIME)
    by_time = tl.zeros([BLOCK_TIME], tl.float32)
    for tile in range(program, num_tiles, tl.num_programs(0)):
        first, stop, key_first, key_stop = _tile(tiles, tile)
        row = first + tl.arange(0, TILE)
        here, token, place, position, next_time = _side(
            row, stop, query_tokens, query_places, query_positions, next_times, _NO_QUERY, True
        )
        for start in range(key_first, key_stop, STEP):
            key_row = start + tl.arange(0, STEP)
            there, key_token, key_place, key_position, key_time = _side(
                key_row, key_stop, key_tokens, key_places, key_positions, times, _NO_KEY, True
            )
            seen = sees(place[:, None], key_place[None, :])
            known, entry, bucket = _places(
                position[:, None], next_time[:, None], key_position[None, :], key_time[None, :],
                edges, num_positions, last_bucket,
            )  # fmt: skip
            begun = _bias(known, entry, bucket, position_weights, time_weights)
            total = tl.zeros([TILE, STEP], tl.float32)
            for index in range(heads):
                head = tl.cast(index, tl.int64)
                query = load_rows(q + head * q_head, token, q_token, here, WIDTH_QK, BLOCK_QK)
                key = load_rows(k + head * k_head, key_token, k_token, there, WIDTH_QK, BLOCK_QK)
                scores = tl.dot(query, tl.trans(key), begun, input_precision=PRECISION)
                grad = load_rows(
                    grad_out + head * out_head, token, out_token, here, WIDTH_V, BLOCK_V
                )
                value = load_rows(v + head * v_head, key_token, v_token, there, WIDTH_V, BLOCK_V)
                grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
                total += grad_weights * slope(scores, gate(scores, FAST))
            total = tl.where(seen, total, 0.0)
            steps = (total * factor).to(tl.int64)
            tl.atomic_add(own_sums + entry, steps, mask=seen & known, sem="relaxed")
            by_time = add_by_bucket(by_time, total, bucket, seen, last_bucket, BLOCK_TIME)
    partial = time_sums + program.to(tl.int64) * (last_bucket + 1)
    tl.store(partial + buckets, by_time, mask=buckets <= last_bucket)
