"""What every row of a batch reads: the views of the layers' heads, and the domain states.

SiLU attention is a sum over keys, so what a row reads is a sum of grouped attentions: over its
run, or over the events of each segment of it that is open or looked back at and over the history
tokens of the run; and over itself, where it is a question, which no other row reads. None touches a
hidden pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from hstu_xd.batch import Questions
from hstu_xd.errors import InputError
from hstu_xd.model.rows import EVENT, QUESTION, RowOrder, Segments
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.ops.grouping import DomainGrouping, lazy_property
from hstu_xd.ops.state_attention.state_reads import QuestionReads, StateReads


class Run(IntEnum):
    """Which of a user's earlier rows a head reads."""

    EVERYTHING = 0
    OWN = 1
    TARGET = 2


def heads_by_run(settings: EncoderSettings, layer: int) -> list[tuple[slice, Run]]:
    """Return what each head of a layer reads: its own domain's run, the target domain's, or all."""
    own, heads = settings.num_heads - settings.target_view_heads, settings.num_heads
    masked = settings.domain_mask and layer not in settings.full_attention_layers
    runs = [
        (slice(0, own), Run.OWN if masked else Run.EVERYTHING),
        (slice(own, heads), Run.TARGET),
    ]
    return [(part, run) for part, run in runs if part.start < part.stop]


@dataclass(frozen=True, eq=False)
class View:
    """What some heads of a layer read.

    Attributes:
        heads: which heads; those of a layer's views come one after the other.
        groupings: attentions by these groupings add up to what every row reads. A grouping says
            which rows ask, which are read, and how both are grouped.
    """

    heads: slice
    groupings: Sequence[DomainGrouping]


@dataclass(frozen=True, eq=False)
class Events:
    """The events of a batch as the layers know them: by domain, not by item.

    Attributes:
        domains: (L,) int64, domain of each event.
        target_domains: (L,) int64, domain of the event after it.
        timestamps: (L,) int64.
        next_timestamps: (L,) int64, time of the event after it.
        offsets: (B + 1,) int64, user ``b`` owns events ``offsets[b]:offsets[b + 1]``.
        padded_length: events of every user where padding was kept, see
            :class:`hstu_xd.batch.JaggedBatch`; else None.
    """

    domains: Tensor
    target_domains: Tensor
    timestamps: Tensor
    next_timestamps: Tensor
    offsets: Tensor
    padded_length: int | None = None

    @lazy_property
    def positions(self) -> Tensor:
        """Return the position of each event in its user's history: (L,) int64."""
        length = self.domains.numel()
        first = torch.repeat_interleave(self.offsets[:-1], self.offsets.diff(), output_size=length)
        return torch.arange(length, device=first.device) - first


