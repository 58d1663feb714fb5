"""Which earlier tokens and domain states a user's newest tokens see, and with what bias."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hstu_xd.modules.relative_attention_bias import NUM_TIME_BUCKETS
from hstu_xd.ops.relative_bias import time_bucket
from hstu_xd.serving.prepared import HIDDEN, PreparedModel
from hstu_xd.serving.state import UserState


@dataclass(frozen=True, eq=False)
class Tokens:
    """One user's tokens of a step, oldest first: m to commit, then V variants of the pending one.

    The variants are the pending event as seen from V requests; they do not see each other. A user
    without events has a virtual pending event: no item, seen by nobody, at position 0.

    Attributes:
        state: of the user; has room for the tokens.
        commits: number ``m``.
        item_ids: (m + V) item of each token, 0 where it is virtual.
        domains: (m + V) domain of each token; the requested one where it is virtual.
        target_domains: (m + V) domain of the event after each token, or the requested one.
        next_times: (m + 1) time of the event after each token, or of the request.
    """

    state: UserState
    commits: int
    item_ids: list[int]
    domains: list[int]
    target_domains: list[int]
    next_times: list[int]

    @classmethod
    def of(cls, state: UserState, requested: list[int], time: int | None) -> "Tokens":
        """All tokens that are not committed, for requests of some domains at one time.

        Args:
            state: of the user.
            requested: (V) domains, at least one.
            time: of the request; None: that of the last event.
        """
        variants = len(requested)
        state.reserve(state.uncommitted + variants)
        first, end = state.committed, state.length
        if not end:
            return cls(state, 0, [0] * variants, requested, requested, [time or 0])
        # The places of the variants in the arrays of events.
        state.events[:, end : end + variants - 1] = state.events[:, end - 1 : end]
        items, times, domains = state.events[:, first : end + variants - 1].tolist()
        commits = end - 1 - first
        return cls(
            state=state,
            commits=commits,
            item_ids=items,
            domains=domains,
            target_domains=domains[1 : commits + 1] + requested,
            next_times=[*times[1 : commits + 1], times[-1] if time is None else time],
        )

    @property
    def variants(self) -> int:
        """Number of requests ``V``."""
        return len(self.item_ids) - self.commits

    @property
    def positions(self) -> list[int]:
        """(m + V) position of each token."""
        first, commits = self.state.committed, self.commits
        return [first + min(i, commits) for i in range(len(self.item_ids))]

    @property
    def known(self) -> int:
        """Events of the window, the pending one included; 1 where it is virtual."""
        return self.state.committed + self.commits + 1

    def unseen(self) -> Tensor:
        """(m + V, m + V) bool, which of the tokens (column) each of them does not see."""
        return _unseen(self.commits, self.variants, virtual=not self.state.length)


@dataclass(frozen=True, eq=False)
class Sight:
    """Biases of one user's r tokens on what they may read, a layer each.

    Attributes:
        hidden: (H, r, c + r), on c committed events and the tokens themselves: 0, or hugely
            negative where a head does not read an event.
        pairs: (r, c + r), relative bias of the same pairs; None without it.
        states: (H, r, D * M + D + r), on committed states, initial ones and those of the tokens,
            minus infinity where they are out of sight; empty without DDSR.
    """

    hidden: Sequence[Tensor]
    pairs: Sequence[Tensor] | None
    states: Sequence[Tensor]

    @classmethod
    def of(cls, prepared: PreparedModel, tokens: Tokens) -> "Sight":
        """Work out the biases of all layers."""
        s, state = prepared.model.settings, tokens.state
        ages = None
        if s.reads_time:
            written = torch.cat([state.events[1, : tokens.known], state.state_times])
            next_times = torch.tensor(tokens.next_times).unsqueeze(1)
            ages = time_bucket(next_times - written, NUM_TIME_BUCKETS)
        pairs = None
        if prepared.positions is not None and prepared.times is not None and ages is not None:
            pairs = _pairs(prepared.positions, prepared.times, tokens, ages).unbind()
        return cls(
            hidden=_hidden(prepared, tokens).expand(s.num_blocks, -1, -1, -1).unbind(),
            pairs=pairs,
            states=_states(prepared, tokens, ages).unbind() if s.ddsr else (),
        )

    def events(self, index: int) -> Tensor:
        """Hidden and relative bias of one layer together, (H, r, c + r), the caller's own."""
        if self.pairs is None:
            return self.hidden[index].clone()
        return self.hidden[index] + self.pairs[index]


