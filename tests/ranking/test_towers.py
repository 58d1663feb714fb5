"""Towers: their formula, one pass for all goals, an index that finds what full scoring finds."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.interest.settings import InterestSettings
from hstu_xd.ranking.batches import RequestBatch, RequestData
from hstu_xd.ranking.histories import HistoryIndex
from hstu_xd.ranking.settings import (
    RankingSettings,
    RankSettings,
    SearchSettings,
    load_ranking_settings,
    variant_name,
)
from hstu_xd.ranking.towers import TowerRanker
from hstu_xd.serving.retrieval import InvertedLists

Cli = Callable[..., Any]
GOALS = 2
READOUTS = ("goal", "layer", "tower", "embedding", "shared")


@pytest.fixture(scope="module")
def index(store: InteractionStore) -> HistoryIndex:
    return HistoryIndex.of(store)


@pytest.fixture
def made(
    index: HistoryIndex, requests_path: Path
) -> Callable[..., tuple[TowerRanker, RequestBatch]]:
    def make(**interest: Any) -> tuple[TowerRanker, RequestBatch]:
        settings = RankingSettings(
            SearchSettings(k=8),
            InterestSettings(kind="towers", **interest),
            RankSettings(item_width=8, level_width=8),
        )
        known = np.ones(len(index.levels.paths), np.bool_)
        torch.manual_seed(0)
        model = TowerRanker(index.levels, known, GOALS, settings).double().eval()
        with torch.no_grad():  # as after some training
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        data = RequestData(index, RequestSet.open(requests_path), settings)
        return model, data.batch(np.array([5, 2, 11, 40]))

    return make


def with_goals(batch: RequestBatch, goal: int) -> RequestBatch:
    return replace(batch, goals=torch.full_like(batch.goals, goal))


@torch.no_grad()
@pytest.mark.parametrize("readout", READOUTS)
def test_an_index_finds_what_full_scoring_finds(
    made: Any, store: InteractionStore, readout: str
) -> None:
    model, batch = made(readout=readout)
    catalogue = torch.arange(1, store.num_items + 1)
    everything = catalogue.expand(len(batch.goals), -1)
    asked, items = model.user_vectors(batch), model.item_vectors(catalogue)
    assert asked.shape == (len(batch.goals), GOALS, items.shape[1])
    for goal in range(GOALS):
        full = model(with_goals(replace(batch, candidates=everything), goal))
        scores = asked[:, goal] @ items.T
        torch.testing.assert_close(scores + model.bias[goal], full, rtol=0, atol=1e-12)
        assert (scores.topk(10).indices == full.topk(10).indices).all()


@torch.no_grad()
def test_faiss_finds_the_same(made: Any, store: InteractionStore) -> None:
    pytest.importorskip("faiss", reason="no faiss here: the towers' index is NOT covered")
    model, batch = made()
    items = model.item_vectors(torch.arange(1, store.num_items + 1)).float()
    lists = InvertedLists(items)
    asked = model.user_vectors(batch)[:, 0].float()
    best = (asked @ items.T).topk(5)
    for row in range(len(asked)):
        scores, places = lists.nearest(asked[row], 5)
        # Of the lists that are looked at, every score is the true one.
        torch.testing.assert_close(scores, items[places] @ asked[row], rtol=0, atol=1e-4)
        assert scores[0] <= best.values[row, 0] + 1e-4


@torch.no_grad()
def test_candidates_do_not_see_each_other(made: Any) -> None:
    model, batch = made()
    together = model(batch)
    for place in range(batch.candidates.shape[1]):
        alone = model(replace(batch, candidates=batch.candidates[:, [place]]))
        torch.testing.assert_close(alone[:, 0], together[:, place], rtol=0, atol=1e-12)


def states_of(model: TowerRanker, batch: RequestBatch) -> tuple[Tensor, int]:
    """The last shared layer's output, and how often a layer of any encoder was run."""
    seen: list[Tensor] = []
    runs = []
    hooks = [model.shared[-1].register_forward_hook(lambda *found: seen.append(found[2]))]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            hooks.append(module.register_forward_hook(lambda *_: runs.append(1)))
    with torch.no_grad():
        model.user_vectors(batch)
    for hook in hooks:
        hook.remove()
    return seen[-1], len(runs)


