"""The definition of DDSR's attention: every token looks the states of all domains up.

It lays out (L, D, M) rows of keys and of values, which is what the other implementations avoid.
"""

import torch
from torch import Tensor

from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS, time_bucket
from hstu_xd.ops.state_attention.state_reads import StateReads


def reference_state_attention(
    q: Tensor, k: Tensor, v: Tensor, reads: StateReads, *, bias: Tensor | None = None
) -> Tensor:
    """Compute the formula of :func:`hstu_xd.ops.state_attention` as it stands there."""
    row, weights = state_weights(q, k, reads, bias=bias)
    return torch.einsum("lsh,lshv->lhv", weights, v[row])


def state_weights(
    q: Tensor, k: Tensor, reads: StateReads, *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the rows of ``k`` that every token reads, and the softmax of their scores.

    Args:
        q: (L, H, dqk) float, scaled.
        k: (L + D, H, dqk) float.
        reads: which states each token reads.
        bias: (129, H) float by age of the state, or None.

    Returns:
        (L, D * M) int64 and (L, D * M, H) float, zero for a visit that has not been.
    """
    domains = reads.grouping.group_of % reads.grouping.num_domains
    index = last_state_index(
        domains, reads.grouping.batch_offsets, reads.grouping.num_domains, reads.states_per_domain
    )
    length, num_domains, depth = index.shape
    initial = length + torch.arange(num_domains, device=index.device).unsqueeze(1)
    row = torch.where(index < 0, initial, index)
    scores = torch.einsum("lhk,ldmhk->ldmh", q, k[row])
    if bias is not None:
        ages = state_age_bucket(index, reads.timestamps, reads.next_timestamps)
        scores = scores + bias.to(scores.dtype)[ages]
    # A domain is represented once by its initial state, not once for every missing visit.
    missing = (index < 0) & (torch.arange(depth, device=index.device) > 0)
    scores = scores.masked_fill(missing.unsqueeze(3), float("-inf"))
    return row.flatten(1), scores.flatten(1, 2).softmax(1)


def last_state_index(
    domains: Tensor, offsets: Tensor, num_domains: int, states_per_domain: int = 1
) -> Tensor:
    """Find the tokens that last visited each domain, for every token, by a running maximum.

    Args:
        domains: (L,) int64, domain of each token.
        offsets: (B + 1,) int64, user ``b`` owns tokens ``offsets[b]:offsets[b + 1]``.
        num_domains: number of domains ``D``.
        states_per_domain: how many of the latest visits ``M`` to list.

    Returns:
        (L, D, M) int64: token index ``max{j <= i : d_j = d}`` of the same user, then the visit
        before it and so on; -1 where there is none.

    Source: arXiv 2508.20945, dynamic domain state representation.
    """
    length = domains.numel()
    tokens = torch.arange(length, device=domains.device)
    visits = tokens.new_full((length, num_domains), -1)
    visits.scatter_(1, domains.unsqueeze(1), tokens.unsqueeze(1))
    latest = visits.cummax(0).values if length else visits
    start = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=length).unsqueeze(1)
    found = [latest.masked_fill(latest < start, -1)]
    if states_per_domain > 1:
        # The visit before token j's own: what was latest in its domain one token earlier.
        earlier = torch.cat([visits.new_full((1, num_domains), -1), latest[:-1]])
        previous = earlier.gather(1, domains.unsqueeze(1)).squeeze(1)
        previous = previous.masked_fill(previous < start.squeeze(1), -1)
        previous = torch.cat([previous, previous.new_full((1,), -1)])  # -1 leads to -1
        for _ in range(states_per_domain - 1):
            found.append(previous[found[-1]])
    return torch.stack(found, dim=2)


def state_age_bucket(index: Tensor, timestamps: Tensor, next_timestamps: Tensor) -> Tensor:
    """Bucket the time from a state's writing to the event to predict, on a logarithmic scale.

    Args:
        index: (L, D, M) int64 of :func:`last_state_index`.
        timestamps: (L,) int64.
        next_timestamps: (L,) int64.

    Returns:
        (L, D, M) int32; the last bucket stands for "never written".
    """
    age = next_timestamps.view(-1, 1, 1) - timestamps[index.clamp(min=0)]
    return time_bucket(age, NUM_TIME_BUCKETS).masked_fill(index < 0, NUM_TIME_BUCKETS)
