"""Ranks of targets among all items, under upstream's metric names."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..indexing.candidate_index import CandidateIndex


@dataclass
class EvalState:
    all_item_ids: set[int]
    candidate_index: CandidateIndex
    top_k_module: Callable


def get_eval_state(
    model, all_item_ids, negatives_sampler, top_k_module_fn, device, float_dtype=None
):
    ids = torch.tensor(all_item_ids, device=device).unsqueeze(0)
    with torch.no_grad():
        vectors = negatives_sampler.normalize_embeddings(model.get_item_embeddings(ids))
    vectors = vectors.to(float_dtype or vectors.dtype)
    return EvalState(set(all_item_ids), CandidateIndex(ids, vectors), top_k_module_fn(vectors, ids))


@torch.inference_mode()
def eval_metrics_v2_from_tensors(
    eval_state, model, seq_features, target_ids, min_positive_rating=4, target_ratings=None,
    epoch=None, filter_invalid_ids=True, user_max_batch_size=None, dtype=None,
):  # fmt: skip
    past_ids = seq_features.past_ids
    features = seq_features._replace(past_embeddings=model.get_item_embeddings(past_ids))
    users = model.encode(**features._asdict())
    _, ids = eval_state.top_k_module(users.to(dtype or users.dtype))
    place = (ids == target_ids).int().argmax(1, keepdim=True)
    better = torch.arange(ids.shape[1], device=ids.device) < place
    if filter_invalid_ids:
        better &= ~(ids.unsqueeze(2) == past_ids.unsqueeze(1)).any(2)
    ranks = 1 + better.sum(1)
    metrics = _metrics(ranks)
    if target_ratings is not None:
        liked = _metrics(ranks[target_ratings.squeeze(1) >= min_positive_rating])
        for name in ("ndcg@10", "hr@10", "hr@50", "mrr"):
            metrics[f"{name}_>={min_positive_rating}"] = liked[name]
    return metrics


def _metrics(ranks):
    gain = 1 / (ranks + 1).log2()
    metrics = {f"ndcg@{k}": gain * (ranks <= k) for k in (1, 10, 50, 100, 200)}
    metrics |= {f"hr@{k}": ranks <= k for k in (1, 10, 50, 100, 200, 500, 1000)}
    return metrics | {"mrr": 1 / ranks}


def _avg(x, world_size):
    totals = torch.tensor([x.sum(), x.numel()], dtype=torch.float, device=x.device)
    if world_size > 1:
        dist.all_reduce(totals)
    return totals[0] / totals[1]


def add_to_summary_writer(writer, batch_id, metrics, prefix, world_size):
    for name, values in metrics.items():
        average = _avg(values, world_size)
        if writer is not None:
            writer.add_scalar(f"{prefix}/{name}", average, batch_id)
