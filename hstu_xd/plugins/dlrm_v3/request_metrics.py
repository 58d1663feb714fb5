"""What evaluation tells of a store beyond upstream's metrics: domains, switches, whole ranking."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError
from hstu_xd.evaluation.metrics import (
    UNREACHABLE,
    RankedTargets,
    grouped_metrics,
    target_groups,
)
from hstu_xd.evaluation.ranking import defined, grouped_ranking_metrics
from hstu_xd.plugins.dlrm_v3.given_requests import GivenRequests
from hstu_xd.plugins.dlrm_v3.requests import EvaluatedRequests, RequestBatch, StoreRequests
from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings
from hstu_xd.plugins.dlrm_v3.store_dataset import StoreDataset

# Rows of history and candidates that the model sees at once, about.
_ROWS = 16_384
# As torchrec's: probabilities are kept this far from 0 and 1.
_EPS = 1e-12


def evaluate(
    model: Any,
    dataset: StoreDataset,
    settings: DlrmSettings,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Evaluate a model on all requests of evaluation.

    Args:
        model: as upstream has sharded it.
        dataset: of the store.
        settings: of ``xd_dlrm.*``.
        batch_size: requests that are scored at once.
        device: of the model.

    Returns:
        GAUC and NE of the true item among the drawn ones, ``gauc``, then those of switches, stays
        and domains, ``gauc[switch]``; with ``ranked_requests`` HR, NDCG and MRR of the rank among
        all items of the domain that the user has not met, likewise, and ``count`` of these. Of
        requests with candidates of their own :func:`hstu_xd.evaluation.ranking.ranking_metrics`,
        then those of domains and goals.
    """
    requests = dataset.requests
    was_training = model.training
    model.eval()
    with torch.no_grad():
        if isinstance(requests, GivenRequests):
            values = _given_metrics(model, dataset, requests, batch_size, device)
        else:
            values = _drawn_metrics(model, dataset, requests, settings, batch_size, device)
    model.train(was_training)
    return values


def _given_metrics(
    model: Any,
    dataset: StoreDataset,
    requests: GivenRequests,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Evaluate on the candidates that requests have of their own."""
    scores = [
        _predict(model, dataset, requests.batch(numbers), device)
        for numbers in _in_parts(requests.evaluated(), batch_size)
    ]
    return defined(grouped_ranking_metrics(*requests.scored(torch.cat(scores).numpy())))


def _drawn_metrics(
    model: Any,
    dataset: StoreDataset,
    requests: StoreRequests,
    settings: DlrmSettings,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Evaluate on the true item among drawn ones, and among all of its domain."""
    asked = requests.evaluated()
    parts = [
        _predict(model, dataset, requests.batch(numbers), device).view(len(numbers), -1)
        for numbers in _in_parts(asked.numbers, batch_size)
    ]
    names = requests.store.catalog.domain_names
    values = _request_metrics(torch.cat(parts), asked, names)
    if settings.ranked_requests:
        ranked = _rank(model, dataset, requests, asked, settings, device)
        values |= grouped_metrics(ranked, names)
    return values


def _in_parts(numbers: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return np.array_split(numbers, -(-numbers.size // size))


def _predict(
    model: Any, dataset: StoreDataset, batch: RequestBatch, device: torch.device
) -> Tensor:
    """Score the candidates of a batch: (Q,) float64 probabilities."""
    sample = dataset.features(batch)
    sample.to(device)
    predictions = model(sample.uih_features_kjt, sample.candidates_features_kjt)[3]
    return predictions[0].double().cpu()


def _request_metrics(
    scores: Tensor, asked: EvaluatedRequests, domain_names: Sequence[str]
) -> dict[str, float]:
    """Compute GAUC and NE of (Q, C) probabilities, those of the true items in the first column."""
    true, drawn = scores[:, :1], scores[:, 1:]
    auc = ((true > drawn).double() + (true == drawn).double() / 2).mean(1)
    p = scores.clamp(_EPS, 1 - _EPS)
    entropy = -(p[:, 0].log() + (1 - p[:, 1:]).log().sum(1)) / scores.shape[1]
    # The entropy of the share of true items, which is the same in every request.
    share = torch.tensor(1 / scores.shape[1], dtype=torch.float64)
    base = -(share * share.log() + (1 - share) * (1 - share).log())
    values = {}
    for suffix, members in target_groups(asked.domains, asked.switched, domain_names).items():
        values[f"gauc{suffix}"] = float(auc[members].mean())
        values[f"ne{suffix}"] = float(entropy[members].mean() / base)
    return values


def _rank(
    model: Any,
    dataset: StoreDataset,
    requests: StoreRequests,
    asked: EvaluatedRequests,
    settings: DlrmSettings,
    device: torch.device,
) -> RankedTargets:
    """Rank true items among all items of their domain, chunk by chunk."""
    count = min(settings.ranked_requests, asked.numbers.size)
    chosen = np.arange(count) * asked.numbers.size // count
    store = requests.store
    lengths = np.minimum(asked.places - store.offsets[asked.users], settings.max_history)
    found = []
    for domain in range(store.num_domains):
        members = chosen[asked.domains.numpy()[chosen] == domain]
        # Those of like length together, so that little is padded.
        members = members[np.argsort(lengths[members], kind="stable")]
        items = store.catalog.items_of(domain)
        at_once = max(1, _ROWS // (settings.max_history + settings.chunk_length))
        for begin in range(0, members.size, at_once):
            part = members[begin : begin + at_once]
            scores = torch.cat(
                [
                    _predict(model, dataset, batch, device).view(part.size, -1)
                    for chunk in items.split(settings.chunk_length)
                    for batch in [requests.batch(asked.numbers[part], chunk)]
                ],
                dim=1,
            )
            if not scores.isfinite().all():
                raise HstuXdError("the model gives scores that are not finite; nothing is ranked")
            ranks, others = _ranks(scores, items, store, asked, part)
            found.append(RankedTargets(ranks, asked.domains[part], asked.switched[part], others))
    return RankedTargets.joined(found)


def _ranks(
    scores: Tensor,
    items: Tensor,
    store: InteractionStore,
    asked: EvaluatedRequests,
    part: NDArray[np.int64],
) -> tuple[Tensor, Tensor]:
    """Return ranks of true items, ties against them, and numbers of other candidates.

    Args:
        scores: (B, n) float64, of all items of the domain.
        items: (n,) int64, ascending.
        store: with the items that users have met.
        asked: the requests of evaluation.
        part: (B,) int64, which of them.

    Returns:
        (B,) int64 ranks from 1, ``UNREACHABLE`` where the user had met the item; (B,) int64.
    """
    is_candidate = torch.ones_like(scores, dtype=torch.bool)
    targets = torch.from_numpy(store.item_ids[asked.places[part]].astype(np.int64))
    places = torch.searchsorted(items, targets)
    for row, request in enumerate(part):
        start = store.offsets[asked.users[request]]
        met = np.isin(items, store.item_ids[start : asked.places[request]])
        is_candidate[row] = torch.from_numpy(~met)
    own = scores.gather(1, places.unsqueeze(1))
    is_reachable = is_candidate.gather(1, places.unsqueeze(1)).squeeze(1)
    before = ((scores >= own) & is_candidate).sum(1)
    ranks = torch.where(is_reachable, before, UNREACHABLE)
    return ranks, is_candidate.sum(1) - is_reachable.long()
