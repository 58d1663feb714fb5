"""Which domain states questions read: rows that read states as an event would and leave none."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.ops.grouping import lazy_property
from hstu_xd.ops.state_attention.state_reads import StateReads, StateTiles


@dataclass(frozen=True, eq=False)
class QuestionReads:
    """The plan of questions: copies of events that are asked for another domain or time.

    A question reads the states that were there before its event, and its own as the newest one of
    the event's domain. Of L events and R questions, question ``r`` is row ``L + r`` of queries,
    keys and values; the initial states come behind.

    Attributes:
        events: which states the events read.
        rows: (R,) int64, event that each question is a copy of.
        timestamps: (R,) int64, time that each question asks for.
    """

    events: StateReads
    rows: Tensor
    timestamps: Tensor

    @lazy_property
    def tiles(self) -> StateTiles:
        """Lay out a tile for every event that is asked; the host reads how many questions it has.

        The states that were there before are the same for all questions of an event.
        """
        grouping, num_kept = self.events.grouping, self.events.states_per_domain
        length, num_domains = grouping.num_tokens, grouping.num_domains
        device = self.rows.device
        order = torch.argsort(self.rows, stable=True)
        asked, tile_of, counts = torch.unique_consecutive(
            self.rows[order], return_inverse=True, return_counts=True
        )
        number = torch.arange(len(order), device=device) - (counts.cumsum(0) - counts)[tile_of]
        height = int(counts.max()) if counts.numel() else 1
        # A tile is filled up with copies of its last question, which are no keys.
        column = torch.arange(height, device=device)
        first = (counts.cumsum(0) - counts).unsqueeze(1)
        tokens = length + order[first + torch.minimum(column, counts.unsqueeze(1) - 1)]
        is_copy = column >= counts.unsqueeze(1)
        slots = torch.empty_like(order)
        slots[order] = tile_of * height + number

        domains = torch.arange(num_domains, device=device)
        group_of = grouping.group_of[asked].unsqueeze(1)
        group = group_of // num_domains * num_domains + domains
        # Visits to each domain before the event: the latest ones are the last before this row.
        position = grouping.positions[asked].unsqueeze(1).expand_as(group).contiguous()
        end = grouping.first_row(group, position)
        back = torch.arange(num_kept, device=device)
        visit = end.unsqueeze(2) - 1 - back
        missing = visit < grouping.offsets[group].unsqueeze(2)
        initial = (length + len(order) + domains).unsqueeze(1)
        states = grouping.permutation[visit.clamp(min=0)]
        # The question's own state replaces the oldest one of its domain, or the initial one.
        is_own = (group == group_of).unsqueeze(2)
        hidden = (missing & (is_own | (back > 0))) | (is_own & (back == num_kept - 1))
        beyond = length + len(order)
        until = torch.where(hidden, -1, beyond)
        times = self.events.timestamps
        own_until = (tokens + 1).masked_fill(is_copy, -1)
        return StateTiles(
            tokens=tokens,
            rows=torch.cat([torch.where(missing, initial, states).flatten(1), tokens], dim=1),
            overwritten=torch.cat([until.flatten(1), own_until], dim=1),
            slots=slots,
            timestamps=torch.cat([times, times[self.rows]]),
            next_timestamps=torch.cat([self.events.next_timestamps, self.timestamps]),
            states_per_domain=num_kept,
        )
