"""Differences between models on the same targets, with the error that drawing the users makes.

Which users are easy and which are hard is the same for both models, so it cancels: the error of the
difference is below that of two metrics taken apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.evaluation.metrics import Metrics, target_groups, user_metrics


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
    base: Sequence[Tensor],
    other: Sequence[Tensor],
    domains: Tensor,
    switched: Tensor,
    domain_names: Sequence[str],
    more: Metrics | None = None,
) -> dict[str, Difference]:
    """Metrics of one model minus those of another, a user's mean over seeds first.

    The error says how far the difference would move with other users; that of other seeds is not
    in it, but for what they do to each user alone.

    Args:
        base: (Q,) int64 ranks from 1 for each seed of one model.
        other: the same of the other model; as many seeds or not.
        domains: (Q,) int64, domain of each target.
        switched: (Q,) bool, the target's domain differs from that of the event before it.
        domain_names: names by domain id.
        more: further metrics that both models are measured by.

    Returns:
        Names as :func:`hstu_xd.evaluation.metrics.grouped_metrics` has them.
    """
    found, of_base = _over_seeds(other, more), _over_seeds(base, more)
    differences = {name: found[name] - of_base[name] for name in found}
    return {
        f"{name}{suffix}": _difference(values[members])
        for suffix, members in target_groups(domains, switched, domain_names).items()
        for name, values in differences.items()
    }


def _over_seeds(ranks: Sequence[Tensor], more: Metrics | None) -> dict[str, Tensor]:
    each = [user_metrics(one, more) for one in ranks]
    return {name: torch.stack([values[name] for values in each]).mean(0) for name in each[0]}


def _difference(values: Tensor) -> Difference:
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else None
    return Difference(float(values.mean()), error, count)
