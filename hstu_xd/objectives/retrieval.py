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
from hstu_xd.objectives.sampled_softmax import sampled_softmax_loss


def sample_negatives(
    catalog: DomainCatalog,
    num_negatives: int,
    generator: torch.Generator,
    *,
    scope: str,
    among: Tensor | None = None,
) -> list[Tensor]:
    """Draw the negatives of a step: one uniform sample shared by all positives of a domain.

    Args:
        catalog: item -> domain table.
        num_negatives: draws, of which distinct ones are kept; a domain (or catalogue) of no more
            items is taken whole.
        generator: seeded per step, so that every process of a job draws the same.
        scope: "domain" (a sample of each domain's items) or "catalogue" (one of all items).
        among: (I + 1,) bool, items that may be drawn; default: all.

    Returns:
        Distinct item ids (R_d,) int64, ascending, per domain, or one tensor under "catalogue".
    """
    pools = (
        [catalog.domain_items]
        if scope == "catalogue"
        else [catalog.items_of(d) for d in range(catalog.num_domains)]
    )
    if among is not None:
        pools = [pool[among[pool]] for pool in pools]
    drawn = [
        pool if pool.numel() <= num_negatives else _draw(pool, num_negatives, generator)
        for pool in pools
    ]
    # Those of a domain ascend as its items do.
    return [ids.sort().values for ids in drawn] if scope == "catalogue" else drawn


def _draw(pool: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return a uniform sample of distinct items, a few fewer than asked where draws repeat."""
    drawn = torch.randint(pool.numel(), (size,), generator=generator).unique()
    return pool[drawn.to(pool.device, non_blocking=True)]


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
    temperature: float = 0.1
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
        negatives = self._draw(model, generator)
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

    def _draw(self, model: CrossDomainHSTU, generator: torch.Generator) -> list[Tensor]:
        catalog = model.catalog
        if isinstance(self.negatives, str):
            # An item that is never a positive would only teach that its features are bad.
            return sample_negatives(
                catalog,
                self.num_negatives,
                generator,
                scope=self.negatives,
                among=model.met_items,
            )
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
