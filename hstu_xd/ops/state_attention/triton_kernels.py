"""Triton kernels of DDSR: attention over the latest states of all domains, forward and backward.

A tile is a run of consecutive tokens of one user. Its keys are the states that were there when it
began, ``depth`` for each domain (its slots), and those that its own tokens write: every state that
any of its tokens reads is fetched once a tile. A key is seen by the tokens from the one that wrote
it until the one that replaces it; the initial state of a domain from the beginning until the first
visit. Nothing else tells apart which pairs are seen.

The gradients of keys are sums over those stretches of tokens, so a program owns some keys of like
lifetime and walks over the tokens that see any of them: no two programs write to the same place.

Numbers that differ from batch to batch are not specialised: a kernel compiled once serves them all.
"""

# The body of a kernel is Triton's language; Python's types do not hold in it.
# pyrefly: ignore-errors

import triton
import triton.language as tl

from hstu_xd.ops.triton_blocks import add_by_bucket, bucket_of, load_rows, look_up, store_rows

# A place after all tokens: rows that are not there see, and are seen by, nothing.
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _tile(tiles, index, num_domains):
    """Load first token and end of a tile, its user, and where its counts of visits lie."""
    entry = tiles + tl.cast(index, tl.int64) * (3 + num_domains)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2).to(tl.int64), entry + 3


