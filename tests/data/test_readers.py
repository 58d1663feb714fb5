"""The same events in every supported file type give the same store."""

import gzip
import json
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import polars as pl
import pytest
from log_files import HEADER, contents, write_log

from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.errors import InputError

ROWS = [
    ("A1", "B001", "books", 1_400_000_000),
    ("A2", "B001", "books", 1_400_000_005),
    ("A1", "B777", "films", 1_400_000_007),
    ("A3", "B778", "films", 1_300_000_000),
    ("A1", "B002", "books", 1_300_000_001),
]


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """The store of ROWS, by way of plain CSV."""
    log = write_log(tmp_path / "expected.csv", ROWS)
    prepare_logs([str(log)], tmp_path / "expected")
    return contents(tmp_path / "expected")


def of_domain(domain: str) -> list[Sequence[object]]:
    return [row for row in ROWS if row[2] == domain]


def prepared(inputs: Sequence[object], out: Path, **options: object) -> dict[str, bytes]:
    prepare_logs([str(path) for path in inputs], out, **options)  # type: ignore[arg-type]
    return contents(out)


def test_store_of_the_rows(tmp_path: Path, expected: dict[str, bytes]) -> None:
    manifest = json.loads(expected["manifest.json"])
    assert (manifest["users"], manifest["items"], manifest["interactions"]) == (3, 4, 5)
    assert manifest["domains"] == {
        "books": {"users": 2, "items": 2, "interactions": 3},
        "films": {"users": 2, "items": 2, "interactions": 2},
    }
    # A1 has two of three events in books: (4 + 1) / 9; the other two have one domain each.
    assert manifest["delta"] == pytest.approx((5 / 9 + 1 + 1) / 3, abs=1e-9)
    assert manifest["history_length"] == {"mean": 1.666666667, "median": 1.0, "max": 3}
    assert manifest["switch_share"] == 0.5


@pytest.mark.parametrize(
    ("name", "separator"),
    [("log.csv", ","), ("log.tsv", "\t"), ("log.txt", ";"), ("log.csv", "|")],
)
def test_separators(name: str, separator: str, tmp_path: Path, expected: dict[str, bytes]) -> None:
    log = write_log(tmp_path / name, ROWS, separator=separator)
    assert prepared([log], tmp_path / "out") == expected


def test_windows_file(tmp_path: Path, expected: dict[str, bytes]) -> None:
    log = write_log(tmp_path / "log.csv", ROWS)
    text = "\n" + log.read_text().replace("\n", "\r\n")
    log.write_bytes(b"\xef\xbb\xbf" + text[1:].encode())
    assert prepared([log], tmp_path / "out") == expected


def test_quotes_blank_lines_and_no_last_newline(tmp_path: Path, expected: dict[str, bytes]) -> None:
    log = write_log(tmp_path / "log.csv", [[f'"{field}"' for field in row] for row in ROWS])
    log.write_text(log.read_text().replace("\n", "\n\n").rstrip())
    assert prepared([log], tmp_path / "out") == expected


def test_gzip_with_any_name(tmp_path: Path, expected: dict[str, bytes]) -> None:
    plain = write_log(tmp_path / "log.csv", ROWS).read_bytes()
    for name in ("log.csv.gz", "zipped.csv"):
        (tmp_path / name).write_bytes(gzip.compress(plain))
        assert prepared([tmp_path / name], tmp_path / f"{name}.out") == expected


def test_other_column_names_and_order(tmp_path: Path, expected: dict[str, bytes]) -> None:
    rows = [(time, domain, "x", item, user) for user, item, domain, time in ROWS]
    log = write_log(tmp_path / "a.csv", rows, ("Time", "Domain", "price", "ASIN", "UserId"))
    assert prepared([log], tmp_path / "a") == expected
    log = write_log(tmp_path / "b.csv", rows, ("when", "shop", "price", "what", "who"))
    columns = ColumnOptions(user="who", item="what", domain="shop", time="when")
    assert prepared([log], tmp_path / "b", columns=columns) == expected


@pytest.mark.parametrize("suffix", [".0", ".75", "e0"])
def test_decimal_times(suffix: str, tmp_path: Path, expected: dict[str, bytes]) -> None:
    log = write_log(tmp_path / "log.csv", [(*row[:3], f"{row[3]}{suffix}") for row in ROWS])
    assert prepared([log], tmp_path / "out") == expected


def test_one_file_a_domain(tmp_path: Path, expected: dict[str, bytes]) -> None:
    header = ("user_id", "item_id", "timestamp")
    for domain in ("books", "films"):
        rows = [(user, item, time) for user, item, _, time in of_domain(domain)]
        write_log(tmp_path / f"{domain}.csv", rows, header)
        write_log(tmp_path / f"{domain[0]}=1.csv", rows, header)
    files = [tmp_path / "films.csv", tmp_path / "books.csv"]
    assert prepared(files, tmp_path / "by stem") == expected
    named = [f"films={tmp_path / 'f=1.csv'}", f"books={tmp_path / 'b=1.csv'}"]
    assert prepared(named, tmp_path / "by name") == expected


