"""Soft search as a view of the ranker: what it may see, where gradients go, beside hard search."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.interest.settings import InterestSettings
from hstu_xd.ranking.batches import RequestBatch, RequestData
from hstu_xd.ranking.histories import HistoryIndex, Questions
from hstu_xd.ranking.model import Ranker
from hstu_xd.ranking.settings import RankingSettings, SearchSettings
from hstu_xd.search import soft

Cli = Callable[..., Any]
CHOSEN = np.array([5, 2, 11])


@pytest.fixture(scope="module")
def index(store: InteractionStore) -> HistoryIndex:
    return HistoryIndex.of(store)


@pytest.fixture
def made(
    index: HistoryIndex, requests_path: Path
) -> Callable[..., tuple[Ranker, RequestBatch, RequestData]]:
    def make(interest: str = "none", **search: Any) -> tuple[Ranker, RequestBatch, RequestData]:
        options = {"soft": "decoupled", "k": 6} | search
        settings = RankingSettings(SearchSettings(**options), InterestSettings(kind=interest))
        data = RequestData(index, RequestSet.open(requests_path), settings)
        torch.manual_seed(0)
        known = np.ones(len(index.levels.paths), np.bool_)
        return (
            Ranker(index.levels, known, 2, settings),
            data.batch(CHOSEN),
            data,
        )

    return make


def test_histories_end_before_their_request(
    made: Any, store: InteractionStore, requests_path: Path
) -> None:
    _, batch, _ = made()
    requests = RequestSet.open(requests_path)
    offsets = batch.histories.offsets.tolist()
    for place, number in enumerate(CHOSEN.tolist()):
        items, times = store.history(int(requests.users[number]))
        at = int(requests.times[number])
        assert (times >= at).any()
        part = slice(offsets[place], offsets[place + 1])
        assert batch.histories.items[part].tolist() == items[times < at].tolist()
        assert batch.histories.gaps[part].tolist() == (at - times[times < at]).tolist()


def test_never_an_event_at_or_after_the_request(
    index: HistoryIndex, store: InteractionStore
) -> None:
    draw = np.random.default_rng(0)
    users = draw.integers(0, store.num_users, 4_000)
    picked = draw.integers(store.offsets[users], store.offsets[users + 1])
    times = np.asarray(store.timestamps)[picked]
    events, offsets = index.before(users, times)
    owner = np.repeat(np.arange(len(users)), np.diff(offsets))
    assert len(events) > 300_000
    assert (np.asarray(store.timestamps)[events] < times[owner]).all()
    assert (events >= store.offsets[users][owner]).all()
    assert (events < store.offsets[users + 1][owner]).all()
    next_time = np.asarray(store.timestamps)[store.offsets[users] + np.diff(offsets)]
    assert (next_time >= times).all()


@pytest.mark.parametrize("tables", soft.TABLES)
def test_view_of_a_request_is_that_of_the_request_alone(tables: str, made: Any) -> None:
    model, batch, data = made(soft=tables)
    batch.candidates[0, -1] = 0
    view = model.soft(batch)
    assert not view[0, -1].any()
    for place, number in enumerate(CHOSEN.tolist()):
        alone = data.batch(np.array([number]))
        alone.candidates[0, :] = batch.candidates[place]
        torch.testing.assert_close(model.soft(alone)[0], view[place], atol=1e-6, rtol=1e-5)


def test_chunks_of_the_history_change_nothing(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = made()
    model.double()
    whole = model.soft(batch)
    monkeypatch.setattr(soft, "SCORES_AT_ONCE", 10)
    torch.testing.assert_close(model.soft(batch), whole, atol=1e-12, rtol=1e-12)


def test_loss_is_that_of_the_ranker_and_of_all_events(made: Any) -> None:
    model, batch, _ = made()
    mask, goals = batch.mask, batch.goals
    assert goals.unique().tolist() == [0, 1]
    labels = batch.labels[mask]
    own = torch.nn.functional.binary_cross_entropy_with_logits(
        model(batch)[mask], labels, reduction="sum"
    )
    view, logits = model.soft.learn(batch)
    torch.testing.assert_close(view, model.soft(batch))
    chosen = logits[torch.arange(len(logits)), goals.repeat_interleave(mask.sum(1))]
    beside = torch.nn.functional.binary_cross_entropy_with_logits(chosen, labels, reduction="sum")
    torch.testing.assert_close(model.loss(batch), own + beside)
    model.soft.over_all = None
    torch.testing.assert_close(model.loss(batch), own)


def test_auxiliary_loss_teaches_tables_of_events_that_were_not_found(made: Any) -> None:
    """Only the auxiliary loss reaches the attention embedding of an item that is not found."""
    touched = {}
    for auxiliary in (True, False):
        model, batch, _ = made(k=1, auxiliary=auxiliary)
        model.loss(batch).backward()
        attention = model.soft.search.attention[0][0].weight.grad
        representation = model.soft.search.representation[0][0].weight.grad
        touched[auxiliary] = [(g != 0).any(1).sum().item() for g in (attention, representation)]
        unread = set(batch.histories.items.tolist()) | set(batch.candidates.flatten().tolist())
        assert max(touched[auxiliary]) <= len(unread)
    assert all(a > b for a, b in zip(touched[True], touched[False], strict=True))
    # One event that was found weighs 1 whatever its score is: attention learns nothing without.
    assert touched[False][0] == 0 < touched[False][1]


def test_attention_finds_and_representation_is_read(made: Any) -> None:
    model, batch, _ = made()
    before = model.soft(batch)
    asked_width = before.shape[-1] // 3
    with torch.no_grad():
        for fields in model.soft.search.attention:  # both sides: products stay
            fields[0].weight.mul_(-1)
        torch.testing.assert_close(model.soft(batch), before)
        for fields in model.soft.search.attention:
            fields[0].weight.normal_()
        other = model.soft(batch)
        torch.testing.assert_close(other[..., :asked_width], before[..., :asked_width])
        assert not torch.allclose(other[..., asked_width:], before[..., asked_width:])
        for fields in model.soft.search.representation:
            fields[0].weight.zero_()
        assert not model.soft(batch).any()


@pytest.mark.parametrize("tables", soft.TABLES)
def test_every_table_has_the_rate_of_tables_once(tables: str, made: Any) -> None:
    model, _, _ = made(soft=tables)
    rated = list(map(id, model.tables()))
    assert len(rated) == len(set(rated))
    for name, weights in model.named_parameters():
        is_layer = any(part in name for part in ("head", "over_all", "projection"))
        assert (id(weights) in rated) != is_layer, name


def test_hard_and_soft_are_views_side_by_side(made: Any) -> None:
    both, batch, _ = made("tin", kind="hard")
    hard, without, _ = made("tin", kind="hard", soft="none")
    assert without.histories is None
    assert torch.equal(batch.events, without.events)
    assert both.head[0].in_features == hard.head[0].in_features + both.soft.out_features
    with torch.no_grad():
        moved = both(batch)
        both.soft.search.times.weight[1:].mul_(-3)
        assert not torch.equal(both(batch), moved)


def test_attention_may_be_narrower(made: Any) -> None:
    model, batch, _ = made(width=8, attention_width=2)
    assert model.soft.search.attention[0][0].weight.shape[1] == 2
    assert model.soft(batch).shape[-1] == 3 * 8 * model.soft.rows.shape[1]


def test_quotas_and_scope_of_hard_search(index: HistoryIndex, store: InteractionStore) -> None:
    draw = np.random.default_rng(1)
    asked = Questions(
        draw.integers(0, store.num_users, 50),
        draw.integers(1, store.num_items + 1, 50),
        np.full(50, 4_000_000_000),
    )
    names = ("item", "type", "aisle")
    places = [index.levels.place(name) for name in names]
    found = index.hard(asked, 9, levels=names, quotas=(1, 0, 3), fill=False, within_domain=True)
    for row in range(50):
        own = index.levels.paths[asked.items[row]]
        items = index.read(found[row][found[row] >= 0])[0]
        matches = index.levels.paths[items][:, places] == own[places]
        level = matches.argmax(1)
        assert (index.levels.paths[items][:, -1] == own[-1]).all()
        assert (level == 0).sum() <= 1
        assert (level == 2).sum() <= 3
    with pytest.raises(InputError, match=r"xd_search.quotas = \(1, 2\) are 2; one for each of"):
        index.hard(asked, 3, levels=names, quotas=(1, 2))


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["xd_search.soft = 'decouple'"], "it must be one of none, decoupled, shared"),
        (
            ["xd_search.soft = 'shared'", "xd_search.attention_width = 4"],
            "one table has one width; leave it out, or take other tables",
        ),
        (["xd_search.scope = 'own'"], "it must be one of all, target_domain"),
        (["xd_search.quotas = (-1,)"], "it must be 0 or more"),
        (
            ["xd_search.kind = 'hard'", "xd_search.quotas = (3,)"],
            "xd_search.quotas = (3,) are 1; one for each of the 4 levels is needed: item, type",
        ),
    ],
)
def test_bad_settings_are_refused(
    bindings: list[str], message: str, cli: Cli, requests_path: Path, tmp_path: Path
) -> None:
    words = [word for binding in bindings for word in ("--gin_bindings", binding)]
    said = cli("rank", "--data", requests_path, "--out", tmp_path / "a", *words)
    assert said.code == 2
    assert message in said.err
    assert not (tmp_path / "a").exists()


def test_padding_of_requests_without_events(made: Any) -> None:
    model, batch, _ = made()
    empty = replace(
        batch,
        histories=type(batch.histories)(
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, dtype=torch.long),
            torch.zeros(len(CHOSEN) + 1, dtype=torch.long),
        ),
    )
    width = model.soft.out_features // 3
    view = model.soft(empty)
    assert view[..., :width].any()
    assert not view[..., width:].any()
    assert torch.isfinite(model.loss(empty))


def test_scope_keeps_other_domains_out_of_what_fills(
    index: HistoryIndex, store: InteractionStore
) -> None:
    items = np.arange(1, 31)
    asked = Questions(np.arange(30) % store.num_users, items, np.full(30, 4_000_000_000))
    own = index.levels.paths[items][:, -1:]
    for within in (True, False):
        found = index.hard(asked, 20, levels=("item",), within_domain=within)
        other = (index.levels.paths[index.read(found)[0]][..., -1] != own) & (found >= 0)
        assert other.any() != within


def test_four_tables_keep_candidates_and_events_apart(made: Any) -> None:
    model, batch, _ = made(soft="four")
    before, width = model.soft(batch), model.soft.out_features // 3
    with torch.no_grad():
        for fields in model.soft.search.representation:
            fields[1].weight.zero_()
        assert torch.equal(model.soft(batch)[..., :width], before[..., :width])
        assert not model.soft(batch)[..., width:].any()


@pytest.mark.parametrize("tables", soft.TABLES)
def test_runs_of_all_tables_are_saved_and_measured(
    tables: str, requests_path: Path, tmp_path: Path, cli: Cli
) -> None:
    own = (f"xd_search.soft = '{tables}'", "xd_rank.num_epochs = 1", "xd_search.k = 5")
    given = [word for binding in own for word in ("--gin_bindings", binding)]
    said = cli("rank", "--data", requests_path, "--out", tmp_path / "run", *given)
    assert said.code == 0, said.err
    assert cli("evaluate", tmp_path / "run").code == 0
