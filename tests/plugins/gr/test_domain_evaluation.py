"""Upstream's metric names filled with domain-scoped ranks, against a count by hand."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generative_recommenders.research.data import eval as upstream_eval
from generative_recommenders.research.indexing.utils import get_top_k_module
from generative_recommenders.research.modeling.sequential.features import SequentialFeatures
from upstream_models import CATALOG, LENGTHS, NUM_ITEMS, WIDTH, batch, hstu_xd, shake

import gin
from hstu_xd.plugins.gr.research.domain_batches import SESSION
from hstu_xd.plugins.gr.research.upstream_metrics import domain_scoped

TARGETS = torch.tensor([[5], [17], [8], [60], [3], [44]])
RATINGS = torch.tensor([[5], [3], [4], [5], [1], [4]])


@pytest.fixture(autouse=True)
def opened() -> Iterator[None]:
    SESSION.open(CATALOG)
    yield
    SESSION.open(None)
    gin.clear_config()


def state(model: torch.nn.Module) -> Any:
    sampler = SimpleNamespace(normalize_embeddings=lambda x: x / x.norm(dim=-1, keepdim=True))
    return upstream_eval.get_eval_state(
        model=model,
        all_item_ids=list(range(1, NUM_ITEMS + 1)),
        negatives_sampler=sampler,
        top_k_module_fn=lambda vectors, ids: get_top_k_module(
            top_k_method="MIPSBruteForceTopK", model=model, item_embeddings=vectors, item_ids=ids
        ),
        device="cpu",
    )


def evaluate(model: torch.nn.Module, **others: Any) -> dict[str, torch.Tensor]:
    features = SequentialFeatures(past_embeddings=None, **batch())
    return domain_scoped(upstream_eval.eval_metrics_v2_from_tensors)(
        state(model), model, features, target_ids=TARGETS, target_ratings=RATINGS, **others
    )


def ranks_by_hand(model: torch.nn.Module, *, scoped: bool) -> list[int]:
    features = batch()
    embeddings = model.get_item_embeddings(features["past_ids"])
    with torch.inference_mode():
        users = model.encode(past_embeddings=embeddings, **features)
        table = model._embedding_module._item_emb.weight
        scores = users @ (table / table.norm(dim=1, keepdim=True)).T
    ranks = []
    for row, target in enumerate(TARGETS.flatten().tolist()):
        seen = set(features["past_ids"][row].tolist()) - {target}
        rivals = [
            item
            for item in range(1, NUM_ITEMS + 1)
            if item not in seen and (not scoped or item % 3 == target % 3)
        ]
        ranks.append(sum(bool(scores[row, item] >= scores[row, target]) for item in rivals))
    return ranks


@pytest.mark.parametrize("candidates", ["domain", "catalogue"])
@pytest.mark.parametrize("users_at_once", [None, 2])
def test_metrics_equal_a_count_by_hand(candidates: str, users_at_once: int | None) -> None:
    gin.parse_config(f'xd_upstream.candidates = "{candidates}"')
    model = shake(hstu_xd(tape=True)).eval()
    found = evaluate(model, user_max_batch_size=users_at_once)
    ranks = ranks_by_hand(model, scoped=candidates == "domain")
    for k in (1, 10, 50, 100, 200, 500, 1000):
        assert found[f"hr@{k}"].tolist() == [rank <= k for rank in ranks]
    for k in (1, 10, 50, 100, 200):
        gains = [1 / math.log2(rank + 1) if rank <= k else 0.0 for rank in ranks]
        assert found[f"ndcg@{k}"].tolist() == pytest.approx(gains)
    assert found["mrr"].tolist() == pytest.approx([1 / rank for rank in ranks])
    liked = [rank for rank, rating in zip(ranks, RATINGS.flatten()) if rating >= 4]
    assert found["hr@10_>=4"].tolist() == [rank <= 10 for rank in liked]
    assert found["mrr_>=4"].tolist() == pytest.approx([1 / rank for rank in liked])


def test_groups_hold_their_targets_and_empty_ones_are_there() -> None:
    model = shake(hstu_xd()).eval()
    found = evaluate(model)
    features = batch()
    last = features["past_ids"].gather(1, LENGTHS[:, None] - 1)
    switched = (last % 3 != TARGETS % 3).flatten()
    assert torch.equal(found["mrr/switch"], found["mrr"][switched])
    assert torch.equal(found["mrr/stay"], found["mrr"][~switched])
    for domain, name in enumerate(CATALOG.domain_names):
        members = (domain == TARGETS % 3).flatten()
        assert torch.equal(found[f"hr@10/{name}"], found["hr@10"][members])
    assert {k.split("/")[1] for k in found if "/" in k} == {"switch", "stay", "a", "b", "c"}


def test_names_are_upstreams() -> None:
    model = shake(hstu_xd()).eval()
    big = 3000  # upstream's own function needs a catalogue of more than 2,500 items
    names = set(evaluate(model))
    features = SequentialFeatures(past_embeddings=None, **batch())
    vectors = torch.randn(1, big, WIDTH)
    index = upstream_eval.CandidateIndex(ids=torch.arange(1, big + 1)[None], embeddings=vectors)
    top_k = get_top_k_module("MIPSBruteForceTopK", model, vectors, index.ids)
    upstream = upstream_eval.eval_metrics_v2_from_tensors(
        upstream_eval.EvalState(set(range(1, big + 1)), index, top_k),
        model,
        features,
        target_ids=TARGETS,
        target_ratings=RATINGS,
    )
    assert set(upstream) == {name for name in names if "/" not in name}


@pytest.mark.parametrize("known", [False, True])
def test_upstreams_own_function_runs_where_no_domains_or_it_is_asked_for(known: bool) -> None:
    if known:
        gin.parse_config('xd_upstream.candidates = "upstream"')
    else:
        SESSION.open(None)
    wrapped = domain_scoped(lambda *arguments, **others: ("theirs", others))
    result, others = wrapped(None, None, None, target_ids=TARGETS)
    assert result == "theirs"
    assert others["target_ids"] is TARGETS
