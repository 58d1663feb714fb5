"""A user's rows of a step: what is new of the window, and the coordinates of what they may read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.model.incremental_views import NewRows, SegmentReach
from hstu_xd.model.rows import EVENT, RowOrder, Segments
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import EncoderRows, Events
from hstu_xd.serving.state import UserState

# Segment of history tokens: no row ever comes after what it may read.
_ALWAYS_READ = torch.iinfo(torch.int64).max


def new_rows(
    state: UserState, settings: EncoderSettings, requested: list[int], time: int | None
) -> NewRows:
    """Return all rows that are not committed, and as readers the last event for every request.

    Args:
        state: of the user; it has room for the rows then.
        settings: of the model.
        requested: (V) domains, at least one.
        time: of the request; None: that of the last event.
    """
    if not state.length:
        return _rows_of_stranger(state, requested, time)
    if settings.has_segments:
        return _rows_of_segments(state, settings, requested, time)
    return _rows_of_events(state, requested, time)


def _rows_of_stranger(state: UserState, requested: list[int], time: int | None) -> NewRows:
    readers = len(requested)
    state.reserve(readers, readers)
    zeros = [0] * readers
    return NewRows(
        user=state,
        num_writers=0,
        item_ids=zeros,
        positions=zeros,
        domains=requested,
        target_domains=requested,
        next_times=[time or 0],
        read=state.events,
        is_virtual=True,
    )


def _rows_of_events(state: UserState, requested: list[int], time: int | None) -> NewRows:
    first, end, readers = state.committed, state.length, len(requested)
    writers = end - 1 - first
    state.reserve(writers + readers, readers)
    # The places of the readers in the arrays of events.
    state.events[:, end : end + readers - 1] = state.events[:, end - 1 : end]
    items, times, domains = state.events[:, first : end + readers - 1].tolist()
    return NewRows(
        user=state,
        num_writers=writers,
        item_ids=items,
        positions=[*range(first, end), *[end - 1] * (readers - 1)],
        domains=domains,
        target_domains=domains[1 : writers + 1] + requested,
        next_times=[*times[1 : writers + 1], times[-1] if time is None else time],
        read=state.events,
    )


def _rows_of_segments(
    state: UserState, settings: EncoderSettings, requested: list[int], time: int | None
) -> NewRows:
    events, readers = state.events[:, : state.length], len(requested)
    window = SegmentedWindow.build(events, settings)
    laid = window.rows_from(state.committed)
    writers = laid.shape[1] - 1
    laid = torch.cat([laid, laid[:, -1:].expand(-1, readers - 1)], dim=1)
    state.reserve(writers + readers, readers)
    end = state.num_rows + writers + readers
    state.rows[:, state.num_rows : end] = laid
    rows = state.rows[:, :end]
    read = events.index_select(1, rows[0])
    items, times, domains = read[:, state.num_rows :].tolist()
    sources, numbers = laid[:, :writers]
    after = events.index_select(1, torch.where(numbers == EVENT, sources + 1, sources))
    _, next_times, target_domains = after.tolist()
    target_domains += requested
    return NewRows(
        user=state,
        num_writers=writers,
        item_ids=items,
        positions=laid[0].tolist(),
        domains=domains,
        target_domains=target_domains,
        next_times=[*next_times, times[-1] if time is None else time],
        read=read,
        tokens={row: n for row, n in enumerate(numbers.tolist()) if n != EVENT},
        reach=SegmentReach(
            positions=rows[0],
            segments=window.segments_of(rows),
            first_read=window.first_read(laid, torch.tensor(target_domains)),
            is_readable=window.is_readable(rows[:, : state.num_rows + writers]),
        ),
    )


@dataclass(frozen=True, eq=False)
class SegmentedWindow:
    """Events of a window, the pending one included, with the history tokens among them.

    Rows are given as (2, R) int64: the event whose item, or whose position, domain and time, a row
    has; and its number among the history tokens, or ``EVENT``.

    Attributes:
        settings: of the model.
        segments: of the window's runs; those of a run are numbered by ``segments.earlier``.
        order: of all rows.
    """

    settings: EncoderSettings
    segments: Segments
    order: RowOrder

    @classmethod
    def build(cls, events: Tensor, settings: EncoderSettings) -> "SegmentedWindow":
        """Cut a window as the full encoder does.

        Args:
            events: (3, n) int64, item ids, timestamps and domains; at least one event.
            settings: of the model.
        """
        _, times, domains = events
        offsets = torch.tensor([0, len(domains)])
        rows = EncoderRows(settings, Events(domains, domains, times, times, offsets))
        assert rows.segments is not None
        assert rows.order is not None
        return cls(settings, rows.segments, rows.order)

    def rows_from(self, first: int) -> Tensor:
        """Return the rows from one event on: (2, R).

        Tokens right before the first event are left out: they are laid with what is before them.
        """
        order = self.order
        return torch.stack([order.sources, order.numbers])[:, int(order.events[first]) :]

    def is_readable(self, rows: Tensor) -> Tensor:
        """Return whether events after the window's may read a row: (2, R) int64 -> (R,) bool."""
        events, numbers = rows
        return (numbers != EVENT) | self.segments.is_readable[events]

    def first_read(self, rows: Tensor, target_domains: Tensor) -> Tensor:
        """Return the first segment of a run whose events a row reads; older ones are hidden.

        Args:
            rows: (2, r) int64.
            target_domains: (r,) int64, domain of the event after each row; a token's own.

        Returns:
            (3, r) int64, by :class:`hstu_xd.model.views.Run`.
        """
        events, numbers = rows
        lookback = self.settings.segment_lookback * (numbers == EVENT)
        own = target = self.segments.earlier[events]
        if self.settings.target_view_heads:
            latest = self.segments.latest(events, target_domains)
            target = self.segments.earlier[latest] * (latest >= 0)
        return torch.stack([own, own, target]) - lookback

    def segments_of(self, rows: Tensor) -> Tensor:
        """Return the segment that a row is read with, (2, R) -> (R,); tokens are always read."""
        events, numbers = rows
        return self.segments.earlier[events].masked_fill(numbers != EVENT, _ALWAYS_READ)
