"""Which domain states every token of a batch reads: the plan that all layers with DDSR share.

Some tokens alone may ask, of states that they read alone. Questions are rows that read states as an
event would and leave none; they have tiles of their own.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.errors import InputError
from hstu_xd.ops.grouping import DomainGrouping, lazy_property
from hstu_xd.ops.state_attention.state_table import StateTable
from hstu_xd.ops.state_attention.state_tiles import StateTiles


@dataclass(frozen=True, eq=False)
class StateReads:
    """The plan of :func:`hstu_xd.ops.state_attention`: tokens, their times, states per domain.

    A token reads the latest ``M`` states of each domain, its own included. The layout that an
    implementation needs is built on its first use.

    Attributes:
        grouping: the batch by (user, domain).
        timestamps: (L,) int64, when each token happened, in the log's own unit.
        next_timestamps: (L,) int64, time of the event after each token.
        states_per_domain: latest states ``M`` of each domain that a token reads.
        asked: where some tokens alone ask, which, see :meth:`asking`; else None.

    Raises:
        InputError: a target view for ``grouping``, times that are not int64 or not one a token, or
            ``states_per_domain`` below 1.

    Example:
        >>> domains, offsets = torch.tensor([0, 1, 0]), torch.tensor([0, 3])
        >>> grouping = DomainGrouping.from_jagged(domains, offsets, 2)
        >>> times = torch.tensor([5, 6, 9])
        >>> StateReads(grouping, times, times, states_per_domain=1).num_rows
        5
    """

    grouping: DomainGrouping
    timestamps: Tensor
    next_timestamps: Tensor
    states_per_domain: int
    asked: "AskedStates | None" = None

    def __post_init__(self) -> None:
        length = self.grouping.num_tokens
        if self.grouping.key_grouping is not None:
            raise InputError(
                "reads.grouping is a target view; the grouping of the tokens by their own domain "
                "is needed, as DomainGrouping.from_jagged gives it"
            )
        for name in ("timestamps", "next_timestamps"):
            tensor: Tensor = getattr(self, name)
            if tensor.shape != (length,) or tensor.dtype != torch.int64:
                raise InputError(
                    f"reads.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    f"torch.int64 of shape ({length},) is needed, one entry a token"
                )
        if self.states_per_domain < 1:
            raise InputError(
                f"reads.states_per_domain is {self.states_per_domain}; at least 1 is needed"
            )

    def asking(self, tokens: Tensor, *, narrowed: bool = True) -> "StateReads":
        """Let some tokens alone ask.

        Args:
            tokens: (Q,) int64, in any order, each once: queries and answers of operators are those
                of these tokens, in their order.
            narrowed: take keys and values of those states alone that they read, in the order of
                ``asked.states``, then the initial ones; else of all.
        """
        return replace(self, asked=AskedStates(tokens, self._read_by(tokens, narrowed), self))

    def _read_by(self, tokens: Tensor, narrowed: bool) -> Tensor:
        """Find the tokens whose states some tokens read, ascending; all, where it is not worth it.

        Of as many look-ups as there are tokens, all states are likely to be found.
        """
        grouping, kept = self.grouping, self.states_per_domain
        length, num_domains = grouping.num_tokens, grouping.num_domains
        domain, back = (torch.arange(n, device=tokens.device) for n in (num_domains, kept))
        if not narrowed or tokens.numel() * num_domains * kept > 2 * length:
            return torch.arange(length, device=tokens.device)
        first = grouping.group_of[tokens] // num_domains * num_domains
        groups = (first.unsqueeze(1) + domain).flatten()
        places = (grouping.positions[tokens] + 1).repeat_interleave(num_domains)
        visits = grouping.first_row(groups, places).unsqueeze(1) - 1 - back
        return grouping.permutation[
            visits[visits >= grouping.offsets[groups].unsqueeze(1)]
        ].unique()

    @property
    def num_queries(self) -> int:
        """Number of tokens that ask."""
        return self.grouping.num_tokens if self.asked is None else self.asked.tokens.numel()

    @property
    def num_states(self) -> int:
        """Number of tokens whose states have keys and values."""
        return self.grouping.num_tokens if self.asked is None else self.asked.states.numel()

    @lazy_property
    def query_of(self) -> Tensor:
        """Return the query of each token, -1 where it asks nothing: (L,) int64."""
        return self._numbered(None if self.asked is None else self.asked.tokens)

    @lazy_property
    def state_of(self) -> Tensor:
        """Return the row of keys and values of each token's state, -1 without: (L,) int64."""
        return self._numbered(None if self.asked is None else self.asked.states)

    def _numbered(self, chosen: Tensor | None) -> Tensor:
        numbers = torch.arange(self.grouping.num_tokens, device=self.timestamps.device)
        if chosen is None:
            return numbers
        return torch.full_like(numbers, -1).index_copy(0, chosen, numbers[: chosen.numel()])

    @property
    def num_rows(self) -> int:
        """Rows of keys and values: a state of each token that has one, an initial one a domain."""
        return self.num_states + self.grouping.num_domains

    @lazy_property
    def tiles(self) -> StateTiles:
        """Lay out tiles for plain PyTorch; to cut them the host reads the histories' lengths."""
        return StateTiles.build(
            self.grouping,
            self.timestamps,
            self.next_timestamps,
            states_per_domain=self.states_per_domain,
        )

    @lazy_property
    def table(self) -> StateTable:
        """Lay out the work list of the fused kernels."""
        return StateTable.build(
            self.grouping,
            self.timestamps,
            self.next_timestamps,
            states_per_domain=self.states_per_domain,
            tile=self._tile(),
        )

    def _tile(self) -> int:
        """Choose the tokens of a tile by what the host knows: nothing may wait for the device."""
        if self.timestamps.device.type == "cpu":
            return 16
        if torch.compiler.is_compiling():
            # The mean length differs from batch to batch: it must not lead to a compilation.
            return 64
        users = max(1, self.grouping.batch_offsets.numel() - 1)
        return 32 if self.grouping.num_tokens / users < 40 else 64


