"""What evaluation tells of domains, switches and whole ranking, against a walk over requests."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import upstream_dlrm  # noqa: F401  (skips where upstream is not importable)
from generative_recommenders.dlrm_v3.train import utils as train_utils
from torch import Tensor

import gin
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.plugins.dlrm_v3 import HOST
from hstu_xd.plugins.dlrm_v3.request_metrics import evaluate
from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings
from hstu_xd.plugins.host import activate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_force() -> Iterator[None]:
    handle = activate(HOST)
    yield
    handle.revert()
    gin.clear_config()


def opened(store: Path, **values: Any) -> tuple[Any, DlrmSettings]:
    for name, value in ({"max_history": 6, "num_candidates": 5} | values).items():
        gin.parse_config(f"xd_dlrm.{name} = {value!r}")
    dataset_class, arguments = train_utils.get_dataset(name=f"xd:{store}")
    config = train_utils.get_hstu_configs(f"xd:{store}")
    return dataset_class(hstu_config=config, **arguments), DlrmSettings()


class Scoring(torch.nn.Module):
    """Scores an item by its number and how many events came before; counts what it is asked."""

    def __init__(self, score: Any = None) -> None:
        super().__init__()
        self.widths: list[int] = []
        self.score = score or (lambda items: ((items * 37) % 101).double() / 102 + 0.001)

    def forward(self, history: Any, candidates: Any) -> tuple:
        assert not self.training
        self.widths += candidates["item_candidate_id"].lengths().tolist()
        return None, None, None, self.score(candidates["item_candidate_id"].values()).unsqueeze(0)


def walk(dataset: Any) -> list[SimpleNamespace]:
    """Every request of evaluation, from the store."""
    requests, store = dataset.requests, dataset.requests.store
    domains, found = store.catalog.item_domains.numpy(), []
    for number, user in zip(range(requests.num_train, len(requests)), range(store.num_users)):
        items, _ = store.history(user)
        place = len(items) - 2
        domain = domains[items[place]]
        drawn = requests.batch(np.array([number])).candidates
        found.append(
            SimpleNamespace(
                target=int(items[place]),
                met=set(items[:place].tolist()),
                domain=int(domain),
                switched=bool(domain != domains[items[place - 1]]),
                candidates=drawn,
                whole=np.flatnonzero(domains == domain).tolist(),
            )
        )
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_gauc_and_ne_are_what_a_walk_over_requests_finds(tiny_store: Path) -> None:
    dataset, settings = opened(tiny_store)
    model = Scoring().train()
    values = evaluate(model, dataset, settings, 7, CPU)
    assert model.training
    requests = walk(dataset)
    names = dataset.requests.store.catalog.domain_names
    groups = {
        "": requests,
        "[switch]": [r for r in requests if r.switched],
        "[stay]": [r for r in requests if not r.switched],
        **{f"[{name}]": [r for r in requests if names[r.domain] == name] for name in names},
    }
    base = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    for suffix, members in groups.items():
        auc, ne = [], []
        for request in members:
            true, *drawn = model.score(request.candidates).tolist()
            auc.append(mean([(true > one) + (true == one) / 2 for one in drawn]))
            ne.append(-(math.log(true) + sum(math.log(1 - one) for one in drawn)) / 5 / base)
        assert values[f"gauc{suffix}"] == pytest.approx(mean(auc))
        assert values[f"ne{suffix}"] == pytest.approx(mean(ne))
    assert not any(name.startswith("hr@") for name in values)


@pytest.mark.parametrize(("ranked", "chunk"), [(1000, 11), (7, 40)])
def test_ranks_among_the_domain_are_what_a_walk_finds(
    tiny_store: Path, ranked: int, chunk: int
) -> None:
    dataset, settings = opened(tiny_store, norm_length=7 + chunk, ranked_requests=ranked)
    model = Scoring()
    values = evaluate(model, dataset, settings, 7, CPU)
    requests = walk(dataset)
    count = min(ranked, len(requests))
    requests = [requests[at * len(requests) // count] for at in range(count)]
    hits, gains = [], []
    for request in requests:
        scores = dict(zip(request.whole, model.score(torch.tensor(request.whole)).tolist()))
        rank = sum(
            score >= scores[request.target]
            for item, score in scores.items()
            if item not in request.met
        )
        is_hit = request.target not in request.met and rank <= 10
        hits.append(float(is_hit))
        gains.append(1 / math.log2(rank + 1) if is_hit else 0.0)
    assert values["count"] == count
    assert values["hr@10"] == pytest.approx(mean(hits))
    assert values["ndcg@10"] == pytest.approx(mean(gains))
    assert 0 < values["hr@10"] < 1
    assert max(model.widths) == min(chunk, 30)


def test_scores_that_are_not_finite_are_refused(tiny_store: Path) -> None:
    dataset, settings = opened(tiny_store, norm_length=40, ranked_requests=3)
    model = Scoring(lambda items: items.double() / 0 - items.double() / 0)
    with pytest.raises(HstuXdError, match="scores that are not finite"):
        evaluate(model, dataset, settings, 7, CPU)


def test_ranking_in_chunks_needs_a_norm_length() -> None:
    with pytest.raises(InputError, match=r"xd_dlrm.ranked_requests = 5 needs xd_dlrm.norm_length"):
        DlrmSettings(ranked_requests=5)
    with pytest.raises(InputError, match=r"above max_history = 200, got 201"):
        DlrmSettings(ranked_requests=5, norm_length=201)
    assert DlrmSettings(ranked_requests=5, norm_length=202).chunk_length == 1


def test_a_score_does_not_depend_on_the_chunk(tiny_store: Path) -> None:
    bindings = "xd_encoder.domain_mask = True\nxd_encoder.tape = True\nxd_encoder.ddsr = True"
    gin.parse_config(bindings)
    sizes = {
        "hstu_attn_num_layers": 2,
        "hstu_num_heads": 2,
        "hstu_attn_qk_dim": 4,
        "hstu_attn_linear_dim": 4,
        "hstu_transducer_embedding_dim": 8,
        "hstu_embedding_table_dim": 8,
    }
    dataset, _ = opened(tiny_store, norm_length=60, **sizes)
    model, _, _ = train_utils.make_model(f"xd:{tiny_store}")
    model._embedding_collection.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval()

    def scores(items: Tensor) -> Tensor:
        numbers = np.arange(len(dataset.requests) - 6, len(dataset.requests))
        sample = dataset.features(dataset.requests.batch(numbers, items))
        with torch.no_grad():
            found = model(sample.uih_features_kjt, sample.candidates_features_kjt)[3]
        return found.view(6, -1)

    items = dataset.requests.store.catalog.items_of(1)
    whole = scores(items)
    chunks = torch.cat([scores(chunk) for chunk in items.split(7)], dim=1)
    torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-6)
    assert whole.std() > 1e-3
