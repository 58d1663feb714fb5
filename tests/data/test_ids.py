"""Spellings of one id meet, and what looks odd about ids is said with examples."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from log_files import HEADER, contents, write_log

from hstu_xd.data import InteractionStore
from hstu_xd.data.encode import IdOptions
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.errors import InputError

START = 1_500_000_000
NAMES = ("user_id", "item_id", "timestamp")


def users(out: Path) -> list[str]:
    store = InteractionStore.open(out)
    return [store.user_token(n) for n in range(store.num_users)]


def test_numbers_meet_across_formats(tmp_path: Path) -> None:
    """Integers, pandas' floats, JSON's floats and padded text of the same people."""
    numbers = (7, 12, 1_000_000_007)
    rows = [(n, f"{n}", START + k) for k, n in enumerate(numbers)]
    frame = pl.DataFrame(
        {"user_id": [float(n) for n in numbers], "item_id": ["p", "q", "r"], "timestamp": START}
    )
    frame.write_parquet(tmp_path / "books.parquet")
    text = "".join(
        json.dumps({"user_id": float(n), "item_id": f"j{n}", "timestamp": t}) + "\n"
        for n, _, t in rows
    )
    (tmp_path / "games.jsonl").write_text(text)
    files = [
        tmp_path / "books.parquet",
        tmp_path / "games.jsonl",
        write_log(tmp_path / "films.csv", [(n, f"f{i}", t) for n, i, t in rows], NAMES),
        write_log(tmp_path / "music.csv", [(f"{n}.0", f"m{i}", t) for n, i, t in rows], NAMES),
        write_log(tmp_path / "toys.csv", [(f" {n}.000 ", f"t{i}", t) for n, i, t in rows], NAMES),
    ]
    prepare_logs([str(file) for file in files], tmp_path / "out")
    assert users(tmp_path / "out") == sorted(map(str, numbers))
    exact = IdOptions(exact=True)
    manifest = prepare_logs([str(f) for f in files], tmp_path / "exact", ids=exact)
    assert manifest["users"] == 9


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["1.0", "1.5", "2"], ["1.0", "1.5", "2"]),  # versions, not numbers
        (["1.0", "2.0", "3.0"], ["1.0", "2.0", "3.0"]),  # nothing they could meet
        (["1.0", "1.00", "2.0"], ["1", "2"]),
        (["007", "7", "7.0"], ["007", "7"]),
        (["-1.0", "-1", "a"], ["-1", "a"]),
        (["1.", ".0", "1"], [".0", "1", "1."]),
    ],
)
def test_decimals(ids: list[str], expected: list[str], tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [(u, "i", "d", START + n) for n, u in enumerate(ids)])
    prepare_logs([str(log)], tmp_path / "out")
    assert users(tmp_path / "out") == expected


def test_floats_that_lost_digits(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": [2.0**53 + 2, 1.0], "item_id": "x", "timestamp": START})
    frame.write_parquet(tmp_path / "books.parquet")
    with pytest.raises(
        InputError, match=r"'user_id' is Float64 and holds numbers up to 9007199254740994"
    ):
        prepare_logs([f"books={tmp_path / 'books.parquet'}"], tmp_path / "out")


def test_a_missing_float_is_missing(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": [1.0, float("nan")], "item_id": "x", "timestamp": START})
    frame.write_parquet(tmp_path / "books.parquet")
    with pytest.raises(InputError, match="row 2: empty user id"):
        prepare_logs([f"books={tmp_path / 'books.parquet'}"], tmp_path / "out")


def test_spaces_at_the_ends(cli: Callable, tmp_path: Path) -> None:
    spaced = [(" u1", "a ", " books", START), ("u1", "b", "books ", START + 1)]
    spaced += [("u1 ", "c\u00a0", "films", START + 2)]
    log = write_log(tmp_path / "log.csv", spaced)
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert "spaces at the ends of 2 user ids taken away" in outcome.out
    assert "--exact-ids keeps ids as they are" in outcome.out
    tidy = [tuple(str(x).strip() for x in row) for row in spaced]
    prepare_logs([str(write_log(tmp_path / "tidy.csv", tidy))], tmp_path / "tidy")
    assert contents(tmp_path / "out") == contents(tmp_path / "tidy")
    manifest = prepare_logs([str(log)], tmp_path / "exact", ids=IdOptions(exact=True))
    assert manifest["users"] == 3
    assert list(manifest["domains"]) == [" books", "books ", "films"]


def test_domains_that_look_like_one(cli: Callable, tmp_path: Path) -> None:
    names = ("Books", "books", "gift cards", "Gift_Cards", "films")
    log = write_log(tmp_path / "log.csv", [("u", d, d, START + n) for n, d in enumerate(names)])
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert outcome.code == 0
    for name in names[:-1]:
        assert f"{name!r}" in outcome.err.split("look like one")[0] or "..." in outcome.err
    assert "'films'" not in outcome.err


@pytest.mark.parametrize(
    "text", ["nan", "NaN", "None", "NULL", "null", r"\N", "N/A", "<NA>", "NaT"]
)
def test_missing_values_as_text(text: str, cli: Callable, tmp_path: Path) -> None:
    rows = [(text, "a", "d", START), (text, text, "e", START + 1), ("u", "b", text, START + 2)]
    outcome = cli("prepare", write_log(tmp_path / "log.csv", rows), "--out", tmp_path / "out")
    assert outcome.code == 0
    for role, events in (("user", 2), ("item", 1), ("domain", 1)):
        said = (
            f"{role} ids that look like missing values count as {role}s: {text!r} ({events} events)"
        )
        assert said in outcome.err


def test_words_that_hold_none(cli: Callable, tmp_path: Path) -> None:
    rows = [("nancy", "nonet", "d", START), ("nancy", "nullity", "e", START + 1)]
    outcome = cli("prepare", write_log(tmp_path / "log.csv", rows), "--out", tmp_path / "out")
    assert outcome.err == ""


def test_users_of_one_domain_each(cli: Callable, tmp_path: Path) -> None:
    books = write_log(tmp_path / "books.csv", [("U-01", "b", START), ("U-02", "b", START)], NAMES)
    films = write_log(tmp_path / "films.csv", [("u1", "f", START), ("u2", "f", START)], NAMES)
    outcome = cli("prepare", books, films, "--out", tmp_path / "out")
    assert outcome.code == 0
    assert "no user has events in more than one domain" in outcome.err
    assert "'U-01' in books, 'u1' in films" in outcome.err
    films = write_log(films, [("u1", "f", START), ("U-02", "f", START)], NAMES)
    outcome = cli("prepare", books, films, "--out", tmp_path / "out", "--force")
    assert outcome.err == ""


def test_strangers_are_looked_for_among_all(cli: Callable, tmp_path: Path) -> None:
    rows = [
        (f"u{n:05}", f"{'bf'[n % 2]}", "books" if n % 2 == 0 else "films", START)
        for n in range(3000)
    ]
    log = write_log(tmp_path / "log.csv", rows)
    assert "no user has events" in cli("prepare", log, "--out", tmp_path / "a").err
    log = write_log(tmp_path / "log.csv", [*rows, ("u02998", "f", "films", START)])
    assert cli("prepare", log, "--out", tmp_path / "b").err == ""


def test_prefix_items(cli: Callable, tmp_path: Path) -> None:
    books = write_log(tmp_path / "books.csv", [("u", "1", START), ("u", "2", START + 2)], NAMES)
    films = write_log(tmp_path / "films.csv", [("u", "1", START + 1)], NAMES)
    outcome = cli("prepare", books, films, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "--prefix-items" in outcome.err
    outcome = cli("prepare", books, films, "--out", tmp_path / "out", "--prefix-items")
    assert outcome.code == 0
    items = pl.read_parquet(tmp_path / "out" / "catalog.parquet")
    assert items.rows() == [("books:1", "books"), ("books:2", "books"), ("films:1", "films")]
    assert InteractionStore.open(tmp_path / "out").item_ids.tolist() == [1, 3, 2]


@pytest.mark.parametrize("role", range(3))
def test_endless_ids(role: int, cli: Callable, tmp_path: Path) -> None:
    row: list[object] = ["u", "i", "d", START]
    row[role] = "x" * 5000
    log = write_log(tmp_path / "log.csv", [("u", "j", "e", START), row], HEADER)
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"{log}:3" in outcome.err
    assert "longer than 4096 bytes" in outcome.err
    assert len(outcome.err) < 400


@pytest.mark.parametrize(
    "ids",
    [("Zoe\u0308", "Zo\u00eb"), ("u1", "\ufeffu1"), ("u1", "u1\u200b")],
    ids=["accents", "byte order mark", "no width"],
)
def test_spellings_in_unicode_meet(ids: tuple[str, str], cli: Callable, tmp_path: Path) -> None:
    rows = [(u, f"i{n}", ("books", "films")[n], START + n) for n, u in enumerate(ids)]
    log = write_log(tmp_path / "log.csv", [*rows, ("other\u0308", "x", "books", START)])
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert "accents and unseen characters of" in outcome.out
    assert len(users(tmp_path / "out")) == 2
    exact = IdOptions(exact=True)
    assert prepare_logs([str(log)], tmp_path / "exact", ids=exact)["users"] == 3


def test_spellings_that_meet_nothing_stay(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("Zoe\u0308", "i", "books", START)])
    prepare_logs([str(log)], tmp_path / "out")
    assert users(tmp_path / "out") == ["Zoe\u0308"]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["007", "7"], "1 user ids differ from others by leading zeros only ('007')"),
        (["12", "12.0", "12.5"], "differ from others by a fraction of zeros only ('12.0')"),
        (["1.23E+15", "1.24E+15"], "2 user ids ('1.23E+15', '1.24E+15') look like numbers that a"),
        (["'u1'", "u1"], """1 user ids ("'u1'") hold their quotes"""),
        (["007", "08", "1.5", "1e3", "o'u1'"], None),
    ],
)
def test_odd_ids(ids: list[str], words: str | None, cli: Callable, tmp_path: Path) -> None:
    rows = [(u, f"i{n}", ("books", "films")[n % 2], START + n // 2) for n, u in enumerate(ids * 2)]
    outcome = cli("prepare", write_log(tmp_path / "log.csv", rows), "--out", tmp_path / "out")
    assert outcome.code == 0
    assert len(users(tmp_path / "out")) == len(ids)
    warned = [line for line in outcome.err.splitlines() if "user ids" in line]
    assert len(warned) == (words is not None)
    assert words is None or words in warned[0]


def test_floats_of_few_digits(tmp_path: Path) -> None:
    ids = pl.Series([2.0**24, 1.0], dtype=pl.Float32)
    frame = pl.DataFrame({"user_id": ids, "item_id": "x", "timestamp": START})
    frame.write_parquet(tmp_path / "books.parquet")
    with pytest.raises(InputError, match="'user_id' is Float32 and holds numbers up to 16777216"):
        prepare_logs([f"books={tmp_path / 'books.parquet'}"], tmp_path / "out")
