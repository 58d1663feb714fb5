"""How popular what is found and recommended is, against cases counted by hand and plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.catalog import DomainCatalog
from hstu_xd.evaluation.popularity import (
    NUM_TENTHS,
    ListTally,
    gini_coefficient,
    percentiles_in_domain,
    tenths_of_targets,
)
from hstu_xd.evaluation.ranks import ListedTargets

# Items 1 to 4 are books, 5 and 6 films; the id 7 is unused.
CATALOG = DomainCatalog(torch.tensor([-1, 0, 0, 0, 0, 1, 1, -1]), ["books", "films"])
COUNTS = torch.tensor([0, 0, 2, 2, 9, 1, 5, 0])


def test_gini_of_even_and_of_one_for_all() -> None:
    assert gini_coefficient(torch.full((7,), 3)) == 0
    assert gini_coefficient(torch.tensor([0, 5, 0, 0, 0])) == pytest.approx(4 / 5, rel=1e-12)
    assert gini_coefficient(torch.tensor([1, 3])) == pytest.approx(1 / 4, rel=1e-12)
    assert math.isnan(gini_coefficient(torch.zeros(4, dtype=torch.int64)))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any))
def test_gini_is_half_the_mean_difference_over_the_mean(counts: list[int]) -> None:
    mean = sum(counts) / len(counts)
    differences = [abs(a - b) for a in counts for b in counts]
    expected = sum(differences) / len(differences) / (2 * mean)
    assert gini_coefficient(torch.tensor(counts)) == pytest.approx(expected, abs=1e-12)


def test_tenths_of_different_numbers_are_even() -> None:
    tenths = tenths_of_targets(torch.arange(30).flip(0))
    assert torch.bincount(tenths.group_of).tolist() == [3] * 10
    assert tenths.bounds[0] == (0, 2)
    assert tenths.labels()[-1] == "27-29"
    assert int(tenths.group_of[0]) == 9


def test_tenths_keep_equal_targets_together() -> None:
    # Six of ten are never met: the middle of their places is the third of ten.
    tenths = tenths_of_targets(torch.tensor([0, 0, 0, 4, 0, 0, 0, 7, 1200, 7]))
    assert tenths.labels() == ["0", "4", "7", "1,200"]
    assert tenths.group_of.tolist() == [0, 0, 0, 1, 0, 0, 0, 2, 3, 2]
    assert tenths_of_targets(torch.tensor([3, 3])).bounds == [(3, 3)]
    members = tenths_of_targets(torch.tensor([3, 1])).members()
    assert list(members) == ["1", "3"]
    assert members["1"].tolist() == [False, True]
    assert members["3"].tolist() == [True, False]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60))
def test_tenths_part_all_targets_in_order(counts: list[int]) -> None:
    tenths = tenths_of_targets(torch.tensor(counts))
    groups = tenths.group_of.tolist()
    assert len(tenths.bounds) == max(groups) + 1 <= min(NUM_TENTHS, len(set(counts)))
    for group, (low, high) in enumerate(tenths.bounds):
        own = [count for count, each in zip(counts, groups) if each == group]
        assert (min(own), max(own)) == (low, high)
    edges = [edge for bounds in tenths.bounds for edge in bounds]
    assert edges == sorted(edges)


def test_percentiles_are_of_the_items_of_the_domain() -> None:
    found = percentiles_in_domain(COUNTS, CATALOG).tolist()
    assert found == [0, 1 / 8, 4 / 8, 4 / 8, 7 / 8, 1 / 4, 3 / 4, 0]


def listed(*lists: list[int]) -> ListedTargets:
    items = torch.tensor(lists)
    users = torch.zeros(len(lists), dtype=torch.int64)
    return ListedTargets(np.arange(len(lists)), users, users, users, items, items.double())


def test_lists_are_counted_over_batches() -> None:
    tally = ListTally(CATALOG, (1, 2))
    tally.add(listed([4, 2], [4, 3]))
    tally.add(listed([6, 0]))  # a list that ends early
    assert tally.counts.tolist() == [[0, 0, 0, 0, 2, 0, 1, 0], [0, 0, 1, 1, 2, 0, 1, 0]]
    found = tally.figures(percentiles_in_domain(COUNTS, CATALOG))
    assert found["coverage@1"] == pytest.approx(2 / 6)  # the unused id is no item
    assert found["coverage@2"] == pytest.approx(4 / 6)
    assert found["coverage@2[books]"] == pytest.approx(3 / 4)
    assert found["coverage@2[films]"] == pytest.approx(1 / 2)
    assert found["popularity@1"] == pytest.approx((2 * 7 / 8 + 3 / 4) / 3)
    assert found["gini@1"] == pytest.approx((3 * 1 + 5 * 2) / (6 * 3))


def test_no_lists_have_no_figures_but_coverage() -> None:
    found = ListTally(CATALOG, (5,)).figures(percentiles_in_domain(COUNTS, CATALOG))
    assert found["coverage@5"] == 0
    assert math.isnan(found["gini@5"])
    assert math.isnan(found["popularity@5"])


def test_equal_targets_are_in_the_tenth_of_their_middle() -> None:
    """Of twenty targets the four of one event are places 1 to 4, whose middle is in the second."""
    counts = torch.tensor([0, 1, 1, 1, 1, *range(2, 17)])
    assert tenths_of_targets(counts).bounds[:4] == [(0, 0), (1, 1), (2, 2), (3, 4)]
