"""Which column is what is told by names, by --columns or by numbers, and never guessed closely."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from log_files import contents, write_log

from hstu_xd.data import InteractionStore
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.errors import InputError

START = 1_500_000_000


def counts(out: Path) -> tuple[int, int]:
    store = InteractionStore.open(out)
    return store.num_users, store.num_items


HEADERLESS = {
    "tab": ("u.data", "11\t21\t4\t880000001\n12\t22\t3\t880000002\n13\t21\t1\t880000003\n", 3, 2),
    "double colon": ("ratings.dat", "1::31::2::970000001\n1::32::3::970000002\n", 1, 2),
    "category": ("clicks.csv", "1,700001,90001,1510000001\n1,700002,90002,1510000002\n", 1, 2),
    "space": ("log.txt", "1 a 5 970000001\n2 a 3 970000002\n", 2, 1),
    "dates": ("log.csv", "ann,heat,5,2020-01-30\nbob,heat,3,2020-01-31\n", 2, 1),
    "letters": ("log.csv", "user1,Album1,5,970000001\nuser2,Album1,5,970000002\n", 2, 1),
    "half of them A": ("log.csv", "A1,A2,5,970000001\nA3,A2,5,970000002\n", 2, 1),
    "one line": ("log.csv", "Anna,Bolero,5,970000001\n", 1, 1),
}


@pytest.mark.parametrize("name", HEADERLESS)
def test_headerless(name: str, cli: Callable, tmp_path: Path) -> None:
    file, text, users, items = HEADERLESS[name]
    log = tmp_path / file
    log.write_text(text)
    outcome = cli("prepare", f"films={log}", "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    mend = "--columns user,item,rating,time"
    for word in (f"{log}:1", "like an event, not like names", mend, "--user-col 1 --item-col 2"):
        assert word in outcome.err
    outcome = cli("prepare", f"films={log}", "--out", tmp_path / "out", *mend.split())
    assert outcome.code == 0
    assert counts(tmp_path / "out") == (users, items)
    assert cli("prepare", log, "--out", tmp_path / "alone", *mend.split()).code == 0
    numbers = ("--user-col", "1", "--item-col", "2", "--time-col", "4")
    assert cli("prepare", f"films={log}", "--out", tmp_path / "numbers", *numbers).code == 0
    assert contents(tmp_path / "numbers") == contents(tmp_path / "out")


def test_headerless_with_a_domain(tmp_path: Path) -> None:
    rows = [("a", "x", "books", START, 9), ("a", "y", "films", START, 3)]
    log = write_log(tmp_path / "log.csv", rows, None)
    names = ("who", "item", "domain", "time", "place")
    columns = ColumnOptions(user="who", order="place", names=names)
    prepare_logs([str(log)], tmp_path / "a", columns=columns)
    columns = ColumnOptions(user="1", item="2", domain="3", time="4", order="5")
    prepare_logs([str(log)], tmp_path / "b", columns=columns)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert InteractionStore.open(tmp_path / "a").item_ids.tolist() == [2, 1]


def test_numbers_of_columns_beside_names(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "x", "d", START)], ("w", "q", "domain", "time"))
    manifest = prepare_logs([str(log)], tmp_path / "out", columns=ColumnOptions(user="1", item="2"))
    assert manifest["interactions"] == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("user,item,time", "4 fields, but --columns names 3"),
        ("user,item,rating,stars", "no time column"),
        ("user,user,rating,time", "'user' occurs twice"),
    ],
)
def test_columns_that_do_not_fit(names: str, words: str, cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "x", 5, START)], None)
    outcome = cli("prepare", f"d={log}", "--out", tmp_path / "out", "--columns", names)
    assert outcome.code == 2
    assert words in outcome.err


def test_columns_for_a_file_with_names(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "x", "d", START)])
    args = ("--columns", "user,item,domain,time")
    outcome = cli("prepare", log, "--out", tmp_path / "out", *args)
    assert "the first line looks like names" in outcome.err


def amazon(users: list[str], items: list[str]) -> list[tuple[str, str, float, int]]:
    return [(u, i, 5.0, START + n) for n, (u, i) in enumerate(zip(users, items))]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("asin", ["B00AGABISW", "0439064864", "043906486X"])
def test_amazon_ids_tell_the_order(asin: str, swapped: bool, tmp_path: Path) -> None:
    rows = amazon(["A3R5OBKS7OM2IR", "AH2L9G3DQHHAJ"], [asin, asin])
    if swapped:
        rows = [(item, user, *rest) for user, item, *rest in rows]
    log = write_log(tmp_path / "Books.csv", rows, None)
    manifest = prepare_logs([str(log)], tmp_path / "out")
    assert (manifest["users"], manifest["items"]) == (2, 1)


def test_no_majority_of_few(tmp_path: Path) -> None:
    """Where most lines look like one order and some like the other, nothing is guessed."""
    rows = amazon(["A1X", "A2X", "B00"], ["B01", "B02", "A9X"])
    log = write_log(tmp_path / "Books.csv", rows, None)
    with pytest.raises(InputError, match="--columns user,item,rating,time"):
        prepare_logs([str(log)], tmp_path / "out")
    with pytest.raises(InputError, match=r"--columns\n*.*item,user,rating,time"):
        prepare_logs([str(log)], tmp_path / "out", file_format="amazon-ratings")


def test_a_rating_is_small(tmp_path: Path) -> None:
    rows = [(u, i, 90_001, t) for u, i, _, t in amazon(["A1", "A2"], ["B1", "B2"])]
    log = write_log(tmp_path / "Books.csv", rows, None)
    with pytest.raises(InputError, match="like an event, not like names"):
        prepare_logs([str(log)], tmp_path / "out")


def test_an_option_that_changes_nothing(tmp_path: Path) -> None:
    lines = [
        '{"user_id": "a", "parent_asin": "p", "asin": "q", "timestamp": 1500000000123}\n',
        '{"user_id": "a", "asin": "r", "timestamp": 1500000500123, "domain": "books"}\n',
    ]
    log = tmp_path / "Books.jsonl"
    log.write_text(lines[0])
    for role, name in (("user", "user_id"), ("item", "parent_asin"), ("time", "timestamp")):
        prepare_logs([str(log)], tmp_path / "plain", force=True)
        columns = ColumnOptions(**{role: name})
        prepare_logs([str(log)], tmp_path / role, columns=columns)
        assert contents(tmp_path / role) == contents(tmp_path / "plain")
    catalogue = pl.read_parquet(tmp_path / "plain" / "catalog.parquet")
    assert catalogue.rows() == [("p", "Books")]
    prepare_logs([str(log)], tmp_path / "asin", columns=ColumnOptions(item="asin"))
    assert pl.read_parquet(tmp_path / "asin" / "catalog.parquet").rows() == [("q", "Books")]
    # A key that the first object lacks is a key all the same.
    log.write_text("".join(lines))
    with pytest.raises(InputError, match=":1: empty domain id"):
        prepare_logs([str(log)], tmp_path / "out")


def test_a_name_that_is_a_number(tmp_path: Path) -> None:
    rows = [("a", "x", "d", START, 7)]
    log = write_log(tmp_path / "log.csv", rows, ("who", "what", "shop", "when", "2020"))
    columns = ColumnOptions(user="who", item="what", domain="shop", time="when")
    assert prepare_logs([str(log)], tmp_path / "out", columns=columns)["interactions"] == 1


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_two_usual_names(ending: str, cli: Callable, tmp_path: Path) -> None:
    names, log = ("user_id", "UID", "item", "domain", "time"), tmp_path / f"log.{ending}"
    frame = pl.DataFrame([("a", "b", "x", "d", START)], schema=names, orient="row")
    {"csv": frame.write_csv, "parquet": frame.write_parquet, "jsonl": frame.write_ndjson}[ending](
        log
    )
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "columns 'user_id' and 'UID' may both be the user" in outcome.err
    assert "--user-col user_id or --user-col UID" in outcome.err
    for name, user in (("user_id", "a"), ("UID", "b")):
        assert cli("prepare", log, "--user-col", name, "--out", tmp_path / name).code == 0
        assert InteractionStore.open(tmp_path / name).user_token(0) == user


def test_files_as_hive_writes_them(tmp_path: Path) -> None:
    rows = [("a", "x", "d", START), ("a", "y", "e", START + 1)]
    log = write_log(tmp_path / "000000_0", rows, None, "\x01")
    columns = ColumnOptions(names=("user", "item", "domain", "time"))
    prepare_logs([str(log)], tmp_path / "out", columns=columns)
    assert counts(tmp_path / "out") == (1, 2)


def test_an_empty_first_line(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "x", "d", START)])
    log.write_text("\n" + log.read_text())
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"{log}:1: is empty; the first line names the columns" in outcome.err
