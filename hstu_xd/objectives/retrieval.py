"""The objective of a retrieval model: sampled softmax, and ranking by dot products."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hstu_xd.batch import JaggedBatch
from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.objective import DotProduct, Metric, Scorer
from hstu_xd.objectives.sampled_softmax import sample_negatives, sampled_softmax_loss

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
        metrics: none of its own.

    Raises:
        InputError: another word than the two for ``negatives``.
    """

    negatives: str | Sampler = "domain"
    num_negatives: int = 2048
    temperature: float = 0.05
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.negatives, str) and self.negatives not in SCOPES:
            raise InputError(f"negatives is {self.negatives!r}; one of {', '.join(SCOPES)}")

    def loss(
        self,
        model: CrossDomainHSTU,
        batch: JaggedBatch,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the sampled softmax summed over tokens, see :func:`sampled_softmax_loss`."""
        negatives = self._draw(model.catalog, generator)
        vectors = model(batch)
        # The softmax is float32 whatever the encoder computes in.
        with torch.autocast(targets.device.type, enabled=False):
            return sampled_softmax_loss(
                model,
                vectors,
                targets,
                negatives,
                temperature=self.temperature,
                targets_per_domain=batch.targets_per_domain,
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
