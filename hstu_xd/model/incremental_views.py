"""What a user's newest rows read: earlier rows in memory, one another, and domain states.

The rules are those of :mod:`hstu_xd.model.views`, for another layout: instead of grouping all rows
of a batch, a few new rows score everything that their user has in memory, and what a head does not
read gets a bias by which it weighs nothing. For a row or two that is faster than to gather a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import heads_by_run
from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS, time_bucket

# Added to a score that must not count: silu of it is 0.
HIDDEN = torch.finfo(torch.float32).min / 2


class UserMemory(Protocol):
    """What a user's earlier rows have left behind in every layer.

    Attributes:
        memory: (layers, H, dqk + dv, capacity), keys and values of rows, with room for new ones.
        num_rows: number of rows in memory.
        state_memory: (layers with DDSR, H, D * M, dqk + dv), keys and values of each domain's
            latest states, the ``i``-th of a domain in place ``i mod M``.
        state_times: (D * M,) int64, time of the event that wrote each state.
        state_counts: (D,) int64, states that each domain has written so far.
    """

    memory: Tensor
    num_rows: int
    state_memory: Tensor
    state_times: Tensor
    state_counts: Tensor

    def commit(self, events: int, rows: int, states: Tensor | None) -> None:
        """Keep what the first new rows have left in memory: these many events and rows."""
        ...

    def keep_only(self, readable: Tensor) -> None:
        """Free the rows in memory that are not readable: (num_rows,) bool."""
        ...


@dataclass(frozen=True, eq=False)
class SegmentReach:
    """Where rows stand among segments, and what the new ones read of them.

    Attributes:
        positions: (c + m + V) int64, of the rows in memory and of the new ones.
        segments: (c + m + V) int64, segment of its run that each of them is read with.
        first_read: (3, m + V) int64, by :class:`hstu_xd.model.views.Run`: first segment whose
            events a new row reads; older events are hidden from it.
        is_readable: (c + m) bool, later events may read a row.
    """

    positions: Tensor
    segments: Tensor
    first_read: Tensor
    is_readable: Tensor


@dataclass(frozen=True, eq=False)
class NewRows:
    """One user's rows of a step: m writers, oldest first, then V readers.

    Writers are events and history tokens; a token has domain, position and time of the last event
    of its segment. The readers are the last event as V requests ask for it: they see all writers,
    and not one another. A user without events has a virtual last event: no item, seen by nobody, at
    position 0. Behind c rows in memory, the user has room for the new ones.

    Attributes:
        user: whose memory the rows read.
        num_writers: number ``m``.
        item_ids: (m + V) item of each row, 0 where it is virtual; not read of history tokens.
        positions: (m + V) position of each row.
        domains: (m + V) domain of each row; the requested one where it is virtual.
        target_domains: (m + V) domain of the event after each row, or the requested one; a history
            token's own.
        next_times: (m + 1) time of the event after each row, or of the request; a history token's
            own.
        read: (3, c + m + V) int64, items, timestamps and domains of the rows in memory and of the
            new ones, or longer.
        is_virtual: the user has no events.
        tokens: history tokens among the new rows, by row.
        reach: None where the model does not cut histories, and where there are none: memory then
            holds every earlier event.
    """

    user: UserMemory
    num_writers: int
    item_ids: list[int]
    positions: Sequence[int]
    domains: list[int]
    target_domains: list[int]
    next_times: list[int]
    read: Tensor
    is_virtual: bool = False
    tokens: dict[int, int] = field(default_factory=dict)
    reach: SegmentReach | None = None

    @property
    def num_readers(self) -> int:
        """Return the number of requests ``V``."""
        return len(self.item_ids) - self.num_writers

    @property
    def known(self) -> int:
        """Return the number of rows in memory and new ones, the readers counted once."""
        return self.user.num_rows + self.num_writers + 1

    def commit(self, states: Tensor | None) -> None:
        """Keep what the writers have left in memory, and free what nobody reads any more.

        Args:
            states: (layers with DDSR, H, m, dqk + dv), keys and values of the states that events
                among the writers write, whatever for history tokens; None without DDSR.
        """
        if states is not None and self.tokens:
            events = [row for row in range(self.num_writers) if row not in self.tokens]
            states = states.index_select(2, torch.tensor(events))
        self.user.commit(self.num_writers - len(self.tokens), self.num_writers, states)
        if self.reach is not None and self.num_writers:
            self.user.keep_only(self.reach.is_readable)


@dataclass(frozen=True, eq=False)
class BiasTables:
    """The learned biases of all layers, and what the heads read.

    Attributes:
        settings: of the model.
        positions: (layers, 2 N - 1), the tables of the relative position bias; None without bias.
        times: (layers, buckets + 1), those of the time bias.
        state_ages: (layers with DDSR, H, buckets + 1), of its age bias; None without it.
        runs: (H,) or (layers * H,) int64, the :class:`hstu_xd.model.views.Run` that each head
            reads; once where all layers read alike.
        domain_scores: (D + 1, D), added to scores of events of a domain (column) by a head that
            reads one domain (row), or everything (last row).
    """

    settings: EncoderSettings
    positions: Tensor | None
    times: Tensor | None
    state_ages: Tensor | None
    runs: Tensor
    domain_scores: Tensor

    @classmethod
    def build(
        cls,
        settings: EncoderSettings,
        *,
        positions: Tensor | None,
        times: Tensor | None,
        state_ages: Tensor | None,
    ) -> "BiasTables":
        """Add to the learned tables what follows from the settings; see the attributes."""
        num_domains = settings.num_domains
        runs = [
            [
                run
                for heads, run in heads_by_run(settings, layer)
                for _ in range(heads.start, heads.stop)
            ]
            for layer in range(settings.num_blocks)
        ]
        scores = torch.full((num_domains + 1, num_domains), HIDDEN)
        scores[-1] = 0
        return cls(
            settings=settings,
            positions=positions,
            times=times,
            state_ages=state_ages,
            runs=torch.tensor(runs if len({*map(tuple, runs)}) > 1 else runs[:1]).flatten(),
            domain_scores=scores.fill_diagonal_(0),
        )


@dataclass(frozen=True, eq=False)
class RowBiases:
    """Biases of one user's r new rows on what they may read, a layer each.

    Attributes:
        hidden: (H, r, c + r), on c rows in memory and the new rows themselves: 0, or hugely
            negative where a head does not read a row.
        pairs: (r, c + r), relative bias of the same pairs; None without it.
        states: (H, r, D * M + D + r), on states in memory, initial ones and those of the new rows,
            minus infinity where they are out of sight; empty without DDSR.
    """

    hidden: Sequence[Tensor]
    pairs: Sequence[Tensor] | None
    states: Sequence[Tensor]

    @classmethod
    def build(cls, tables: BiasTables, rows: NewRows) -> "RowBiases":
        """Work out the biases of all layers."""
        s = tables.settings
        ages = None
        if s.reads_time:
            written = torch.cat([rows.read[1, : rows.known], rows.user.state_times])
            next_times = torch.tensor(rows.next_times).unsqueeze(1)
            ages = time_bucket(next_times - written, NUM_TIME_BUCKETS)
        pairs = None
        if tables.positions is not None and tables.times is not None and ages is not None:
            pairs = _pairs(tables.positions, tables.times, rows, ages).unbind()
        return cls(
            hidden=_hidden(tables, rows).expand(s.num_blocks, -1, -1, -1).unbind(),
            pairs=pairs,
            states=_states(tables, rows, ages).unbind() if s.ddsr else (),
        )

    def of_rows(self, layer: int) -> Tensor:
        """Return hidden and relative bias of a layer together: (H, r, c + r), the caller's own."""
        if self.pairs is None:
            return self.hidden[layer].clone()
        return self.hidden[layer] + self.pairs[layer]


