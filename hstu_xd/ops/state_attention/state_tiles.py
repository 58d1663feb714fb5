"""Tiles of DDSR's attention for plain PyTorch: what a few consecutive tokens of a user read.

They have the shape of matrix products. A tile reads the states that were there when it began (the
carry-in, the same for all its tokens) and those that its own tokens write. Which of them a token
still sees is a matter of when they are overwritten: a state is replaced by the ``M``-th visit after
it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu_xd.ops.grouping import DomainGrouping, lazy_property, replacements
from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS, time_bucket

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
