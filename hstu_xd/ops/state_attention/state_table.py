"""The work list of the fused DDSR kernels: tiles of tokens, and of states by how long they last.

Everything is computed where the grouping lies and its sizes follow from shapes alone, so the host
never waits for the device.
"""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.row_tiles import rank, ranks, split

# Lifetimes of states are told apart by factors of four, the last class is open.
_LIFETIMES = 8
_MOST_KEYS = 32


@dataclass(frozen=True, eq=False)
class StateTable:
    """What the kernels need to know about a batch.

    The tokens of ``B`` users are cut into ``G = L // tile + min(L, B)`` tiles, some of them empty.

    Attributes:
        tiles: (G, 3 + D) int32 rows: first token, end, user, and for each domain the end, in
            grouped order, of the user's visits before the tile.
        offsets: (B * D + 1,) int64, of the grouping.
        tokens: (L,) int64, grouped order -> token.
        first_visits: (B * D,) int32, first visit to each domain; the end of the user's history
            where there is none.
        replaced: (L,) int32, see :func:`replacements`.
        key_tiles: (T, 2) int32 rows: first and end in ``key_tokens``.
        key_tokens: (L,) int64, tokens by user, then by how long their states last, then by time.
        next_times: (L,) int64, time of the event after each token.
        times: (L,) int64.
        tile: tokens of a tile at most.
        states_per_domain: latest states ``M`` of each domain that a token sees.
    """

    tiles: Tensor
    offsets: Tensor
    tokens: Tensor
    first_visits: Tensor
    replaced: Tensor
    key_tiles: Tensor
    key_tokens: Tensor
    next_times: Tensor
    times: Tensor
    _: KW_ONLY
    tile: int
    states_per_domain: int

    @classmethod
    def build(
        cls,
        grouping: DomainGrouping,
        timestamps: Tensor,
        next_timestamps: Tensor,
        *,
        states_per_domain: int,
        tile: int,
    ) -> "StateTable":
        """Lay out a batch; see the attributes."""
        length, offsets = grouping.num_tokens, grouping.batch_offsets
        replaced = replacements(grouping, states_per_domain)
        age = replaced - torch.arange(length, device=replaced.device)
        lifetime = (age.float().log2() / 2).long().clamp(max=_LIFETIMES - 1)
        keys = DomainGrouping.from_jagged(lifetime, offsets, _LIFETIMES)
        _, first, stop = split(keys.offsets, length, key_height(tile))
        ends = torch.repeat_interleave(
            offsets[1:], grouping.num_domains, output_size=grouping.offsets.numel() - 1
        )
        visit = pad(grouping.permutation, (0, 1))[grouping.offsets[:-1]]
        return cls(
            tiles=_tiles(grouping, tile),
            offsets=grouping.offsets,
            tokens=grouping.permutation,
            first_visits=torch.where(grouping.offsets.diff() > 0, visit, ends).to(torch.int32),
            replaced=replaced.to(torch.int32),
            key_tiles=torch.stack([first, stop], dim=1).to(torch.int32),
            key_tokens=keys.permutation,
            next_times=next_timestamps,
            times=timestamps,
            tile=tile,
            states_per_domain=states_per_domain,
        )

    def tensors(self) -> list[Tensor]:
        """As an operator takes it."""
        return [x for x in vars(self).values() if isinstance(x, Tensor)]


def key_height(tile: int) -> int:
    """States of a tile of keys: the fewer, the fewer tokens see some of them but not all."""
    return min(tile, _MOST_KEYS)


def replacements(grouping: DomainGrouping, states_per_domain: int) -> Tensor:
    """First token that no longer sees each token's state: the ``M``-th visit after its own.

    Args:
        grouping: the batch by (user, domain).
        states_per_domain: latest states ``M`` of each domain that a token sees.

    Returns:
        (L,) int64; the end of the user's history where no visit replaces a state.
    """
    length, num_domains = grouping.num_tokens, grouping.num_domains
    rows = torch.arange(length, device=grouping.permutation.device)
    groups = torch.arange(grouping.offsets.numel() - 1, device=rows.device)
    group = torch.repeat_interleave(groups, grouping.offsets.diff(), output_size=length)
    visit = rows + states_per_domain
    token = pad(grouping.permutation, (0, 1))[visit.clamp(max=length)]
    end = grouping.batch_offsets[group // num_domains + 1]
    token = torch.where(visit < grouping.offsets[group + 1], token, end)
    return torch.empty_like(token).scatter_(0, grouping.permutation, token)


def _tiles(grouping: DomainGrouping, tile: int) -> Tensor:
    length, num_domains = grouping.num_tokens, grouping.num_domains
    user, first, stop = split(grouping.batch_offsets, length, tile)
    domains = torch.arange(num_domains, device=user.device)
    group = user.unsqueeze(1) * num_domains + domains
    position = (first - grouping.batch_offsets[user]).unsqueeze(1)
    visited = torch.searchsorted(ranks(grouping), rank(group, position, length))
    return torch.cat([torch.stack([first, stop, user], dim=1), visited], dim=1).to(torch.int32)
