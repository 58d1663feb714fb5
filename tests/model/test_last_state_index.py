"""The last-state lookup that defines DDSR, against a loop over time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS
from hstu_xd.ops.state_attention.reference import last_state_index, state_age_bucket


@st.composite
def users(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Domains of each user's events, and the number of domains."""
    num_domains = draw(st.sampled_from([1, 2, 3, 500]))
    domain = st.integers(0, num_domains - 1)
    return draw(st.lists(st.lists(domain, max_size=12), max_size=5)), num_domains


def by_loop(histories: list[list[int]], num_domains: int, states: int) -> torch.Tensor:
    rows, start = [], 0
    for history in histories:
        for i in range(len(history)):
            row = []
            for domain in range(num_domains):
                visits = [start + j for j in range(i, -1, -1) if history[j] == domain]
                row.append((visits + [-1] * states)[:states])
            rows.append(row)
        start += len(history)
    return torch.tensor(rows, dtype=torch.int64).view(-1, num_domains, states)


def lay_end_to_end(histories: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    domains = torch.tensor([d for history in histories for d in history], dtype=torch.int64)
    lengths = torch.tensor([0, *map(len, histories)])
    return domains, lengths.cumsum(0)


@given(users(), st.sampled_from([1, 2, 4]))
def test_equals_a_loop(drawn: tuple[list[list[int]], int], states: int) -> None:
    histories, num_domains = drawn
    domains, offsets = lay_end_to_end(histories)
    found = last_state_index(domains, offsets, num_domains, states)
    assert torch.equal(found, by_loop(histories, num_domains, states))


@pytest.mark.parametrize("num_domains", [2, 500])
@pytest.mark.parametrize("states", [1, 3])
def test_long_histories(num_domains: int, states: int) -> None:
    generator = torch.Generator().manual_seed(0)
    histories = [
        torch.randint(num_domains, (length,), generator=generator).tolist()
        for length in (60, 0, 1, 17)
    ]
    domains, offsets = lay_end_to_end(histories)
    found = last_state_index(domains, offsets, num_domains, states)
    assert torch.equal(found, by_loop(histories, num_domains, states))


def test_age_is_the_time_since_the_state_was_written() -> None:
    domains, offsets = lay_end_to_end([[0, 1, 0], [1]])
    times = torch.tensor([0, 100, 103, 7])
    next_times = torch.tensor([100, 103, 103, 1_000_007])
    index = last_state_index(domains, offsets, 2, 2)
    age = state_age_bucket(index, times, next_times)
    never = NUM_TIME_BUCKETS
    # ln(100) / 0.301 = 15.3, ln(103) / 0.301 = 15.4, ln(3) / 0.301 = 3.6, ln(1e6) / 0.301 = 45.9
    assert age.tolist() == [
        [[15, never], [never, never]],
        [[15, never], [3, never]],
        [[0, 15], [3, never]],
        [[never, never], [45, never]],
    ]


def test_age_of_an_empty_batch() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    index = last_state_index(nothing, torch.tensor([0, 0]), 3, 2)
    assert state_age_bucket(index, nothing, nothing).shape == (0, 3, 2)
