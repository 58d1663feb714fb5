"""Ranks and metrics against a count by hand."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import HstuXdError
from hstu_xd.evaluation.metrics import METRICS, UNREACHABLE, grouped_metrics, ranking_metrics
from hstu_xd.evaluation.ranks import rank_targets, target_ranks
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.objectives.objective import DotProduct


class Items:
    """Fixed item vectors and a catalogue."""

    def __init__(self, catalog: DomainCatalog, vectors: torch.Tensor) -> None:
        self.catalog, self._vectors = catalog, vectors

    def item_vectors(self, item_ids: torch.Tensor) -> torch.Tensor:
        return self._vectors[item_ids]


def make(seed: int, num_items: int, num_domains: int, queries: int):
    random = torch.Generator().manual_seed(seed)

    def ints(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=random)

    catalog = DomainCatalog(ints(num_domains, num_items + 1), [f"d{i}" for i in range(num_domains)])
    # Few distinct integer scores, so that ties are everywhere and sums are exact.
    items = Items(catalog, ints(3, num_items + 1, 2).float())
    targets = 1 + ints(num_items, queries)
    seen = [(1 + ints(num_items, int(n))).tolist() for n in ints(9, queries)]
    users = ints(3, queries, 2).float()
    return items, users, targets, seen


def rank_by_hand(items: Items, user: torch.Tensor, target: int, seen: list[int]) -> int:
    if target in seen:
        return UNREACHABLE
    domains = items.catalog.item_domains.tolist()
    score = [float(user @ vector) for vector in items._vectors]
    candidates = {
        item
        for item in range(1, len(domains))
        if domains[item] == domains[target] and item not in seen
    }
    return sum(score[item] >= score[target] for item in candidates)


@given(
    seed=st.integers(0, 10**6),
    num_items=st.integers(1, 40),
    num_domains=st.integers(1, 4),
    queries=st.integers(1, 12),
    block=st.sampled_from([1, 17, 10**6]),
)
def test_rank_counts_unseen_items_of_the_domain_and_ties_against_the_target(
    seed: int, num_items: int, num_domains: int, queries: int, block: int
) -> None:
    items, users, targets, seen = make(seed, num_items, num_domains, queries)
    offsets = torch.tensor([0] + [len(s) for s in seen]).cumsum(0)
    flat = torch.tensor([item for s in seen for item in s], dtype=torch.int64)
    scorer = DotProduct(items.item_vectors)
    ranks = target_ranks(users, targets, flat, offsets, items.catalog, scorer, block_scores=block)
    expected = [rank_by_hand(items, users[i], int(targets[i]), seen[i]) for i in range(queries)]
    assert ranks.tolist() == expected


@given(st.lists(st.integers(1, 300), min_size=1, max_size=50))
def test_metrics_equal_their_definitions(ranks: list[int]) -> None:
    values = ranking_metrics(torch.tensor(ranks))
    n = len(ranks)
    for k in (1, 10, 100):
        assert values[f"hr@{k}"] == pytest.approx(sum(r <= k for r in ranks) / n)
    for k in (10, 100):
        gains = [1 / math.log2(r + 1) for r in ranks if r <= k]
        assert values[f"ndcg@{k}"] == pytest.approx(sum(gains) / n)
    assert values["mrr"] == pytest.approx(sum(1 / r for r in ranks) / n)


def test_groups_are_separate_and_empty_ones_absent() -> None:
    ranks = torch.tensor([1, 200, 5])
    values = grouped_metrics(
        ranks, torch.tensor([0, 0, 2]), torch.tensor([True, False, True]), ["a", "b", "c"]
    )
    assert set(METRICS) <= set(values)
    assert values["hr@10[a]"] == 0.5
    assert values["hr@10[c]"] == 1.0
    assert values["hr@10[switch]"] == 1.0
    assert values["hr@10[stay]"] == 0.0
    assert values["count"] == 3
    assert values["count[switch]"] == 2
    assert not any(name.endswith("[b]") for name in values)


def test_a_target_without_a_rank_is_a_miss_and_counted() -> None:
    ranks = torch.tensor([1, UNREACHABLE, UNREACHABLE, 4])
    values = grouped_metrics(
        ranks, torch.tensor([0, 0, 1, 2]), torch.tensor([True, False, True, True]), ["a", "b", "c"]
    )
    assert values["hr@100"] == 0.5
    assert values["mrr"] == (1 + 1 / 4) / 4
    assert {values[f"{name}[b]"] for name in METRICS} == {0.0}
    assert values["count[a]"] == 2
    unreachable = {k: v for k, v in values.items() if k.startswith("count_unreachable")}
    assert unreachable == {
        "count_unreachable": 2,
        "count_unreachable[switch]": 1,
        "count_unreachable[stay]": 1,
        "count_unreachable[a]": 1,
        "count_unreachable[b]": 1,
    }


def test_diverged_model_is_an_error_not_a_rank() -> None:
    items, users, targets, _ = make(0, 10, 2, 3)
    users[1] = float("nan")
    none = torch.zeros(4, dtype=torch.int64)
    scorer = DotProduct(items.item_vectors)
    with pytest.raises(HstuXdError, match=r"not finite.*lower"):
        target_ranks(users, targets, none[:0], none, items.catalog, scorer)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_any_score_that_is_not_finite_is_found(value: float) -> None:
    items, users, targets, _ = make(0, 10, 2, 3)
    none = torch.zeros(4, dtype=torch.int64)

    def scorer(pool: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        scores = torch.zeros(pool.numel())
        scores[-1] = value
        return lambda some: scores.expand(len(some), -1).clone()

    with pytest.raises(HstuXdError, match=r"not finite"):
        target_ranks(users, targets, none[:0], none, items.catalog, scorer)


def test_an_evaluation_prepares_the_items_of_a_domain_once(tmp_path: Path) -> None:
    """In batches of any size, whose ranks are those of one batch."""
    sizes = SynthOptions(users=30, domains=3, items_per_domain=20, mean_length=12)
    synthesize(tmp_path / "store", sizes)
    store = InteractionStore.open(tmp_path / "store")
    data = SequenceData(store, Split.TEST, 10)
    model = CrossDomainHSTU(store.catalog, EncoderSettings(num_domains=3, norm_length=10))
    prepared: list[torch.Tensor] = []

    def scorer(pool: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        prepared.append(pool)
        return DotProduct(model.item_vectors)(pool)

    found = rank_targets(model, data, data.users, scorer=scorer, batch_size=4)
    domains = [store.catalog.items_of(domain).tolist() for domain in range(3)]
    assert sorted(pool.tolist() for pool in prepared) == sorted(domains)
    whole = rank_targets(model, data, data.users, batch_size=data.users.size)
    assert torch.equal(found.ranks, whole.ranks)
