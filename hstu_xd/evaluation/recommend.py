"""Top items of one domain for one history."""

import numpy as np
import torch

from hstu_xd.model import CrossDomainHSTU


@torch.no_grad()
def recommend_items(
    model: CrossDomainHSTU,
    item_ids: np.ndarray,
    timestamps: np.ndarray,
    domain: int,
    k: int,
    *,
    window: int,
) -> list[tuple[int, float]]:
    """Best unseen items of a domain, by the dot product of unit vectors.

    Args:
        model: a trained model.
        item_ids: (S,) int, the whole history, oldest first; its latest window is read.
        timestamps: (S,) int64.
        domain: domain id to recommend from.
        k: number of items; fewer come back where the domain has no more unseen ones.
        window: events that are read, a run's ``max_sequence_length``: later positions, for which
            the model has room, were never trained.

    Returns:
        ``(item id, score)`` pairs, best first.
    """
    items = torch.from_numpy(np.array(item_ids, np.int64))
    times = torch.from_numpy(np.array(timestamps, np.int64))
    vector = model.encode(items[None, -window:], times[None, -window:], torch.tensor([domain]))
    pool = model.catalog.items_of(domain)
    pool = pool[~torch.isin(pool, items)]
    scores = model.item_vectors(pool) @ vector[0]
    best = scores.topk(min(k, pool.numel()))
    return list(zip(pool[best.indices].tolist(), best.values.tolist()))
