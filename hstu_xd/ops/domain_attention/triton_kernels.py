"""Triton kernels of domain attention, forward and backward.

A program owns one tile: up to ``TILE`` consecutive rows of one group, in grouped order, for one
head. It walks over the rows of the other side of its group, ``STEP`` at a time, and only over those
that any row of the tile can meet (see tile_table.py). Rows are fetched from where they lie in the
batch, by token, so that nothing is copied into grouped order before.

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

from hstu_xd.ops.triton_blocks import add_by_bucket, bucket_of, load_rows, store_rows

# Positions of rows that are not there: a query before all keys, a key after all queries.
_NO_QUERY = tl.constexpr(-(2**31))
_NO_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def _tile(tiles, index):
    """Load first row and end of a tile, and of the other side's rows that it meets."""
    entry = tiles + index * 4
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _side(row, stop, tokens, order, positions, times, ABSENT: tl.constexpr, BIASED: tl.constexpr):
    """Load of each row: is it there, its token, its place in causal order, position and time."""
    here = row < stop
    token = tl.load(tokens + row, mask=here, other=0)
    place = tl.load(order + token, mask=here, other=ABSENT).to(tl.int32)
    position, time = place, token
    if BIASED:
        position = tl.load(positions + token, mask=here, other=0).to(tl.int32)
        time = tl.load(times + token, mask=here, other=0)
    return here, token, place, position, time


@triton.jit
def sees(query_place, key_place):
    """Return whether queries see keys of their group: the rule of visibility.py, by pairs."""
    return key_place <= query_place


@triton.jit
def _bias(
    query_position, next_time, key_position, key_time, seen,
    position_weights, time_weights, edges, num_positions, last_bucket,
):  # fmt: skip
    """Look up the bias of pairs, with rows of the position table (``2 N - 1`` long) and buckets.

    It is NaN where the position table ends too early: nothing can be raised here, and a wrong
    number must not pass for a right one.
    """
    row = key_position - query_position + (num_positions - 1) // 2
    known = (row >= 0) & (row < num_positions)
    bucket = bucket_of(next_time - key_time, edges, last_bucket)
    position = tl.load(position_weights + row, mask=seen & known, other=float("nan"))
    time = tl.load(time_weights + bucket, mask=seen, other=0.0)
    return position.to(tl.float32) + time.to(tl.float32), row, bucket


@triton.jit
def _scores(
    rows, columns, query_position, next_time, key_position, key_time, seen,
    position_weights, time_weights, edges, num_positions, last_bucket, BIASED: tl.constexpr,
):  # fmt: skip
    """Compute scores of pairs, of a row of one side and one of the other, with bias if any."""
    scores = tl.dot(rows, tl.trans(columns), input_precision="ieee")
    if BIASED:
        bias, _, _ = _bias(
            query_position, next_time, key_position, key_time, seen,
            position_weights, time_weights, edges, num_positions, last_bucket,
        )  # fmt: skip
        scores += bias
    return scores


@triton.jit
def _gate(scores):
    """Return the sigmoid: SiLU is ``scores * gate``."""
    return 1.0 / (1.0 + tl.exp(-scores))


@triton.jit
def _slope(scores, gate):
    """Return the derivative of SiLU."""
    return gate * (1.0 + scores * (1.0 - gate))