def _hidden(tables: BiasTables, rows: NewRows) -> Tensor:
    """Return the bias that hides rows: (layers or 1, H, r, c + r)."""
    first, count = rows.user.num_rows, len(rows.item_ids)
    end = first + count
    everything = [len(tables.domain_scores) - 1] * count
    by_run = torch.tensor([everything, rows.domains, rows.target_domains])  # in the order of Run
    read = by_run.index_select(0, tables.runs).view(-1)
    hidden = tables.domain_scores.index_select(0, read)
    hidden = hidden.index_select(1, rows.read[2, :end])
    if rows.reach is not None:
        first_read = rows.reach.first_read.index_select(0, tables.runs).view(-1, 1)
        hidden.masked_fill_(rows.reach.segments < first_read, HIDDEN)
    hidden = hidden.view(-1, tables.settings.num_heads, count, end)
    hidden[..., first:].masked_fill_(
        _unseen(rows.num_writers, rows.num_readers, virtual=rows.is_virtual), HIDDEN
    )
    return hidden


def _pairs(positions: Tensor, times: Tensor, rows: NewRows, ages: Tensor) -> Tensor:
    """Return the relative bias of all pairs: (layers, r, c + r)."""
    known, origin = rows.known, positions.shape[1] // 2
    places = [origin - position for position in rows.positions[: rows.num_writers + 1]]
    if rows.reach is None:
        # Positions in memory run from 0 without a gap.
        pairs = torch.stack([positions[:, place : place + known] for place in places], dim=1)
    else:
        pairs = positions[:, torch.tensor(places).unsqueeze(1) + rows.reach.positions[:known]]
    pairs += times.index_select(1, ages.view(-1)).view(len(pairs), *ages.shape)[..., :known]
    return _per_reader(pairs, rows.num_readers)


