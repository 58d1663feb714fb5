"""The work list of the fused kernels: which rows a program owns and which rows they can meet.

Everything is computed where the grouping lies and its sizes follow from shapes alone, so the host
never waits for the device.
"""

import torch
from torch import Tensor

from hstu_xd.ops.grouping import DomainGrouping


def query_tiles(grouping: DomainGrouping, tile: int) -> Tensor:
    """Tiles of queries with the keys that any of their queries may see.

    Args:
        grouping: the plan of the batch.
        tile: rows of a tile at most.

    Returns:
        (T, 4) int32 rows ``first, stop, key_first, key_stop`` in grouped order, the most work
        first, and ``T = L // tile + min(L, groups)``; zeros where there are fewer tiles.
    """
    keys = grouping.keys
    group, first, stop = split(grouping.offsets, grouping.num_tokens, tile)
    key_first, key_end = keys.offsets[group], keys.offsets[group + 1]
    last_position = grouping.positions[grouping.permutation[stop - 1]]
    seen = torch.searchsorted(
        ranks(keys), rank(group, last_position, grouping.num_tokens), right=True
    )
    return _longest_first(first, stop, key_first, seen.clamp(key_first, key_end))


def key_tiles(grouping: DomainGrouping, tile: int) -> Tensor:
    """Tiles of keys with the queries that may see any of their keys.

    Args:
        grouping: the plan of the batch.
        tile: rows of a tile at most.

    Returns:
        (T, 4) int32 rows ``first, stop, query_first, query_stop``, like :func:`query_tiles`.
    """
    keys = grouping.keys
    group, first, stop = split(keys.offsets, keys.num_tokens, tile)
    query_first, query_end = grouping.offsets[group], grouping.offsets[group + 1]
    first_row = first.clamp(max=keys.num_tokens - 1)
    first_position = keys.positions[keys.permutation[first_row]]
    seeing = torch.searchsorted(ranks(grouping), rank(group, first_position, keys.num_tokens))
    return _longest_first(first, stop, seeing.clamp(query_first, query_end), query_end)


def split(offsets: Tensor, length: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut groups of rows into tiles.

    Args:
        offsets: (groups + 1,) int64, where the groups begin.
        length: rows ``L`` of all groups together.
        tile: rows of a tile at most.

    Returns:
        Group, first row and end of every tile, ``(L // tile + min(L, groups),)`` int64 each; empty
        tiles come last.
    """
    lengths = offsets.diff()
    groups = lengths.numel()
    counts = (lengths + (tile - 1)) // tile
    ends = counts.cumsum(0)
    index = torch.arange(length // tile + min(length, groups), device=ends.device)
    group = torch.searchsorted(ends, index, right=True).clamp_(max=groups - 1)
    first = offsets[group] + (index - (ends - counts)[group]) * tile
    end = offsets[group + 1]
    return group, torch.minimum(first, end), torch.minimum(first + tile, end)


def rank(group: Tensor, position: Tensor, length: int) -> Tensor:
    """One number that orders rows by group, then by position (below ``length``)."""
    return group * (length + 1) + position.clamp(0, length)


def ranks(grouping: DomainGrouping) -> Tensor:
    """(L,) ranks of all rows in grouped order: they rise."""
    lengths = grouping.offsets.diff()
    groups = torch.arange(lengths.numel(), device=lengths.device)
    owner = torch.repeat_interleave(groups, lengths, output_size=grouping.num_tokens)
    return rank(owner, grouping.positions[grouping.permutation], grouping.num_tokens)


def _longest_first(first: Tensor, stop: Tensor, other_first: Tensor, other_stop: Tensor) -> Tensor:
    """The table, ordered so that no long tile starts when all others are done."""
    work = (other_stop - other_first).masked_fill(first >= stop, -1)
    order = torch.argsort(work, descending=True, stable=True)
    rows = torch.stack([first, stop, other_first, other_stop], dim=1)
    return rows[order].to(torch.int32)
