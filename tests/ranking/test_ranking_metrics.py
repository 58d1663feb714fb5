"""Metrics of ranking against their definitions, ties and undefined ones included."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.evaluation.ranking import (
    ScoredRows,
    defined,
    grouped_ranking_metrics,
    ranking_metrics,
)


def rows_of(scores: list[float], labels: list[int], users: list[int]) -> ScoredRows:
    return ScoredRows(
        np.array(scores), np.array(labels, np.float32), np.array(users), np.array(users)
    )


def auc_by_pairs(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Count pairs of a positive and a negative; equal scores count half."""
    differences = scores[labels > 0][:, None] - scores[labels == 0]
    return float(((np.sign(differences) + 1) / 2).mean()) if differences.size else None


ROWS = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.integers(0, 1), st.integers(0, 4)),
    min_size=1,
    max_size=40,
)


@given(ROWS)
def test_equals_the_definition(drawn: list[tuple[float, int, int]]) -> None:
    drawn = sorted(drawn, key=lambda row: row[2])
    rows = rows_of(*map(list, zip(*drawn, strict=True)))
    found = ranking_metrics(rows)
    users = [rows.where(rows.users == user) for user in np.unique(rows.users)]
    by_user = [auc_by_pairs(each.scores, each.labels) for each in users]
    both = [(auc, len(each.scores)) for auc, each in zip(by_user, users) if auc is not None]
    assert found["auc"] == pytest.approx(auc_by_pairs(rows.scores, rows.labels))
    assert found["users"] == len(both)
    if both:
        assert found["gauc"] == pytest.approx(np.mean([auc for auc, _ in both]))
        assert found["gauc_by_rows"] == pytest.approx(
            np.average([auc for auc, _ in both], weights=[n for _, n in both])
        )
    else:
        assert found["gauc"] is None
    ndcg, mrr = [], []
    for each in users:
        # The middle of the places that rows of one score share.
        ranks = [
            (each.scores > score).sum() + ((each.scores == score).sum() + 1) / 2
            for score in each.scores[each.labels > 0]
        ]
        if ranks:
            ideal = sum(1 / np.log2(n + 2) for n in range(min(len(ranks), 10)))
            ndcg.append(sum(1 / np.log2(r + 1) for r in ranks if r <= 10) / ideal)
            mrr.append(1 / min(ranks))
    assert found["ndcg@10"] == (pytest.approx(np.mean(ndcg)) if ndcg else None)
    assert found["mrr"] == (pytest.approx(np.mean(mrr)) if mrr else None)
    losses = [-np.log(s if label else 1 - s) for s, label, _ in drawn]
    assert found["logloss"] == pytest.approx(np.mean(losses))


def test_equal_scores_are_worth_half() -> None:
    found = ranking_metrics(rows_of([0.3] * 4, [1, 0, 1, 0], [0, 0, 1, 1]))
    assert (found["auc"], found["gauc"]) == (0.5, 0.5)
    assert found["calibration"] == pytest.approx(0.6)
    assert found["mrr"] == pytest.approx(1 / 1.5)


def test_one_class_is_undefined_and_never_half() -> None:
    found = ranking_metrics(rows_of([0.3, 0.4], [0, 0], [0, 0]))
    assert [found[name] for name in ("auc", "gauc", "calibration", "ndcg@10", "mrr")] == [None] * 5
    assert (found["rows"], found["positives"], found["users"]) == (2, 0, 0)
    assert {"logloss", "rows"} <= set(defined(found))
    assert not {"auc", "gauc"} & set(defined(found))


def test_users_of_one_class_are_left_out_of_gauc() -> None:
    found = ranking_metrics(rows_of([0.9, 0.1, 0.5, 0.6], [1, 0, 1, 1], [0, 0, 1, 1]))
    assert (found["gauc"], found["users"]) == (1.0, 1)


def test_groups_are_named() -> None:
    rows = rows_of([0.9, 0.1, 0.5, 0.6], [1, 0, 0, 1], [0, 0, 1, 1])
    groups = [(("a", "b", "empty"), np.array([0, 0, 1, 1])), (("new",), np.array([-1, -1, 0, -1]))]
    found = grouped_ranking_metrics(rows, groups)
    assert (found["auc[a]"], found["auc[b]"]) == (1.0, 1.0)
    assert found["rows[new]"] == 1
    assert found["auc[new]"] is None
    assert (found["rows[empty]"], found["logloss[empty]"]) == (0, None)
