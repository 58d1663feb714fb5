"""How well candidates of requests are ranked: all together, within users, and within requests.

A metric that is not defined, such as the AUC of rows of one class, is None, never a number that
looks like one. Equal scores count half, everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

METRICS = ("auc", "gauc", "logloss", "ndcg@10", "mrr")
Values = dict[str, float | int | None]
_CUT = 10
_SMALLEST = 1e-7


@dataclass(frozen=True)
class ScoredRows:
    """Candidates with what a model thinks of them; those of a request stand side by side.

    Attributes:
        scores: (Q,) float64, chances that they are taken, in 0..1.
        labels: (Q,) 1 where they were.
        requests: (Q,) int64, ascending number of the request.
        users: (Q,) int64.
    """

    scores: NDArray[np.float64]
    labels: NDArray[np.float32]
    requests: NDArray[np.int64]
    users: NDArray[np.int64]

    def where(self, mask: NDArray[np.bool_]) -> "ScoredRows":
        """Return some of the rows."""
        return ScoredRows(
            self.scores[mask], self.labels[mask], self.requests[mask], self.users[mask]
        )


def middle_ranks(scores: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rank scores within groups, lowest first and from 1; equal scores share the middle rank.

    Example:
        >>> middle_ranks(np.array([0.5, 0.2, 0.5, 0.9]), np.zeros(4, np.int64))
        array([2.5, 1. , 2.5, 4. ])
    """
    order = np.lexsort((scores, groups))
    new_group = np.ones(len(order), np.bool_)
    new_group[1:] = groups[order][1:] != groups[order][:-1]
    new_score = new_group.copy()
    new_score[1:] |= scores[order][1:] != scores[order][:-1]
    places = np.arange(len(order))
    starts = np.flatnonzero(new_score)
    sizes = np.diff(np.append(starts, len(order)))
    first_of_group = np.maximum.accumulate(np.where(new_group, places, 0))
    middle = np.repeat(starts + (sizes - 1) / 2, sizes) - first_of_group + 1
    ranks = np.empty(len(order))
    ranks[order] = middle
    return ranks


def grouped_auc(
    scores: NDArray[np.float64], labels: NDArray[np.float32], groups: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Compute the AUC of each group that has rows of both classes.

    Returns:
        The groups (G,), their AUC (G,), and their numbers of rows (G,).
    """
    names, place = np.unique(groups, return_inverse=True)
    ranks = middle_ranks(scores, place)
    rows = np.bincount(place, minlength=len(names))
    positives = np.bincount(place, weights=labels, minlength=len(names))
    sums = np.bincount(place, weights=ranks * labels, minlength=len(names))
    negatives = rows - positives
    both = (positives > 0) & (negatives > 0)
    wins = sums - positives * (positives + 1) / 2
    return names[both], wins[both] / (positives * negatives)[both], rows[both]


def ranking_metrics(rows: ScoredRows) -> Values:
    """Compute every metric of some rows.

    ``gauc`` is the mean over users with rows of both classes, ``gauc_by_rows`` weighs them by their
    rows, ``calibration`` is the mean chance over the share of positives. NDCG@10 and MRR are means
    over requests with a positive; a tie takes the middle rank.

    Args:
        rows: candidates and scores.

    Returns:
        The metrics, and how many rows, positives, users of both classes and requests they rest on.
    """
    count, positives = len(rows.scores), float(rows.labels.sum())
    _, overall, _ = grouped_auc(rows.scores, rows.labels, np.zeros(count, np.int64))
    _, by_user, weights = grouped_auc(rows.scores, rows.labels, rows.users)
    ndcg, mrr = _within_requests(rows)
    chance = np.clip(rows.scores, _SMALLEST, 1 - _SMALLEST)
    loss = -np.where(rows.labels > 0, np.log(chance), np.log1p(-chance))
    return {
        "auc": _mean(overall),
        "gauc": _mean(by_user),
        "gauc_by_rows": float(np.average(by_user, weights=weights)) if len(by_user) else None,
        "logloss": _mean(loss),
        "calibration": float(rows.scores.sum() / positives) if positives else None,
        "ndcg@10": _mean(ndcg),
        "mrr": _mean(mrr),
        "rows": count,
        "positives": int(positives),
        "users": len(by_user),
        "requests": len(ndcg),
    }


def grouped_ranking_metrics(
    rows: ScoredRows, groupings: Sequence[tuple[Sequence[str], NDArray[np.int64]]]
) -> Values:
    """Compute every metric of all rows, and as ``auc[name]`` of groups of them.

    Args:
        rows: candidates and scores.
        groupings: names of groups, and of each row the place of its group there; -1: in none.
    """
    found = ranking_metrics(rows)
    for names, places in groupings:
        for place, name in enumerate(names):
            part = ranking_metrics(rows.where(places == place))
            found |= {f"{metric}[{name}]": value for metric, value in part.items()}
    return found


def defined(values: Mapping[str, float | int | None]) -> dict[str, float]:
    """Leave out the metrics that are not defined."""
    return {name: value for name, value in values.items() if value is not None}


def _within_requests(rows: ScoredRows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return NDCG@10 and the reciprocal rank of the first positive, of requests with one."""
    _, place = np.unique(rows.requests, return_inverse=True)
    ranks = middle_ranks(-rows.scores, place)
    taken = rows.labels > 0
    gains = np.where(taken & (ranks <= _CUT), 1 / np.log2(ranks + 1), 0.0)
    count = int(place.max(initial=-1)) + 1
    gained = np.bincount(place, weights=gains, minlength=count)
    positives = np.bincount(place, weights=taken, minlength=count).astype(np.int64)
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(1, _CUT + 1) + 1))])
    best = np.full(count, np.inf)
    np.minimum.at(best, place[taken], ranks[taken])
    asked = positives > 0
    ndcg = gained[asked] / ideal[np.minimum(positives[asked], _CUT)]
    return ndcg, 1 / best[asked]


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None