def test_one_pass_serves_all_goals(made: Any) -> None:
    for readout, passes in (("goal", 2), ("shared", 2), ("embedding", 2), ("layer", 1 + GOALS)):
        model, batch = made(readout=readout)
        assert states_of(model, batch)[1] == passes
    model, _ = made(readout="tower")
    assert (len(model.shared), [len(layers) for layers in model.own]) == (0, [2] * GOALS)


def test_an_event_reads_those_before_it_and_itself(made: Any) -> None:
    model, batch = made()
    before, _ = states_of(model, batch)
    place = 3
    events = batch.events.clone()
    events[:, place] = events[:, place] % 100 + 1
    assert (events[:, place] != batch.events[:, place]).all()
    after, _ = states_of(model, replace(batch, events=events))
    changed = (after - before).abs().sum(-1) > 1e-9
    assert changed[:, : place + 1].all()  # it, and those after it, which stand before it
    assert not changed[:, place + 1 :].any()


@torch.no_grad()
def test_padding_is_not_read(made: Any) -> None:
    model, batch = made()
    empty = torch.zeros_like(batch.events)
    cut = empty.clone()
    cut[:, :5] = batch.events[:, :5]
    padded = model(replace(batch, events=cut))
    short = replace(batch, events=batch.events[:, :5], buckets=batch.buckets[:, :5])
    torch.testing.assert_close(padded, model(short), rtol=0, atol=1e-12)
    nobody = model.user_vectors(replace(batch, events=empty))
    assert nobody.isfinite().all()
    torch.testing.assert_close(nobody, nobody[:1].expand_as(nobody), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_read_out_is_attention_of_a_learned_query(made: Any) -> None:
    model, batch = made()
    states, _ = states_of(model, batch)
    states = nn.functional.layer_norm(states, states.shape[-1:], model.norm.weight, model.norm.bias)
    inner = model.queries.shape[1]
    likeness = model.queries @ states.transpose(1, 2) / math.sqrt(inner)
    hidden = nn.functional.pad(batch.events == 0, (0, 1))
    read = likeness.masked_fill(hidden[:, None], -math.inf).softmax(-1) @ states
    vectors = model.item_vectors(batch.candidates)
    for goal in range(GOALS):
        mapped = vectors @ model.maps[goal].T
        scores = (mapped @ read[:, goal, :, None])[..., 0] / math.sqrt(inner) + model.bias[goal]
        torch.testing.assert_close(scores, model(with_goals(batch, goal)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("readout", READOUTS)
def test_what_goals_share(made: Any, readout: str) -> None:
    model, batch = made(readout=readout)
    model.loss(with_goals(batch, 0)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    found = [model(with_goals(batch, goal)) - model.bias[goal] for goal in range(GOALS)]
    assert torch.allclose(*found) == (readout == "shared")
    if readout in ("goal", "layer", "tower"):
        assert model.maps.grad[0].abs().sum() > 0
        assert model.maps.grad[1].abs().sum() == 0
        assert model.queries.grad[1].abs().sum() == 0
    if readout in ("layer", "tower"):
        idle = [p.grad for p in model.own[1].parameters()]
        assert all(grad is None or not grad.any() for grad in idle)


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["xd_search.kind = 'hard'"], "xd_search.kind = 'hard' with xd_interest.kind = 'towers'"),
        (["xd_search.soft = 'four'"], "give xd_search.soft = 'none', or another kind"),
        (["xd_interest.counts = True"], "give xd_interest.counts = False, or another kind"),
    ],
)
def test_what_reads_the_candidate_is_refused(bindings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_ranking_settings([], ["xd_interest.kind = 'towers'", *bindings])


def test_heads_divide_the_width(made: Any) -> None:
    with pytest.raises(InputError, match=r"xd_interest.heads = 3 does not divide 32"):
        made(heads=3)


def test_a_recipe_trains_and_is_named(requests_path: Path, tmp_path: Path, cli: Cli) -> None:
    recipe = ("--gin_config_file", "gin/standalone/rank_towers.gin")
    quick = ("--gin_bindings", "xd_rank.num_epochs = 1", "--gin_bindings", "xd_search.k = 10")
    said = cli("rank", "--data", requests_path, "--out", tmp_path / "run", *recipe, *quick)
    assert said.code == 0, said.err
    assert cli("evaluate", tmp_path / "run").code == 0
    settings = load_ranking_settings([Path(recipe[1])], ["xd_interest.readout = 'shared'"])
    assert variant_name(settings) == "towers + read-out shared"
