"""Requests from impressions with labels: candidates of a moment side by side, faults named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore

Call = Callable[..., str]
T = 1_600_000_000
SHOWN = pl.DataFrame(
    [
        (f"u{n % 4}", f"i{(7 * n + k) % 20}", T + 100 * n, "ad" if n % 3 else "feed", 1 + (k == 1))
        for n in range(40)
        for k in range(3)
    ],
    schema=["user", "item", "time", "place", "label_type"],
    orient="row",
)
LABEL = ("--label-col", "label_type", "--positive", "2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.chdir(tmp_path)
    log = pl.DataFrame(
        [(f"u{n % 4}", f"i{n % 20}", f"d{n % 2}", T + 30 * n) for n in range(200)],
        schema=["user", "item", "domain", "time"],
        orient="row",
    )
    log.write_parquet("log.parquet")
    SHOWN.sample(fraction=1, shuffle=True, seed=1).write_parquet("shown.parquet")
    call("prepare", "log.parquet", "--out", "store")


def made(call: Call, *words: str, file: str = "shown.parquet", code: int = 0) -> str:
    return call("labelled-requests", file, "--data", "store", "--out", "made", *words, code=code)


def test_rows_of_a_moment_are_one_request(call: Call) -> None:
    said = made(call, *LABEL, "--goal-col", "place")
    store = InteractionStore.open("store")
    found = RequestSet.open(Path("made"), store)
    assert found.goal_names == ("place=ad", "place=feed")
    rows = set()
    for r, (user, time, goal) in enumerate(zip(found.users, found.times, found.goals)):
        for place in range(found.offsets[r], found.offsets[r + 1]):
            item = store.catalog.token(int(found.candidates[place]))
            name = found.goal_names[goal].removeprefix("place=")
            label = int(found.labels[place]) + 1
            rows.add((store.user_token(int(user)), item, int(time), name, label))
    assert rows == set(SHOWN.iter_rows())
    assert np.diff(found.offsets).tolist() == [3] * 40
    assert [len(found.of_split(split)) for split in ("train", "valid", "test")] == [32, 4, 4]
    cuts = list(found.manifest["cuts"].values())
    assert (found.splits == np.searchsorted(cuts, found.times, side="right")).all()
    assert "train        32 requests of 4 users, 96 candidates (place=ad " in said


def test_labels_do_not_show_in_the_order_of_candidates(call: Call) -> None:
    made(call, *LABEL)
    found = RequestSet.open(Path("made"))
    for r in range(len(found.users)):
        items = found.candidates[found.offsets[r] : found.offsets[r + 1]]
        assert (np.diff(items) > 0).all()


def test_the_order_of_rows_counts_for_nothing(call: Call) -> None:
    made(call, *LABEL)
    first = Path("made/requests.parquet").read_bytes()
    pl.concat([SHOWN, SHOWN]).write_csv("twice.csv")
    made(call, *LABEL, "--force", file="twice.csv")
    assert Path("made/requests.parquet").read_bytes() == first


def test_rows_that_the_store_does_not_know_are_counted(call: Call) -> None:
    strange = pl.DataFrame([("u1", "i99", T, "ad", 2)], schema=SHOWN.schema, orient="row")
    pl.concat([strange, SHOWN]).write_parquet("more.parquet")
    said = made(call, *LABEL, file="more.parquet")
    assert "left out 1 rows whose user or item is not in store, such as user 'u1' with item" in said
    assert RequestSet.open(Path("made")).manifest["left_out"]["rows"] == 1


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({}, (), "no column 'label'; did you mean 'label_type'?"),
        ({}, ("--label-col", "label_type", "--positive", "3"), "no row has label_type '3' (values"),
        ({"label_type": 2}, LABEL, "every row has label_type '2'"),
        ({"label_type": None}, LABEL, "row 1: no label_type; fill it in"),
        ({"time": None}, LABEL, "row 1: no time; every impression needs its time"),
        ({"user": ""}, LABEL, "row 1: no user; fill it in"),
        ({"user": "x"}, LABEL, "user 'x' or item 'i0' is not in store, and so it is with every"),
        ({"item": "i3"}, LABEL, "has item 'i3' with two labels; keep one of them"),
        ({}, (*LABEL, "--goal-col", "nowhere"), "no column 'nowhere'"),
        ({}, (*LABEL, "--valid-from", "5"), "do not cut the log"),
        ({"time": T}, LABEL, "do not cut the log"),
    ],
)
def test_faults_are_named(
    call: Call, change: dict[str, object], words: tuple[str, ...], said: str
) -> None:
    SHOWN.with_columns(pl.lit(value).alias(name) for name, value in change.items()).write_parquet(
        "faulty.parquet"
    )
    assert said in made(call, *words, file="faulty.parquet", code=2)
    assert not Path("made").exists()


def test_what_is_there_is_kept(call: Call) -> None:
    made(call, *LABEL)
    assert "--force" in made(call, *LABEL, code=2)
