"""HR, NDCG and MRR of ranks, overall, per domain, and for targets after a domain switch or not."""

from collections.abc import Sequence

import torch
from torch import Tensor

METRICS = ("hr@1", "hr@10", "hr@100", "ndcg@10", "ndcg@100", "mrr")


def ranking_metrics(ranks: Tensor) -> dict[str, float]:
    """Metrics of one set of ranks, as fractions in 0..1.

    ``hr@k`` is the share of ranks at most k, ``ndcg@k`` the mean of ``1 / log2(rank + 1)`` over
    those (one relevant item a query), ``mrr`` the mean of ``1 / rank``.

    Args:
        ranks: (Q,) int64 from 1, Q at least 1.
    """
    rank = ranks.double()
    gain = 1 / torch.log2(rank + 1)
    values = {f"hr@{k}": (rank <= k).double().mean() for k in (1, 10, 100)}
    values |= {f"ndcg@{k}": (gain * (rank <= k)).mean() for k in (10, 100)}
    values["mrr"] = (1 / rank).mean()
    return {name: float(value) for name, value in values.items()}


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
    groups = {"": torch.ones_like(switched), "[switch]": switched, "[stay]": ~switched}
    groups |= {f"[{name}]": domains == i for i, name in enumerate(domain_names)}
    values: dict[str, float] = {}
    for suffix, members in groups.items():
        if bool(members.any()):
            values |= {f"{k}{suffix}": v for k, v in ranking_metrics(ranks[members]).items()}
            values[f"count{suffix}"] = int(members.sum())
    return values
