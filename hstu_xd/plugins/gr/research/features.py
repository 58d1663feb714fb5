"""The domain of every next event, carried to the encoder where upstream builds its features."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.plugins.gr.research.session import SESSION

NEXT_DOMAINS = "xd_next_domains"


def next_domains(
    past_ids: Tensor, past_lengths: Tensor, target_domains: Tensor, catalog: DomainCatalog
) -> Tensor:
    """Payload that tells the encoder which domain each position predicts.

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
    """Upstream's ``movielens_seq_features_from_row`` with the payload ``xd_next_domains``."""

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
    """A payload by name.

    Raises:
        InputError: it is missing.
    """
    if name not in payloads:
        raise InputError(
            f"past_payloads has no {name!r}, which {why} needs (found: {sorted(payloads)}); "
            "hstu_xd.plugins.gr.research.features.next_domains builds xd_next_domains"
        )
    return payloads[name]
