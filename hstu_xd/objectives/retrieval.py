"""The objective of a retrieval model: sampled softmax, and ranking by dot products.

Negatives come from the positive's own domain, or from the whole catalogue.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hstu_xd.batch import JaggedBatch
from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.asking import OtherDomains
from hstu_xd.objectives.objective import DotProduct, Metric, Scorer


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
    weights: Tensor | None = None,
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
        weights: (L,) float, what each token counts; default: 1.

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
        losses = _softmax_losses(
            user_vectors[tokens] / temperature, positives[tokens], vectors, target_ids[tokens], ids
        )
        total = total + (losses if weights is None else losses * weights[tokens]).sum()
    return total


def count_per_domain(domains: Tensor, num_domains: int) -> list[int]:
    """Count how many of (L,) domain ids each domain has: D numbers."""
    return torch.bincount(domains, minlength=num_domains).tolist()


def _softmax_losses(
    queries: Tensor, positives: Tensor, negatives: Tensor, target_ids: Tensor, ids: Tensor
) -> Tensor:
    """Return the losses (T,) of (T, K) queries, (T, K) positives and (R, K) shared negatives."""
    positive = (queries * positives).sum(1)
    logits = queries @ negatives.T
    # Negatives are distinct and ascending, so a positive stands among them once or not at all.
    column = torch.searchsorted(ids, target_ids).clamp(max=ids.numel() - 1)
    # Finite, or a domain of one item would have no softmax to differentiate.
    far = torch.finfo(logits.dtype).min / 2
    out = logits.new_zeros(len(logits), 1).masked_fill_((ids[column] == target_ids)[:, None], far)
    logits = logits.scatter_add_(1, column[:, None], out)
    return torch.logaddexp(logits.logsumexp(1), positive) - positive


# Draws a step's negatives: given the catalogue, a number of draws and the step's generator, int64
# item ids, one tensor a domain, or a single one that all domains share.
Sampler = Callable[[DomainCatalog, int, torch.Generator], Sequence[Tensor]]

SCOPES = ("domain", "catalogue")


@dataclass(frozen=True)
class Retrieval:
    """Tell the next item from sampled negatives; rank items by dot products of unit vectors.

    Attributes:
        negatives: where negatives come from, "domain" (the positive's own domain) or "catalogue"
            (all items), or a :data:`Sampler`.
        num_negatives: sampled negatives per positive.
        temperature: dot products of unit vectors are divided by it.
        others: what positions are asked beside their next event.
        metrics: none of its own.

    Raises:
        InputError: another word than the two for ``negatives``.
    """

    negatives: str | Sampler = "domain"
    num_negatives: int = 2048
    temperature: float = 0.05
    others: OtherDomains = field(default_factory=OtherDomains)
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.negatives, str) and self.negatives not in SCOPES:
            raise InputError(f"negatives is {self.negatives!r}; one of {', '.join(SCOPES)}")

    def prepare(
        self,
        catalog: DomainCatalog,
        batch: JaggedBatch,
        targets: Tensor,
        generator: torch.Generator,
    ) -> JaggedBatch:
        """Put questions about other domains into a batch, where any are to be asked."""
        if not self.others.count:
            return batch
        asked = self.others.ask(batch, targets, catalog.num_domains, generator)
        return replace(batch, asked=asked)

    def loss(
        self,
        model: CrossDomainHSTU,
        batch: JaggedBatch,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the sampled softmax summed over tokens, see :func:`sampled_softmax_loss`.

        Questions about other domains are added with their weight, against the same negatives.
        """
        if batch.asked is None:
            batch = self.prepare(model.catalog, batch, targets, generator)
        negatives = self._draw(model.catalog, generator)
        asked, counts = batch.asked, batch.targets_per_domain
        if asked is None or not asked.targets.numel():
            vectors, weights = model(batch), None
        else:
            vectors = model(batch, questions=asked.questions)
            weights = vectors.new_full((len(vectors),), self.others.weight, dtype=torch.float32)
            weights[: len(targets)] = 1
            targets = torch.cat([targets, asked.targets])
            if counts is not None:
                counts = tuple(map(sum, zip(counts, asked.targets_per_domain)))
        # The softmax is float32 whatever the encoder computes in.
        with torch.autocast(targets.device.type, enabled=False):
            return sampled_softmax_loss(
                model,
                vectors,
                targets,
                negatives,
                temperature=self.temperature,
                targets_per_domain=counts,
                weights=weights,
            )

    def scorer(self, model: CrossDomainHSTU) -> Scorer:
        """Return the dot product with the model's item vectors."""
        return DotProduct(model.item_vectors)

    def _draw(self, catalog: DomainCatalog, generator: torch.Generator) -> list[Tensor]:
        if isinstance(self.negatives, str):
            return sample_negatives(catalog, self.num_negatives, generator, scope=self.negatives)
        drawn = self.negatives(catalog, self.num_negatives, generator)
        return _checked(drawn, catalog)


def _checked(drawn: Any, catalog: DomainCatalog) -> list[Tensor]:
    """Return a sampler's negatives as the loss needs them: distinct, ascending, on the device.

    Raises:
        InputError: not one tensor of ids a domain, or one for all.
    """
    needed = (
        f"a list of {catalog.num_domains} int64 tensors of item ids is needed, one a domain and "
        "none empty, or of one tensor for all domains"
    )
    if not isinstance(drawn, list | tuple):
        raise InputError(f"the sampler of negatives returned a {type(drawn).__name__}; {needed}")
    if len(drawn) not in (1, catalog.num_domains):
        raise InputError(f"the sampler of negatives returned {len(drawn)} tensors; {needed}")
    for ids in drawn:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1:
            given = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else ids
            raise InputError(f"the sampler of negatives returned {given!s:.60}; {needed}")
    empty = [
        not ids.numel() and (len(drawn) == 1 or catalog.items_of(domain).numel() > 0)
        for domain, ids in enumerate(drawn)
    ]
    if any(empty):
        raise InputError(
            f"the sampler of negatives returned none for domain {empty.index(True)}; {needed}"
        )
    device = catalog.item_domains.device
    return [ids.unique().to(device, non_blocking=True) for ids in drawn]
