"""Upstream's negatives samplers, drawing from the domain of each positive."""

from collections.abc import Callable
from typing import Any

import torch
from generative_recommenders.research.modeling.sequential.autoregressive_losses import (
    InBatchNegativesSampler,
    LocalNegativesSampler,
    NegativesSampler,
)
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.catalog import DomainCatalog
from hstu_xd.plugins.gr.research.session import SESSION
from hstu_xd.plugins.gr.research.settings import UpstreamSettings

# Large against every number of items: the remainder is uniform to 2^-30 and better.
_DRAWS = 2**62


class _DomainScoped(NegativesSampler):
    """Put before one of upstream's samplers: it knows the domains, and says so in its name."""

    def __init__(self, *, catalog: DomainCatalog, **upstream: Any) -> None:
        super().__init__(**upstream)
        self._catalog = catalog

    def debug_str(self) -> str:
        """Upstream's description, marked as domain-scoped; a part of its paths."""
        return f"{super().debug_str()}-domain"


class DomainLocalNegativesSampler(_DomainScoped, LocalNegativesSampler):
    """Uniform negatives out of the positive's own domain (``sampling_strategy = "local"``).

    Args:
        catalog: item -> domain table.
        Others: as upstream's sampler.
    """

    def forward(self, positive_ids: Tensor, num_to_sample: int) -> tuple[Tensor, Tensor]:
        """Sample for each positive.

        Args:
            positive_ids: (...) int64; padding draws from the first domain, its loss counts nothing.
            num_to_sample: negatives ``R`` a positive.

        Returns:
            (..., R) int64 ids and (..., R, K) float normalised vectors.
        """
        catalog = self._catalog
        domains = catalog.domain_of(positive_ids).clamp(min=0)
        sampled = _draw_within(domains, catalog.domain_offsets, num_to_sample)
        ids = catalog.domain_items[sampled]
        return ids, self.normalize_embeddings(self._item_emb(ids))


class DomainInBatchNegativesSampler(_DomainScoped, InBatchNegativesSampler):
    """Negatives of the positive's own domain among the batch's items (``"in-batch"``).

    Args:
        catalog: item -> domain table.
        Others: as upstream's sampler.
    """

    def process_batch(self, ids: Tensor, presences: Tensor, embeddings: Tensor) -> None:
        """Cache the batch's items as upstream does, then order them by domain."""
        super().process_batch(ids, presences, embeddings)
        domains = self._catalog.domain_of(self._cached_ids)
        order = torch.argsort(domains, stable=True)
        self._cached_ids = self._cached_ids[order]
        self._cached_embeddings = self._cached_embeddings[order]
        counts = torch.bincount(domains, minlength=self._catalog.num_domains)
        self._cached_offsets = pad(counts.cumsum(0), (1, 0))

    def forward(self, positive_ids: Tensor, num_to_sample: int) -> tuple[Tensor, Tensor]:
        """As :meth:`DomainLocalNegativesSampler.forward`, out of the cached batch."""
        domains = self._catalog.domain_of(positive_ids).clamp(min=0)
        sampled = _draw_within(domains, self._cached_offsets, num_to_sample)
        return self._cached_ids[sampled], self._cached_embeddings[sampled]


def _draw_within(domains: Tensor, offsets: Tensor, num_to_sample: int) -> Tensor:
    """(...) domains -> (..., R) places, uniform in ``offsets[d]:offsets[d + 1]``."""
    first = offsets[domains].unsqueeze(-1)
    # Only padding asks for a domain without items; it draws any place.
    count = (offsets[domains + 1].unsqueeze(-1) - first).clamp(min=1)
    draws = torch.randint(_DRAWS, (*domains.shape, num_to_sample), device=domains.device)
    return torch.minimum(first + draws % count, offsets[-1] - 1)


def local_sampler(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """``LocalNegativesSampler`` as ``xd_upstream.negatives`` asks."""
    return _scoped(upstream, DomainLocalNegativesSampler)


def in_batch_sampler(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """``InBatchNegativesSampler`` as ``xd_upstream.negatives`` asks."""
    return _scoped(upstream, DomainInBatchNegativesSampler)


def _scoped(upstream: Callable[..., Any], domain_scoped: Callable[..., Any]) -> Callable[..., Any]:
    def xd_negatives_sampler(**arguments: Any) -> Any:
        if SESSION.catalog is None or UpstreamSettings().negatives == "catalogue":
            return upstream(**arguments)
        return domain_scoped(catalog=SESSION.new_catalog(), **arguments)

    return xd_negatives_sampler