def _states(tables: BiasTables, rows: NewRows, ages: Tensor | None) -> Tensor:
    """Return the bias of domain states: (layers with DDSR, H, r, D * M + D + r)."""
    s = tables.settings
    hidden = hidden_states(rows, s.num_domains, s.states_per_domain)
    shape = len(s.state_layers), s.num_heads, *hidden.shape
    if tables.state_ages is None or ages is None:
        return torch.zeros(shape).masked_fill_(hidden, float("-inf"))
    in_memory, own = ages[:, rows.known :], ages[:, rows.user.num_rows : rows.known]
    never = ages.new_full((len(ages), s.num_domains), NUM_TIME_BUCKETS)
    buckets = _per_reader(torch.cat([in_memory, never, own], dim=1), rows.num_readers)
    bias = tables.state_ages.index_select(2, buckets.view(-1)).view(shape)
    return bias.masked_fill_(hidden, float("-inf"))


def hidden_states(rows: NewRows, num_domains: int, states_per_domain: int) -> Tensor:
    """Return which states rows do not see, (r, D * M + D + r) bool, but for each domain's latest.

    A row sees the ``M`` latest states of each domain; where there is none, the initial one. Every
    event is its domain's newest state. What a history token sees does not matter.
    """
    initial, own = num_domains * states_per_domain, num_domains * (states_per_domain + 1)
    # Columns of each domain's states in sight, oldest first.
    latest = [
        [
            domain * states_per_domain + number % states_per_domain
            for number in range(max(0, count - states_per_domain), count)
        ]
        for domain, count in enumerate(rows.user.state_counts.tolist())
    ]
    hidden = bytearray(b"\1") * (own + len(rows.item_ids))
    for domain, columns in enumerate(latest):
        for column in columns or [initial + domain]:
            hidden[column] = 0
    every = bytearray()
    for number, domain in enumerate(rows.domains):
        if number in rows.tokens:
            every += hidden
            continue
        columns, row = latest[domain], hidden.copy()
        if not rows.is_virtual:
            if not columns:
                row[initial + domain] = 1
            elif len(columns) == states_per_domain:
                row[columns[0]] = 1
            row[own + number] = 0
        if number < rows.num_writers:
            hidden, latest[domain] = row, [*columns, own + number][-states_per_domain:]
        every += row
    return torch.frombuffer(every, dtype=torch.bool).view(len(rows.item_ids), -1)


@lru_cache(maxsize=256)
def _unseen(num_writers: int, num_readers: int, *, virtual: bool) -> Tensor:
    """Return which new rows (column) each of them does not see: (m + V, m + V) bool.

    A row sees the writers up to itself, and a reader itself, unless it is virtual.
    """
    rows = torch.arange(num_writers + num_readers)
    unseen = (rows >= num_writers) | (rows > rows.unsqueeze(1))
    return unseen if virtual else unseen.fill_diagonal_(False)


def _per_reader(pairs: Tensor, num_readers: int) -> Tensor:
    """Repeat the last row and the last column, the last event's, for each of its readers."""
    if num_readers == 1:
        return pairs
    pairs = torch.cat([pairs, pairs[..., -1:].expand(*pairs.shape[:-1], num_readers - 1)], dim=-1)
    last = pairs[..., -1:, :]
    return torch.cat([pairs, last.expand(*last.shape[:-2], num_readers - 1, -1)], dim=-2)