@triton.jit
def forward_kernel(
    q, k, v, out,
    position_weights, time_weights, edges,
    tiles, query_tokens, key_tokens, query_order, key_order, positions, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    heads, norm, num_positions, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Walk a tile of queries over its keys: ``out = sum_j SiLU(<q, k_j> + bias_j) v_j / norm``."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    first, stop, key_first, key_stop = _tile(tiles, program // heads)
    if first >= stop:
        return
    row = first + tl.arange(0, TILE)
    here, token, place, position, next_time = _side(
        row, stop, query_tokens, query_order, positions, next_times, _NO_QUERY, BIASED
    )
    query = load_rows(q + head * q_head, token, q_token, here, WIDTH_QK, BLOCK_QK)
    total = tl.zeros([TILE, BLOCK_V], tl.float32)
    for start in range(key_first, key_stop, STEP):
        key_row = start + tl.arange(0, STEP)
        there, key_token, key_place, key_position, key_time = _side(
            key_row, key_stop, key_tokens, key_order, positions, times, _NO_KEY, BIASED
        )
        seen = sees(place[:, None], key_place[None, :])
        key = load_rows(k + head * k_head, key_token, k_token, there, WIDTH_QK, BLOCK_QK)
        scores = _scores(
            query, key,
            position[:, None], next_time[:, None], key_position[None, :], key_time[None, :],
            seen, position_weights, time_weights, edges, num_positions, last_bucket, BIASED,
        )  # fmt: skip
        weights = tl.where(seen, scores * _gate(scores), 0.0)
        value = load_rows(v + head * v_head, key_token, v_token, there, WIDTH_V, BLOCK_V)
        total = tl.dot(weights.to(value.dtype), value, total, input_precision="ieee")
    store_rows(out + head * out_head, token, out_token, here, total / norm, WIDTH_V, BLOCK_V)


@triton.jit
def query_gradient_kernel(
    q, k, v, grad_out, grad_q,
    position_weights, time_weights, edges,
    tiles, query_tokens, key_tokens, query_order, key_order, positions, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head,
    out_token, out_head, grad_token, grad_head,
    heads, norm, num_positions, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Walk a tile of queries over its keys: ``dq = sum_j ds_j k_j / norm``."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    first, stop, key_first, key_stop = _tile(tiles, program // heads)
    if first >= stop:
        return
    row = first + tl.arange(0, TILE)
    here, token, place, position, next_time = _side(
        row, stop, query_tokens, query_order, positions, next_times, _NO_QUERY, BIASED
    )
    query = load_rows(q + head * q_head, token, q_token, here, WIDTH_QK, BLOCK_QK)
    grad = load_rows(grad_out + head * out_head, token, out_token, here, WIDTH_V, BLOCK_V)
    total = tl.zeros([TILE, BLOCK_QK], tl.float32)
    for start in range(key_first, key_stop, STEP):
        key_row = start + tl.arange(0, STEP)
        there, key_token, key_place, key_position, key_time = _side(
            key_row, key_stop, key_tokens, key_order, positions, times, _NO_KEY, BIASED
        )
        seen = sees(place[:, None], key_place[None, :])
        key = load_rows(k + head * k_head, key_token, k_token, there, WIDTH_QK, BLOCK_QK)
        scores = _scores(
            query, key,
            position[:, None], next_time[:, None], key_position[None, :], key_time[None, :],
            seen, position_weights, time_weights, edges, num_positions, last_bucket, BIASED,
        )  # fmt: skip
        value = load_rows(v + head * v_head, key_token, v_token, there, WIDTH_V, BLOCK_V)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
        grad_scores = tl.where(seen, grad_weights * _slope(scores, _gate(scores)), 0.0)
        total = tl.dot(grad_scores.to(key.dtype), key, total, input_precision="ieee")
    base = grad_q + head * grad_head
    store_rows(base, token, grad_token, here, total / norm, WIDTH_QK, BLOCK_QK)


@triton.jit
def key_value_gradient_kernel(
    q, k, v, grad_out, grad_k, grad_v,
    position_weights, time_weights, edges,
    tiles, query_tokens, key_tokens, query_order, key_order, positions, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head,
    out_token, out_head, grad_k_token, grad_k_head, grad_v_token, grad_v_head,
    heads, norm, num_positions, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Walk a tile of keys over its queries: ``dk = sum_i ds_i q_i / norm, dv = sum_i w_i do_i``.

    Pairs are transposed, a key to a row, so that they enter the sums as they are.
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    first, stop, query_first, query_stop = _tile(tiles, program // heads)
    if first >= stop:
        return
    row = first + tl.arange(0, TILE)
    here, token, place, position, time = _side(
        row, stop, key_tokens, key_order, positions, times, _NO_KEY, BIASED
    )
    key = load_rows(k + head * k_head, token, k_token, here, WIDTH_QK, BLOCK_QK)
    value = load_rows(v + head * v_head, token, v_token, here, WIDTH_V, BLOCK_V)
    total_k = tl.zeros([TILE, BLOCK_QK], tl.float32)
    total_v = tl.zeros([TILE, BLOCK_V], tl.float32)
    for start in range(query_first, query_stop, STEP):
        query_row = start + tl.arange(0, STEP)
        there, query_token, query_place, query_position, next_time = _side(
            query_row, query_stop, query_tokens, query_order, positions, next_times,
            _NO_QUERY, BIASED,
        )  # fmt: skip
        seen = sees(query_place[None, :], place[:, None])
        query = load_rows(q + head * q_head, query_token, q_token, there, WIDTH_QK, BLOCK_QK)
        scores = _scores(
            key, query,
            query_position[None, :], next_time[None, :], position[:, None], time[:, None],
            seen, position_weights, time_weights, edges, num_positions, last_bucket, BIASED,
        )  # fmt: skip
        gate = _gate(scores)
        weights = tl.where(seen, scores * gate, 0.0)
        grad = load_rows(
            grad_out + head * out_head, query_token, out_token, there, WIDTH_V, BLOCK_V
        )
        total_v = tl.dot(weights.to(grad.dtype), grad, total_v, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
        grad_scores = tl.where(seen, grad_weights * _slope(scores, gate), 0.0)
        total_k = tl.dot(grad_scores.to(query.dtype), query, total_k, input_precision="ieee")
    base = grad_k + head * grad_k_head
    store_rows(base, token, grad_k_token, here, total_k / norm, WIDTH_QK, BLOCK_QK)
    base = grad_v + head * grad_v_head
    store_rows(base, token, grad_v_token, here, total_v / norm, WIDTH_V, BLOCK_V)


# The number of tiles differs from batch to batch: a kernel compiled once serves all.
@triton.jit(do_not_specialize=["num_tiles"])
def bias_gradient_kernel(
    q, k, v, grad_out, position_sums, time_sums, scale,
    position_weights, time_weights, edges,
    tiles, query_tokens, key_tokens, query_order, key_order, positions, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    num_tiles, heads, copies, num_positions, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_TIME: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr,
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
            row, stop, query_tokens, query_order, positions, next_times, _NO_QUERY, True
        )
        for start in range(key_first, key_stop, STEP):
            key_row = start + tl.arange(0, STEP)
            there, key_token, key_place, key_position, key_time = _side(
                key_row, key_stop, key_tokens, key_order, positions, times, _NO_KEY, True
            )
            seen = sees(place[:, None], key_place[None, :])
            bias, entry, bucket = _bias(
                position[:, None], next_time[:, None], key_position[None, :], key_time[None, :],
                seen, position_weights, time_weights, edges, num_positions, last_bucket,
            )  # fmt: skip
            total = tl.zeros([TILE, STEP], tl.float32)
            for index in range(heads):
                head = tl.cast(index, tl.int64)
                query = load_rows(q + head * q_head, token, q_token, here, WIDTH_QK, BLOCK_QK)
                key = load_rows(k + head * k_head, key_token, k_token, there, WIDTH_QK, BLOCK_QK)
                scores = tl.dot(query, tl.trans(key), bias, input_precision="ieee")
                grad = load_rows(
                    grad_out + head * out_head, token, out_token, here, WIDTH_V, BLOCK_V
                )
                value = load_rows(v + head * v_head, key_token, v_token, there, WIDTH_V, BLOCK_V)
                grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
                total += grad_weights * _slope(scores, _gate(scores))
            total = tl.where(seen, total, 0.0)
            known = seen & (entry >= 0) & (entry < num_positions)
            steps = (total * factor).to(tl.int64)
            tl.atomic_add(own_sums + entry, steps, mask=known, sem="relaxed")
            by_time = add_by_bucket(by_time, total, bucket, seen, last_bucket, BLOCK_TIME)
    partial = time_sums + program.to(tl.int64) * (last_bucket + 1)
    tl.store(partial + buckets, by_time, mask=buckets <= last_bucket)
