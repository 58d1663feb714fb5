"""Ranks and metrics against a count by hand."""

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import HstuXdError
from hstu_xd.evaluation.metrics import (
    UNREACHABLE,
    RankedTargets,
    grouped_metrics,
    sampled_ranks,
    user_metrics,
)
from hstu_xd.evaluation.protocol import METRICS, Protocol, measured_notes
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


def rank_by_hand(
    items: Items, user: torch.Tensor, target: int, seen: list[int], protocol: Protocol
) -> tuple[int, int]:
    """Rank, and number of other candidates."""
    domains = items.catalog.item_domains.tolist()
    score = [float(user @ vector) for vector in items._vectors]
    others = [
        score[item]
        for item in set(range(1, len(domains))) - {target, *seen}
        if protocol.candidates == "all" or domains[item] == domains[target]
    ]
    tied = sum(other == score[target] for other in others) * (protocol.ties == "against")
    rank = 1 + sum(other > score[target] for other in others) + tied
    return UNREACHABLE if target in seen else rank, len(others)


@given(
    seed=st.integers(0, 10**6),
    num_items=st.integers(1, 40),
    num_domains=st.integers(1, 4),
    queries=st.integers(1, 12),
    block=st.sampled_from([1, 17, 10**6]),
    candidates=st.sampled_from(["domain", "all", 3]),
    ties=st.sampled_from(["against", "favour"]),
)
def test_rank_counts_unseen_candidates_and_ties_as_the_protocol_says(
    seed: int,
    num_items: int,
    num_domains: int,
    queries: int,
    block: int,
    candidates: str | int,
    ties: str,
) -> None:
    protocol = Protocol(candidates=candidates, ties=ties)
    items, users, targets, seen = make(seed, num_items, num_domains, queries)
    offsets = torch.tensor([0] + [len(s) for s in seen]).cumsum(0)
    flat = torch.tensor([item for s in seen for item in s], dtype=torch.int64)
    scorer = DotProduct(items.item_vectors)
    ranks, others = target_ranks(
        users,
        targets,
        flat,
        offsets,
        items.catalog,
        scorer,
        protocol=protocol,
        block_scores=block,
    )
    expected = [
        rank_by_hand(items, users[i], int(targets[i]), seen[i], protocol) for i in range(queries)
    ]
    assert list(zip(ranks.tolist(), others.tolist())) == expected


def ranked_targets(
    ranks: list[int],
    domains: list[int] | None = None,
    switched: list[bool] | None = None,
    others: list[int] | None = None,
) -> RankedTargets:
    """Targets of domain 0 that stay, with plenty of candidates, unless told otherwise."""
    zeros = [0] * len(ranks)
    return RankedTargets(
        torch.tensor(ranks),
        torch.tensor(domains or zeros),
        torch.tensor(switched or zeros).bool(),
        torch.tensor(others or [10_000] * len(ranks)),
    )


@given(st.lists(st.integers(1, 300), min_size=1, max_size=50))
def test_metrics_equal_their_definitions(ranks: list[int]) -> None:
    values = {k: float(v.mean()) for k, v in user_metrics(ranked_targets(ranks)).items()}
    assert tuple(values) == METRICS
    n = len(ranks)
    for k in (1, 10, 100):
        assert values[f"hr@{k}"] == pytest.approx(sum(r <= k for r in ranks) / n)
    for k in (10, 100):
        gains = [1 / math.log2(r + 1) for r in ranks if r <= k]
        assert values[f"ndcg@{k}"] == pytest.approx(sum(gains) / n)
    assert values["mrr"] == pytest.approx(sum(1 / r for r in ranks) / n)


def test_groups_are_separate_and_empty_ones_absent() -> None:
    ranked = ranked_targets([1, 200, 5], [0, 0, 2], [True, False, True])
    values = grouped_metrics(ranked, ["a", "b", "c"])
    assert set(METRICS) <= set(values)
    assert values["hr@10[a]"] == 0.5
    assert values["hr@10[c]"] == 1.0
    assert values["hr@10[switch]"] == 1.0
    assert values["hr@10[stay]"] == 0.0
    assert values["count"] == 3
    assert values["count[switch]"] == 2
    assert not any(name.endswith("[b]") for name in values)


