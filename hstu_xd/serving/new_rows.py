"""A user's rows of a step: what is new of the window, and the coordinates of what they may read.

A user's window, its runs cut into segments: which rows it has and which of them are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hstu_xd.model.rows import EVENT, Segments
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import EncoderRows, Events
from hstu_xd.serving.state import UserState

# Segment of history tokens: no row ever comes after what it may read.
_ALWAYS_READ = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class CutWindow:
    """Events of a window, the pending one included, and how they are cut.

    Rows are given as (2, R) int64: the event whose item, or whose position, domain and time, a row
    has; and its number among the history tokens, or ``EVENT``.

    Attributes:
        settings: of the model.
        domains: (n,) int64, of the events.
        cut: of their runs; the segments of a run are numbered by ``cut.earlier``.
    """

    settings: EncoderSettings
    domains: Tensor
    cut: Segments

    @classmethod
    def of(cls, events: Tensor, settings: EncoderSettings) -> "CutWindow":
        """Cut a window.

        Args:
            events: (3, n) int64, item ids, timestamps and domains; at least one event.
            settings: of the model.
        """
        _, times, domains = events
        offsets = torch.tensor([0, len(domains)])
        cut = EncoderRows(settings, Events(domains, domains, times, times, offsets)).segments
        assert cut is not None
        return cls(settings, domains, cut)

    def lay_out(self, first: int) -> Tensor:
        """Rows from one event on, history tokens before those that close a segment: (2, R).

        Tokens right before the first event are left out: they are laid with what is before them.
        """
        laid: list[tuple[int, int]] = []
        closes, previous = (x[first:].tolist() for x in (self.cut.closes, self.cut.previous))
        for event, (closing, last) in enumerate(zip(closes, previous), start=first):
            if closing and event > first:
                laid += [(last, number) for number in range(self.settings.history_tokens)]
            laid.append((event, EVENT))
        return torch.tensor(laid).T

    def is_readable(self, rows: Tensor) -> Tensor:
        """(R,) bool, whether events after the window's may read a row: (2, R) int64."""
        events, numbers = rows
        return (numbers != EVENT) | self.cut.is_readable[events]

    def reach(self, rows: Tensor, target_domains: Tensor) -> Tensor:
        """First segment of a run whose events a row reads; older events are hidden from it.

        Args:
            rows: (2, r) int64.
            target_domains: (r,) int64, domain of the event after each row; a token's own.

        Returns:
            (3, r) int64, for what a head may read, see ``PreparedModel.views``.
        """
        events, numbers = rows
        lookback = self.settings.segment_lookback * (numbers == EVENT)
        own = target = self.cut.earlier[events]
        if self.settings.target_view_heads:
            target = self._open_segments(target_domains, events)
        return torch.stack([own, own, target]) - lookback

    def segments_of(self, rows: Tensor) -> Tensor:
        """(R,) int64, segment that a row is read with: (2, R) int64; tokens are always read."""
        events, numbers = rows
        return self.cut.earlier[events].masked_fill(numbers != EVENT, _ALWAYS_READ)

    def _open_segments(self, domains: Tensor, events: Tensor) -> Tensor:
        """(r,) int64, segment of each domain's run that is open when an event has arrived."""
        met = self.domains == domains.unsqueeze(1)
        met &= torch.arange(len(self.domains)) <= events.unsqueeze(1)
        return (self.cut.earlier * met).amax(1)


