"""Features of items and items without events: stored by type, told where they are missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hstu_xd.data.store import InteractionStore

Call = Callable[..., str]
LOG = "user,item,domain,time\n" + "".join(
    f"u{n % 5},{'ab'[n % 2]}{n % 7},{'ab'[n % 2]},{1_600_000_000 + n}\n" for n in range(60)
)
ITEMS = pl.DataFrame(
    {
        "item": [*(f"a{n}" for n in range(10)), *(f"b{n}" for n in range(9))],
        "domain": ["a"] * 10 + ["b"] * 9,
        "brand": [None if n == 4 else f"brand {n % 3}" for n in range(19)],
        "fresh": [n % 2 == 0 for n in range(19)],
        "price": [None if n == 2 else n / 2 for n in range(19)],
        "text": [None if n == 3 else [float(n), 1.0, -n] for n in range(19)],
    }
)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log.csv").write_text(LOG)
    ITEMS.sample(fraction=1, shuffle=True, seed=1).write_parquet("items.parquet")


FEATURES = ("--item-features", "items.parquet", "--features", "price,brand,text,fresh")


def of_item(store: InteractionStore, item: str) -> dict[str, Any]:
    """Say what a store holds of an item."""
    assert store.features is not None
    assert store.features.categories is not None
    row = [store.catalog.token(i) for i in range(1, store.num_items + 1)].index(item)
    categories = store.features.categories
    found: dict[str, Any] = {}
    for name, codes, values in zip(categories.names, categories.nodes, categories.values):
        found[name] = None if codes[row] < 0 else values[codes[row]]
    for name, numbers in store.features.numbers.items():
        found[name] = None if np.isnan(numbers[row]).all() else numbers[row].tolist()
    return found


def test_features_are_stored_by_their_types(call: Call) -> None:
    said = call("prepare", "log.csv", "--out", "store", *FEATURES)
    store = InteractionStore.open("store", verify=True)
    for row in ITEMS.iter_rows(named=True):
        if row["item"] in [store.catalog.token(i) for i in range(1, store.num_items + 1)]:
            assert of_item(store, row["item"]) == {
                "brand": row["brand"],
                "fresh": str(row["fresh"]).lower(),
                "price": None if row["price"] is None else [row["price"]],
                "text": row["text"],
            }
    assert store.manifest["item_features"]["numbers"]["text"] == {"width": 3, "items_without": 1}
    assert "1 of 14 items have no text in items.parquet" in said
    assert "cold_items" not in store.manifest


def test_items_without_events_are_in_the_catalogue(call: Call) -> None:
    """The events are those of the store without them, whatever the numbers of their items."""
    call("prepare", "log.csv", "--out", "plain")
    call("prepare", "log.csv", "--out", "store", *FEATURES, "--cold-items")
    plain, store = InteractionStore.open("plain"), InteractionStore.open("store", verify=True)
    assert (plain.num_items, store.num_items, store.manifest["cold_items"]) == (14, 19, 5)
    assert store.manifest["domains"]["b"]["items"] == 9
    for user in range(plain.num_users):
        (items, times), (own, own_times) = plain.history(user), store.history(user)
        assert [plain.catalog.token(i) for i in items] == [store.catalog.token(i) for i in own]
        assert times.tolist() == own_times.tolist()
    assert of_item(store, "a9")["brand"] == "brand 0"
    assert store.catalog.items_of(1).numel() == 9


def test_a_domain_that_is_not_in_the_log_is_left_out(call: Call) -> None:
    ITEMS.with_columns(
        domain=pl.when(pl.col("item") == "a9").then(pl.lit("c")).otherwise("domain")
    ).write_parquet("items.parquet")
    said = call("prepare", "log.csv", "--out", "store", *FEATURES, "--cold-items")
    assert "1 items without events are left out: no event of the log is of their domain" in said
    assert InteractionStore.open("store").num_items == 18


def test_numbers_that_are_text_are_categories_and_said(call: Call) -> None:
    ITEMS.select("item", "brand", "price").write_csv("items.csv")
    options = ("--item-features", "items.csv", "--features", "brand,price")
    said = call("prepare", "log.csv", "--out", "store", *options)
    assert "WARNING: price in items.csv is text and holds numbers: each of its 1" in said
    assert "brand in items.csv is text" not in said
    features = InteractionStore.open("store").features
    assert features is not None
    assert features.categories is not None
    assert (features.categories.names, list(features.numbers)) == (("brand", "price"), [])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--features", "prise"], "no column 'prise'; did you mean 'price'?"),
        ({}, ["--features", "price,price"], "names 'price' twice"),
        ({}, [], "or features with --features"),
        (
            {"text": [[1.0]] + [[1.0, 2.0]] * 18},
            ["--features", "text"],
            "column 'text' has 2 numbers for item 'a1' and 1 for others",
        ),
        ({"text": [None] * 19}, ["--features", "text"], "column 'text' is Null"),
        ({"text": [["x"]] * 19}, ["--features", "text"], "a vector is a list of numbers"),
        ({"price": [float("inf")] * 19}, ["--features", "price"], "is not finite"),
        ({"text": [[float("nan")]] * 19}, ["--features", "text"], "is not finite"),
        ({"text": [[None]] * 19}, ["--features", "text"], "is not finite"),
        ({"domain": None}, ["--features", "price", "--cold-items"], "has no domain column"),
    ],
)
def test_errors_name_the_mend(
    call: Call, change: dict[str, Any], options: list[str], message: str
) -> None:
    items = ITEMS.drop("domain") if change == {"domain": None} else ITEMS
    if change != {"domain": None}:
        items = items.with_columns(pl.Series(name, values) for name, values in change.items())
    items.write_parquet("items.parquet")
    ask = ("prepare", "log.csv", "--out", "store", "--item-features", "items.parquet", *options)
    assert message in call(*ask, code=2)
    assert not Path("store").exists()


def test_options_that_need_the_file_and_appending(call: Call) -> None:
    said = call("prepare", "log.csv", "--out", "store", "--cold-items", code=2)
    assert "--cold-items needs a file of items; name it with --item-features" in said
    call("prepare", "log.csv", "--out", "store", *FEATURES)
    said = call("prepare", "log.csv", "--append", "store", "--out", "next", code=2)
    assert "its items have features (--item-features)" in said
