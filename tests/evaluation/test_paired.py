"""Paired differences against a plain loop over users."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from hstu_xd.evaluation.metrics import RankedTargets, grouped_metrics
from hstu_xd.evaluation.paired import (
    Difference,
    differences_by_group,
    mean_over_seeds,
    paired_differences,
)
from hstu_xd.evaluation.protocol import METRICS, Protocol

NAMES = ("books", "films", "games")  # nobody's target is a game
DOMAINS = torch.tensor([0, 0, 1, 1, 0, 0])
SWITCHED = torch.tensor([True, False, True, False, False, True])


def targets(*ranks: int) -> RankedTargets:
    others = torch.full_like(DOMAINS, 1000)
    return RankedTargets(torch.tensor(ranks), DOMAINS, SWITCHED, others)


BASE = [targets(1, 12, 3, 150, 9, 40), targets(2, 8, 3, 90, 11, 41)]
OTHER = [targets(1, 10, 4, 99, 5, 400)]


def ndcg(rank: int) -> float:
    return 1 / math.log2(rank + 1) if rank <= 100 else 0.0


def test_a_users_mean_over_seeds_comes_first() -> None:
    found = paired_differences(BASE, OTHER, NAMES)
    each = [
        ndcg(int(OTHER[0].ranks[user]))
        - statistics.fmean(ndcg(int(seed.ranks[user])) for seed in BASE)
        for user in range(6)
    ]
    for suffix, members in {"": range(6), "[stay]": (1, 3, 4), "[films]": (2, 3)}.items():
        some = [each[user] for user in members]
        difference = found[f"ndcg@100{suffix}"]
        assert difference.mean == pytest.approx(statistics.fmean(some), rel=1e-12)
        error = statistics.stdev(some) / math.sqrt(len(some))
        assert difference.standard_error == pytest.approx(error, rel=1e-12)
        assert difference.count == len(some)


@pytest.mark.parametrize("protocol", [Protocol(), Protocol(candidates=99)])
def test_means_are_differences_of_what_evaluate_says(protocol: Protocol) -> None:
    found = paired_differences(BASE[:1], OTHER, NAMES, protocol)
    one, other = (grouped_metrics(r[0], NAMES, protocol) for r in (BASE, OTHER))
    assert found.keys() == {
        name for name in one if not name.startswith("count") and "[macro]" not in name
    }
    assert "mrr[games]" not in found
    assert set(METRICS) < found.keys()
    for name, difference in found.items():
        assert difference.mean == pytest.approx(other[name] - one[name], abs=1e-12)


def test_equal_models_and_single_users_are_never_clear() -> None:
    same = paired_differences(OTHER, OTHER, NAMES)["mrr"]
    assert (same.mean, same.standard_error, same.is_clear) == (0.0, 0.0, False)
    only = torch.tensor([0])
    ten, one = (RankedTargets(only + rank, only, only == 1, only + 50) for rank in (10, 1))
    alone = paired_differences([ten], [one], NAMES)["hr@1"]
    assert alone.mean == 1.0
    assert alone.standard_error is None
    assert not alone.is_clear


def test_clear_is_beyond_two_sided_95_percent() -> None:
    assert Difference(-0.2, 0.1, 9).is_clear
    assert not Difference(0.19, 0.1, 9).is_clear


def test_targets_that_one_model_knows_as_cold_are_told_apart_for_both() -> None:
    cold = torch.tensor([False, True, False, True, False, False])
    with_features = [replace(OTHER[0], cold=cold)]
    assert "mrr[cold]" not in paired_differences(BASE, OTHER, NAMES)
    for found in (
        paired_differences(BASE[:1], with_features, NAMES)["mrr[cold]"],
        paired_differences(with_features, BASE[:1], NAMES)["mrr[cold]"],
    ):
        assert found.count == 2
        assert abs(found.mean) == pytest.approx((1 / 10 - 1 / 12 + 1 / 99 - 1 / 150) / 2)


def test_groups_of_ones_own_are_compared_as_well() -> None:
    rare = torch.tensor([True, True, False, False, True, False])
    found = differences_by_group(BASE, OTHER, {"[rare]": rare})
    each = paired_differences(BASE, OTHER, NAMES)
    assert found.keys() == {f"{name}[rare]" for name in METRICS}
    assert found["mrr[rare]"].count == 3
    of_rare = mean_over_seeds(OTHER)["mrr"] - mean_over_seeds(BASE)["mrr"]
    assert found["mrr[rare]"].mean == pytest.approx(float(of_rare[rare].mean()), abs=1e-12)
    assert each["mrr"].mean == pytest.approx(float(of_rare.mean()), abs=1e-12)