class AskedStates(NamedTuple):
    """Which tokens ask, (Q,) int64, and whose states have rows, (n,) int64; and the whole batch."""

    tokens: Tensor
    states: Tensor
    whole: StateReads


@dataclass(frozen=True, eq=False)
class QuestionReads:
    """The plan of questions: rows that read states as an event of theirs would, and leave none.

    A question stands somewhere in a user's history and is of a domain. It reads the states of the
    events before it, and its own as the newest one of its domain. Of L events and R questions,
    question ``r`` is row ``L + r`` of queries, keys and values; the initial states come behind.

    Attributes:
        events: which states the events read.
        groups: (R,) int64, ``user * num_domains + domain`` of each question.
        positions: (R,) int64, events of the user before it.
        written: (R,) int64, time of its own state.
        timestamps: (R,) int64, time that each question asks for.
        apart: give every question a tile of its own, so that no other one moves its answer, not
            even by rounding.
    """

    events: StateReads
    groups: Tensor
    positions: Tensor
    written: Tensor
    timestamps: Tensor
    apart: bool = False

    @classmethod
    def copies(cls, events: StateReads, rows: Tensor, timestamps: Tensor) -> "QuestionReads":
        """Ask events once more, each in its own place.

        Args:
            events: which states the events read.
            rows: (R,) int64, event that each question is a copy of.
            timestamps: (R,) int64, time that each question asks for.
        """
        grouping = events.grouping
        return cls(
            events,
            grouping.group_of[rows],
            grouping.positions[rows],
            events.timestamps[rows],
            timestamps,
        )

    @lazy_property
    def tiles(self) -> StateTiles:
        """Lay out a tile for every place and domain; the host reads the most questions of one.

        The states that were there before are the same for all questions of a place.
        """
        grouping, num_kept = self.events.grouping, self.events.states_per_domain
        length, num_domains = grouping.num_tokens, grouping.num_domains
        device = self.groups.device
        users = self.groups // num_domains
        # A user with n events has n + 1 places.
        places = grouping.batch_offsets[users] + users + self.positions
        places = places * num_domains + self.groups % num_domains
        if self.apart:
            places = torch.arange(len(places), device=device)
        order = torch.argsort(places, stable=True)
        _, tile_of, counts = torch.unique_consecutive(
            places[order], return_inverse=True, return_counts=True
        )
        start = counts.cumsum(0) - counts
        number = torch.arange(len(order), device=device) - start[tile_of]
        height = int(counts.max()) if counts.numel() else 1
        # A tile is filled up with copies of its last question, which are no keys.
        column = torch.arange(height, device=device)
        tokens = order[start.unsqueeze(1) + torch.minimum(column, counts.unsqueeze(1) - 1)]
        tokens = tokens + length
        is_copy = column >= counts.unsqueeze(1)
        slots = torch.empty_like(order)
        slots[order] = tile_of * height + number

        domains = torch.arange(num_domains, device=device)
        own_group, position = (x[order[start]].unsqueeze(1) for x in (self.groups, self.positions))
        group = own_group // num_domains * num_domains + domains
        # Visits to each domain before the question: the latest ones are the last before this row.
        end = grouping.first_row(group, position.expand_as(group).contiguous())
        back = torch.arange(num_kept, device=device)
        visit = end.unsqueeze(2) - 1 - back
        missing = visit < grouping.offsets[group].unsqueeze(2)
        initial = (length + len(order) + domains).unsqueeze(1)
        # The entry behind the last stands for what a batch without events lacks.
        states = pad(grouping.permutation, (0, 1))[visit.clamp(min=0)]
        # The question's own state replaces the oldest one of its domain, or the initial one.
        is_own = (group == own_group).unsqueeze(2)
        hidden = (missing & (is_own | (back > 0))) | (is_own & (back == num_kept - 1))
        beyond = length + len(order)
        until = torch.where(hidden, -1, beyond)
        own_until = (tokens + 1).masked_fill(is_copy, -1)
        return StateTiles(
            tokens=tokens,
            rows=torch.cat([torch.where(missing, initial, states).flatten(1), tokens], dim=1),
            overwritten=torch.cat([until.flatten(1), own_until], dim=1),
            slots=slots,
            timestamps=torch.cat([self.events.timestamps, self.written]),
            next_timestamps=torch.cat([self.events.next_timestamps, self.timestamps]),
            states_per_domain=num_kept,
        )
