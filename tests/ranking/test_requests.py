"""Requests from purchases: what is asked, what stands against it, and that a file stays itself."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError

Cli = Callable[..., Any]


@pytest.fixture
def made(requests_path: Path, store: InteractionStore) -> RequestSet:
    return RequestSet.open(requests_path, store)


def events_of(store: InteractionStore) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user": np.repeat(np.arange(store.num_users), np.diff(store.offsets)),
            "item": np.asarray(store.item_ids).astype(np.int64),
            "time": np.asarray(store.timestamps),
            "goal": store.fields.codes[0].astype(np.int64) - 1,
        }
    )


def test_every_request_is_what_it_says(made: RequestSet, store: InteractionStore) -> None:
    events, week = events_of(store), 7 * 86_400
    cuts = list(made.manifest["cuts"].values())
    split_of = np.searchsorted(cuts, events["time"].to_numpy(), side="right")
    events = events.with_columns(split=pl.Series(split_of), week=pl.col("time") // week)
    taken = set(events.select("user", "time", "goal", "item").iter_rows())
    basket = set(events.select("user", "time", "item").iter_rows())
    others = events.group_by("week", "split", "goal", "item").agg(pl.col("user").unique())
    buyers = {row[:4]: set(row[4]) for row in others.iter_rows()}
    assert made.goal_names == ("deal=false", "deal=true")
    for r in range(len(made.users)):
        user, time, goal = int(made.users[r]), int(made.times[r]), int(made.goals[r])
        rows = slice(made.offsets[r], made.offsets[r + 1])
        items, labels = made.candidates[rows].tolist(), made.labels[rows].tolist()
        assert Counter(labels) == {1: 2, 0: 8}
        assert len(set(items)) == len(items)
        assert (store.history(user)[1] < time).sum() >= 20
        assert made.splits[r] == np.searchsorted(cuts, time, side="right")
        for item, label in zip(items, labels, strict=True):
            assert ((user, time, goal, item) in taken) == bool(label)
            if not label:
                assert (user, time, item) not in basket
                assert buyers[time // week, int(made.splits[r]), goal, item] - {user}
    assert max(Counter(zip(made.users.tolist(), made.splits.tolist(), strict=True)).values()) == 10
    assert made.manifest["without_negatives"] == 0


def test_negatives_come_as_often_as_they_are_bought(
    made: RequestSet, store: InteractionStore
) -> None:
    bought = np.bincount(store.item_ids, minlength=store.num_items + 1)
    drawn = np.bincount(made.candidates[made.labels == 0], minlength=store.num_items + 1)
    assert np.corrcoef(bought, drawn)[0, 1] > 0.8


def test_rows_of_requests(made: RequestSet) -> None:
    chosen = np.array([3, 0, 7])
    wanted = [np.arange(made.offsets[r], made.offsets[r + 1]) for r in chosen]
    assert (made.rows(chosen) == np.concatenate(wanted)).all()


def test_equal_seeds_give_equal_files(
    cli: Cli, store_path: Path, requests_path: Path, tmp_path: Path
) -> None:
    options = ("--goal", "deal", "--positives", 2, "--min-history", 20)
    found = {}
    for seed in (0, 1):
        out = tmp_path / str(seed)
        assert (
            cli("requests", "--data", store_path, "--out", out, *options, "--seed", seed).code == 0
        )
        found[seed] = json.loads((out / "requests.json").read_text())["hash"]
    assert found[0] == json.loads((requests_path / "requests.json").read_text())["hash"] != found[1]


def test_without_goal_there_is_one(cli: Cli, store_path: Path, tmp_path: Path) -> None:
    said = cli("requests", "--data", store_path, "--out", tmp_path / "a", "--min-history", 0)
    assert said.code == 0
    assert "(any " in said.out
    assert RequestSet.open(tmp_path / "a").goal_names == ("any",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--goal", "dael"], "did you mean 'deal'? (there: deal)"),
        (["--positives", 0], "--positives 0: give at least 1"),
        (["--min-history", -1], "--min-history -1: give at least 0"),
        (["--positives", 40], "no request in the train split"),
        (["--valid-from", 5], "--valid-from 5 and --test-from"),
        (["--valid-from", 1_608_000_000, "--test-from", 1_607_000_000], "the earlier first"),
    ],
)
def test_errors_name_the_mend(
    options: list[object], message: str, cli: Cli, store_path: Path, tmp_path: Path
) -> None:
    said = cli("requests", "--data", store_path, "--out", tmp_path / "a", *options)
    assert said.code == 2
    assert message in said.err
    assert not (tmp_path / "a").exists()


def test_only_requests_are_replaced(cli: Cli, store_path: Path, requests_path: Path) -> None:
    said = cli("requests", "--data", store_path, "--out", requests_path)
    assert (said.code, "add --force" in said.err) == (2, True)
    said = cli("requests", "--data", store_path, "--out", store_path, "--force")
    assert (said.code, "is not a requests" in said.err) == (2, True)


def test_other_and_damaged_requests_are_refused(
    requests_path: Path, store: InteractionStore, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no requests here"):
        RequestSet.open(tmp_path)
    copy = Path(shutil.copytree(requests_path, tmp_path / "copy"))
    table = pl.read_parquet(copy / "requests.parquet").with_columns(pl.col("time") + 1)
    table.write_parquet(copy / "requests.parquet")
    with pytest.raises(InputError, match=r"not the file that requests.json describes"):
        RequestSet.open(copy)
    manifest = json.loads((copy / "requests.json").read_text())
    for change, message in (
        ({"data_hashes": {}}, "made of another store"),
        ({"format_version": 9}, "format version 9"),
    ):
        (copy / "requests.json").write_text(json.dumps(manifest | change))
        with pytest.raises(InputError, match=message):
            RequestSet.open(copy, store)
    (copy / "requests.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        RequestSet.open(copy)
