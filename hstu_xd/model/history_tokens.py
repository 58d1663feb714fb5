"""Learnable tokens that compress a long history: the layout of a batch with tokens in it.

A run (a user's events of one domain under the domain mask, else all of a user's events) is cut into
segments. When the first event after a segment arrives, ``K`` tokens are laid before it: they close
the segment. Later events and tokens read its tokens; its events are hidden, from tokens at once,
from events when ``segment_lookback`` more segments have closed. Nothing here knows the future: an
event is laid out the same whatever follows it.

SiLU attention is a sum over keys, so what a row sees is a sum of grouped attentions: over the
events of the segment that is open, of each one looked back at, and over the tokens of the run. None
touches a hidden pair.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.model.plan import EncoderPlan
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.ops.grouping import DomainGrouping


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """A batch of L events with history tokens laid in between: L' rows in all.

    Takes the place of :class:`EncoderPlan` in the layers' attention; what concerns events alone
    (domain states) stays with ``events``.

    Attributes:
        events: the plan of the batch without tokens.
        places: (L,) int64, row of every event.
        token_rows: (M, K) int64, rows of the tokens of the M closed segments.
        positions: (L',) int64, of the event; a token has that of its segment's last event.
        timestamps: (L',) int64, likewise.
        next_timestamps: (L',) int64; for a token the time of its segment's last event.
        is_readable: (L,) bool, events after the batch's may read this one.
        own: groupings whose attentions add up to what a row reads of its own run.
        target: the same of the run of its target domain; empty without target view.
    """

    events: EncoderPlan
    places: Tensor
    token_rows: Tensor
    positions: Tensor
    timestamps: Tensor
    next_timestamps: Tensor
    is_readable: Tensor
    own: tuple[DomainGrouping, ...]
    target: tuple[DomainGrouping, ...]

    @classmethod
    def build(cls, events: EncoderPlan, settings: EncoderSettings) -> "TokenPlan":
        """Lay out a batch. Nothing in it loops over users or segments; on a GPU it waits once.

        Args:
            events: the plan of the batch.
            settings: how segments are cut, and the number of tokens.
        """
        cut = Segments.cut(events, settings)
        runs = cut.runs
        kept, closed = settings.history_tokens, torch.nonzero(cut.closes).squeeze(1)
        # Tokens laid before event i, those right before it included.
        before = pad(kept * cut.closes.long().cumsum(0), (1, 0))
        places = torch.arange(runs.num_tokens, device=before.device) + before[1:]
        column = torch.arange(kept, device=before.device)
        token_rows = places[closed].unsqueeze(1) - kept + column
        # The event whose coordinates a row has.
        source = closed.new_empty(places.numel() + token_rows.numel())
        source[places] = torch.arange(places.numel(), device=source.device)
        source[token_rows] = cut.previous[closed].unsqueeze(1)
        is_token = torch.zeros_like(source, dtype=torch.bool)
        is_token[token_rows] = True
        layout = _Layout(
            source,
            is_token,
            events.offsets + before[events.offsets],
            token_rows.numel() > 0,
            settings.segment_lookback,
        )
        run = runs.group_of % runs.num_domains
        target: tuple[DomainGrouping, ...] = ()
        if settings.target_view_heads:
            targets = events.target_domains
            target = layout.views(cut, runs, targets, _latest(runs, targets))
        return cls(
            events=events,
            places=places,
            token_rows=token_rows,
            positions=events.positions[source],
            timestamps=events.timestamps[source],
            next_timestamps=torch.where(
                is_token, events.timestamps[source], events.next_timestamps[source]
            ),
            is_readable=cut.is_readable,
            own=layout.views(cut, runs, run, torch.arange(runs.num_tokens, device=run.device)),
            target=target,
        )

    @property
    def num_kept(self) -> int:
        """Rows that an event after the batch's may read."""
        return int(self.is_readable.sum()) + self.token_rows.numel()

    def own_views(self, *, masked: bool) -> tuple[DomainGrouping, ...]:
        """See :meth:`EncoderPlan.own_views`; segments are cut for all layers alike."""
        return self.own

    def target_views(self) -> tuple[DomainGrouping, ...]:
        """See :meth:`EncoderPlan.target_views`."""
        return self.target

    def insert(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Rows of events and tokens: (L, W), (K, W) float -> (L', W)."""
        rows = x.new_empty(self.positions.numel(), x.shape[1])
        rows = rows.index_copy(0, self.places, x)
        every = tokens.to(x.dtype).expand(len(self.token_rows), -1, -1).flatten(0, 1)
        return rows.index_copy(0, self.token_rows.flatten(), every)

    def take_events(self, x: Tensor) -> Tensor:
        """Rows of the events: (L', W) -> (L, W)."""
        return x.index_select(0, self.places)

    def spread_events(self, x: Tensor) -> Tensor:
        """Events to their rows, zeros to the tokens: (L, W) -> (L', W)."""
        rows = x.new_zeros(self.positions.numel(), x.shape[1])
        return rows.index_copy(0, self.places, x)


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the runs of a batch are cut.

    Attributes:
        runs: what is cut: a user's events of a domain, or all of a user's.
        segments: (L,) int64, segment of every event, counted from 0 for each user, run by run.
        earlier: (L,) int64, segments of its run before it.
        closes: (L,) bool, the event opens a segment and thereby closes the one before it.
        previous: (L,) int64, the event before it in its run; itself if it is the first.
        is_readable: (L,) bool, events after the batch's may read this one.
        bound: no user has more segments.
    """

    runs: DomainGrouping
    segments: Tensor
    earlier: Tensor
    closes: Tensor
    previous: Tensor
    is_readable: Tensor
    bound: int

    @classmethod
    def cut(cls, events: EncoderPlan, settings: EncoderSettings) -> "Segments":
        """Cut the runs of a batch; what they are and where they end follows from the settings."""
        runs = events.own_view if settings.domain_mask else events.full_view
        order, length = runs.permutation, runs.num_tokens
        row = torch.arange(length, device=order.device)
        start, end = (
            torch.repeat_interleave(offsets, runs.lengths, output_size=length)
            for offsets in (runs.offsets[:-1], runs.offsets[1:])
        )
        rank = row - start
        previous = order[(row - 1).clamp(min=0)]
        previous = torch.where(rank > 0, previous, order)
        bound = settings.norm_length
        if settings.segment_by == "count":
            opens = rank % settings.segment_length == 0
            bound = settings.norm_length // settings.segment_length + runs.num_domains
        elif settings.segment_by == "time_gap":
            opens = events.timestamps[order] - events.timestamps[previous] > settings.segment_gap
        else:
            session = _sessions(events, settings.segment_gap)
            opens = session[order] != session[previous]
        closes = opens & (rank > 0)
        # Segments of the batch in grouped order, then counted from 0 for each user.
        segment = (opens | (rank == 0)).long().cumsum(0) - 1
        first = events.offsets[:-1].clamp(max=max(0, length - 1))
        if length:
            users = torch.arange(first.numel(), device=order.device)
            owner = torch.repeat_interleave(users, events.offsets.diff(), output_size=length)
            segment = segment - segment[first][owner]
        is_readable = segment >= segment[end - 1] - settings.segment_lookback
        inverse = runs.inverse
        return cls(
            runs,
            segment[inverse],
            (segment - segment[start])[inverse],
            closes[inverse],
            previous[inverse],
            is_readable[inverse],
            bound,
        )

    def at(self, events: Tensor, back: int) -> Tensor:
        """Segment ``back`` segments before that of an event; a number of its own where none is.

        Args:
            events: (n,) int64, -1 for none.
            back: number of segments.
        """
        found = (events >= 0) & (self.earlier[events] >= back)
        return torch.where(found, self.segments[events] - back, self.bound + 1)


@dataclass(frozen=True, eq=False)
class _Layout:
    """Rows of a batch with tokens.

    Attributes:
        source: (L',) int64, event whose coordinates a row has.
        is_token: (L',) bool.
        offsets: (B + 1,) int64, rows of every user.
        has_tokens: whether there is a token among the rows.
        lookback: closed segments whose events are read by events.
    """

    source: Tensor
    is_token: Tensor
    offsets: Tensor
    has_tokens: bool
    lookback: int

    def views(
        self, cut: Segments, runs: DomainGrouping, read_run: Tensor, latest: Tensor
    ) -> tuple[DomainGrouping, ...]:
        """Groupings over the events of each segment that is read and over the tokens of a run.

        Args:
            cut: the segments.
            runs: the runs.
            read_run: (L,) int64, run that every event reads.
            latest: (L,) int64, latest event of that run at that event; -1 if there is none.
        """
        # Keys that a view leaves out stand in a group that nobody reads.
        own, nobody = self._rows(cut.segments), cut.bound
        keys = own.masked_fill(self.is_token, nobody)
        # One group more: where there is nothing to read yet.
        events = DomainGrouping.from_jagged(keys, self.offsets, cut.bound + 2)
        views = []
        for back in range(self.lookback + 1):
            of_token = own if not back else own.new_full((), cut.bound + 1)
            queries = torch.where(self.is_token, of_token, self._rows(cut.at(latest, back)))
            views.append(events.target_view(queries))
        if self.has_tokens:
            run, nobody = self._rows(runs.group_of % runs.num_domains), runs.num_domains
            keys = run.masked_fill(~self.is_token, nobody)
            tokens = DomainGrouping.from_jagged(keys, self.offsets, nobody + 1)
            queries = torch.where(self.is_token, run, self._rows(read_run))
            views.append(tokens.target_view(queries))
        return tuple(views)

    def _rows(self, of_events: Tensor) -> Tensor:
        return of_events[self.source]


def _latest(runs: DomainGrouping, targets: Tensor) -> Tensor:
    """(L,) int64, latest event of each event's target run, itself included; -1 if none yet."""
    group = runs.group_of // runs.num_domains * runs.num_domains + targets
    at = runs.first_row(group, runs.positions + 1) - 1
    found = runs.permutation[at.clamp(min=0)]
    return torch.where((at >= 0) & (runs.group_of[found] == group), found, -1)


def _sessions(events: EncoderPlan, gap: int) -> Tensor:
    """(L,) int64, session of every event: a longer pause than ``gap`` begins another."""
    times = events.timestamps
    begins = torch.ones_like(times, dtype=torch.bool)
    begins[1:] = (times[1:] - times[:-1] > gap) | (events.positions[1:] == 0)
    return begins.long().cumsum(0)
