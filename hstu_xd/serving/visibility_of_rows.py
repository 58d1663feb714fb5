"""Which earlier rows and domain states a user's newest rows see, and with what bias."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS, time_bucket
from hstu_xd.serving.fused_weights import HIDDEN, PreparedModel
from hstu_xd.serving.new_rows import Reach, Rows


@dataclass(frozen=True, eq=False)
class Sight:
    """Biases of one user's r rows on what they may read, a layer each.

    Attributes:
        hidden: (H, r, c + r), on c rows in memory and the rows themselves: 0, or hugely negative
            where a head does not read a row.
        pairs: (r, c + r), relative bias of the same pairs; None without it.
        states: (H, r, D * M + D + r), on committed states, initial ones and those of the rows,
            minus infinity where they are out of sight; empty without DDSR.
    """

    hidden: Sequence[Tensor]
    pairs: Sequence[Tensor] | None
    states: Sequence[Tensor]

    @classmethod
    def of(cls, prepared: PreparedModel, rows: Rows) -> "Sight":
        """Work out the biases of all layers."""
        s = prepared.model.settings
        ages = None
        if s.reads_time:
            written = torch.cat([rows.read[1, : rows.known], rows.state.state_times])
            next_times = torch.tensor(rows.next_times).unsqueeze(1)
            ages = time_bucket(next_times - written, NUM_TIME_BUCKETS)
        pairs = None
        if prepared.positions is not None and prepared.times is not None and ages is not None:
            pairs = _pairs(prepared.positions, prepared.times, rows, ages).unbind()
        return cls(
            hidden=_hidden(prepared, rows).expand(s.num_blocks, -1, -1, -1).unbind(),
            pairs=pairs,
            states=_states(prepared, rows, ages).unbind() if s.ddsr else (),
        )

    def events(self, index: int) -> Tensor:
        """Hidden and relative bias of one layer together, (H, r, c + r), the caller's own."""
        if self.pairs is None:
            return self.hidden[index].clone()
        return self.hidden[index] + self.pairs[index]


def _hidden(prepared: PreparedModel, rows: Rows) -> Tensor:
    """(layers or 1, H, r, c + r)."""
    first, count = rows.state.kept, len(rows.item_ids)
    end = first + count
    everything = [len(prepared.domain_scores) - 1] * count
    views = torch.tensor([everything, rows.domains, rows.target_domains])
    read = views.index_select(0, prepared.views).view(-1)
    hidden = prepared.domain_scores.index_select(0, read)
    hidden = hidden.index_select(1, rows.read[2, :end])
    if rows.reach is not None:
        hidden.masked_fill_(_out_of_reach(prepared, rows.reach), HIDDEN)
    hidden = hidden.view(-1, prepared.model.settings.num_heads, count, end)
    hidden[..., first:].masked_fill_(
        _unseen(rows.commits, rows.variants, virtual=not rows.state.length), HIDDEN
    )
    return hidden


def _out_of_reach(prepared: PreparedModel, reach: Reach) -> Tensor:
    """(layers or 1 * H * r, c + r) bool, events of segments that a row does not look back at."""
    first_read = reach.first_read.index_select(0, prepared.views).view(-1, 1)
    return reach.segments < first_read


def _pairs(positions: Tensor, times: Tensor, rows: Rows, ages: Tensor) -> Tensor:
    """(layers, r, c + r)."""
    known, origin = rows.known, positions.shape[1] // 2
    places = [origin - position for position in rows.positions[: rows.commits + 1]]
    if rows.reach is None:
        # Positions in memory run from 0 without a gap.
        pairs = torch.stack([positions[:, place : place + known] for place in places], dim=1)
    else:
        pairs = positions[:, torch.tensor(places).unsqueeze(1) + rows.reach.positions[:known]]
    pairs += times.index_select(1, ages.view(-1)).view(len(pairs), *ages.shape)[..., :known]
    return _per_variant(pairs, rows.variants)


def _states(prepared: PreparedModel, rows: Rows, ages: Tensor | None) -> Tensor:
    """(layers, H, r, D * M + D + r)."""
    s = prepared.model.settings
    hidden = _hidden_states(rows, s.num_domains, s.states_per_domain)
    shape = s.num_blocks, s.num_heads, *hidden.shape
    if prepared.state_ages is None or ages is None:
        return torch.zeros(shape).masked_fill_(hidden, float("-inf"))
    committed, own = ages[:, rows.known :], ages[:, rows.state.kept : rows.known]
    never = ages.new_full((len(ages), s.num_domains), NUM_TIME_BUCKETS)
    buckets = _per_variant(torch.cat([committed, never, own], dim=1), rows.variants)
    bias = prepared.state_ages.index_select(2, buckets.view(-1)).view(shape)
    return bias.masked_fill_(hidden, float("-inf"))


def _hidden_states(rows: Rows, num_domains: int, kept: int) -> Tensor:
    """(r, D * M + D + r) bool: a row sees the ``kept`` latest states of each domain.

    Where a domain has none, it sees the initial one; every event is its domain's newest state. What
    a history token sees does not matter.
    """
    initial, own = num_domains * kept, num_domains * (kept + 1)
    # Columns of each domain's states in sight, oldest first.
    latest = [
        [domain * kept + number % kept for number in range(max(0, count - kept), count)]
        for domain, count in enumerate(rows.state.state_counts.tolist())
    ]
    sight = bytearray(b"\1") * (own + len(rows.item_ids))
    for domain, columns in enumerate(latest):
        for column in columns or [initial + domain]:
            sight[column] = 0
    every = bytearray()
    for number, domain in enumerate(rows.domains):
        if number in rows.tokens:
            every += sight
            continue
        columns, row = latest[domain], sight.copy()
        if rows.state.length:
            if not columns:
                row[initial + domain] = 1
            elif len(columns) == kept:
                row[columns[0]] = 1
            row[own + number] = 0
        if number < rows.commits:
            sight, latest[domain] = row, [*columns, own + number][-kept:]
        every += row
    return torch.frombuffer(every, dtype=torch.bool).view(len(rows.item_ids), -1)


@lru_cache(maxsize=256)
def _unseen(commits: int, variants: int, *, virtual: bool) -> Tensor:
    """(m + V, m + V) bool, which of the rows (column) each of them does not see."""
    rows = torch.arange(commits + variants)
    unseen = (rows >= commits) | (rows > rows.unsqueeze(1))
    return unseen if virtual else unseen.fill_diagonal_(False)


def _per_variant(pairs: Tensor, variants: int) -> Tensor:
    """Repeat the last row and the last column, the pending event's, for each of its variants."""
    if variants == 1:
        return pairs
    pairs = torch.cat([pairs, pairs[..., -1:].expand(*pairs.shape[:-1], variants - 1)], dim=-1)
    last = pairs[..., -1:, :]
    return torch.cat([pairs, last.expand(*last.shape[:-2], variants - 1, -1)], dim=-2)
