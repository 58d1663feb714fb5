"""What the rebound names put into upstream's batches: next domains, and negatives by domain."""

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
from hstu_xd.errors import InputError
from hstu_xd.plugins.bridge import Session, draw_places, draw_within
from hstu_xd.plugins.gr.research.settings import UpstreamSettings

# The data set that upstream's trainer opened last.
SESSION = Session()
# The payload that carries the domain of every next event to the encoder.
NEXT_DOMAINS = "xd_next_domains"


def next_domains(
    past_ids: Tensor, past_lengths: Tensor, target_domains: Tensor, catalog: DomainCatalog
) -> Tensor:
    """Build the payload that tells the encoder which domain each position predicts.

    Args:
        past_ids: (B, N) int64, oldest first, 0 from ``past_lengths`` on.
        past_lengths: (B,) int64, at least 1.
        target_domains: (B,) int64, the domain asked for after the last event.
        catalog: on the device of the tensors.

    Returns:
        (B, N) int64: the domain of event ``i + 1``, the asked one at the last event, -1 behind it.
    """
    following = torch.cat([past_ids[:, 1:], torch.zeros_like(past_ids[:, :1])], dim=1)
    last = (past_lengths - 1).view(-1, 1)
    return catalog.domain_of(following).scatter(1, last, target_domains.view(-1, 1))


def with_domains(features_from_row: Callable[..., Any]) -> Callable[..., Any]:
    """Give upstream's ``movielens_seq_features_from_row`` the payload ``xd_next_domains``."""

    def xd_seq_features_from_row(
        row: dict[str, Tensor], device: Any, max_output_length: int
    ) -> Any:
        features, target_ids, target_ratings = features_from_row(
            row=row, device=device, max_output_length=max_output_length
        )
        if SESSION.catalog is None:
            return features, target_ids, target_ratings
        catalog = SESSION.catalog_on(target_ids.device)
        targets = catalog.domain_of(target_ids.squeeze(1))
        payload = next_domains(features.past_ids, features.past_lengths, targets, catalog)
        payloads = {**features.past_payloads, NEXT_DOMAINS: payload}
        return features._replace(past_payloads=payloads), target_ids, target_ratings

    return xd_seq_features_from_row


def required_payload(payloads: dict[str, Tensor], name: str, why: str) -> Tensor:
    """Return a payload by name.

    Raises:
        InputError: it is missing.
    """
    if name not in payloads:
        raise InputError(
            f"past_payloads has no {name!r}, which {why} needs (found: {sorted(payloads)}); "
            "hstu_xd.plugins.gr.research.domain_batches.next_domains builds xd_next_domains"
        )
    return payloads[name]


class _DomainScoped(NegativesSampler):
    """Put before one of upstream's samplers: it knows the domains, and says so in its name."""

    def __init__(self, *, catalog: DomainCatalog, **upstream: Any) -> None:
        super().__init__(**upstream)
        self._catalog = catalog

    def debug_str(self) -> str:
        """Return upstream's description, marked as domain-scoped; a part of its paths."""
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
        domains = self._catalog.domain_of(positive_ids)
        ids = draw_within(domains, self._catalog, num_to_sample)
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
        """Sample as :meth:`DomainLocalNegativesSampler.forward`, out of the cached batch."""
        domains = self._catalog.domain_of(positive_ids).clamp(min=0)
        sampled = draw_places(domains, self._cached_offsets, num_to_sample)
        return self._cached_ids[sampled], self._cached_embeddings[sampled]


def local_sampler(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Build upstream's ``LocalNegativesSampler`` as ``xd_upstream.negatives`` asks."""
    return _scoped(upstream, DomainLocalNegativesSampler)


def in_batch_sampler(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Build upstream's ``InBatchNegativesSampler`` as ``xd_upstream.negatives`` asks."""
    return _scoped(upstream, DomainInBatchNegativesSampler)


def _scoped(upstream: Callable[..., Any], domain_scoped: Callable[..., Any]) -> Callable[..., Any]:
    def xd_negatives_sampler(**arguments: Any) -> Any:
        if SESSION.catalog is None or UpstreamSettings().negatives == "catalogue":
            return upstream(**arguments)
        return domain_scoped(catalog=SESSION.new_catalog(), **arguments)

    return xd_negatives_sampler
