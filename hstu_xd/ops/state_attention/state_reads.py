"""Which domain states every token of a batch reads: the plan that all layers with DDSR share.

For plain PyTorch it is laid out in tiles: what a few consecutive tokens of a user read, in the
shape of matrix products. A tile reads the states that were there when it began (the carry-in, the
same for all its tokens) and those that its own tokens write. Which of them a token still sees is a
matter of when they are overwritten: a state is replaced by the ``M``-th visit after it. Questions
are rows that read states as an event would and leave none; they have tiles of their own.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.errors import InputError
from hstu_xd.ops.grouping import DomainGrouping, lazy_property, replacements
from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS, time_bucket
from hstu_xd.ops.state_attention.state_table import StateTable

_HEIGHTS = (8, 16, 32, 64, 128)
# Costs of a key of a tile and of a tile itself, in query-key pairs (measured on CPU).
_PAIRS_PER_KEY, _PAIRS_PER_TILE = 8, 200


@dataclass(frozen=True, eq=False)
class StateTiles:
    """G tiles of T tokens with S = D * M + T keys each; no tile holds tokens of two users.

    A user's last tile is filled up with copies of its last token; copies are not seen as keys.
    ``M`` is 1 in the carry-in of a batch in which no user fills more than one tile.

    Attributes:
        tokens: (G, T) int64, tokens of the tiles.
        rows: (G, S) int64, keys: a token, or ``L + d`` for the initial state of domain ``d``.
        overwritten: (G, S) int64, first token that no longer sees the key; -1 if none ever does.
        slots: (L,) int64, place of every token in the flat ``tokens``.
        timestamps: (L,) int64.
        next_timestamps: (L,) int64.
        states_per_domain: latest states ``M`` of each domain that a token sees.
        padded: all histories are as long and each is one tile: sizes follow from shapes alone.
    """

    tokens: Tensor
    rows: Tensor
    overwritten: Tensor
    slots: Tensor
    timestamps: Tensor
    next_timestamps: Tensor
    states_per_domain: int
    padded: bool = False

    @classmethod
    def build(
        cls,
        grouping: DomainGrouping,
        timestamps: Tensor,
        next_timestamps: Tensor,
        *,
        states_per_domain: int,
        height: int | None = None,
    ) -> "StateTiles":
        """Cut the histories of a batch. Nothing in it loops over users, tokens or domains.

        Args:
            grouping: the batch by (user, domain).
            timestamps: (L,) int64.
            next_timestamps: (L,) int64, time of the event after each token.
            states_per_domain: latest states ``M`` of each domain that a token sees.
            height: tokens ``T`` of a tile; default: what is cheapest for these histories.

        Example:
            >>> domains, times = torch.tensor([1, 0, 1]), torch.tensor([5, 6, 9])
            >>> grouping = DomainGrouping.from_jagged(domains, torch.tensor([0, 3]), 2)
            >>> StateTiles.build(grouping, times, times, states_per_domain=1, height=2).rows
            tensor([[3, 4, 0, 1],
                    [1, 0, 2, 2]])
        """
        cut = _Cut.build(grouping, height, grouping.num_domains * states_per_domain)
        overwritten = replacements(grouping, states_per_domain)
        depth = states_per_domain if cut.carries else 1
        carried, until = _carry_in(grouping, cut, overwritten, depth)
        own_until = overwritten[cut.tokens].masked_fill_(cut.copies, -1)
        return cls(
            tokens=cut.tokens,
            rows=torch.cat([carried, cut.tokens], dim=1),
            overwritten=torch.cat([until, own_until], dim=1),
            slots=cut.slots,
            timestamps=timestamps,
            next_timestamps=next_timestamps,
            states_per_domain=states_per_domain,
            padded=grouping.padded_length is not None,
        )

    @lazy_property
    def unseen(self) -> Tensor:
        """Tell which keys a token does not see, overwritten or not yet written: (G, T, S) bool."""
        carried = self.rows.shape[1] - self.tokens.shape[1]
        query = self.tokens.unsqueeze(2)
        unseen = query >= self.overwritten.unsqueeze(1)
        unseen[:, :, carried:] |= self.tokens.unsqueeze(1) > query
        return unseen

    @lazy_property
    def ages(self) -> Tensor:
        """Bucket the time from a state's writing to the event to predict: (G, T, S) uint8.

        ``NUM_TIME_BUCKETS`` stands for "never written", the number after it for unseen.
        """
        length = self.timestamps.numel()
        written = self.timestamps[self.rows.clamp(max=max(0, length - 1))]
        age = self.next_timestamps[self.tokens].unsqueeze(2) - written.unsqueeze(1)
        bucket = time_bucket(age, NUM_TIME_BUCKETS).to(torch.uint8)
        bucket.masked_fill_((self.rows >= length).unsqueeze(1), NUM_TIME_BUCKETS)
        return bucket.masked_fill_(self.unseen, NUM_TIME_BUCKETS + 1)


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
class _Cut:
    """Where tiles begin and end.

    Attributes:
        tokens: (G, T) int64.
        copies: (G, T) bool, fills up a user's last tile.
        slots: (L,) int64, place of every token in the flat ``tokens``.
        users: (G,) int64.
        first_tiles: (G,) int64, first tile of the same user.
        carries: some user has a second tile.
    """

    tokens: Tensor
    copies: Tensor
    slots: Tensor
    users: Tensor
    first_tiles: Tensor
    carries: bool

    @classmethod
    def build(cls, grouping: DomainGrouping, height: int | None, carried: int) -> "_Cut":
        if grouping.padded_length is not None:
            return cls._one_tile_a_user(grouping, grouping.padded_length)
        offsets = grouping.batch_offsets
        lengths = offsets.diff()
        on_host = lengths.numpy(force=True)
        if height is None:
            height = _cheapest_height(on_host, carried)
        num_tiles = _num_tiles(on_host, height)
        tiles = (lengths + (height - 1)) // height
        users, tile, column = (
            torch.arange(n, device=offsets.device) for n in (len(lengths), num_tiles, height)
        )
        owner = torch.repeat_interleave(users, lengths, output_size=grouping.num_tokens)
        users = torch.repeat_interleave(users, tiles, output_size=num_tiles)
        first = tiles.cumsum(0) - tiles
        begin = offsets[users] + height * (tile - first[users])
        place = begin.unsqueeze(1) + column
        end = offsets[users + 1].unsqueeze(1)
        return cls(
            tokens=torch.minimum(place, end - 1),
            copies=place >= end,
            slots=grouping.positions + height * first[owner],
            users=users,
            first_tiles=first[users],
            carries=num_tiles > int((on_host > 0).sum()),
        )

    @classmethod
    def _one_tile_a_user(cls, grouping: DomainGrouping, length: int) -> "_Cut":
        """Cut where all users have as many tokens: no size depends on what the lengths are."""
        slots = torch.arange(grouping.num_tokens, device=grouping.permutation.device)
        tokens = slots.view(-1, length)
        users = torch.arange(tokens.shape[0], device=slots.device)
        return cls(
            tokens=tokens,
            copies=torch.zeros_like(tokens, dtype=torch.bool),
            slots=slots,
            users=users,
            first_tiles=users,
            carries=False,
        )


def _num_tiles(lengths: np.ndarray, height: int) -> int:
    return int((-(-lengths // height)).sum())


def _cheapest_height(lengths: np.ndarray, carried: int) -> int:
    """Choose the tokens of a tile: tall ones waste pairs, low ones read the carry-in often."""
    longest = max(1, int(lengths.max(initial=1)))
    heights = [height for height in _HEIGHTS if height < longest]
    heights.append(min(longest, _HEIGHTS[-1]))

    def cost(height: int) -> int:
        pairs = (carried + height) * (height + _PAIRS_PER_KEY) + _PAIRS_PER_TILE
        return _num_tiles(lengths, height) * pairs

    return min(heights, key=cost)


def _carry_in(
    grouping: DomainGrouping, cut: _Cut, overwritten: Tensor, depth: int
) -> tuple[Tensor, Tensor]:
    """Find rows and ends of the states before each tile, (G, D * depth) int64 each."""
    length, num_domains = grouping.num_tokens, grouping.num_domains
    if not length:
        return (cut.users.new_zeros(0, num_domains * depth),) * 2
    begin, size = (
        x.view(-1, num_domains)[cut.users] for x in (grouping.offsets[:-1], grouping.lengths)
    )
    first_visit = grouping.permutation[begin.clamp(max=length - 1)].masked_fill_(size == 0, length)
    # Visits of each tile's tokens, then of the user's tiles before it.
    visits = torch.zeros_like(begin)
    group = (cut.slots // cut.tokens.shape[1]) * num_domains + grouping.group_of % num_domains
    visits.view(-1).scatter_add_(0, group, torch.ones_like(group))
    before = visits.cumsum(0) - visits
    before = (before - before[cut.first_tiles]).unsqueeze(2)
    back = torch.arange(depth, device=begin.device)
    missing = before <= back
    visit = (begin.unsqueeze(2) + before - 1 - back).masked_fill_(missing, 0)
    token = grouping.permutation[visit]
    initial = length + torch.arange(num_domains, device=begin.device).unsqueeze(1)
    # A domain is represented once by its initial state, not once for every missing visit.
    never = torch.where(back == 0, first_visit.unsqueeze(2), -1)
    rows = torch.where(missing, initial, token)
    return rows.flatten(1), torch.where(missing, never, overwritten[token]).flatten(1)


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
