"""Regrouping against a walk over users and domains; needs no codebase."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.plugins.dlrm_v3.domain_groups import DomainGroups, RequestLayout

DOMAINS = 3
domains_of = st.lists(st.integers(0, DOMAINS - 1), max_size=6)
users = st.lists(st.tuples(domains_of, domains_of), min_size=1, max_size=5)


def lay_out(batch: list[tuple[list[int], list[int]]], num_context: int) -> tuple:
    lengths = [num_context + len(history) + len(targets) for history, targets in batch]
    layout = RequestLayout.build(
        torch.tensor(lengths), torch.tensor([len(targets) for _, targets in batch]), num_context
    )
    history, targets = ([d for user in batch for d in user[part]] for part in (0, 1))
    domains = layout.row_domains(
        torch.tensor(history, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
    )
    return layout, domains


@given(users, st.integers(0, 2), st.booleans())
def test_groups_are_what_a_walk_over_users_and_domains_finds(
    batch, num_context, shortest_first
) -> None:
    groups = DomainGroups.build(
        *lay_out(batch, num_context), DOMAINS, shortest_first=shortest_first
    )
    start, expected = 0, []
    for history, targets in batch:
        prefix = list(range(start, start + num_context))
        rows = {
            kind: [(start + num_context + before + at, d) for at, d in enumerate(part)]
            for kind, part, before in (("history", history, 0), ("target", targets, len(history)))
        }
        for domain in sorted(set(targets)):
            seen = [row for row, d in rows["history"] if d == domain]
            asked = [row for row, d in rows["target"] if d == domain]
            expected.append((prefix + seen + asked, len(asked)))
        start += num_context + len(history) + len(targets)
    if shortest_first:
        expected.sort(key=lambda group: len(group[0]))
    found = [
        groups.rows[groups.offsets[g] : groups.offsets[g + 1]].tolist()
        for g in range(groups.lengths.numel())
    ]
    assert list(zip(found, groups.num_targets.tolist())) == expected
    assert groups.lengths.tolist() == [len(rows) for rows, _ in expected]
    assert groups.num_rows == start


@given(users, st.integers(0, 2))
def test_targets_return_to_their_rows_and_nothing_else_does(batch, num_context) -> None:
    groups = DomainGroups.build(*lay_out(batch, num_context), DOMAINS)
    x = torch.arange(1.0, groups.num_rows + 1).unsqueeze(1)
    returned = groups.spread_targets(groups.gather(x))
    lengths = [(num_context + len(history), len(targets)) for history, targets in batch]
    is_target = torch.tensor(
        [kind for other, asked in lengths for kind in [False] * other + [True] * asked], dtype=bool
    )
    assert torch.equal(returned, x * is_target.unsqueeze(1))


@given(users, st.integers(0, 2))
def test_targets_carry_the_transition_and_the_last_event_stays(batch, num_context) -> None:
    layout, domains = lay_out(batch, num_context)
    expected = []
    for history, targets in batch:
        expected += [(0, 0)] * num_context
        expected += list(zip(history, history[1:] + history[-1:]))
        expected += [(history[-1] if history else target, target) for target in targets]
    left, entered = layout.transitions(domains)
    assert list(zip(left.tolist(), entered.tolist())) == expected
