"""Evaluate a model on one split of a store."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu_xd.data.batches import SequenceData
from hstu_xd.evaluation.metrics import grouped_metrics
from hstu_xd.evaluation.ranking import dot_product_scorer, target_ranks
from hstu_xd.model import CrossDomainHSTU


@dataclass(frozen=True)
class RankedTargets:
    """One entry a user: (Q,) rank from 1, (Q,) domain of the target, (Q,) whether it switched."""

    ranks: Tensor
    domains: Tensor
    switched: Tensor


@torch.no_grad()
def rank_targets(
    model: CrossDomainHSTU,
    data: SequenceData,
    users: np.ndarray,
    *,
    batch_size: int = 256,
    progress: Callable[[int], object] = lambda users: None,
) -> RankedTargets:
    """Rank the users' last targets among their domains' unseen items.

    Args:
        model: put into evaluation mode for the time of the call.
        data: the split.
        users: (Q,) user indices out of ``data.users``.
        batch_size: users encoded at once.
        progress: called with the number of users done after every batch.
    """
    was_training = model.training
    model.eval()
    device = model.catalog.item_domains.device
    ranks, domains, switched = [], [], []
    for start in range(0, users.size, batch_size):
        some = users[start : start + batch_size]
        batch, targets = data.batch(some)
        seen_ids, seen_offsets = data.seen(some)
        batch, targets = batch.to(device), targets.to(device)
        last = batch.offsets[1:] - 1
        vectors = model(batch)[last]
        ranks.append(
            target_ranks(
                vectors,
                targets[last],
                seen_ids.to(device),
                seen_offsets.to(device),
                model.catalog,
                dot_product_scorer(model.item_vectors),
            )
        )
        domains.append(batch.target_domains[last])
        switched.append(model.catalog.domain_of(batch.item_ids[last]) != domains[-1])
        progress(some.size)
    model.train(was_training)
    return RankedTargets(torch.cat(ranks), torch.cat(domains), torch.cat(switched))


def evaluate(
    model: CrossDomainHSTU,
    data: SequenceData,
    *,
    batch_size: int = 256,
    progress: Callable[[int], object] = lambda users: None,
) -> dict[str, float]:
    """Metrics of a whole split, see :func:`hstu_xd.evaluation.metrics.grouped_metrics`."""
    ranked = rank_targets(model, data, data.users, batch_size=batch_size, progress=progress)
    return grouped_metrics(
        ranked.ranks, ranked.domains, ranked.switched, model.catalog.domain_names
    )
