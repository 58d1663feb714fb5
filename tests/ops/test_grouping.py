"""The regrouping plan against a loop, and the arguments it refuses."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.errors import InputError
from hstu_xd.ops.grouping import DomainGrouping


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], int]:
    """Domains of each user's events, domains of the events after them, number of domains."""
    num_domains = draw(st.sampled_from([1, 2, 5, 500]))
    domain = st.integers(0, num_domains - 1)
    users = draw(st.lists(st.lists(domain, max_size=15), max_size=6))
    targets = [draw(st.lists(domain, min_size=len(u), max_size=len(u))) for u in users]
    return users, targets, num_domains


def flat(users: list[list[int]]) -> torch.Tensor:
    return torch.tensor([d for user in users for d in user], dtype=torch.int64)


def offsets_of(users: list[list[int]]) -> torch.Tensor:
    return torch.tensor([0, *map(len, users)]).cumsum(0)


def runs_by_loop(users: list[list[int]], num_domains: int) -> list[list[int]]:
    """Tokens of every (user, domain) group in time order."""
    runs, start = [], 0
    for user in users:
        for domain in range(num_domains):
            runs.append([start + i for i, d in enumerate(user) if d == domain])
        start += len(user)
    return runs


def check_against_loop(
    grouping: DomainGrouping, users: list[list[int]], domains: list[list[int]], num_domains: int
) -> None:
    runs = runs_by_loop(domains, num_domains)
    tokens = [token for run in runs for token in run]
    assert grouping.permutation.tolist() == tokens
    assert grouping.lengths.tolist() == [len(run) for run in runs]
    assert grouping.offsets.tolist() == torch.tensor([0, *map(len, runs)]).cumsum(0).tolist()
    assert grouping.positions.tolist() == [i for user in users for i in range(len(user))]
    assert grouping.batch_offsets.tolist() == offsets_of(users).tolist()
    assert grouping.num_tokens == len(tokens)
    group_of = {token: g for g, run in enumerate(runs) for token in run}
    assert grouping.group_of.tolist() == [group_of[t] for t in range(len(tokens))]
    assert [tokens[slot] for slot in grouping.inverse.tolist()] == list(range(len(tokens)))
    for tensor in (grouping.permutation, grouping.offsets, grouping.inverse, grouping.group_of):
        assert tensor.dtype == torch.int64


@given(batches())
def test_own_view_equals_a_loop(batch: tuple[list[list[int]], list[list[int]], int]) -> None:
    users, _, num_domains = batch
    grouping = DomainGrouping.from_jagged(flat(users), offsets_of(users), num_domains)
    check_against_loop(grouping, users, users, num_domains)
    assert grouping.keys is grouping


@given(batches())
def test_target_view_equals_a_loop(batch: tuple[list[list[int]], list[list[int]], int]) -> None:
    users, targets, num_domains = batch
    own = DomainGrouping.from_jagged(flat(users), offsets_of(users), num_domains)
    view = own.target_view(flat(targets))
    check_against_loop(view, users, targets, num_domains)
    assert view.keys is own


@given(batches())
def test_single_puts_a_user_into_one_group(
    batch: tuple[list[list[int]], list[list[int]], int],
) -> None:
    users, _, _ = batch
    single = DomainGrouping.single(offsets_of(users), sum(map(len, users)))
    check_against_loop(single, users, [[0] * len(user) for user in users], 1)


DOMAINS, OFFSETS = torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3])


@pytest.mark.parametrize(
    ("domains", "offsets", "num_domains", "message"),
    [
        (
            DOMAINS.int(),
            OFFSETS,
            2,
            "domains is torch.int32 of shape (3,); a vector of torch.int64",
        ),
        (DOMAINS.view(1, 3), OFFSETS, 2, "domains is torch.int64 of shape (1, 3); a vector"),
        (DOMAINS, OFFSETS.float(), 2, "offsets is torch.float32 of shape (3,); a vector"),
        (DOMAINS, OFFSETS, 0, "num_domains is 0; at least 1 is needed"),
        (DOMAINS, OFFSETS[:0], 2, "offsets is empty; B + 1 entries are needed, beginning with 0"),
        (DOMAINS, OFFSETS[:2], 2, "offsets must rise from 0 to the number of tokens (3), got"),
        (DOMAINS, OFFSETS + 1, 2, "offsets must rise from 0 to the number of tokens (3), got"),
        (DOMAINS, torch.tensor([0, 2, 1, 3]), 2, "offsets must rise from 0"),
        (DOMAINS, OFFSETS, 1, "domains holds ids 0..1; with num_domains=1 they must lie in 0..0"),
        (DOMAINS - 1, OFFSETS, 2, "domains holds ids -1..0; with num_domains=2 they must lie in"),
    ],
)
def test_messages(
    domains: torch.Tensor, offsets: torch.Tensor, num_domains: int, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        DomainGrouping.from_jagged(domains, offsets, num_domains)


def test_targets_out_of_range_are_refused() -> None:
    own = DomainGrouping.from_jagged(DOMAINS, OFFSETS, 2)
    with pytest.raises(InputError, match=r"domains holds ids 0\.\.2; with num_domains=2"):
        own.target_view(torch.tensor([0, 2, 1]))


def test_targets_of_another_batch_are_refused() -> None:
    own = DomainGrouping.from_jagged(DOMAINS, OFFSETS, 2)
    with pytest.raises(InputError, match="offsets must rise from 0"):
        own.target_view(torch.tensor([0, 1]))
