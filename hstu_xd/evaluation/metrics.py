"""HR, NDCG and MRR of ranks, overall, per domain, and for targets after a domain switch or not."""

from collections.abc import Sequence

import torch
from torch import Tensor

METRICS = ("hr@1", "hr@10", "hr@100", "ndcg@10", "ndcg@100", "mrr")


def user_metrics(ranks: Tensor) -> dict[str, Tensor]:
    """Metrics of each rank by itself, as fractions in 0..1.

    ``hr@k`` is 1 where the rank is at most k, ``ndcg@k`` is ``1 / log2(rank + 1)`` there (one
    relevant item a query), both 0 elsewhere; ``mrr`` is ``1 / rank``.

    Args:
        ranks: (Q,) int64 from 1.

    Returns:
        (Q,) float64 for every name of :data:`METRICS`.
    """
    rank = ranks.double()
    gain = 1 / torch.log2(rank + 1)
    values = {f"hr@{k}": (rank <= k).double() for k in (1, 10, 100)}
    values |= {f"ndcg@{k}": gain * (rank <= k) for k in (10, 100)}
    return values | {"mrr": 1 / rank}


def ranking_metrics(ranks: Tensor) -> dict[str, float]:
    """Means of :func:`user_metrics` over one set of ranks.

    Args:
        ranks: (Q,) int64 from 1, Q at least 1.
    """
    return {name: float(values.mean()) for name, values in user_metrics(ranks).items()}


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
    ranks: Tensor, domains: Tensor, switched: Tensor, domain_names: Sequence[str]
) -> dict[str, float]:
    """Metrics overall (``name``), per domain (``name[domain]``), and for switch and stay targets.

    Args:
        ranks: (Q,) int64 from 1.
        domains: (Q,) int64, domain of each target.
        switched: (Q,) bool, the target's domain differs from that of the event before it.
        domain_names: names by domain id.

    Returns:
        Every metric of :data:`METRICS` and ``count`` for each group that has a target.
    """
    values: dict[str, float] = {}
    for suffix, members in target_groups(domains, switched, domain_names).items():
        values |= {f"{k}{suffix}": v for k, v in ranking_metrics(ranks[members]).items()}
        values[f"count{suffix}"] = int(members.sum())
    return values
