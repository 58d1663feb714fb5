"""Fields of events and levels of items: kept through sorting and filters, and optional."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hstu_xd.data.store import InteractionStore
from hstu_xd.data.taxonomy import level_paths
from hstu_xd.errors import InputError


def events(rows: int = 400, seed: int = 0) -> pl.DataFrame:
    """A log with many ties in time, exact repeats, and fields that differ between these."""
    draw = np.random.default_rng(seed)
    items = draw.integers(0, 12, rows)
    return pl.DataFrame(
        {
            "user": [f"u{n}" for n in draw.integers(0, 9, rows)],
            "item": [f"i{n}" for n in items],
            "domain": [f"d{n % 3}" for n in items],
            "time": 1_600_000_000 + draw.integers(0, 30, rows),
            "shop": draw.choice(["north", "south", ""], rows),
            "deal": draw.random(rows) < 0.5,
            "price": draw.integers(1, 5, rows) / 2,
        }
    )


ITEMS = pl.DataFrame(
    {
        "item": [f"i{n}" for n in range(11)],
        "type": [f"t{n % 6}" for n in range(11)],
        "aisle": [None if n == 4 else f"a{n % 2}" for n in range(11)],
    }
)


def told(frame: pl.DataFrame) -> Counter[tuple[Any, ...]]:
    rows = frame.with_columns(
        shop=pl.col("shop").replace("", None),
        deal=pl.col("deal").cast(pl.String),
    )
    return Counter(rows.select("user", "item", "time", "shop", "deal").iter_rows())


def stored(store: InteractionStore) -> Counter[tuple[Any, ...]]:
    values = [[None, *known] for known in store.fields.values]
    shop, deal = (
        [values[f][code] for code in store.fields.codes[f]]
        for f in map(store.fields.names.index, ("shop", "deal"))
    )
    users = np.repeat(np.arange(store.num_users), np.diff(store.offsets))
    return Counter(
        (
            store.user_token(int(users[row])),
            store.catalog.token(int(store.item_ids[row])),
            int(store.timestamps[row]),
            shop[row],
            deal[row],
        )
        for row in range(store.num_interactions)
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    events().write_csv(tmp_path / "log.csv")
    ITEMS.write_parquet(tmp_path / "items.parquet")
    return tmp_path / "log.csv"


def hashes(folder: Path) -> dict[str, str]:
    return json.loads((folder / "manifest.json").read_text())["hashes"]


@pytest.mark.parametrize("form", ["csv", "parquet", "json", "slow"])
def test_every_event_keeps_its_fields(form: str, cli: Any, tmp_path: Path) -> None:
    file, extra = tmp_path / f"log.{'jsonl' if form == 'json' else form}", []
    if form == "parquet":
        events().write_parquet(file)
    elif form == "json":
        events().write_ndjson(file)
    else:
        file = file.with_suffix(".csv")
        events().write_csv(file)
        extra = ["--skip-faulty"] * (form == "slow")
    said = cli("prepare", file, "--out", tmp_path / "a", "--event-cols", "shop,deal", *extra)
    assert said.code == 0, said.err
    store = InteractionStore.open(tmp_path / "a", verify=True)
    assert stored(store) == told(events())
    facts = store.manifest["event_fields"]
    assert facts["shop"] == {"values": 2, "missing": (events()["shop"] == "").sum()}
    assert store.fields.of("deal", "--goal")[1] == ["false", "true"]


def test_the_order_of_rows_counts_for_nothing(cli: Any, log: Path, tmp_path: Path) -> None:
    events().sample(fraction=1, shuffle=True, seed=3).write_csv(tmp_path / "other.csv")
    for name, file in (("a", log), ("b", tmp_path / "other.csv")):
        columns = ("--event-cols", "price,shop,deal")
        assert cli("prepare", file, "--out", tmp_path / name, *columns).code == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_fields_follow_their_events_through_filters(cli: Any, log: Path, tmp_path: Path) -> None:
    filters = ("--min-item", "34", "--drop-repeats", "exact")
    assert (
        cli("prepare", log, "--out", tmp_path / "a", "--event-cols", "shop,deal", *filters).code
        == 0
    )
    store = InteractionStore.open(tmp_path / "a")
    assert 0 < store.num_interactions < 300
    left = stored(store)
    assert left <= told(events())
    assert max(Counter(row[:3] for row in left.elements()).values()) == 1


def test_events_of_one_second_keep_the_order_of_their_fractions(cli: Any, tmp_path: Path) -> None:
    rows = [("u", "i", "d", 1_600_000_000 + at / 4, shop) for at, shop in enumerate("dbca")]
    frame = pl.DataFrame(rows, schema=["user", "item", "domain", "time", "shop"], orient="row")
    frame.sample(fraction=1, shuffle=True, seed=1).write_csv(tmp_path / "log.csv")
    out = tmp_path / "a"
    assert cli("prepare", tmp_path / "log.csv", "--out", out, "--event-cols", "shop").code == 0
    codes, values = InteractionStore.open(out).fields.of("shop", "--goal")
    assert [values[code - 1] for code in codes] == list("dbca")


def test_levels_of_the_items(cli: Any, log: Path, tmp_path: Path) -> None:
    said = cli(
        *("prepare", log, "--out", tmp_path / "a", "--levels", "type,aisle"),
        *("--item-features", tmp_path / "items.parquet"),
    )
    assert said.code == 0
    assert "1 of 12 items have no row in items.parquet" in said.err
    store = InteractionStore.open(tmp_path / "a", verify=True)
    assert store.taxonomy is not None
    known = {row[0]: row[1:] for row in ITEMS.iter_rows()}
    for item in range(1, store.num_items + 1):
        nodes = store.taxonomy.nodes[:, item - 1]
        names = tuple(
            None if node < 0 else values[node]
            for node, values in zip(nodes, store.taxonomy.values, strict=True)
        )
        assert names == known.get(store.catalog.token(item), (None, None))
    assert store.manifest["levels"]["aisle"] == {"nodes": 2, "items_without": 2}
    names, paths = level_paths(store.taxonomy, store.catalog.item_domains.numpy(), 3)
    assert names == ("item", "type", "aisle", "domain")
    assert (paths[0] == -1).all()
    assert (paths[1:, 0] == np.arange(1, 13)).all()
    assert (paths[1:, 1:3] == store.taxonomy.nodes.T).all()
    assert level_paths(None, np.zeros(4, np.int64), 1)[0] == ("item",)


def test_a_store_without_has_nothing_of_it(cli: Any, log: Path, tmp_path: Path) -> None:
    assert cli("prepare", log, "--out", tmp_path / "a").code == 0
    store = InteractionStore.open(tmp_path / "a")
    assert not {"event_fields", "levels"} & set(store.manifest)
    assert not list((tmp_path / "a").glob("*level*")) + list((tmp_path / "a").glob("event*"))
    assert store.fields.names == ()
    assert store.taxonomy is None
    with pytest.raises(InputError, match=r"no such field of events .there: none.*--event-cols"):
        store.fields.of("shop", "--goal")
    columns = (
        "--event-cols",
        "shop",
        "--levels",
        "type",
        "--item-features",
        log.with_name("items.parquet"),
    )
    assert cli("prepare", log, "--out", tmp_path / "b", *columns).code == 0
    with_side = hashes(tmp_path / "b")
    assert {name: with_side[name] for name in hashes(tmp_path / "a")} == hashes(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--event-cols", "shp"], "no field column 'shp' (did you mean 'shop'?)"),
        (["--event-cols", "shop,shop"], "names 'shop' twice"),
        (["--event-cols", "shop,,deal"], "holds an empty name"),
        (["--levels", "type"], "needs a file of items; name it with --item-features"),
        (["--item-features", "items.parquet"], "name levels of a taxonomy with --levels"),
        (["--item-features", "none.parquet", "--levels", "type"], "no such file"),
        (["--item-features", "items.parquet", "--levels", "typ"], "did you mean 'type'?"),
        (["--item-features", "items.parquet", "--levels", "type,type"], "names 'type' twice"),
        (["--item-features", "twice.csv", "--levels", "type"], "item 'i3' has more than one row"),
        (["--item-features", "alien.csv", "--levels", "type"], "none of the log's items has a row"),
        (["--item-features", "log.parquet", "--levels", "type"], "not a readable Parquet or CSV"),
        (["--item-features", "nameless.csv", "--levels", "type"], "no item column"),
    ],
)
def test_errors_name_the_mend(
    options: list[str],
    message: str,
    cli: Any,
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    pl.concat([ITEMS, ITEMS[3:4]]).write_csv("twice.csv")
    ITEMS.with_columns(item="item" + pl.col("item")).write_csv("alien.csv")
    ITEMS.rename({"item": "thing"}).write_csv("nameless.csv")
    Path("log.parquet").write_text("no Parquet")
    said = cli("prepare", log, "--out", "out", *options)
    assert said.code == 2
    assert message in said.err
    assert not Path("out").exists()


def test_ratings_have_no_fields(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("A1,B1,5.0,1600000000\nA2,B2,5.0,1600000001\n")
    said = cli("prepare", tmp_path / "ratings.csv", "--out", tmp_path / "a", "--event-cols", "x")
    assert said.code == 2
    assert "has no fields of events; leave out --event-cols x" in said.err


def test_damage_is_named(cli: Any, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert cli("prepare", log, "--out", out, "--event-cols", "shop").code == 0
    other = pl.DataFrame({"name": ["shop"], "value": ["north"]})
    other.write_parquet(out / "event_values.parquet")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["sizes"]["event_values.parquet"] = (out / "event_values.parquet").stat().st_size
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="does not hold the values that the manifest counts"):
        _ = InteractionStore.open(out).fields
    with pytest.raises(InputError, match=r"event_values.parquet: has another SHA-256"):
        InteractionStore.open(out, verify=True)
    (out / "event_fields.npy").unlink()
    with pytest.raises(InputError, match=r"event_fields.npy: is missing"):
        InteractionStore.open(out)
