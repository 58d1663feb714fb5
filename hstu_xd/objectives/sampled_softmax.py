"""Sampled softmax whose negatives come from the positive's own domain."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.model.hstu import CrossDomainHSTU


def sample_negatives(
    catalog: DomainCatalog, num_negatives: int, generator: torch.Generator, *, scope: str
) -> list[Tensor]:
    """Draw the negatives of a step: one uniform sample shared by all positives of a domain.

    Args:
        catalog: item -> domain table.
        num_negatives: draws, of which distinct ones are kept; a domain (or catalogue) of no more
            items is taken whole.
        generator: seeded per step, so that every process of a job draws the same.
        scope: "domain" (a sample of each domain's items) or "catalogue" (one of all items).

    Returns:
        Distinct item ids (R_d,) int64, ascending, per domain, or one tensor under "catalogue".
    """
    pools = (
        [catalog.domain_items]
        if scope == "catalogue"
        else [catalog.items_of(d) for d in range(catalog.num_domains)]
    )
    return [
        (pool if pool.numel() <= num_negatives else _draw(pool, num_negatives, generator))
        .sort()
        .values
        for pool in pools
    ]


def _draw(pool: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return a uniform sample of distinct items, a few fewer than asked where draws repeat."""
    drawn = torch.randint(pool.numel(), (size,), generator=generator).unique()
    return pool[drawn.to(pool.device, non_blocking=True)]


def sampled_softmax_loss(
    model: CrossDomainHSTU,
    user_vectors: Tensor,
    target_ids: Tensor,
    negatives: list[Tensor],
    *,
    temperature: float,
    targets_per_domain: Sequence[int] | None = None,
) -> Tensor:
    """Sum ``-log softmax`` of the positives against their sampled negatives over tokens.

    A negative that equals the positive is left out of its softmax.

    Args:
        model: gives item vectors and the catalogue.
        user_vectors: (L, K) float, unit vectors.
        target_ids: (L,) int64.
        negatives: of :func:`sample_negatives`.
        temperature: dot products of unit vectors are divided by it.
        targets_per_domain: (D,) numbers of targets, where the host knows them; otherwise they are
            counted, which waits for a GPU.

    Returns:
        Scalar float32; divide by the number of tokens for the mean.
    """
    positives = model.item_vectors(target_ids)
    pools = model.item_vectors(torch.cat(negatives)).split([n.numel() for n in negatives])
    if len(negatives) == 1:
        members = [torch.arange(target_ids.numel(), device=target_ids.device)]
    else:
        domains = model.catalog.domain_of(target_ids)
        if targets_per_domain is None:
            targets_per_domain = count_per_domain(domains, len(negatives))
        members = list(torch.argsort(domains, stable=True).split(list(targets_per_domain)))
    total = user_vectors.new_zeros(())
    for ids, vectors, tokens in zip(negatives, pools, members):
        if tokens.numel() == 0:
            continue
        total = total + _softmax_loss(
            user_vectors[tokens] / temperature, positives[tokens], vectors, target_ids[tokens], ids
        )
    return total


def count_per_domain(domains: Tensor, num_domains: int) -> list[int]:
    """Count how many of (L,) domain ids each domain has: D numbers."""
    return torch.bincount(domains, minlength=num_domains).tolist()


def _softmax_loss(
    queries: Tensor, positives: Tensor, negatives: Tensor, target_ids: Tensor, ids: Tensor
) -> Tensor:
    """Sum the loss of (T, K) queries with (T, K) positives and (R, K) shared negatives."""
    positive = (queries * positives).sum(1)
    logits = queries @ negatives.T
    # Negatives are distinct and ascending, so a positive stands among them once or not at all.
    column = torch.searchsorted(ids, target_ids).clamp(max=ids.numel() - 1)
    # Finite, or a domain of one item would have no softmax to differentiate.
    far = torch.finfo(logits.dtype).min / 2
    out = logits.new_zeros(len(logits), 1).masked_fill_((ids[column] == target_ids)[:, None], far)
    logits = logits.scatter_add_(1, column[:, None], out)
    return (torch.logaddexp(logits.logsumexp(1), positive) - positive).sum()
