"""The rows of a batch: its events, the tokens that compress a long history, and questions.

Rows are of two kinds. *Writers* are read by later rows: the events, and history tokens. *Readers*
read and leave nothing behind: questions, which are events asked once more for another domain or
time.

A run (a user's events of one domain under the domain mask, else all of a user's) is cut into
segments. When the first event after a segment arrives, ``K`` tokens are laid before it: they close
the segment. Later events and tokens read its tokens; its events are hidden, from tokens at once,
from events when ``segment_lookback`` more segments have closed. Nothing here knows the future: an
event is laid out the same whatever follows it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.model.settings import EncoderSettings
from hstu_xd.ops.grouping import DomainGrouping, lazy_property

# In place of its number among the history tokens of a segment, for a row that is none.
EVENT, QUESTION = -1, -2


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
        lookback: closed segments whose events are read by events.
    """

    runs: DomainGrouping
    segments: Tensor
    earlier: Tensor
    closes: Tensor
    previous: Tensor
    is_readable: Tensor
    bound: int
    lookback: int

    @classmethod
    def build(
        cls, runs: DomainGrouping, timestamps: Tensor, settings: EncoderSettings
    ) -> "Segments":
        """Cut the runs of a batch; nothing in it loops over users or segments.

        Args:
            runs: a user's events of a domain under the domain mask, else all of a user's.
            timestamps: (L,) int64, of the events.
            settings: where segments end.
        """
        order, length = runs.permutation, runs.num_tokens
        row = torch.arange(length, device=order.device)
        start, end = (
            torch.repeat_interleave(offsets, runs.lengths, output_size=length)
            for offsets in (runs.offsets[:-1], runs.offsets[1:])
        )
        place = row - start
        previous = order[(row - 1).clamp(min=0)]
        previous = torch.where(place > 0, previous, order)
        bound = settings.norm_length
        if settings.segment_by == "count":
            opens = place % settings.segment_length == 0
            bound = settings.norm_length // settings.segment_length + runs.num_domains
        elif settings.segment_by == "time_gap":
            opens = timestamps[order] - timestamps[previous] > settings.segment_gap
        else:
            session = _sessions(timestamps, runs.positions, settings.segment_gap)
            opens = session[order] != session[previous]
        closes = opens & (place > 0)
        # Segments of the batch in grouped order, then counted from 0 for each user.
        segment = (opens | (place == 0)).long().cumsum(0) - 1
        offsets = runs.batch_offsets
        first = offsets[:-1].clamp(max=max(0, length - 1))
        if length:
            users = torch.arange(first.numel(), device=order.device)
            owner = torch.repeat_interleave(users, offsets.diff(), output_size=length)
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
            settings.segment_lookback,
        )

    def latest(self, events: Tensor, domains: Tensor) -> Tensor:
        """Find the latest event of a domain's run when an event has arrived.

        Args:
            events: (n,) int64.
            domains: (n,) int64, whose runs are asked for.

        Returns:
            (n,) int64, the event itself where it is of that run; -1 where the run is still empty.
        """
        runs = self.runs
        group = runs.group_of[events] // runs.num_domains * runs.num_domains + domains
        at = runs.first_row(group, runs.positions[events] + 1) - 1
        found = runs.permutation[at.clamp(min=0)]
        return torch.where((at >= 0) & (runs.group_of[found] == group), found, -1)

    def back(self, events: Tensor, count: int) -> Tensor:
        """Find the segment ``count`` segments before that of an event.

        Args:
            events: (n,) int64, -1 for none.
            count: number of segments.

        Returns:
            (n,) int64; ``bound + 1``, a number of its own, where there is none.
        """
        found = (events >= 0) & (self.earlier[events] >= count)
        return torch.where(found, self.segments[events] - count, self.bound + 1)


