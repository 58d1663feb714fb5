"""Sampled softmax whose negatives come from the positive's own domain."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hstu_xd.catalog import DomainCatalog
from hstu_xd.model import CrossDomainHSTU


def sample_negatives(
    catalog: DomainCatalog, num_negatives: int, generator: torch.Generator, *, scope: str
) -> list[Tensor]:
    """Draw the negatives of a step: one uniform sample shared by all positives of a domain.

    Args:
        catalog: item -> domain table.
        num_negatives: sample size; a domain (or catalogue) of no more items is taken whole.
        generator: seeded per step, so that every process of a job draws the same.
        scope: "domain" (a sample of each domain's items) or "catalogue" (one of all items).

    Returns:
        Item ids (R_d,) int64 per domain, or one tensor under "catalogue".
    """
    pools = (
        [catalog.domain_items]
        if scope == "catalogue"
        else [catalog.items_of(d) for d in range(catalog.num_domains)]
    )
    return [
        pool
        if pool.numel() <= num_negatives
        else pool[
            torch.randint(pool.numel(), (num_negatives,), generator=generator).to(pool.device)
        ]
        for pool in pools
    ]


def sampled_softmax_loss(
    model: CrossDomainHSTU,
    user_vectors: Tensor,
    target_ids: Tensor,
    negatives: list[Tensor],
    *,
    temperature: float,
) -> Tensor:
    """Sum over tokens of ``-log softmax`` of the positive against its sampled negatives.

    A negative that equals the positive is left out of its softmax.

    Args:
        model: gives item vectors and the catalogue.
        user_vectors: (L, K) float, unit vectors.
        target_ids: (L,) int64.
        negatives: of :func:`sample_negatives`.
        temperature: dot products of unit vectors are divided by it.

    Returns:
        Scalar float32; divide by the number of tokens for the mean.
    """
    positives = model.item_vectors(target_ids)
    pools = model.item_vectors(torch.cat(negatives)).split([n.numel() for n in negatives])
    if len(negatives) == 1:
        members = [torch.arange(target_ids.numel(), device=target_ids.device)]
    else:
        order = torch.argsort(model.catalog.domain_of(target_ids), stable=True)
        counts = torch.bincount(
            model.catalog.domain_of(target_ids), minlength=model.catalog.num_domains
        )
        members = list(order.split(counts.tolist()))
    total = user_vectors.new_zeros(())
    for ids, vectors, tokens in zip(negatives, pools, members):
        if tokens.numel() == 0:
            continue
        queries, targets = user_vectors[tokens], target_ids[tokens]
        positive = (queries * positives[tokens]).sum(1, keepdim=True)
        negative = (queries @ vectors.T).masked_fill(targets.unsqueeze(1) == ids, float("-inf"))
        logits = torch.cat([positive, negative], dim=1) / temperature
        first = torch.zeros_like(targets)
        total = total + cross_entropy(logits, first, reduction="sum")
    return total