@dataclass(frozen=True, eq=False)
class EncoderRows:
    """The rows that go through the layers, and what each of them reads; shared by all layers.

    Built once a batch, each part on its first use, so switches that are off cost nothing. *Entries*
    are the events, then the questions: what goes into the encoder and comes out of it.

    Attributes:
        settings: of the encoder.
        events: of the batch.
        questions: events to be encoded once more, for another domain or time; None without.
    """

    settings: EncoderSettings
    events: Events
    questions: Questions | None = None

    def __post_init__(self) -> None:
        if self.questions is None:
            return
        if self.settings.normalization != "silu":
            raise InputError(
                f"questions need normalization='silu', got {self.settings.normalization!r}: a "
                "question reads earlier rows and itself, and softmax of both is no sum of two"
            )
        if self.events.padded_length is not None:
            raise InputError("questions need a batch without padding: JaggedBatch.from_padded")
        self.questions.check(self.events.domains.numel(), self.settings.num_domains)

    def views(self, layer: int) -> list[View]:
        """Return what the heads of a layer, counted from 0, read."""
        views = []
        for heads, run in heads_by_run(self.settings, layer):
            if run is Run.TARGET:
                groupings = self.target
            else:
                groupings = self.own if run is Run.OWN else self.everything
            views.append(View(heads, groupings))
        return views

    @lazy_property
    def everything(self) -> Sequence[DomainGrouping]:
        """Return the groupings by which every row reads all that is before it."""
        if self.order is None:
            return (self.events_by_user,)
        everyone = torch.zeros_like(self.domains)
        return self._groupings_of_rows(everyone, everyone, num_runs=1)

    @lazy_property
    def own(self) -> Sequence[DomainGrouping]:
        """Return the groupings by which every row reads the run of its own domain."""
        if self.order is None:
            return (self.events_by_domain,)
        own = self.domains
        return self._groupings_of_rows(own, own)

    @lazy_property
    def target(self) -> Sequence[DomainGrouping]:
        """Return the groupings by which every row reads the run of the domain it predicts."""
        if self.order is None:
            return (self.events_by_domain.target_view(self.events.target_domains),)
        read = self._of_entries(self.entry_targets, self.domains)  # a token reads its own run
        return self._groupings_of_rows(self.domains, read)

    @lazy_property
    def events_by_user(self) -> DomainGrouping:
        """Return the events in one group a user."""
        events = self.events
        return DomainGrouping.single(events.offsets, events.domains.numel(), events.padded_length)

    @lazy_property
    def events_by_domain(self) -> DomainGrouping:
        """Return the events by (user, domain)."""
        events = self.events
        return DomainGrouping.from_jagged(
            events.domains, events.offsets, self.settings.num_domains, events.padded_length
        )

    @lazy_property
    def segments(self) -> Segments | None:
        """Return where runs are cut, if they are."""
        s = self.settings
        if s.segment_by == "none":
            return None
        runs = self.events_by_domain if s.domain_mask else self.events_by_user
        return Segments.build(runs, self.events.timestamps, s)

    @lazy_property
    def order(self) -> RowOrder | None:
        """Return how the rows are laid out; None where they are the events alone."""
        if self.questions is None and self.segments is None:
            return None
        return RowOrder.build(
            self.events.offsets,
            self.events.domains.numel(),
            segments=self.segments,
            history_tokens=self.settings.history_tokens,
            questions=None if self.questions is None else self.questions.rows,
        )

    @lazy_property
    def positions(self) -> Tensor:
        """Return the position of each row's event in its history: (L',) int64."""
        return self._of_source(self.events.positions)

    @lazy_property
    def timestamps(self) -> Tensor:
        """Return the time of each row's event: (L',) int64."""
        return self._of_source(self.events.timestamps)

    @lazy_property
    def next_timestamps(self) -> Tensor:
        """Return the time of the event after each row, of the request, or a token's own: (L',)."""
        times = self.events.next_timestamps
        if self.order is None:
            return times
        if self.questions is not None:
            times = torch.cat([times, self.questions.timestamps])
        return self._of_entries(times, self.timestamps)

    @lazy_property
    def domains(self) -> Tensor:
        """Return the domain of each row's event: (L',) int64."""
        return self._of_source(self.events.domains)

    @property
    def entry_domains(self) -> Tensor:
        """Return the domain of each entry: (L + R,) int64."""
        domains = self.events.domains
        if self.questions is None:
            return domains
        return torch.cat([domains, domains[self.questions.rows]])

    @lazy_property
    def entry_targets(self) -> Tensor:
        """Return the domain that each entry predicts: (L + R,) int64."""
        targets = self.events.target_domains
        if self.questions is None:
            return targets
        return torch.cat([targets, self.questions.target_domains])

    @lazy_property
    def state_reads(self) -> StateReads:
        """Return which domain states every event reads."""
        return StateReads(
            self.events_by_domain,
            self.events.timestamps,
            self.events.next_timestamps,
            self.settings.states_per_domain,
        )

    @lazy_property
    def question_reads(self) -> QuestionReads | None:
        """Return which domain states every question reads."""
        asked = self.questions
        if asked is None:
            return None
        return QuestionReads.copies(self.state_reads, asked.rows, asked.timestamps)

    @property
    def num_readable(self) -> int:
        """Count the rows that an event after the batch's may read."""
        if self.segments is None or self.order is None:
            return self.events.domains.numel()
        return int(self.segments.is_readable.sum()) + self.order.tokens.numel()

    def lay_out(self, entries: Tensor, history_tokens: Tensor | None) -> Tensor:
        """Bring entries into the order of the rows: (L + R, K), (K', K) float -> (L', K)."""
        if self.order is None:
            return entries
        tokens = entries[:0] if history_tokens is None else history_tokens
        return self.order.insert_tokens(entries, tokens)

    def take_entries(self, x: Tensor) -> Tensor:
        """Take the rows of the events, then of the questions: (L', W) -> (L + R, W)."""
        return x if self.order is None else self.order.take_entries(x)

    def spread_entries(self, x: Tensor) -> Tensor:
        """Put entries into their rows, zeros into the others: (L + R, W) -> (L', W)."""
        return x if self.order is None else self.order.spread_entries(x)

    def _of_source(self, of_events: Tensor) -> Tensor:
        return of_events if self.order is None else of_events[self.order.sources]

    def _of_entries(self, of_entries: Tensor, of_tokens: Tensor) -> Tensor:
        """Bring what entries have, (L + R,), into the order of rows; for tokens take (L',)."""
        assert self.order is not None
        return of_tokens.index_copy(0, self.order.entries, of_entries)

    def _groupings_of_rows(
        self, own: Tensor, read: Tensor, *, num_runs: int | None = None
    ) -> list[DomainGrouping]:
        """Build the groupings by which rows read runs.

        Args:
            own: (L',) int64, which of its user's runs every row belongs to.
            read: (L',) int64, which of them it reads.
            num_runs: of a user; default: one a domain.
        """
        assert self.order is not None
        order, segments = self.order, self.segments
        num_runs = self.settings.num_domains if num_runs is None else num_runs
        is_question = order.numbers == QUESTION
        if segments is None:
            events = _keys(own, ~is_question, order.offsets, num_runs)
            groupings = [events.target_view(read)]
        else:
            groupings = _groupings_of_segments(order, segments, own, read, num_runs)
        if self.questions is not None:
            # A question's own row, where its run is read at all, is read by itself alone.
            place, longest = groupings[0].positions, groupings[0].longest
            itself = torch.where(is_question & (read == own), place, longest + 1)
            groupings.append(_keys(place, is_question, order.offsets, longest).target_view(itself))
        return groupings