@dataclass(frozen=True, eq=False)
class RowOrder:
    """The rows of a batch in the order of the layers: L' in all.

    History tokens stand right before the event that closes their segment, questions right before
    the event that they are copies of: so a row may read the writers up to itself.

    Attributes:
        sources: (L',) int64, event whose coordinates a row has; a token has those of its segment's
            last event.
        numbers: (L',) int64, which of its segment's history tokens a row is; ``EVENT`` or
            ``QUESTION`` for other rows.
        offsets: (B + 1,) int64, rows of every user.
        events: (L,) int64, row of every event.
        tokens: (M, K) int64, rows of the tokens of the M closed segments.
        questions: (R,) int64, row of every question.
    """

    sources: Tensor
    numbers: Tensor
    offsets: Tensor
    events: Tensor
    tokens: Tensor
    questions: Tensor

    @classmethod
    def build(
        cls,
        offsets: Tensor,
        num_events: int,
        *,
        segments: Segments | None = None,
        history_tokens: int = 0,
        questions: Tensor | None = None,
    ) -> "RowOrder":
        """Lay out a batch. Nothing in it loops over users or rows; on a GPU it waits once.

        Args:
            offsets: (B + 1,) int64, events of every user.
            num_events: of all users.
            segments: of the events' runs, if they are cut.
            history_tokens: tokens ``K`` of a closed segment.
            questions: (R,) int64, event that each question is a copy of.
        """
        device = offsets.device
        events = torch.arange(num_events, device=device)
        closed = events[:0]
        # Rows laid before event i, those right before it included.
        before = torch.zeros(num_events + 1, dtype=torch.int64, device=device)
        if segments is not None:
            closed = torch.nonzero(segments.closes).squeeze(1)
            before = pad(history_tokens * segments.closes.long().cumsum(0), (1, 0))
        asked = before[1:] * 0
        order = closed[:0]
        if questions is not None:
            asked.scatter_add_(0, questions, torch.ones_like(questions))
            before = before + pad(asked.cumsum(0), (1, 0))
            order = torch.argsort(questions, stable=True)
        places = events + before[1:]
        column = torch.arange(history_tokens, device=device)
        tokens = (places - asked)[closed].unsqueeze(1) - history_tokens + column
        sources = events.new_empty(num_events + tokens.numel() + order.numel())
        numbers = torch.full_like(sources, EVENT)
        sources[places] = events
        numbers[tokens] = column
        rows = order
        if segments is not None:
            sources[tokens] = segments.previous[closed].unsqueeze(1)
        if questions is not None:
            # The n-th question of an event stands n rows after the first one.
            number = torch.arange(len(order), device=device)
            number = number - (asked.cumsum(0) - asked)[questions[order]]
            rows = torch.empty_like(order)
            rows[order] = (places - asked)[questions[order]] + number
            sources[rows] = questions
            numbers[rows] = QUESTION
        return cls(sources, numbers, offsets + before[offsets], places, tokens, rows)

    @lazy_property
    def entries(self) -> Tensor:
        """Return the rows of the events, then of the questions: (L + R,) int64."""
        return torch.cat([self.events, self.questions])

    def take_entries(self, x: Tensor) -> Tensor:
        """Take the rows of the events, then of the questions: (L', W) -> (L + R, W)."""
        return x.index_select(0, self.entries)

    def spread_entries(self, x: Tensor) -> Tensor:
        """Put events and questions into their rows, zeros elsewhere: (L + R, W) -> (L', W)."""
        rows = x.new_zeros(self.sources.numel(), x.shape[1])
        return rows.index_copy(0, self.entries, x)

    def insert_tokens(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Lay out events, questions and tokens: (L + R, W), (K, W) float -> (L', W)."""
        rows = x.new_empty(self.sources.numel(), x.shape[1])
        rows = rows.index_copy(0, self.entries, x)
        every = tokens.to(x.dtype).expand(len(self.tokens), -1, -1).flatten(0, 1)
        return rows.index_copy(0, self.tokens.flatten(), every)


def _sessions(timestamps: Tensor, positions: Tensor, gap: int) -> Tensor:
    """Return the session of every event: a longer pause than ``gap`` begins another one; (L,)."""
    begins = torch.ones_like(timestamps, dtype=torch.bool)
    begins[1:] = (timestamps[1:] - timestamps[:-1] > gap) | (positions[1:] == 0)
    return begins.long().cumsum(0)
