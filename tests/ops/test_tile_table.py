"""Tiles cover every row once, and meet exactly the rows that a loop says they can meet."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from attention_cases import Spec, draw
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_xd.ops.domain_attention.tile_table import key_tiles, query_tiles
from hstu_xd.ops.grouping import DomainGrouping


def rows_by_group(grouping: DomainGrouping) -> list[list[tuple[int, int]]]:
    """(row, position) of every group."""
    bounds = grouping.offsets.tolist()
    positions = grouping.positions[grouping.permutation].tolist()
    return [[(r, positions[r]) for r in range(a, b)] for a, b in pairwise(bounds)]


def tiles_by_loop(grouping: DomainGrouping, tile: int, *, of_keys: bool) -> set[tuple[int, ...]]:
    """First and end of each tile's own rows, and of the rows that it meets, if any."""
    found = set()
    for queries, keys in zip(rows_by_group(grouping), rows_by_group(grouping.keys)):
        own, other = (keys, queries) if of_keys else (queries, keys)
        for start in range(0, len(own), tile):
            rows = own[start : start + tile]
            met = [
                r
                for r, position in other
                if (position >= rows[0][1] if of_keys else position <= rows[-1][1])
            ]
            found.add((rows[0][0], rows[-1][0] + 1, *((met[0], met[-1] + 1) if met else ())))
    return found


@given(
    st.builds(
        Spec,
        st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any).map(tuple),
        st.sampled_from([1, 2, 7]),
        target_view=st.booleans(),
    ),
    st.sampled_from([1, 4, 16]),
    st.booleans(),
)
@settings(max_examples=60)
def test_tiles_are_those_of_a_loop(spec: Spec, tile: int, of_keys: bool) -> None:
    grouping = draw(spec).grouping()
    table = (key_tiles if of_keys else query_tiles)(grouping, tile)
    assert table.dtype == torch.int32
    assert len(table) == grouping.num_tokens // tile + min(
        grouping.num_tokens, grouping.lengths.numel()
    )
    found = [(a, b, c, d) if c < d else (a, b) for a, b, c, d in table.tolist() if a < b]
    assert len(found) == len(set(found))
    assert set(found) == tiles_by_loop(grouping, tile, of_keys=of_keys)


@pytest.mark.parametrize("table", [query_tiles, key_tiles])
def test_the_most_work_comes_first(table: Callable[..., torch.Tensor]) -> None:
    grouping = draw(Spec((70, 0, 3, 40), target_view=True)).grouping()
    first, stop, other_first, other_stop = table(grouping, 16).long().unbind(1)
    work = (other_stop - other_first).masked_fill(first >= stop, -1)
    assert torch.equal(work, work.sort(descending=True).values)
