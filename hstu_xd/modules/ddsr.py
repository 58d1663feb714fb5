"""DDSR: the last hidden state of every domain, queried by a small cross-domain attention."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from hstu_xd.modules.relative_attention_bias import NUM_TIME_BUCKETS
from hstu_xd.ops.relative_bias import time_bucket

# Gathered states of one chunk of tokens: bounds memory at hundreds of domains (float count).
_CHUNK_FLOATS = 16_000_000


def last_state_index(
    domains: Tensor, offsets: Tensor, num_domains: int, states_per_domain: int = 1
) -> Tensor:
    """Token that last visited each domain, for every token: a running maximum, no loop over time.

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


class DynamicDomainState(nn.Module):
    """Cross-domain attention over the states of all domains, ``O(D L)``.

    ``C_i = sum_s softmax_s(<Wq h_i, Wk S_i[s]> / sqrt(dqk) + age bias) Wv S_i[s]`` over the latest
    ``M`` hidden states of each domain, a learned initial state where a domain has not occurred
    yet. ``Wv`` starts at zero, so the layer starts as the HSTU layer it extends.

    Args:
        embedding_dim: model width ``K``.
        num_domains: number of domains ``D``.
        num_heads: heads ``H``.
        dqk: width of queries and keys a head.
        dv: width of values a head.
        states_per_domain: latest states ``M`` kept per domain; the paper keeps one.
        query_target_domain: let the query know the domain of the next event.
        age_bias: add a learned bias on the log-bucketed time since the state was written.

    Source: arXiv 2508.20945, dynamic domain state representation; several states, the query's
    target domain and the age bias are this project's.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_domains: int,
        num_heads: int,
        dqk: int,
        dv: int,
        *,
        states_per_domain: int = 1,
        query_target_domain: bool = True,
        age_bias: bool = True,
    ) -> None:
        super().__init__()
        self._heads, self._dqk, self._dv = num_heads, dqk, dv
        self._num_domains, self._states_per_domain = num_domains, states_per_domain
        self._query = nn.Linear(embedding_dim, num_heads * dqk, bias=False)
        self._key = nn.Linear(embedding_dim, num_heads * dqk, bias=False)
        self._value = nn.Linear(embedding_dim, num_heads * dv, bias=False)
        self._initial_state = nn.Parameter(
            torch.empty(num_domains, embedding_dim).normal_(std=0.02)
        )
        self._target_emb = (
            nn.Embedding(num_domains, num_heads * dqk) if query_target_domain else None
        )
        self._age_w = (
            nn.Parameter(torch.zeros(NUM_TIME_BUCKETS + 1, num_heads)) if age_bias else None
        )
        nn.init.xavier_uniform_(self._query.weight)
        nn.init.xavier_uniform_(self._key.weight)
        nn.init.zeros_(self._value.weight)
        if self._target_emb is not None:
            nn.init.normal_(self._target_emb.weight, std=0.02)

    def forward(
        self,
        hidden: Tensor,
        states: Tensor,
        index: Tensor,
        target_domains: Tensor,
        age_bucket: Tensor,
    ) -> Tensor:
        """Query the domain states.

        Args:
            hidden: (L, K) float, what the queries are made of.
            states: (L, K) float, the state that each token writes for its domain.
            index: (L, D, M) int64 of :func:`last_state_index`.
            target_domains: (L,) int64, domain of each token's next event.
            age_bucket: (L, D, M) int64 of :func:`state_age_bucket`.

        Returns:
            (L, H * dv) float.
        """
        length = hidden.shape[0]
        query = self._query(hidden)
        if self._target_emb is not None:
            query = query + self._target_emb(target_domains)
        written = torch.cat([states, self._initial_state.to(states.dtype)])
        memory = torch.cat([self._key(written), self._value(written)], dim=1)
        # Row of each (domain, visit): the token that wrote it, or the domain's initial state.
        initial = length + torch.arange(self._num_domains, device=index.device).view(1, -1, 1)
        row = torch.where(index < 0, initial, index).flatten(1)
        # A domain is represented once by its initial state, not once for every missing visit.
        missing = (index < 0) & (torch.arange(index.shape[2], device=index.device) > 0)
        missing, age = missing.flatten(1), age_bucket.flatten(1)
        step = max(1, _CHUNK_FLOATS // max(1, row.shape[1] * memory.shape[1]))
        if step >= length:
            return self._attend(query, memory, row, missing, age)
        chunks = [slice(i, i + step) for i in range(0, length, step)]
        return torch.cat(
            [
                checkpoint(
                    self._attend, query[c], memory, row[c], missing[c], age[c], use_reentrant=False
                )
                for c in chunks
            ]
        )

    def _attend(
        self, query: Tensor, memory: Tensor, row: Tensor, missing: Tensor, age: Tensor
    ) -> Tensor:
        """(L, H dqk), (W, H (dqk + dv)), then (L, S) row, missing and age -> (L, H dv)."""
        # A lookup in a table: its backward pass is several times that of advanced indexing.
        key, value = embedding(row, memory).split(
            [self._heads * self._dqk, self._heads * self._dv], dim=2
        )
        scores = (query.unsqueeze(1) * key).unflatten(2, (self._heads, self._dqk)).sum(3)
        scores = scores * self._dqk**-0.5
        if self._age_w is not None:
            scores = scores + embedding(age, self._age_w).to(scores.dtype)
        weights = scores.masked_fill(missing.unsqueeze(2), float("-inf")).softmax(1)
        value = value.unflatten(2, (self._heads, self._dv))
        return (weights.unsqueeze(3) * value).sum(1).flatten(1)


def state_age_bucket(index: Tensor, timestamps: Tensor, next_timestamps: Tensor) -> Tensor:
    """Log bucket of the time from a state's writing to the event to predict.

    Args:
        index: (L, D, M) int64 of :func:`last_state_index`.
        timestamps: (L,) int64.
        next_timestamps: (L,) int64.

    Returns:
        (L, D, M) int64; the last bucket stands for "never written".
    """
    age = next_timestamps.view(-1, 1, 1) - timestamps[index.clamp(min=0)]
    return time_bucket(age, NUM_TIME_BUCKETS).masked_fill(index < 0, NUM_TIME_BUCKETS)