def test_a_target_without_a_rank_is_a_miss_and_counted() -> None:
    ranked = ranked_targets(
        [1, UNREACHABLE, UNREACHABLE, 4], [0, 0, 1, 2], [True, False, True, True]
    )
    values = grouped_metrics(ranked, ["a", "b", "c"])
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


@given(others=st.integers(0, 9), num_sampled=st.integers(1, 11), data=st.data())
def test_expected_metrics_are_the_mean_over_all_samples(
    others: int, num_sampled: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, others + 1))
    ranked = ranked_targets([rank, UNREACHABLE], others=[others, 4])
    protocol = Protocol(candidates=num_sampled, ks=(1, 2, 5))
    own = {"twice": lambda ranks: 2.0 / ranks}
    found = user_metrics(ranked, protocol, own)
    samples = list(combinations(range(1, others + 1), min(num_sampled, others)))
    ranks = [1 + sum(place < rank for place in sample) for sample in samples]
    every = user_metrics(ranked_targets(ranks), Protocol(ks=(1, 2, 5)), own)
    assert found.keys() == every.keys()
    for name, values in found.items():
        assert float(values[0]) == pytest.approx(float(every[name].mean()), abs=1e-12)
        assert name == "twice" or float(values[1]) == 0


def test_a_sample_of_all_others_is_the_full_ranking() -> None:
    ranked = ranked_targets([1, 7, 40, UNREACHABLE], others=[49, 12, 49, 49])
    for name, values in user_metrics(ranked, Protocol(candidates=49)).items():
        full = user_metrics(ranked)[name]
        assert torch.allclose(values, full, rtol=1e-10, atol=0), name


def test_expected_metrics_of_a_large_catalogue_are_those_of_many_samples() -> None:
    rank, others, num_sampled = 401, 100_000, 999
    shares = sampled_ranks(torch.tensor([rank]), torch.tensor([others]), num_sampled)[0]
    assert float(shares.sum()) == pytest.approx(1, abs=1e-12)
    drawn = np.random.default_rng(0).hypergeometric(rank - 1, others - rank + 1, num_sampled, 10**6)
    for k in (0, 1, 5, 10):
        assert float(shares[: k + 1].sum()) == pytest.approx((drawn <= k).mean(), abs=3e-3)


def test_users_in_blocks_have_the_same_expectations(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = torch.randint(1, 300, (40,), generator=torch.Generator().manual_seed(0))
    ranked = ranked_targets(ranks.tolist(), others=[500] * 40)
    whole = user_metrics(ranked, Protocol(candidates=99))
    monkeypatch.setattr("hstu_xd.evaluation.metrics._BLOCK_SHARES", 300)
    for name, values in user_metrics(ranked, Protocol(candidates=99)).items():
        assert torch.allclose(values, whole[name], rtol=1e-12), name


def test_targets_with_few_candidates_are_counted_and_left_out() -> None:
    ranked = ranked_targets([1, 1, 30, UNREACHABLE], [0, 0, 1, 0], others=[0, 9, 500, 0])
    values = grouped_metrics(ranked, ["a", "b"])
    assert {k: v for k, v in values.items() if "trivial@" in k} == {
        "count_trivial@1": 1,
        "count_trivial@10": 2,
        "count_trivial@100": 2,
    }
    assert values["hr@100"] == 3 / 4
    assert values["hr@1[nontrivial]"] == 1 / 3
    assert values["hr@10[nontrivial]"] == 0
    assert values["hr@100[macro]"] == (2 / 3 + 1) / 2
    assert "@1 1, @10 2, @100 2" in " ".join(measured_notes(Protocol(), values))
    plenty = grouped_metrics(ranked_targets([1, 2]), ["a", "b"])
    assert not any("trivial" in name or "macro" in name for name in plenty)
    few = grouped_metrics(ranked_targets([1, 2]), ["a"], Protocol(candidates=9))
    assert few["count_trivial@10"] == 2


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
