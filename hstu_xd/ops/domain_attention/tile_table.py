"""The work list of the fused kernels, and all that a launch of one is given.

A tile says which rows a program owns and which rows they can meet. Everything is computed where the
grouping lies and its sizes follow from shapes alone, so the host never waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hstu_xd.ops.grouping import DomainGrouping, seeing_start, seen_end
from hstu_xd.ops.relative_bias import RelativeBias
from hstu_xd.ops.triton_support import split


class PairPlan(NamedTuple):
    """Integer tensors that say which pairs meet, and what the bias of a pair depends on.

    Attributes:
        query_tiles: (T, 4) int32, see :func:`query_tiles`.
        key_tiles: (T, 4) int32, see :func:`key_tiles`.
        query_tokens: (L,) int64, grouped order of the queries -> token of the batch.
        key_tokens: (L,) int64, grouped order of the keys -> token.
        query_places: (L,) int32, position of each query, in grouped order: it decides causality.
        key_places: (L,) int32, position of each key, in grouped order.
        query_positions: (L,) int32, likewise, position for the bias; None without bias.
        key_positions: (L,) int32, likewise; None without bias.
        next_times: (L,) int64, time of the event after each query; None without bias.
        times: (L,) int64, time of each key; None without bias.
    """

    query_tiles: Tensor
    key_tiles: Tensor
    query_tokens: Tensor
    key_tokens: Tensor
    query_places: Tensor
    key_places: Tensor
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    next_times: Tensor | None = None
    times: Tensor | None = None

    @classmethod
    def build(cls, grouping: DomainGrouping, bias: RelativeBias | None, tile: int) -> "PairPlan":
        """Lay out a batch, with the coordinates that a bias depends on if there is one.

        Args:
            grouping: who sees whom.
            bias: the bias of its pairs, or None.
            tile: rows of a tile at most.
        """
        queries, keys = grouping.permutation, grouping.keys.permutation
        places = grouping.positions[queries].int(), grouping.keys.positions[keys].int()
        tables = query_tiles(grouping, tile), key_tiles(grouping, tile)
        plan = cls(*tables, queries, keys, *places)
        if bias is None:
            return plan
        return plan._replace(
            query_positions=bias.positions[queries].int(),
            key_positions=bias.positions[keys].int(),
            next_times=bias.next_timestamps[queries],
            times=bias.timestamps[keys],
        )

    def tensors(self) -> list[Tensor]:
        """Return the tensors as an operator takes them: six, or ten with a bias."""
        return [x for x in self if x is not None]


class KernelInputs(NamedTuple):
    """What every kernel is given.

    Attributes:
        q: (L, H, dqk) float.
        k: (L, H, dqk) float.
        v: (L, H, dv) float.
        position_weights: (2 N - 1,) float, or None.
        time_weights: (num_buckets + 1,) float, or None.
        plan: pairs and their coordinates.
        norm_length: the divisor ``N``.
        tile: rows of the tiles in ``plan``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    position_weights: Tensor | None
    time_weights: Tensor | None
    plan: PairPlan
    norm_length: int
    tile: int


def query_tiles(grouping: DomainGrouping, tile: int) -> Tensor:
    """Cut the queries into tiles, each with the keys that any of its queries may see.

    Args:
        grouping: the plan of the batch.
        tile: rows of a tile at most.

    Returns:
        (T, 4) int32 rows ``first, stop, key_first, key_stop`` in grouped order, the most work
        first, and ``T = L // tile + min(L, groups)``; zeros where there are fewer tiles.
    """
    group, first, stop = split(grouping.offsets, grouping.num_tokens, tile)
    key_first = grouping.keys.offsets[group]
    if grouping.keys is grouping:
        return _longest_first(first, stop, key_first, stop)
    last_position = grouping.positions[grouping.permutation[stop - 1]]
    return _longest_first(first, stop, key_first, seen_end(grouping, group, last_position))


def key_tiles(grouping: DomainGrouping, tile: int) -> Tensor:
    """Cut the keys into tiles, each with the queries that may see any of its keys.

    Args:
        grouping: the plan of the batch.
        tile: rows of a tile at most.

    Returns:
        (T, 4) int32 rows ``first, stop, query_first, query_stop``, like :func:`query_tiles`.
    """
    keys = grouping.keys
    group, first, stop = split(keys.offsets, keys.num_tokens, tile)
    query_stop = grouping.offsets[group + 1]
    if keys is grouping:
        return _longest_first(first, stop, first, query_stop)
    first_row = first.clamp(max=keys.num_tokens - 1)
    first_position = keys.positions[keys.permutation[first_row]]
    return _longest_first(first, stop, seeing_start(grouping, group, first_position), query_stop)


def _longest_first(first: Tensor, stop: Tensor, other_first: Tensor, other_stop: Tensor) -> Tensor:
    """Order the table so that no long tile starts when all others are done."""
    work = (other_stop - other_first).masked_fill(first >= stop, -1)
    order = torch.argsort(work, descending=True, stable=True)
    rows = torch.stack([first, stop, other_first, other_stop], dim=1)
    return rows[order].to(torch.int32)