def _hidden(prepared: PreparedModel, tokens: Tokens) -> Tensor:
    """(layers or 1, H, r, c + r)."""
    first = tokens.state.committed
    end = first + len(tokens.item_ids)
    everything = [len(prepared.domain_scores) - 1] * len(tokens.domains)
    views = torch.tensor([everything, tokens.domains, tokens.target_domains])
    read = views.index_select(0, prepared.views).view(-1)
    hidden = prepared.domain_scores.index_select(0, read)
    hidden = hidden.index_select(1, tokens.state.events[2, :end])
    hidden = hidden.view(-1, prepared.model.settings.num_heads, len(tokens.domains), end)
    hidden[..., first:].masked_fill_(tokens.unseen(), HIDDEN)
    return hidden


def _pairs(positions: Tensor, times: Tensor, tokens: Tokens, ages: Tensor) -> Tensor:
    """(layers, r, c + r)."""
    known, origin = tokens.known, positions.shape[1] // 2
    places = [origin - position for position in range(tokens.state.committed, known)]
    pairs = torch.stack([positions[:, place : place + known] for place in places], dim=1)
    pairs += times.index_select(1, ages.view(-1)).view(len(pairs), *ages.shape)[..., :known]
    return _per_variant(pairs, tokens.variants)


def _states(prepared: PreparedModel, tokens: Tokens, ages: Tensor | None) -> Tensor:
    """(layers, H, r, D * M + D + r)."""
    s = prepared.model.settings
    hidden = _hidden_states(tokens, s.num_domains, s.states_per_domain)
    shape = s.num_blocks, s.num_heads, *hidden.shape
    if prepared.state_ages is None or ages is None:
        return torch.zeros(shape).masked_fill_(hidden, float("-inf"))
    committed, own = ages[:, tokens.known :], ages[:, tokens.state.committed : tokens.known]
    never = ages.new_full((len(ages), s.num_domains), NUM_TIME_BUCKETS)
    buckets = _per_variant(torch.cat([committed, never, own], dim=1), tokens.variants)
    bias = prepared.state_ages.index_select(2, buckets.view(-1)).view(shape)
    return bias.masked_fill_(hidden, float("-inf"))


def _hidden_states(tokens: Tokens, num_domains: int, kept: int) -> Tensor:
    """(r, D * M + D + r) bool: a token sees the ``kept`` latest states of each domain.

    Where a domain has none, it sees the initial one; every token is its domain's newest state.
    """
    initial, own = num_domains * kept, num_domains * (kept + 1)
    # Columns of each domain's states in sight, oldest first.
    latest = [
        [domain * kept + number % kept for number in range(max(0, count - kept), count)]
        for domain, count in enumerate(tokens.state.state_counts.tolist())
    ]
    sight = bytearray(b"\1") * (own + len(tokens.item_ids))
    for domain, columns in enumerate(latest):
        for column in columns or [initial + domain]:
            sight[column] = 0
    rows = bytearray()
    for token, domain in enumerate(tokens.domains):
        columns, row = latest[domain], sight.copy()
        if tokens.state.length:
            if not columns:
                row[initial + domain] = 1
            elif len(columns) == kept:
                row[columns[0]] = 1
            row[own + token] = 0
        if token < tokens.commits:
            sight, latest[domain] = row, [*columns, own + token][-kept:]
        rows += row
    return torch.frombuffer(rows, dtype=torch.bool).view(len(tokens.item_ids), -1)


@lru_cache(maxsize=256)
def _unseen(commits: int, variants: int, *, virtual: bool) -> Tensor:
    tokens = torch.arange(commits + variants)
    unseen = (tokens >= commits) | (tokens > tokens.unsqueeze(1))
    return unseen if virtual else unseen.fill_diagonal_(False)


def _per_variant(pairs: Tensor, variants: int) -> Tensor:
    """Repeat the last row and the last column, the pending event's, for each of its variants."""
    if variants == 1:
        return pairs
    pairs = torch.cat([pairs, pairs[..., -1:].expand(*pairs.shape[:-1], variants - 1)], dim=-1)
    last = pairs[..., -1:, :]
    return torch.cat([pairs, last.expand(*last.shape[:-2], variants - 1, -1)], dim=-2)
