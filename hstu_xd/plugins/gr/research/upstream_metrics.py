"""Domain-scoped ranking under the metric names that upstream logs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hstu_xd.evaluation.protocol import ALL, DOMAIN, Protocol
from hstu_xd.evaluation.ranks import Scorer, target_ranks
from hstu_xd.plugins.bridge import target_groups
from hstu_xd.plugins.gr.research.domain_batches import SESSION
from hstu_xd.plugins.gr.research.settings import UpstreamSettings

_NDCG_AT = (1, 10, 50, 100, 200)
_HR_AT = (1, 10, 50, 100, 200, 500, 1000)
# Repeated per domain, for switch and for stay targets: "hr@10/films", "mrr/switch".
_GROUPED = ("hr@10", "hr@100", "ndcg@10", "ndcg@100", "mrr")


def domain_scoped(eval_metrics: Callable[..., Any]) -> Callable[..., Any]:
    """Give upstream's ``eval_metrics_v2_from_tensors`` what ``xd_upstream.candidates`` asks for.

    With "domain" the target is ranked among all items of its domain, with "catalogue" among all
    items, less those in the history that was read; ties count against it and the rank is exact
    however low. Upstream's own function searches the first 2,500 places, and fails on catalogues
    that are smaller.
    """

    @torch.inference_mode()
    def xd_eval_metrics(
        eval_state: Any,
        model: Any,
        seq_features: Any,
        target_ids: Tensor,
        min_positive_rating: int = 4,
        target_ratings: Tensor | None = None,
        epoch: str | None = None,
        filter_invalid_ids: bool = True,
        user_max_batch_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        candidates = UpstreamSettings().candidates
        if SESSION.catalog is None or candidates == "upstream":
            return eval_metrics(
                eval_state,
                model,
                seq_features,
                target_ids=target_ids,
                min_positive_rating=min_positive_rating,
                target_ratings=target_ratings,
                epoch=epoch,
                filter_invalid_ids=filter_invalid_ids,
                user_max_batch_size=user_max_batch_size,
                dtype=dtype,
            )
        targets = target_ids.squeeze(1)
        ranks = _ranks(
            eval_state,
            model,
            seq_features,
            targets,
            among_all=candidates == "catalogue",
            without_history=filter_invalid_ids,
            dtype=dtype,
        )
        metrics = upstream_metrics(ranks)
        if target_ratings is not None:
            liked = ranks[target_ratings.squeeze(1) >= min_positive_rating]
            values = upstream_metrics(liked)
            for name in ("ndcg@10", "hr@10", "hr@50", "mrr"):
                metrics[f"{name}_>={min_positive_rating}"] = values[name]
        last = seq_features.past_ids.gather(1, seq_features.past_lengths.view(-1, 1) - 1)
        return metrics | _grouped(metrics, targets, last.squeeze(1))

    return xd_eval_metrics


def _ranks(
    eval_state: Any,
    model: Any,
    features: Any,
    targets: Tensor,
    *,
    among_all: bool,
    without_history: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """(B,) int64 rank of each target, from 1."""
    users = model.encode(
        past_lengths=features.past_lengths,
        past_ids=features.past_ids,
        past_embeddings=model.get_item_embeddings(features.past_ids),
        past_payloads=features.past_payloads,
    )
    catalog = SESSION.catalog_on(targets.device)
    # A target that was met before keeps its rank here, as this plug-in has always counted.
    past = features.past_ids
    seen = past.masked_fill(past == targets.view(-1, 1), 0) if without_history else past[:, :0]
    ranks, _ = target_ranks(
        users if dtype is None else users.to(dtype),
        targets,
        seen.flatten(),
        torch.arange(len(users) + 1, device=seen.device) * seen.shape[1],
        catalog,
        similarity_scorer(model, eval_state.candidate_index, catalog.num_items),
        protocol=Protocol(candidates=ALL if among_all else DOMAIN),
    )
    return ranks


def upstream_metrics(ranks: Tensor) -> dict[str, Tensor]:
    """Compute upstream's metrics of every target.

    Args:
        ranks: (Q,) int64 from 1.

    Returns:
        name -> (Q,) float32 ("ndcg@k", "mrr") or bool ("hr@k").
    """
    gain = 1 / torch.log2(ranks.float() + 1)
    metrics = {f"ndcg@{k}": gain * (ranks <= k) for k in _NDCG_AT}
    metrics |= {f"hr@{k}": ranks <= k for k in _HR_AT}
    metrics["mrr"] = 1 / ranks.float()
    return metrics


def similarity_scorer(model: Any, index: Any, num_items: int) -> Scorer:
    """Score by the model's own similarity (dot product or MoL) with the index's item vectors.

    Args:
        model: upstream's encoder with its ``similarity_fn``.
        index: upstream's candidate index: ``ids`` (1, X) int64, ``embeddings`` (1, X, K).
        num_items: largest item id.
    """
    place = index.ids.new_zeros(num_items + 1)
    place[index.ids[0]] = torch.arange(index.num_objects, device=place.device)

    def score(items: Tensor) -> Callable[[Tensor], Tensor]:
        vectors = index.embeddings[:, place[items]]

        def similarities(queries: Tensor) -> Tensor:
            logits, _ = model.similarity_fn(
                query_embeddings=queries, item_ids=items.unsqueeze(0), item_embeddings=vectors
            )
            return logits.float()

        return similarities

    return score


def _grouped(metrics: dict[str, Tensor], targets: Tensor, last: Tensor) -> dict[str, Tensor]:
    """Give the same values once more for each group of targets, empty groups included."""
    catalog = SESSION.catalog_on(targets.device)
    groups = target_groups(
        catalog.domain_of(targets), catalog.domain_of(last), catalog.domain_names
    )
    return {
        f"{name}/{group}": metrics[name][members]
        for group, members in groups.items()
        for name in _GROUPED
    }
