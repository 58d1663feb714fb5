"""How well candidates of requests are ranked: all together, within users, and within requests.

A metric that is not defined, such as the AUC of rows of one class, is None, never a number that
looks like one. Equal scores count half, everywhere.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

METRICS = ("auc", "gauc", "logloss", "ndcg@10", "mrr")
Values = dict[str, float | int | None]
# Names of groups, and of each row the place of its group there; -1: in none.
Grouping = tuple[Sequence[str], NDArray[np.int64]]
# Groups of candidates beside those of goals and domains: quarters of the history's length, and
# candidates that no training event has.
QUARTERS, UNSEEN = ("shortest", "short", "long", "longest"), "unseen"
_CUT = 10
_SMALLEST = 1e-7


@dataclass(frozen=True)
class RankingProtocol:
    """Which metrics of ranking runs tables show, and what they mean.

    The counterpart of :class:`hstu_xd.evaluation.protocol.Protocol`, without a setting: requests
    name their candidates.

    Attributes:
        metrics: all of them.
        headlines: those that matter most, of which all but the last are drawn by group.
        main_metrics: those that tell variants apart at a glance, shares all of them.
    """

    metrics: ClassVar = (*METRICS[:3], "calibration", *METRICS[3:])
    headlines: ClassVar = ("gauc", "auc", "ndcg@10")
    main_metrics: ClassVar = ("auc", "gauc", "ndcg@10", "mrr")

    def columns(self, measured: Collection[str]) -> tuple[str, ...]:
        """Return the names of the columns of a table of variants, whatever was measured."""
        return self.metrics

    def sentences(self) -> Iterator[str]:
        """Say in words what the numbers of a table mean."""
        yield (
            "Candidates are those of the requests; equal scores count half. GAUC is the mean of "
            "the users' own AUC, over users with candidates that were taken and others that were "
            "not; NDCG@10 and MRR are means over requests with one that was taken."
        )
        yield (
            "The log loss is better the smaller it is; calibration is the mean chance over the "
            "share that was taken, and best at 1."
        )


def history_group(quarter: str) -> str:
    """Name the group of one of :data:`QUARTERS`."""
    return f"history {quarter}"


def undefined_notes(values: Mapping[str, float | int | None]) -> list[str]:
    """Say of which groups no AUC is defined; nothing where it is of all."""
    names = [name for name, value in values.items() if value is None and name.startswith("auc")]
    groups = [name.removeprefix("auc").strip("[]") or "all" for name in names]
    if not groups:
        return []
    return [f"No AUC, as the candidates there are none or of one class: {', '.join(groups)}."]


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
    ratios = _ratios(rows)
    return {
        "auc": _auc(rows),
        **{name: ratio.value for name, ratio in ratios.items()},
        "rows": len(rows.scores),
        "positives": int(rows.labels.sum()),
        "users": len(ratios["gauc"].users),
        "requests": len(ratios["mrr"].users),
    }


@dataclass(frozen=True)
class Estimate:
    """A metric, and how much each user moves it.

    Attributes:
        value: of the metric.
        users: (U,) int64, those that it rests on, ascending.
        influence: (U,) float64, with a sum of 0: by how much the metric is larger, to first order,
            than one of other users in the place of each.
    """

    value: float
    users: NDArray[np.int64]
    influence: NDArray[np.float64]


def ranking_estimates(rows: ScoredRows) -> dict[str, Estimate]:
    """Compute every metric that is defined, as :func:`ranking_metrics` does, with its influences.

    That of a mean or a ratio is its linearisation, that of the AUC the components of DeLong et al.
    (1988), summed over the rows of a user as Obuchowski (1997) does for clusters.
    """
    found = {name: _ratio_estimate(ratio) for name, ratio in _ratios(rows).items()}
    return {
        name: each
        for name, each in {"auc": _auc_estimate(rows), **found}.items()
        if each is not None
    }


class _Ratio(NamedTuple):
    """A metric as one sum over another: of users, rows or requests, each with its user."""

    above: NDArray[np.float64]
    below: NDArray[np.float64]
    users: NDArray[np.int64]

    @property
    def value(self) -> float | None:
        whole = self.below.sum()
        return float(self.above.sum() / whole) if whole else None


def _ratios(rows: ScoredRows) -> dict[str, _Ratio]:
    users, aucs, weights = grouped_auc(rows.scores, rows.labels, rows.users)
    ndcg, mrr, askers = _within_requests(rows)
    chance = np.clip(rows.scores, _SMALLEST, 1 - _SMALLEST)
    loss = -np.where(rows.labels > 0, np.log(chance), np.log1p(-chance))
    one, labels = np.ones_like, rows.labels.astype(np.float64)
    return {
        "gauc": _Ratio(aucs, one(aucs), users),
        "gauc_by_rows": _Ratio(aucs * weights, weights.astype(np.float64), users),
        "logloss": _Ratio(loss, one(loss), rows.users),
        "calibration": _Ratio(rows.scores, labels, rows.users),
        "ndcg@10": _Ratio(ndcg, one(ndcg), askers),
        "mrr": _Ratio(mrr, one(mrr), askers),
    }


def _ratio_estimate(ratio: _Ratio) -> Estimate | None:
    if (value := ratio.value) is None:
        return None
    parts = (ratio.above - value * ratio.below) / ratio.below.sum()
    return Estimate(value, *_summed_by_user(parts, ratio.users))


def _auc(rows: ScoredRows) -> float | None:
    _, found, _ = grouped_auc(rows.scores, rows.labels, np.zeros(len(rows.scores), np.int64))
    return float(found[0]) if len(found) else None


def _auc_estimate(rows: ScoredRows) -> Estimate | None:
    if (value := _auc(rows)) is None:
        return None
    taken = rows.labels > 0
    everywhere = middle_ranks(rows.scores, np.zeros(len(taken), np.int64))
    below = everywhere - middle_ranks(rows.scores, taken.astype(np.int64))
    positives, negatives = int(taken.sum()), int((~taken).sum())
    # Of a positive, the share of negatives that it is above; of a negative, of positives above it.
    wins = np.where(taken, below / negatives, 1 - below / positives)
    parts = (wins - value) / np.where(taken, positives, negatives)
    return Estimate(value, *_summed_by_user(parts, rows.users))


def _summed_by_user(
    values: NDArray[np.float64], users: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    names, place = np.unique(users, return_inverse=True)
    sums = np.bincount(place, weights=values, minlength=len(names))
    return names, sums.astype(np.float64)


def grouped_ranking_metrics(rows: ScoredRows, groupings: Sequence[Grouping]) -> Values:
    """Compute every metric of all rows, and as ``auc[name]`` of groups of them.

    Args:
        rows: candidates and scores.
        groupings: of the rows.
    """
    found: Values = {}
    for suffix, part in parts_of(rows, groupings):
        found |= {f"{metric}{suffix}": value for metric, value in ranking_metrics(part).items()}
    return found


def parts_of(rows: ScoredRows, groupings: Sequence[Grouping]) -> Iterator[tuple[str, ScoredRows]]:
    """Yield all rows under "", then those of each group under "[name]"."""
    yield "", rows
    for names, places in groupings:
        for place, name in enumerate(names):
            yield f"[{name}]", rows.where(places == place)


def defined(values: Mapping[str, float | int | None]) -> dict[str, float]:
    """Leave out the metrics that are not defined."""
    return {name: value for name, value in values.items() if value is not None}


def _within_requests(
    rows: ScoredRows,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return NDCG@10, reciprocal rank of the first positive, and user, of requests with one."""
    _, first, place = np.unique(rows.requests, return_index=True, return_inverse=True)
    ranks = middle_ranks(-rows.scores, place)
    taken = rows.labels > 0
    gains = np.where(taken & (ranks <= _CUT), 1 / np.log2(ranks + 1), 0.0)
    count = len(first)
    gained = np.bincount(place, weights=gains, minlength=count)
    positives = np.bincount(place, weights=taken, minlength=count).astype(np.int64)
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(1, _CUT + 1) + 1))])
    best = np.full(count, np.inf)
    np.minimum.at(best, place[taken], ranks[taken])
    asked = positives > 0
    ndcg = gained[asked] / ideal[np.minimum(positives[asked], _CUT)]
    return ndcg, 1 / best[asked], rows.users[first[asked]]
