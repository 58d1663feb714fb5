"""The work list of the fused DDSR kernels: tiles of tokens, and of states by how long they last.

Everything is computed where the grouping lies and its sizes follow from shapes alone, so the host
never waits for the device.
"""

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.ops.grouping import DomainGrouping, replacements
from hstu_xd.ops.triton_support import split

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
        """Return the tensors, as an operator takes them."""
        return [x for x in vars(self).values() if isinstance(x, Tensor)]


class StateKernelInputs(NamedTuple):
    """What every kernel is given.

    Attributes:
        q: (L, H, dqk) float, scaled.
        k: (L + D, H, dqk) float, of the tokens' states, then of the domains' initial ones.
        v: (L + D, H, dv) float, likewise.
        bias: (C, H) float by age of the state, its last row for initial states; or None.
        table: which states each token reads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    table: StateTable


def key_height(tile: int) -> int:
    """Choose the states of a tile of keys: of few, fewer tokens see some but not all."""
    return min(tile, _MOST_KEYS)


def _tiles(grouping: DomainGrouping, tile: int) -> Tensor:
    length, num_domains = grouping.num_tokens, grouping.num_domains
    user, first, stop = split(grouping.batch_offsets, length, tile)
    domains = torch.arange(num_domains, device=user.device)
    group = user.unsqueeze(1) * num_domains + domains
    position = (first - grouping.batch_offsets[user]).unsqueeze(1)
    # The first visit that is not before the tile.
    visited = grouping.first_row(group, position)
    return torch.cat([torch.stack([first, stop, user], dim=1), visited], dim=1).to(torch.int32)
