"""The domain branch: what it reads, that nothing of the future does, and how it begins."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.interest.settings import InterestSettings
from hstu_xd.model.encoder import CrossDomainEncoder
from hstu_xd.model.inputs import next_domain_signal
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import Events
from hstu_xd.ranking.batches import RequestBatch, RequestData
from hstu_xd.ranking.domain_branch import Encoded
from hstu_xd.ranking.histories import HistoryIndex, Questions
from hstu_xd.ranking.model import Ranker
from hstu_xd.ranking.settings import (
    RankingSettings,
    RankSettings,
    SearchSettings,
    ShortSettings,
)
from hstu_xd.ranking.task import RankingTask, training_events

Cli = Callable[..., Any]
CHOSEN = np.array([5, 2, 11, 40])
EVENTS = 12
XD = {"domain_mask": True, "target_view_heads": 2, "tape": True, "ddsr": True}
ENCODERS: dict[str, dict[str, Any]] = {
    "hstu": {},
    "target": {"target_domain_embedding": True},
    "mask": {"domain_mask": True},
    "xd": XD,
    "tokens": XD | {"segment_by": "count", "segment_length": 3, "history_tokens": 2},
    "days": XD | {"segment_by": "time_gap", "segment_gap": 300_000, "history_tokens": 1},
}
every_encoder = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture(scope="module")
def index(store: InteractionStore) -> HistoryIndex:
    return HistoryIndex.of(store)


BOTH = {"tape": True, "domain_states": True}


def settings_with(
    search: str = "recent", interest: dict[str, Any] | None = None, **encoder: Any
) -> RankingSettings:
    return RankingSettings(
        SearchSettings(kind=search, k=5),
        InterestSettings(**(interest or {})),
        RankSettings(item_width=6, level_width=6),
        short=ShortSettings(events=EVENTS, width=16),
        encoder=EncoderSettings(1, 1, dqk=4, dv=4, **encoder),
    )


def ranker_of(index: HistoryIndex, settings: RankingSettings) -> Ranker:
    """As after some training: what begins as zero is not."""
    torch.manual_seed(0)
    known = np.ones(len(index.levels.paths), np.bool_)
    model = Ranker(index.levels, known, 2, settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def made(
    index: HistoryIndex, requests_path: Path
) -> Callable[..., tuple[Ranker, RequestBatch, RequestData]]:
    def make(
        search: str = "recent", interest: dict[str, Any] | None = None, **encoder: Any
    ) -> tuple[Ranker, RequestBatch, RequestData]:
        settings = settings_with(search, interest, **encoder)
        data = RequestData(index, RequestSet.open(requests_path), settings)
        return ranker_of(index, settings), data.batch(CHOSEN), data

    return make


def encoded_by(model: Ranker, batch: RequestBatch) -> Encoded:
    """What the branch says."""
    items = batch.latest.items
    domains = model.domains
    return model.branch(model.items(items), domains[items], batch.latest, domains[batch.candidates])


def read_by(model: Ranker, batch: RequestBatch) -> Tensor:
    """What it says of every candidate: (R, C, d)."""
    return encoded_by(model, batch).read


def hidden_alone(
    model: Ranker, items: Tensor, times: Tensor, request_time: int, domain: int
) -> Tensor:
    """A history that ends in a request for one domain, encoded as training would encode it."""
    branch, domains = model.branch, model.domains[items]
    following = torch.cat([domains[1:], torch.tensor([domain])])
    events = Events(
        domains=domains,
        target_domains=following,
        timestamps=times,
        next_timestamps=torch.cat([times[1:], torch.tensor([request_time])]),
        offsets=torch.tensor([0, len(items)]),
    )
    signal = next_domain_signal(branch._tape, branch._target_domain_emb, domains, following)
    x = branch._input(branch._project(model.items(items)), events.positions, signal)
    return branch._norm(branch._encoder(x, events))


def history_of(
    store: InteractionStore, requests: RequestSet, number: int
) -> tuple[Tensor, Tensor, int]:
    """The latest events of a request, and its time."""
    items, times = map(torch.tensor, store.history(int(requests.users[number])))
    at = int(requests.times[number])
    there = times < at
    assert not there.all()
    return items[there][-EVENTS:].long(), times[there][-EVENTS:], at


@torch.no_grad()
@every_encoder
def test_a_candidate_reads_what_the_encoder_says_of_it_alone(
    name: str, made: Any, store: InteractionStore, requests_path: Path
) -> None:
    model, batch, _ = made(**ENCODERS[name])
    requests, found = RequestSet.open(requests_path), read_by(model, batch)
    checked = set()
    for place, number in enumerate(CHOSEN.tolist()):
        history = history_of(store, requests, number)
        for column in range(batch.candidates.shape[1]):
            domain = int(model.domains[batch.candidates[place, column]])
            wanted = model.branch._read(hidden_alone(model, *history, domain)[-1])
            torch.testing.assert_close(found[place, column], wanted, rtol=0, atol=1e-10)
            checked.add((place, domain))
    assert len(checked) == 2 * len(CHOSEN)
    single = read_by(model.float(), batch)
    torch.testing.assert_close(single, found.float(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_only_the_domain_of_a_candidate_is_asked(made: Any) -> None:
    model, batch, _ = made(**XD)
    found, domains = read_by(model, batch), model.domains[batch.candidates]
    for row in range(len(CHOSEN)):
        one, other = (found[row][domains[row] == domain] for domain in (0, 1))
        assert (one == one[0]).all()
        assert (other == other[0]).all()
        assert (one[0] - other[0]).abs().max() > 1e-3
    before = model(batch)
    model.domains = 1 - model.domains  # of events, too: what is the same and what changes is new
    assert (model(batch) - before).abs().min() > 0


@torch.no_grad()
def test_without_a_switch_that_reads_it_no_domain_is_told(made: Any) -> None:
    model, batch, _ = made()
    found = read_by(model, batch)
    torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_layers_read_the_branch_and_its_product_with_the_candidate(made: Any) -> None:
    model, batch, _ = made(**XD)
    read: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    model(batch)
    found, candidates = read_by(model, batch), model.items(batch.candidates)
    start, width = model.interest.out_features, candidates.shape[-1]
    views = read[0][..., start : start + 2 * width].split(width, -1)
    assert torch.equal(views[0], found)
    assert torch.equal(views[1], found * candidates)


@torch.no_grad()
@every_encoder
def test_states_are_what_the_latest_event_of_a_domain_left(
    name: str, made: Any, store: InteractionStore, requests_path: Path
) -> None:
    model, batch, _ = made(interest=BOTH, **ENCODERS[name])
    requests, (_, states, ages) = RequestSet.open(requests_path), encoded_by(model, batch)
    for place, number in enumerate(CHOSEN.tolist()):
        items, times, at = history_of(store, requests, number)
        domains = model.domains[items]
        hidden = hidden_alone(model, items, times, at, int(domains[-1]))
        for domain in (0, 1):
            row = int((domains == domain).nonzero()[-1])
            wanted = model.branch._state(hidden[row])
            torch.testing.assert_close(states[place, domain], wanted, rtol=0, atol=1e-10)
            assert ages[place, domain] == at - times[row]


@torch.no_grad()
@pytest.mark.parametrize("search", ["recent", "hard"])
def test_states_are_read_as_one_more_event_each(search: str, made: Any) -> None:
    """Of which the mean takes those that there are."""
    model, batch, _ = made(search, {"kind": "mean", "domain_states": True}, **XD)
    items, gaps, offsets, _ = batch.latest
    one = int((model.domains[items[:EVENTS]] == 1).nonzero()[0])
    assert one < EVENTS - 1
    latest = type(batch.latest)(
        torch.cat([items[one : one + 1], items[EVENTS:]]),
        torch.cat([gaps[one : one + 1], gaps[EVENTS:]]),
        (offsets - EVENTS + 1).clamp(min=0),
    )
    batch = replace(batch, latest=latest)
    encoded, candidates = encoded_by(model, batch), model.items(batch.candidates)
    assert (encoded.ages > 0).tolist() == [[False, True]] + 3 * [[True, True]]
    found = model._interest_in(candidates, batch, encoded)
    found = found[..., : candidates.shape[-1]]
    events = model.items(batch.events).view(len(CHOSEN), -1, 5, candidates.shape[-1])
    for row, domains in ((0, [1]), (2, [0, 1])):
        for column in (0, 3):
            own = events[row, column if search == "hard" else 0]
            wanted = torch.cat([own, encoded.states[row, domains]]).mean(0)
            torch.testing.assert_close(found[row, column], wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_switch_is_told_of_candidates_of_another_domain(made: Any) -> None:
    model, batch, _ = made(interest={"tape": True}, **XD)
    told, tape = model._switches(batch, model.tape), model.tape
    last = model.domains[batch.latest.items][batch.latest.offsets[1:] - 1]
    assert last.unique().tolist() == [0, 1]
    left, entered = tape._transition(tape._domain_emb.weight), tape._domain_emb.weight
    for row, candidates in enumerate(model.domains[batch.candidates].tolist()):
        for column, domain in enumerate(candidates):
            wanted = tape._scale * entered[domain] * left[last[row]] * (domain != last[row])
            torch.testing.assert_close(told[row, column], wanted)
    none = type(batch.latest)(*(x[:0] for x in batch.latest[:2]), batch.latest.offsets * 0)
    assert not model._switches(replace(batch, latest=none), tape).any()
    candidates = model.items(batch.candidates)
    with_switch = model._interest_in(candidates, batch, None)
    model.tape = None
    plain = model._interest_in(candidates + told, batch, None)
    torch.testing.assert_close(with_switch, plain)
    assert not torch.allclose(with_switch, model._interest_in(candidates, batch, None))


@torch.no_grad()
@pytest.mark.parametrize("events", [0, EVENTS])
def test_nothing_is_told_of_a_switch_at_first(
    events: int, index: HistoryIndex, requests_path: Path
) -> None:
    """To the bit; the encoder is not needed for it."""
    known, scores = np.ones(len(index.levels.paths), np.bool_), []
    for tape in (False, True):
        settings = settings_with(interest={"tape": tape}, **XD)
        settings = replace(settings, short=replace(settings.short, events=events))
        data = RequestData(index, RequestSet.open(requests_path), settings)
        torch.manual_seed(0)
        scores.append(Ranker(index.levels, known, 2, settings).eval()(data.batch(CHOSEN)))
    assert torch.equal(*scores)


@torch.no_grad()
@pytest.mark.parametrize("search", ["recent", "hard"])
def test_candidates_do_not_see_each_other(search: str, made: Any) -> None:
    model, batch, _ = made(search, BOTH, **XD)
    together = model(batch)
    for place in range(batch.candidates.shape[1]):
        alone, counts = batch.candidates[:, [place]], batch.counts[:, [place]]
        own = {}
        if search == "hard":
            shape = batch.candidates.shape
            own = {
                name: getattr(batch, name).view(*shape, -1)[:, place]
                for name in ("events", "buckets")
            }
        alone = model(replace(batch, candidates=alone, counts=counts, **own))
        torch.testing.assert_close(alone[:, 0], together[:, place], rtol=0, atol=1e-12)


@torch.no_grad()
@every_encoder
def test_nothing_at_or_after_a_request_reaches_a_score(
    name: str, index: HistoryIndex, store: InteractionStore, requests_path: Path
) -> None:
    settings = settings_with("hard", BOTH, **ENCODERS[name])
    model, requests = ranker_of(index, settings), RequestSet.open(requests_path)
    times, items = np.asarray(store.timestamps), np.asarray(store.item_ids)
    owner = np.repeat(np.arange(store.num_users), np.diff(store.offsets))
    for number in CHOSEN.tolist():
        chosen, scores = np.array([number]), []
        at, mine = requests.times[number], owner == requests.users[number]
        same_second = mine & (times == at)
        assert same_second.any()
        latest = np.flatnonzero(mine & (times < at))[-1]
        for changed in (np.zeros_like(mine), mine & (times >= at), np.arange(len(mine)) == latest):
            other = np.where(changed, items % store.num_items + 1, items)
            later = np.where(mine & (times > at), times + 5, times)
            now = later if changed.sum() > 1 else times
            data = RequestData(
                HistoryIndex(index.levels, store.offsets, other, now), requests, settings
            )
            scores.append(model(data.batch(chosen)))
        assert (scores[1] - scores[0]).abs().max() == 0.0
        assert (scores[2] - scores[0]).abs().max() > 0


def test_the_latest_events_before_a_time(index: HistoryIndex, store: InteractionStore) -> None:
    draw = np.random.default_rng(0)
    users = draw.integers(0, store.num_users, 300)
    times = np.array([int(draw.choice(store.history(int(user))[1])) for user in users])
    times[0] = 0
    grown = HistoryIndex.of(store)
    grown.append(0, 1, 4_000_000_000)
    assert (users == 0).any()
    for most in (1, 7, 10_000):
        for one in (index, grown):
            events, offsets = one.before(users, times, most)
            for row in range(len(users)):
                at = store.history(int(users[row]))[1]
                first = store.offsets[users[row]]
                wanted = first + np.flatnonzero(at < times[row])[-most:]
                assert events[offsets[row] : offsets[row + 1]].tolist() == wanted.tolist()
    late = np.array([5_000_000_000])
    events, _ = grown.before(np.array([0]), late, 2)
    assert grown.read(events)[0].tolist() == [store.history(0)[0][-1], 1]
    found = index.recent(Questions(users, np.zeros_like(users), times), 7)
    assert np.array_equal(index.before(users, times, 7)[0], found[:, ::-1][found[:, ::-1] >= 0])


@torch.no_grad()
def test_tape_states_and_told_domain_begin_as_nothing(
    index: HistoryIndex, requests_path: Path
) -> None:
    switches = {"tape": True, "ddsr": True, "target_domain_embedding": True}
    known = np.ones(len(index.levels.paths), np.bool_)
    off, on = (
        Ranker(index.levels, known, 2, settings_with(**chosen)).double().eval()
        for chosen in ({}, switches)
    )
    on.load_state_dict(off.state_dict(), strict=False)
    data = RequestData(index, RequestSet.open(requests_path), settings_with())
    batch = data.batch(CHOSEN)
    torch.testing.assert_close(on(batch), off(batch), rtol=0, atol=1e-12)


@every_encoder
def test_every_part_learns(name: str, made: Any) -> None:
    model, batch, _ = made(interest=BOTH, **ENCODERS[name])
    items, gaps, offsets, _ = batch.latest
    offsets = (offsets - EVENTS + 1).clamp(min=0)  # the first has met one domain alone
    latest = type(batch.latest)(items[EVENTS - 1 :], gaps[EVENTS - 1 :], offsets)
    model.train()
    model.loss(replace(batch, latest=latest)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_events_are_encoded_once_a_request(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = made(**XD)
    rows, whole = [], CrossDomainEncoder.forward

    def counted(self: Any, x: Tensor, *given: Any, **named: Any) -> Tensor:
        rows.append(len(x))
        return whole(self, x, *given, **named)

    monkeypatch.setattr(CrossDomainEncoder, "forward", counted)
    batch.candidates[0, -1] = 0  # padding asks nothing
    model(batch)
    assert rows == [EVENTS * len(CHOSEN) + 2 * len(CHOSEN)]
    many = batch.candidates.repeat(1, 9)
    read_by(model, replace(batch, candidates=many))
    assert rows[1] == rows[0]


@torch.no_grad()
def test_without_events_nothing_is_said(made: Any) -> None:
    model, batch, _ = made(interest=BOTH, **XD)
    items, gaps, offsets, _ = batch.latest
    end = int(offsets[1])
    first = type(batch.latest)(items[:end], gaps[:end], offsets.clamp(max=end))
    found = read_by(model, replace(batch, latest=first))
    torch.testing.assert_close(found[0], read_by(model, batch)[0], rtol=0, atol=1e-12)
    assert not found[1:].any()
    none = type(first)(items[:0], gaps[:0], offsets * 0)
    assert not any(part.any() for part in encoded_by(model, replace(batch, latest=none)))
    assert model(replace(batch, latest=none)).isfinite().all()


def test_a_run_without_it_is_what_it_was(index: HistoryIndex, requests_path: Path) -> None:
    settings = RankingSettings(SearchSettings(k=5))
    known = np.ones(len(index.levels.paths), np.bool_)
    model = Ranker(index.levels, known, 2, settings)
    assert model.branch is None
    assert not [name for name in model.state_dict() if "branch" in name or "domains" in name]
    data = RequestData(index, RequestSet.open(requests_path), settings)
    assert data.batch(CHOSEN).latest is None
    assert "encoder" not in settings.facts()


def test_dropping_follows_from_the_step(
    index: HistoryIndex, store: InteractionStore, requests_path: Path, tmp_path: Path
) -> None:
    from hstu_xd.ranking.trainer import RankTrainer

    losses = []
    for drawn in (0, 7):
        requests = RequestSet.open(requests_path)
        settings = settings_with(linear_dropout_rate=0.5)
        trained = training_events(store, 2**40)
        trainer = RankTrainer(RankingTask(store, requests, settings, trained), tmp_path)
        torch.rand(drawn)  # as if somebody had drawn before
        for _ in range(2):
            trainer._step(CHOSEN)
        losses.append(trainer.progress.loss_sum)
    assert losses[0] == losses[1]


def test_a_store_of_one_domain(requests_path: Path, index: HistoryIndex) -> None:
    """There every candidate is asked the same."""
    one = replace(index.levels, domains=np.minimum(index.levels.domains, 0), num_domains=1)
    settings = settings_with(**XD)
    known = np.ones(len(one.paths), np.bool_)
    model = Ranker(one, known, 2, settings).double().eval()
    batch = RequestData(index, RequestSet.open(requests_path), settings).batch(CHOSEN)
    found = read_by(model, batch)
    assert (found == found[:, :1]).all()
