"""A user's window, its runs cut into segments: which rows it has and which of them are read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.modules.history_tokens import Segments
from hstu_xd.modules.plan import EncoderPlan
from hstu_xd.modules.settings import EncoderSettings

# In place of its number among the history tokens, for a row that is none.
EVENT = -1
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
        plan = EncoderPlan(
            domains=domains,
            target_domains=domains,
            timestamps=times,
            next_timestamps=times,
            offsets=torch.tensor([0, len(domains)]),
            num_domains=settings.num_domains,
        )
        return cls(settings, domains, Segments.cut(plan, settings))

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
