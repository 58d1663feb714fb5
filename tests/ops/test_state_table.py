"""The layout of the DDSR kernels against loops over users, domains and visits."""

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.state_attention.state_table import StateTable, key_height


@dataclass(frozen=True)
class Batch:
    histories: list[list[int]]
    num_domains: int
    num_states: int

    @property
    def starts(self) -> list[int]:
        return [sum(map(len, self.histories[:user])) for user in range(len(self.histories))]

    def table(self, tile: int) -> StateTable:
        domains = torch.tensor([d for h in self.histories for d in h], dtype=torch.int64)
        offsets = torch.tensor([0, *map(len, self.histories)]).cumsum(0)
        grouping = DomainGrouping.from_jagged(domains, offsets, self.num_domains)
        times = torch.zeros_like(domains)
        return StateTable.build(
            grouping, times, times, states_per_domain=self.num_states, tile=tile
        )

    def visits(self, user: int, domain: int) -> list[int]:
        """Tokens of a user in a domain."""
        start, history = self.starts[user], self.histories[user]
        return [start + i for i, d in enumerate(history) if d == domain]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    num_domains = draw(st.sampled_from([1, 2, 3, 70]))
    domain = st.integers(0, num_domains - 1)
    histories = draw(st.lists(st.lists(domain, max_size=40), max_size=4))
    return Batch(histories, num_domains, draw(st.integers(1, 4)))


def rows(tensor: Tensor) -> list[list[int]]:
    return tensor.tolist()


@given(batches(), st.sampled_from([1, 3, 16]))
@settings(max_examples=50)
def test_tiles_of_tokens(batch: Batch, tile: int) -> None:
    """Every token once, and of each domain the visits of its user before the tile."""
    table = batch.table(tile)
    length, users = sum(map(len, batch.histories)), len(batch.histories)
    assert len(table.tiles) == length // tile + min(length, users)
    expected, visits = [], table.tokens.tolist()
    for user, (start, history) in enumerate(zip(batch.starts, batch.histories)):
        end = start + len(history)
        expected += [[a, min(a + tile, end), user] for a in range(start, end, tile)]
    found = [row for row in rows(table.tiles) if row[0] < row[1]]
    assert [row[:3] for row in found] == expected
    for first, _, user, *ends in found:
        for domain, end in enumerate(ends):
            begin = int(table.offsets[user * batch.num_domains + domain])
            before = [t for t in batch.visits(user, domain) if t < first]
            assert visits[begin:end] == before


@given(batches())
@settings(max_examples=50)
def test_when_states_come_and_go(batch: Batch) -> None:
    """A state until the M-th visit after it, an initial state until the first."""
    table, depth = batch.table(16), batch.num_states
    for user, (start, history) in enumerate(zip(batch.starts, batch.histories)):
        end = start + len(history)
        for domain in range(batch.num_domains):
            visits = [*batch.visits(user, domain), *[end] * (depth + 1)]
            assert table.first_visits[user * batch.num_domains + domain] == visits[0]
            for rank, token in enumerate(batch.visits(user, domain)):
                assert table.replaced[token] == visits[rank + depth]


@given(batches(), st.sampled_from([1, 3, 16, 64]))
@settings(max_examples=50)
def test_tiles_of_states(batch: Batch, tile: int) -> None:
    """Every token's state once, tiles of one user."""
    table = batch.table(tile)
    tokens, found = table.key_tokens.tolist(), []
    users = [user for user, history in enumerate(batch.histories) for _ in history]
    for first, stop in rows(table.key_tiles):
        assert stop - first <= key_height(tile)
        assert len({users[token] for token in tokens[first:stop]}) <= 1
        found += tokens[first:stop]
    assert sorted(found) == list(range(len(users)))


def test_a_state_that_lasts_does_not_lengthen_the_walk() -> None:
    """Every tenth token writes a state that stays to the end; the others' last for a few tokens."""
    length = 2000
    history = [i // 10 if i % 10 == 0 else 200 + i % 3 for i in range(length)]
    table = Batch([history], 203, 1).table(64)
    tiles = [table.key_tokens[a:b] for a, b in rows(table.key_tiles) if a < b]
    assert seeing(table, tiles) <= 7 * length
    # In the order of the tokens every tile would reach to the end of the history.
    in_order = seeing(table, list(torch.arange(length).split(key_height(64))))
    assert in_order >= 31 * length


def seeing(table: StateTable, tiles: list[Tensor]) -> int:
    """Tokens that the kernel walks over, for all tiles of states together."""
    return sum(int(table.replaced[tokens].max() - tokens.min()) for tokens in tiles)
