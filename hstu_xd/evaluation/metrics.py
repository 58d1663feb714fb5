"""HR, NDCG and MRR of ranks, overall, per domain, and for targets after a domain switch or not."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hstu_xd.errors import InputError

# The rank of a target that is no candidate: every metric counts it as a miss.
UNREACHABLE = torch.iinfo(torch.int64).max

METRICS = ("hr@1", "hr@10", "hr@100", "ndcg@10", "ndcg@100", "mrr")

# Further functions of (Q,) ranks by name, each to (Q,) numbers.
Metrics = Mapping[str, Callable[[Tensor], Tensor]]


def user_metrics(ranks: Tensor, more: Metrics | None = None) -> dict[str, Tensor]:
    """Compute metrics of each rank by itself, as fractions in 0..1.

    ``hr@k`` is 1 where the rank is at most k, ``ndcg@k`` is ``1 / log2(rank + 1)`` there (one
    relevant item a query), both 0 elsewhere; ``mrr`` is ``1 / rank``. All are 0 for a target
    without a rank.

    Args:
        ranks: (Q,) int64 from 1, or :data:`UNREACHABLE`.
        more: further metrics, beside those of :data:`METRICS`.

    Returns:
        (Q,) float64 for every name.

    Raises:
        InputError: one of the further metrics does not return a number for each rank.
    """
    rank = ranks.double().masked_fill(ranks == UNREACHABLE, torch.inf)
    gain = 1 / torch.log2(rank + 1)
    values = {f"hr@{k}": (rank <= k).double() for k in (1, 10, 100)}
    values |= {f"ndcg@{k}": gain * (rank <= k) for k in (10, 100)}
    values |= {"mrr": 1 / rank}
    return values | {
        name: _numbers(name, metric(ranks), ranks) for name, metric in (more or {}).items()
    }


def _numbers(name: str, found: object, ranks: Tensor) -> Tensor:
    """Return what a user's metric returned as float64, or say what is wrong with it."""
    if isinstance(found, Tensor) and found.shape == ranks.shape and not found.is_complex():
        return found.detach().to(ranks.device, torch.float64)
    given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.40}"
    raise InputError(
        f"the metric {name} returned {given} for {len(ranks)} ranks; a tensor of shape "
        f"{tuple(ranks.shape)} is needed, a number for each rank: 1 / ranks, (ranks <= 5).double()"
    )


def ranking_metrics(ranks: Tensor, more: Metrics | None = None) -> dict[str, float]:
    """Take the means of :func:`user_metrics` over one set of ranks.

    Args:
        ranks: (Q,) int64 from 1, Q at least 1.
        more: further metrics.
    """
    return {name: float(values.mean()) for name, values in user_metrics(ranks, more).items()}


def target_groups(
    domains: Tensor, switched: Tensor, domain_names: Sequence[str]
) -> dict[str, Tensor]:
    """Which targets count to what: "" all, "[switch]", "[stay]" and "[domain]" of each name.

    Args:
        domains: (Q,) int64, domain of each target.
        switched: (Q,) bool, the target's domain differs from that of the event before it.
        domain_names: names by domain id.

    Returns:
        (Q,) bool for every group that has a target.
    """
    groups = {"": torch.ones_like(switched), "[switch]": switched, "[stay]": ~switched}
    groups |= {f"[{name}]": domains == i for i, name in enumerate(domain_names)}
    return {suffix: members for suffix, members in groups.items() if bool(members.any())}


def grouped_metrics(
    ranks: Tensor,
    domains: Tensor,
    switched: Tensor,
    domain_names: Sequence[str],
    more: Metrics | None = None,
) -> dict[str, float]:
    """Take metrics overall (``name``), a domain (``name[domain]``), of switch and stay targets.

    Args:
        ranks: (Q,) int64 from 1.
        domains: (Q,) int64, domain of each target.
        switched: (Q,) bool, the target's domain differs from that of the event before it.
        domain_names: names by domain id.
        more: further metrics.

    Returns:
        Every metric and ``count`` for each group that has a target; ``count_unreachable`` where
        there are targets without a rank.
    """
    values: dict[str, float] = {}
    for suffix, members in target_groups(domains, switched, domain_names).items():
        values |= {f"{k}{suffix}": v for k, v in ranking_metrics(ranks[members], more).items()}
        values[f"count{suffix}"] = int(members.sum())
        if unreachable := int((ranks[members] == UNREACHABLE).sum()):
            values[f"count_unreachable{suffix}"] = unreachable
    return values
