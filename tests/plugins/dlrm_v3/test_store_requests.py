"""Requests of a store against a walk over its users; needs no codebase."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from hstu_xd.cli.app import run
from hstu_xd.data.cuts import TimeCuts, cut_in_time
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.plugins.dlrm_v3.requests import StoreRequests
from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings


def requests_of(path: Path, **changed: Any) -> StoreRequests:
    options = {
        "split": "valid",
        "max_history": 6,
        "cut_points": 0,
        "num_candidates": 5,
        "seed": 1,
    }
    return StoreRequests(InteractionStore.open(path), **options | changed)


def walk(store: InteractionStore, split: str, cut_points: int, longest: int) -> list[tuple]:
    """(user, history, target, time) of every request, by the words of the docstring."""
    train, held_out = [], []
    for user in range(store.num_users):
        items, times = store.history(user)
        at = len(items) - (2 if split == "valid" else 1)
        asked = range(1, len(items) - 2)
        for place in list(asked)[-cut_points:] if cut_points else asked:
            train.append((user, items[:place][-longest:], items[place], times[place]))
        if at > 0:
            held_out.append((user, items[:at][-longest:], items[at], times[at]))
    return [*train, *held_out]


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("cut_points", [0, 2])
def test_requests_are_what_a_walk_over_users_finds(
    tiny_store: Path, split: str, cut_points: int
) -> None:
    requests = requests_of(tiny_store, split=split, cut_points=cut_points)
    store = requests.store
    expected = walk(store, split, cut_points, 6)
    assert len(requests) == len(expected)
    batch = requests.batch(np.arange(len(requests)))
    histories = batch.items.split(batch.history_lengths.tolist())
    for number, (user, history, target, time) in enumerate(expected):
        assert batch.users[number] == user
        assert histories[number].tolist() == history.tolist()
        assert batch.candidates[number * 5] == target
        assert batch.request_times[number * 5] == time
    assert torch.equal(batch.domains, store.catalog.domain_of(batch.items))
    assert requests.num_train == len(expected) - store.num_users


def walk_in_time(store: InteractionStore, split: str, cuts: TimeCuts, cut_points: int) -> list:
    """(user, length of the history, target, time) of every request."""
    train, held_out = [], []
    begin, end = cuts.valid_from, cuts.test_from
    if split == "test":
        begin, end = cuts.test_from, 10**18
    for user in range(store.num_users):
        events = list(zip(*store.history(user)))
        asked = [at for at, (_, time) in enumerate(events) if at and time < cuts.valid_from]
        for at in asked[-cut_points:] if cut_points else asked:
            train.append((user, at, *events[at]))
        period = [at for at, (_, time) in enumerate(events) if begin <= time < end]
        if period and period[0] > 0:
            held_out.append((user, period[-1], *events[period[-1]]))
    return [*train, *held_out]


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("cut_points", [0, 2])
def test_a_log_that_is_cut_in_time_trains_on_what_comes_before(
    tiny_store: Path, split: str, cut_points: int
) -> None:
    store = InteractionStore.open(tiny_store)
    cuts = cut_in_time(store.timestamps, 0.6, 0.8, told=("first", "second"))
    requests = requests_of(
        tiny_store, split=split, cut_points=cut_points, max_history=999, cuts=cuts
    )
    expected = walk_in_time(store, split, cuts, cut_points)
    batch = requests.batch(np.arange(len(requests)))
    found = zip(batch.users, batch.history_lengths, batch.candidates[::5], batch.request_times[::5])
    assert [tuple(map(int, each)) for each in found] == [tuple(map(int, e)) for e in expected]
    assert (batch.request_times[: requests.num_train * 5] < cuts.valid_from).all()
    asked = requests.evaluated()
    assert (store.timestamps[asked.places] >= cuts.valid_from).all()


def test_settings_cut_the_log(tiny_store: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = InteractionStore.open(tiny_store)
    assert DlrmSettings().cuts(store) is None
    cuts = DlrmSettings(valid_from=0.2, test_from=0.9).cuts(store)
    assert cuts == cut_in_time(store.timestamps, 0.2, 0.9, told=("first", "second"))
    with caplog.at_level(logging.WARNING):
        requests_of(tiny_store, cuts=cuts)
    assert f"have fewer than 2 events before {cuts.valid_from} and give no" in caplog.text


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((0.8, ""), r"xd_dlrm.valid_from = 0.8, xd_dlrm.test_from = ''; a cut in time needs both"),
        ((0.9, 0.8), r"xd_dlrm.valid_from = 0.9 and xd_dlrm.test_from = 0.8 do not cut the log"),
        (("soon", 0.9), r"xd_dlrm.valid_from = 'soon': write dates such as"),
    ],
)
def test_cuts_that_cannot_be_are_refused(cuts: tuple, message: str, tiny_store: Path) -> None:
    with pytest.raises(InputError, match=message):
        DlrmSettings(valid_from=cuts[0], test_from=cuts[1]).cuts(InteractionStore.open(tiny_store))


def test_candidates_are_of_the_targets_domain_and_labels_mark_the_target(tiny_store: Path) -> None:
    requests = requests_of(tiny_store)
    batch = requests.batch(np.arange(len(requests)))
    catalog = requests.store.catalog
    candidates = batch.candidates.view(-1, 5)
    domains = catalog.domain_of(candidates)
    assert torch.equal(domains.flatten(), batch.candidate_domains)
    assert (domains == domains[:, :1]).all()
    assert (candidates[:, 1:] != candidates[:, :1]).all()
    assert batch.labels.view(-1, 5).tolist() == [[1, 0, 0, 0, 0]] * len(requests)


def test_every_other_item_of_the_domain_is_as_likely(tiny_store: Path) -> None:
    requests = requests_of(tiny_store, num_candidates=4000)
    batch = requests.batch(np.array([0]))
    counts = torch.bincount(batch.candidates[1:])
    catalog = requests.store.catalog
    others = catalog.domain_items[catalog.item_domains[catalog.domain_items] == batch.domains[-1]]
    target = int(batch.candidates[0])
    own = catalog.domain_of(batch.candidates[:1])
    others = catalog.domain_items[catalog.item_domains[catalog.domain_items] == own]
    shares = counts[others[others != target]] / 3999
    assert shares.numel() == others.numel() - 1
    assert (shares * shares.numel()).min() > 0.6
    assert (shares * shares.numel()).max() < 1.4


def test_evaluation_draws_the_same_every_time_and_training_does_not(tiny_store: Path) -> None:
    first, second = requests_of(tiny_store), requests_of(tiny_store)
    held_out = np.arange(first.num_train, len(first))
    train = np.arange(first.num_train)
    assert torch.equal(first.batch(held_out).candidates, second.batch(held_out).candidates)
    reverse = second.batch(held_out[::-1].copy()).candidates.view(-1, 5).flip(0).flatten()
    assert torch.equal(first.batch(held_out).candidates, reverse)
    assert not torch.equal(first.batch(train).candidates, first.batch(train).candidates)
    other = requests_of(tiny_store, seed=2).batch(held_out).candidates
    assert not torch.equal(first.batch(held_out).candidates, other)


def prepared(folder: Path, lengths: list[int], domains: int = 1) -> Path:
    """A store of users with so many events of items 0, 1, 2, ... in turn."""
    rows = [
        {"user": f"u{u}", "item": f"i{at % 4}", "domain": f"d{at % 4 % domains}", "time": at}
        for u, length in enumerate(lengths)
        for at in range(length)
    ]
    pl.DataFrame(rows).write_csv(folder / "log.csv")
    command = ["prepare", str(folder / "log.csv"), "--out", str(folder / "store")]
    assert run([*command, "--min-user", "1", "--min-item", "1"]) == 0
    return folder / "store"


def test_users_with_too_few_events_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = prepared(tmp_path, [1, 2, 3, 4, 8])
    with caplog.at_level(logging.WARNING):
        requests = requests_of(path)
    assert "3 of 5 users have fewer than 4 events and give no training request" in caplog.text
    assert (requests.num_train, len(requests)) == (1 + 5, 1 + 5 + 3)


def test_a_store_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 requests of training and 1 of evaluation; users with"):
        requests_of(prepared(tmp_path, [3]))


def test_an_item_alone_in_its_domain_is_not_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 requests of training and 0 of evaluation"):
        requests_of(prepared(tmp_path, [8, 8], domains=4))