def test_name_before_path_beats_the_domain_column(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", ROWS)
    manifest = prepare_logs([f"shop={log}"], tmp_path / "out")
    assert list(manifest["domains"]) == ["shop"]


@pytest.mark.parametrize("times", ["int", "text", "float", "datetime", "zoned", "date"])
def test_parquet(times: str, tmp_path: Path, expected: dict[str, bytes]) -> None:
    frame = pl.DataFrame(ROWS, schema=list(HEADER), orient="row")
    epoch = datetime(1970, 1, 1, tzinfo=timezone.utc)
    moments = [epoch + timedelta(seconds=row[3]) for row in ROWS]
    column = {
        "int": frame["timestamp"].cast(pl.UInt32),
        "text": frame["timestamp"].cast(pl.String),
        "float": frame["timestamp"] + 0.5,
        "datetime": pl.Series([moment.replace(tzinfo=None) for moment in moments]),
        "zoned": pl.Series(moments).dt.convert_time_zone("Asia/Tokyo"),
        "date": pl.Series([moment.date() for moment in moments]),
    }[times]
    log = tmp_path / "log.parquet"
    frame.with_columns(
        timestamp=column, domain=pl.col("domain").cast(pl.Categorical)
    ).write_parquet(log)
    store = prepared([log], tmp_path / "out")
    if times == "date":
        assert json.loads(store["manifest.json"])["interactions"] == len(ROWS)
    else:
        assert store == expected


def test_parquet_number_ids(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"user_id": [7, 8], "item_id": [1, 2], "domain": [0, 1], "timestamp": [5, 6]}
    )
    frame.write_parquet(tmp_path / "log.parquet")
    rows = [(7, 1, 0, 5), (8, 2, 1, 6)]
    log = write_log(tmp_path / "log.csv", rows)
    assert prepared([tmp_path / "log.parquet"], tmp_path / "a") == prepared([log], tmp_path / "b")


@pytest.mark.parametrize("file_format", ["auto", "amazon-ratings"])
@pytest.mark.parametrize("year", [2014, 2018])
def test_amazon_ratings(
    year: int, file_format: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    for domain in ("books", "films"):
        rows = [(user, item, 5.0, time) for user, item, _, time in of_domain(domain)]
        if year == 2018:
            rows = [(item, user, *rest) for user, item, *rest in rows]
        write_log(tmp_path / f"{domain}.csv", rows, header=None)
    files = [tmp_path / "books.csv", tmp_path / "films.csv"]
    assert prepared(files, tmp_path / "out", file_format=file_format) == expected


def test_amazon_ratings_with_ids_that_tell_nothing(tmp_path: Path) -> None:
    log = write_log(tmp_path / "books.csv", [("u1", "i1", 5, 3), ("u2", "i1", 5, 4)], header=None)
    with pytest.raises(InputError, match="--columns user,item,rating,time, or say by number"):
        prepare_logs([f"books={log}"], tmp_path / "a")
    first = prepare_logs(
        [f"books={log}"],
        tmp_path / "a",
        columns=ColumnOptions(names=("user", "item", "rating", "time")),
    )
    assert (first["users"], first["items"]) == (2, 1)
    columns = ColumnOptions(user="2", item="1")
    second = prepare_logs([str(log)], tmp_path / "b", columns=columns)
    assert (second["users"], second["items"]) == (1, 2)


def review(year: int, user: str, item: str, time: int) -> dict[str, object]:
    if year == 2023:
        ids = {"parent_asin": item, "asin": "other"} if time % 2 else {"asin": item}
        return {
            "rating": 5.0,
            "images": [{"a": 1}],
            "user_id": user,
            **ids,
            "timestamp": time * 1000 + 7,
        }
    return {"reviewerID": user, "asin": item, "style": {"x": [1]}, "unixReviewTime": time}


@pytest.mark.parametrize("year", [2014, 2018, 2023])
@pytest.mark.parametrize("zipped", [False, True])
def test_amazon_reviews(
    year: int, zipped: bool, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    files = []
    for domain in ("books", "films"):
        events = [review(year, user, item, time) for user, item, _, time in of_domain(domain)]
        text = "".join(json.dumps(event) + "\n" for event in events).encode()
        files.append(tmp_path / (f"{domain}.json.gz" if zipped else f"{domain}.jsonl"))
        files[-1].write_bytes(gzip.compress(text) if zipped else text)
    assert prepared(files, tmp_path / "out") == expected


def test_recbole(tmp_path: Path, expected: dict[str, bytes]) -> None:
    types = ("user_id:token", "item_id:token", "domain:token", "timestamp:float")
    rows = [(*row[:3], f"{row[3]}.0") for row in ROWS]
    log = write_log(tmp_path / "all.inter", rows, types, separator="\t")
    assert prepared([log], tmp_path / "one file") == expected
    files = []
    for domain in ("books", "films"):
        part = [(row[0], row[1], 4.0, row[3]) for row in of_domain(domain)]
        header = (*types[:2], "rating:float", types[3])
        files.append(write_log(tmp_path / f"{domain}.inter", part, header, separator="\t"))
    assert prepared(files, tmp_path / "two files") == expected


def test_recbole_keeps_quotes(tmp_path: Path) -> None:
    header = ("user_id:token", "item_id:token", "timestamp:float")
    rows = [("a", '"x', 1), ("b", 'y"', 2)]
    log = write_log(tmp_path / "books.inter", rows, header, separator="\t")
    prepare_logs([str(log)], tmp_path / "out")
    catalogue = pl.read_parquet(tmp_path / "out" / "catalog.parquet")
    assert catalogue["item"].to_list() == ['"x', 'y"']


def test_unicode_ids_sort_by_code_point(tmp_path: Path) -> None:
    users = ["b", "B", "\u00e4", "\U0001f600", "z", "\uff5e", "10", "9"]
    rows = [(user, "i", "d", n) for n, user in enumerate(users)]
    prepare_logs([str(write_log(tmp_path / "log.csv", rows))], tmp_path / "out")
    stored = pl.read_parquet(tmp_path / "out" / "users.parquet")["user"].to_list()
    assert stored == sorted(users)


def test_milliseconds_are_read_as_such(tmp_path: Path, expected: dict[str, bytes]) -> None:
    rows = [(*row[:3], row[3] * 1000) for row in ROWS]
    assert prepared([write_log(tmp_path / "log.csv", rows)], tmp_path / "out") == expected