@dataclass(frozen=True, eq=False)
class Reach:
    """Where a step's rows stand among segments, and what they read of them.

    Attributes:
        window: of the user.
        positions: (c + m + V) int64, of the rows in memory and of the step's.
        segments: (c + m + V) int64, segment that each of them is read with.
        first_read: (3, m + V) int64, see :meth:`CutWindow.reach`.
    """

    window: CutWindow
    positions: Tensor
    segments: Tensor
    first_read: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """One user's rows of a step: m to commit, oldest first, then V variants of the pending event.

    A row is an event or a history token; that has domain, position and time of the last event of
    its segment. The variants are the pending event as seen from V requests; they do not see each
    other. A user without events has a virtual pending event: no item, seen by nobody, at position
    0. Behind c rows in memory, the state has room for the step's.

    Attributes:
        state: of the user.
        commits: number ``m``.
        item_ids: (m + V) item of each row, 0 where it is virtual; not read of history tokens.
        positions: (m + V) position of each row.
        domains: (m + V) domain of each row; the requested one where it is virtual.
        target_domains: (m + V) domain of the event after each row, or the requested one; a history
            token's own.
        next_times: (m + 1) time of the event after each row, or of the request; a history token's
            own.
        read: (3, c + m + V) int64, items, timestamps and domains of the rows in memory and of the
            step's, or longer.
        tokens: history tokens among the step's rows, by row.
        reach: None where the model does not cut histories, and where there are none: memory then
            holds every committed event.
    """

    state: UserState
    commits: int
    item_ids: list[int]
    positions: Sequence[int]
    domains: list[int]
    target_domains: list[int]
    next_times: list[int]
    read: Tensor
    tokens: dict[int, int] = field(default_factory=dict)
    reach: Reach | None = None

    @classmethod
    def of(
        cls, state: UserState, settings: EncoderSettings, requested: list[int], time: int | None
    ) -> "Rows":
        """All rows that are not committed, for requests of some domains at one time.

        Args:
            state: of the user.
            settings: of the model.
            requested: (V) domains, at least one.
            time: of the request; None: that of the last event.
        """
        if not state.length:
            variants = len(requested)
            state.reserve(variants, variants)
            at, when = [0] * variants, [time or 0]
            return cls(state, 0, at, at, requested, requested, when, state.events)
        if settings.has_segments:
            return cls._of_segments(state, settings, requested, time)
        return cls._of_events(state, requested, time)

    @classmethod
    def _of_events(cls, state: UserState, requested: list[int], time: int | None) -> "Rows":
        first, end, variants = state.committed, state.length, len(requested)
        commits = end - 1 - first
        state.reserve(commits + variants, variants)
        # The places of the variants in the arrays of events.
        state.events[:, end : end + variants - 1] = state.events[:, end - 1 : end]
        items, times, domains = state.events[:, first : end + variants - 1].tolist()
        return cls(
            state=state,
            commits=commits,
            item_ids=items,
            positions=[*range(first, end), *[end - 1] * (variants - 1)],
            domains=domains,
            target_domains=domains[1 : commits + 1] + requested,
            next_times=[*times[1 : commits + 1], times[-1] if time is None else time],
            read=state.events,
        )

    @classmethod
    def _of_segments(
        cls, state: UserState, settings: EncoderSettings, requested: list[int], time: int | None
    ) -> "Rows":
        events, variants = state.events[:, : state.length], len(requested)
        window = CutWindow.of(events, settings)
        laid = window.lay_out(state.committed)
        commits = laid.shape[1] - 1
        laid = torch.cat([laid, laid[:, -1:].expand(-1, variants - 1)], dim=1)
        state.reserve(commits + variants, variants)
        end = state.kept + commits + variants
        state.rows[:, state.kept : end] = laid
        rows = state.rows[:, :end]
        read = events.index_select(1, rows[0])
        items, times, domains = read[:, state.kept :].tolist()
        sources, numbers = laid[:, :commits]
        after = events.index_select(1, torch.where(numbers == EVENT, sources + 1, sources))
        _, next_times, target_domains = after.tolist()
        target_domains += requested
        return cls(
            state=state,
            commits=commits,
            item_ids=items,
            positions=laid[0].tolist(),
            domains=domains,
            target_domains=target_domains,
            next_times=[*next_times, times[-1] if time is None else time],
            read=read,
            tokens={row: n for row, n in enumerate(numbers.tolist()) if n != EVENT},
            reach=Reach(
                window=window,
                positions=rows[0],
                segments=window.segments_of(rows),
                first_read=window.reach(laid, torch.tensor(target_domains)),
            ),
        )

    @property
    def variants(self) -> int:
        """Number of requests ``V``."""
        return len(self.item_ids) - self.commits

    @property
    def known(self) -> int:
        """Rows in memory and of the step, the pending event counted once."""
        return self.state.kept + self.commits + 1

    def commit(self, states: Tensor | None) -> None:
        """Keep what the first rows have left in memory, and free what nobody reads any more.

        Args:
            states: (layers, H, m, dqk + dv), DDSR's keys and values of the states that events among
                the first m rows write, whatever for history tokens; None without DDSR.
        """
        state = self.state
        if states is not None and self.tokens:
            events = [row for row in range(self.commits) if row not in self.tokens]
            states = states.index_select(2, torch.tensor(events))
        state.commit(self.commits - len(self.tokens), self.commits, states)
        if self.reach is not None and self.commits:
            state.keep_only(self.reach.window.is_readable(state.rows[:, : state.kept]))