@triton.jit
def _states(
    slot, first, stop, user, visited,
    offsets, tokens, first_visits, replaced, times, num_tokens, num_domains, depth,
):  # fmt: skip
    """Load of each key of a tile: its row, whether it is there, since and until which token it is
    seen, its time, and whether it is an initial state.

    A domain is represented once by its initial state, not once for every missing visit.
    """
    carried = slot < num_domains * depth
    domain = tl.where(carried, slot // depth, 0)
    back = slot % depth
    group = user * num_domains + domain
    begin = tl.load(offsets + group, mask=carried, other=0)
    end = tl.load(visited + domain, mask=carried, other=0)
    visit = end - 1 - back
    written = carried & (visit >= begin)
    initial = carried & (end == begin) & (back == 0)
    own = first + slot - num_domains * depth
    token = tl.load(tokens + visit, mask=written, other=0).to(tl.int32)
    token = tl.where(carried, token, own)
    known = written | ((slot >= num_domains * depth) & (own < stop))
    until = tl.load(replaced + token, mask=known, other=-1)
    until = tl.where(initial, tl.load(first_visits + group, mask=initial, other=-1), until)
    time = tl.load(times + token, mask=known, other=0)
    row = tl.where(initial, num_tokens + domain, token).to(tl.int64)
    return row, known | initial, tl.where(initial, -1, token), until, time, initial


@triton.jit
def _scores(
    query, key, next_time, time, initial,
    bias, edges, head, heads, last_bucket, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute scores of pairs and their rows of ``bias``, the last one for initial states."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    bucket = tl.zeros(scores.shape, tl.int32)
    if BIASED:
        bucket = tl.minimum(bucket_of(next_time - time, edges), last_bucket)
        bucket = tl.where(initial, last_bucket, bucket)
        scores += look_up(bias + head, bucket * heads)
    return scores, bucket


@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    q, k, v, bias, out, log_mass,
    edges, tiles, offsets, tokens, first_visits, replaced, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    num_tokens, num_domains, depth, heads, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk a tile over its keys: ``out = softmax_s(<q, k_s> + bias_s) v_s``, one pass.

    log_mass: (L, H) float32, logarithm of the softmax's denominator.
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    first, stop, user, visited = _tile(tiles, program // heads, num_domains)
    if first >= stop:
        return
    token = first + tl.arange(0, TILE)
    here = token < stop
    place = tl.where(here, token, _NOWHERE)
    at = token.to(tl.int64)
    query = load_rows(q + head * q_head, at, q_token, here, WIDTH_QK, BLOCK_QK)
    next_time = tl.load(next_times + token, mask=here, other=0)
    top = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    total = tl.zeros([TILE, BLOCK_V], tl.float32)
    for start in range(0, num_domains * depth + stop - first, STEP):
        row, there, since, until, time, initial = _states(
            start + tl.arange(0, STEP), first, stop, user, visited,
            offsets, tokens, first_visits, replaced, times, num_tokens, num_domains, depth,
        )  # fmt: skip
        seen = (since[None, :] <= place[:, None]) & (place[:, None] < until[None, :])
        key = load_rows(k + head * k_head, row, k_token, there, WIDTH_QK, BLOCK_QK)
        scores, _ = _scores(
            query, key, next_time[:, None], time[None, :], initial[None, :],
            bias, edges, head, heads, last_bucket, BIASED, PRECISION,
        )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Finite also for tokens that have seen no key yet.
        level = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - level[:, None])
        kept = tl.exp(top - level)
        mass = mass * kept + tl.sum(weights, 1)
        value = load_rows(v + head * v_head, row, v_token, there, WIDTH_V, BLOCK_V)
        total = tl.dot(
            weights.to(value.dtype), value, total * kept[:, None], input_precision=PRECISION
        )
        top = new_top
    mass = tl.where(here, mass, 1.0)
    answer = total / mass[:, None]
    store_rows(out + head * out_head, at, out_token, here, answer, WIDTH_V, BLOCK_V)
    tl.store(log_mass + at * heads + head, top + tl.log(mass), mask=here)


@triton.jit(do_not_specialize=["num_tokens"])
def query_gradient_kernel(
    q, k, v, bias, out, log_mass, grad_out, grad_q, by_age, inner,
    edges, tiles, offsets, tokens, first_visits, replaced, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    grad_out_token, grad_out_head, grad_q_token, grad_q_head,
    num_tokens, num_domains, depth, heads, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_AGE: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk a tile over its keys: ``dq = sum_s ds_s k_s``, weights computed again.

    by_age: (tiles, H, last_bucket + 1) float32, sums of ``ds`` by row of the bias.
    inner: (L, H) float32, ``<out, grad_out>``, which the gradients of the keys need as well.
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    first, stop, user, visited = _tile(tiles, program // heads, num_domains)
    if first >= stop:
        return
    token = first + tl.arange(0, TILE)
    here = token < stop
    place = tl.where(here, token, _NOWHERE)
    at = token.to(tl.int64)
    query = load_rows(q + head * q_head, at, q_token, here, WIDTH_QK, BLOCK_QK)
    answer = load_rows(out + head * out_head, at, out_token, here, WIDTH_V, BLOCK_V)
    base = grad_out + head * grad_out_head
    grad = load_rows(base, at, grad_out_token, here, WIDTH_V, BLOCK_V)
    product = tl.sum(answer.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(inner + at * heads + head, product, mask=here)
    log_total = tl.load(log_mass + at * heads + head, mask=here, other=0.0)
    next_time = tl.load(next_times + token, mask=here, other=0)
    total = tl.zeros([TILE, BLOCK_QK], tl.float32)
    ages = tl.arange(0, BLOCK_AGE)
    sums = tl.zeros([BLOCK_AGE], tl.float32)
    for start in range(0, num_domains * depth + stop - first, STEP):
        row, there, since, until, time, initial = _states(
            start + tl.arange(0, STEP), first, stop, user, visited,
            offsets, tokens, first_visits, replaced, times, num_tokens, num_domains, depth,
        )  # fmt: skip
        seen = (since[None, :] <= place[:, None]) & (place[:, None] < until[None, :])
        key = load_rows(k + head * k_head, row, k_token, there, WIDTH_QK, BLOCK_QK)
        scores, bucket = _scores(
            query, key, next_time[:, None], time[None, :], initial[None, :],
            bias, edges, head, heads, last_bucket, BIASED, PRECISION,
        )  # fmt: skip
        weights = tl.where(seen, tl.exp(scores - log_total[:, None]), 0.0)
        value = load_rows(v + head * v_head, row, v_token, there, WIDTH_V, BLOCK_V)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - product[:, None])
        total = tl.dot(grad_scores.to(key.dtype), key, total, input_precision=PRECISION)
        if BIASED:
            # Initial states all have the last row: counting them apart keeps the others close.
            never = tl.sum(tl.where(initial[None, :], grad_scores, 0.0))
            sums += tl.where(ages == last_bucket, never, 0.0)
            dated = seen & ~initial[None, :]
            grad_scores = tl.where(dated, grad_scores, 0.0)
            sums = add_by_bucket(sums, grad_scores, bucket, dated, last_bucket, BLOCK_AGE)
    store_rows(grad_q + head * grad_q_head, at, grad_q_token, here, total, WIDTH_QK, BLOCK_QK)
    if BIASED:
        partial = by_age + program.to(tl.int64) * (last_bucket + 1)
        tl.store(partial + ages, sums, mask=ages <= last_bucket)


@triton.jit
def _add_key_gradients(
    total_k, total_v, key, value, since, until, time, initial, token, stop,
    q, bias, log_mass, grad_out, inner, edges, next_times,
    q_token, q_head, grad_out_token, grad_out_head, head, heads, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what some tokens before ``stop`` give ``dk = sum_i ds_i q_i``, ``dv = sum_i w_i do_i``.

    Pairs are transposed, a key to a row, so that they enter the sums as they are.
    """
    there = token < stop
    at = token.to(tl.int64)
    seen = (since[:, None] <= token[None, :]) & (token[None, :] < until[:, None]) & there[None, :]
    query = load_rows(q + head * q_head, at, q_token, there, WIDTH_QK, BLOCK_QK)
    next_time = tl.load(next_times + token, mask=there, other=0)
    scores, _ = _scores(
        key, query, next_time[None, :], time[:, None], initial[:, None],
        bias, edges, head, heads, last_bucket, BIASED, PRECISION,
    )  # fmt: skip
    log_total = tl.load(log_mass + at * heads + head, mask=there, other=0.0)
    weights = tl.where(seen, tl.exp(scores - log_total[None, :]), 0.0)
    base = grad_out + head * grad_out_head
    grad = load_rows(base, at, grad_out_token, there, WIDTH_V, BLOCK_V)
    total_v = tl.dot(weights.to(grad.dtype), grad, total_v, input_precision=PRECISION)
    grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    product = tl.load(inner + at * heads + head, mask=there, other=0.0)
    grad_scores = weights * (grad_weights - product[None, :])
    total_k = tl.dot(grad_scores.to(query.dtype), query, total_k, input_precision=PRECISION)
    return total_k, total_v


@triton.jit
def token_gradient_kernel(
    q, k, v, bias, log_mass, grad_out, grad_k, grad_v, inner,
    edges, key_tiles, key_tokens, replaced, next_times, times,
    q_token, q_head, k_token, k_head, v_token, v_head,
    grad_out_token, grad_out_head, grad_k_token, grad_k_head, grad_v_token, grad_v_head,
    heads, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum gradients of states that tokens wrote over all tokens that see any state of the tile."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    entry = key_tiles + (program // heads) * 2
    row = tl.load(entry) + tl.arange(0, TILE)
    here = row < tl.load(entry + 1)
    at = tl.load(key_tokens + row, mask=here, other=0)
    since = tl.where(here, at.to(tl.int32), _NOWHERE)
    until = tl.load(replaced + at, mask=here, other=0)
    key = load_rows(k + head * k_head, at, k_token, here, WIDTH_QK, BLOCK_QK)
    value = load_rows(v + head * v_head, at, v_token, here, WIDTH_V, BLOCK_V)
    time = tl.load(times + at, mask=here, other=0)
    total_k = tl.zeros([TILE, BLOCK_QK], tl.float32)
    total_v = tl.zeros([TILE, BLOCK_V], tl.float32)
    stop = tl.max(until)
    for start in range(tl.min(since), stop, STEP):
        total_k, total_v = _add_key_gradients(
            total_k, total_v, key, value, since, until, time, row < 0,
            start + tl.arange(0, STEP), stop,
            q, bias, log_mass, grad_out, inner, edges, next_times,
            q_token, q_head, grad_out_token, grad_out_head, head, heads, last_bucket,
            WIDTH_QK, WIDTH_V, BLOCK_QK, BLOCK_V, BIASED, PRECISION,
        )  # fmt: skip
    store_rows(grad_k + head * grad_k_head, at, grad_k_token, here, total_k, WIDTH_QK, BLOCK_QK)
    store_rows(grad_v + head * grad_v_head, at, grad_v_token, here, total_v, WIDTH_V, BLOCK_V)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "shares"])
def initial_gradient_kernel(
    q, k, v, bias, log_mass, grad_out, grad_k, grad_v, inner,
    edges, tiles, first_visits, next_times,
    q_token, q_head, k_token, k_head, v_token, v_head,
    grad_out_token, grad_out_head, grad_k_token, grad_k_head, grad_v_token, grad_v_head,
    num_tiles, shares, num_tokens, num_domains, heads, last_bucket,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum gradients of initial states of some domains over every so many-th tile of tokens.

    grad_k, grad_v: (shares, D, H, d) float32, partial sums; strides are those within a share.
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    share = program // heads % shares
    domain = program // (heads * shares) * TILE + tl.arange(0, TILE)
    here = domain < num_domains
    row = (num_tokens + domain).to(tl.int64)
    key = load_rows(k + head * k_head, row, k_token, here, WIDTH_QK, BLOCK_QK)
    value = load_rows(v + head * v_head, row, v_token, here, WIDTH_V, BLOCK_V)
    since = tl.where(here, -1, _NOWHERE)
    total_k = tl.zeros([TILE, BLOCK_QK], tl.float32)
    total_v = tl.zeros([TILE, BLOCK_V], tl.float32)
    for tile in range(share, num_tiles, shares):
        first, end, user, _ = _tile(tiles, tile, num_domains)
        until = tl.load(first_visits + user * num_domains + domain, mask=here, other=0)
        stop = tl.minimum(end, tl.max(until))
        for start in range(first, stop, STEP):
            total_k, total_v = _add_key_gradients(
                total_k, total_v, key, value, since, until, domain.to(tl.int64), here,
                start + tl.arange(0, STEP), stop,
                q, bias, log_mass, grad_out, inner, edges, next_times,
                q_token, q_head, grad_out_token, grad_out_head, head, heads, last_bucket,
                WIDTH_QK, WIDTH_V, BLOCK_QK, BLOCK_V, BIASED, PRECISION,
            )  # fmt: skip
    at = (share * num_domains + domain).to(tl.int64)
    store_rows(grad_k + head * grad_k_head, at, grad_k_token, here, total_k, WIDTH_QK, BLOCK_QK)
    store_rows(grad_v + head * grad_v_head, at, grad_v_token, here, total_v, WIDTH_V, BLOCK_V)
