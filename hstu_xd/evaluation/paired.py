"""Differences of two models on the same held-out events, user by user, with standard errors.

Which users are easy and which are hard is the same for two models, so it cancels in the difference:
its error is below that of two metrics taken apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu_xd.evaluation.metrics import Metrics, RankedTargets, target_groups, user_metrics
from hstu_xd.evaluation.protocol import DEFAULTS, Protocol
from hstu_xd.evaluation.ranking import (
    Estimate,
    Grouping,
    ScoredRows,
    parts_of,
    ranking_estimates,
)


@dataclass(frozen=True)
class Difference:
    """Of one metric over one group of targets.

    Attributes:
        mean: difference of the metric, a fraction.
        standard_error: of that mean as a mean over users; None for a single one.
        count: users.
    """

    mean: float
    standard_error: float | None
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether it is more than 1.96 standard errors from zero: 95 % confidence."""
        return self.standard_error is not None and abs(self.mean) > 1.96 * self.standard_error


def paired_differences(
    base: Sequence[RankedTargets],
    other: Sequence[RankedTargets],
    domain_names: Sequence[str],
    protocol: Protocol = DEFAULTS,
    more: Metrics | None = None,
) -> dict[str, Difference]:
    """Metrics of one model minus those of another, a user's mean over seeds first.

    The error says how far the difference would move with other users; that of other seeds is not
    in it, but for what they do to each user alone.

    Args:
        base: the users' targets as each seed of one model ranks them.
        other: the same of the other model; as many seeds or not.
        domain_names: names by domain id.
        protocol: which metrics.
        more: further metrics that both models are measured by.

    Returns:
        Names as :func:`hstu_xd.evaluation.metrics.grouped_metrics` has them.
    """
    domains, switched = base[0].domains, base[0].switched
    # Only models whose items have features tell cold targets apart, and one is enough; where some
    # were trained on more than others, those are cold that none has met.
    known = [one.cold for one in (*base, *other) if one.cold is not None]
    cold = torch.stack(known).all(0) if known else None
    groups = target_groups(domains, switched, domain_names, cold)
    return differences_by_group(base, other, groups, protocol, more)


def differences_by_group(
    base: Sequence[RankedTargets],
    other: Sequence[RankedTargets],
    groups: Mapping[str, Tensor],
    protocol: Protocol = DEFAULTS,
    more: Metrics | None = None,
) -> dict[str, Difference]:
    """Take paired differences over groups of targets, see :func:`paired_differences`.

    Args:
        base: the users' targets as each seed of one model ranks them.
        other: the same of the other model.
        groups: (Q,) bool of each suffix, who is in the group; at least one target each.
        protocol: which metrics.
        more: further metrics that both models are measured by.

    Returns:
        Names of metrics with the suffix of a group.
    """
    found, of_base = (mean_over_seeds(each, protocol, more) for each in (other, base))
    differences = {name: found[name] - of_base[name] for name in found}
    return {
        f"{name}{suffix}": _difference(values[members])
        for suffix, members in groups.items()
        for name, values in differences.items()
    }


def mean_over_seeds(
    ranked: Sequence[RankedTargets], protocol: Protocol = DEFAULTS, more: Metrics | None = None
) -> dict[str, Tensor]:
    """Take each target's metrics and their mean over the seeds of a model: (Q,) float64 each."""
    each = [user_metrics(one, protocol, more) for one in ranked]
    return {name: torch.stack([values[name] for values in each]).mean(0) for name in each[0]}


def _difference(values: Tensor) -> Difference:
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else None
    return Difference(float(values.mean()), error, count)


def paired_ranking_differences(
    base: Sequence[ScoredRows], other: Sequence[ScoredRows], groupings: Sequence[Grouping]
) -> dict[str, Difference]:
    """Metrics of one ranker minus those of another, each the mean over its seeds.

    The error is that of the users' influences on the difference, see
    :func:`hstu_xd.evaluation.ranking.ranking_estimates`: as for retrieval, other seeds are not in
    it, but for what they do to each user.

    Args:
        base: the candidates as each seed of one ranker scores them.
        other: the same candidates by the other one; as many seeds or not.
        groupings: of the candidates.

    Returns:
        Names as :func:`hstu_xd.evaluation.ranking.grouped_ranking_metrics` has them, without those
        of metrics that are not defined.
    """
    found: dict[str, Difference] = {}
    each = [[list(parts_of(rows, groupings)) for rows in rows_of] for rows_of in (base, other)]
    for place, (suffix, _) in enumerate(each[0][0]):
        of_base, of_other = ([ranking_estimates(p[place][1]) for p in seeds] for seeds in each)
        found |= {
            f"{name}{suffix}": _between([e[name] for e in of_base], [e[name] for e in of_other])
            for name in of_base[0]
        }
    return found


def _between(base: Sequence[Estimate], other: Sequence[Estimate]) -> Difference:
    """Take the difference of a metric; users are the same, as they do not depend on scores."""
    mean = float(np.mean([e.value for e in other]) - np.mean([e.value for e in base]))
    moves = np.mean([e.influence for e in other], 0) - np.mean([e.influence for e in base], 0)
    count = len(moves)
    error = math.sqrt(count / (count - 1) * float(moves @ moves)) if count > 1 else None
    return Difference(mean, error, count)