def _groupings_of_segments(
    order: RowOrder, segments: Segments, own: Tensor, read: Tensor, num_runs: int
) -> list[DomainGrouping]:
    """Group the events of each segment that is read, and the tokens of a run."""
    is_event, is_token = order.numbers == EVENT, order.numbers >= 0
    segment = segments.segments[order.sources]
    latest = order.sources if read is own else segments.latest(order.sources, read)
    events = _keys(segment, is_event, order.offsets, segments.bound)
    groupings = []
    for back in range(segments.lookback + 1):
        # Tokens read the segment that they close.
        of_token = segment if not back else segment.new_full((), segments.bound + 1)
        queries = torch.where(is_token, of_token, segments.back(latest, back))
        groupings.append(events.target_view(queries))
    if order.tokens.numel():
        tokens = _keys(own, is_token, order.offsets, num_runs)
        groupings.append(tokens.target_view(torch.where(is_token, own, read)))
    return groupings


def _keys(groups: Tensor, is_key: Tensor, offsets: Tensor, num_groups: int) -> DomainGrouping:
    """Group the rows that are read.

    The others stand in a group that nobody reads; who reads the group after it reads nothing.
    """
    keys = groups.masked_fill(~is_key, num_groups)
    return DomainGrouping.from_jagged(keys, offsets, num_groups + 2)
