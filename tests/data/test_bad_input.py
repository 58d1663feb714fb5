"""Every kind of bad input: exit code 2, one line that names place, value and mend, nothing left."""

import csv
import gzip
import json
from collections.abc import Callable
from datetime import time, timedelta
from pathlib import Path

import pytest
from log_files import write_log

HEADER = "user_id,item_id,domain,timestamp\n"
GOOD = "a,b,books,1\n"

# name: (content of log.csv, words the message must hold; {log} is the file)
FAULTS: dict[str, tuple[str, list[str]]] = {
    "missing column": (
        "user_id,item_id,domain,timestmp\na,b,c,1\n",
        ["{log}:1", "no time column", "user_id, item_id, domain, timestmp", "--time-col timestmp"],
    ),
    "no domain column": (
        "user_id,item_id,timestamp\na,b,1\n",
        ["{log}:1", "--domain-col", "NAME="],
    ),
    "column twice": (
        "user_id,user_id,item_id,domain,timestamp\n",
        ["{log}:1", "'user_id'", "twice"],
    ),
    "no header": ("a,b,books,100\na,c,books,101\n", ["{log}:1", "a, b, books, 100", "--user-col"]),
    "word as timestamp": (HEADER + GOOD + "a,c,books,noon\n", ["{log}:3", "'noon'", "seconds"]),
    "negative timestamp": (HEADER + GOOD + "a,c,books,-7\n", ["{log}:3", "negative", "'-7'"]),
    "negative fraction": (HEADER + GOOD + "a,c,books,-0.5\n", ["{log}:3", "negative", "'-0.5'"]),
    "NaN timestamp": (HEADER + GOOD + "a,c,books,NaN\n", ["{log}:3", "'NaN'", "seconds"]),
    "infinite timestamp": (HEADER + GOOD + "a,c,books,inf\n", ["{log}:3", "'inf'", "seconds"]),
    "huge timestamp": (HEADER + GOOD + "a,c,books,1e30\n", ["{log}:3", "'1e30'", "seconds"]),
    "empty timestamp": (HEADER + GOOD + "a,c,books,\n", ["{log}:3", "empty timestamp", "fill"]),
    "empty user": (HEADER + GOOD + ",c,books,2\n", ["{log}:3", "empty user id", "fill it in"]),
    "blank item": (HEADER + GOOD + "a,  ,books,2\n", ["{log}:3", "empty item id ('  ')", "fill"]),
    "quoted empty item": (HEADER + GOOD + 'a,"",books,2\n', ["{log}:3", "empty item id"]),
    "empty domain": (HEADER + GOOD + "a,c,,2\n", ["{log}:3", "empty domain id", "fill it in"]),
    "after an empty line": (HEADER + GOOD + "\n\na,c,books,x\n", ["{log}:5", "'x'"]),
    "after a quoted newline": (HEADER + '"a\nz",b,books,1\na,c,books,x\n', ["{log}:4", "'x'"]),
    "too few fields": (HEADER + GOOD + "a,c\n", ["{log}:3", "2 fields where 4", "'a,c'", "mend"]),
    "too many fields": (HEADER + GOOD + "a,c,books,2,9\n", ["{log}:3", "5 fields where 4"]),
    "too many fields, last unused": (
        "user_id,item_id,domain,timestamp,stars\na,b,books,1,5\na,c,books,2,5,6\n",
        ["{log}:3", "6 fields where 5"],
    ),
    "open quote": (HEADER + GOOD + '"a,c,books,2\na,d,books,3\n', ["{log}:3", "quote the field"]),
    "empty file": ("", ["{log}", "empty", "at least one event"]),
    "header only": (HEADER, ["{log}", "no events", "only a header"]),
    "domain named like a group": (
        HEADER + GOOD + "a,c,switch,2\n",
        ["domain 'switch'", "hr@100[switch]", "call the domain otherwise"],
    ),
    "item in two domains": (
        HEADER + GOOD + "a,c,films,2\nz,b,films,3\n",
        ["{log}:4", "'b'", "'films'", "'books' at {log}:2", "give it one domain"],
    ),
}


def assert_refused(
    outcome: tuple[int, str, str], words: list[str], folder: Path, *kept: str
) -> None:
    """Exit code 2, one line on stderr that holds the words, and only ``kept`` in the folder."""
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert err.startswith("hstu-xd: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_csv(name: str, cli: Callable, tmp_path: Path) -> None:
    content, words = FAULTS[name]
    log = tmp_path / "log.csv"
    log.write_text(content, encoding="utf-8")
    words = [word.format(log=log) for word in words]
    assert_refused(cli("prepare", log, "--out", tmp_path / "out"), words, tmp_path, "log.csv")


def test_fault_far_down_a_compressed_file(cli: Callable, tmp_path: Path) -> None:
    log = tmp_path / "log.csv.gz"
    rows = [f"u{n},i{n},books,{n}\n" for n in range(50_000)]
    rows[43_210] = "u,i,books,soon\n"
    log.write_bytes(gzip.compress((HEADER + "".join(rows)).encode()))
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert_refused(outcome, [f"{log}:43212", "'soon'"], tmp_path, "log.csv.gz")


@pytest.mark.parametrize("lines", [1, 3000])
def test_undecodable_line(lines: int, cli: Callable, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes(HEADER.encode() + GOOD.encode() * lines + b"\xff\xfe,c,books,2\n")
    words = [f"{log}:{lines + 2}", "UTF-8"]
    assert_refused(cli("prepare", log, "--out", tmp_path / "out"), words, tmp_path, "log.csv")


@pytest.mark.parametrize("rows", [10, 30_000])
def test_truncated_gzip(rows: int, cli: Callable, tmp_path: Path) -> None:
    log = tmp_path / "log.csv.gz"
    body = HEADER + "".join(f"u{n * 7919 % 10007},i{n},books,{n}\n" for n in range(rows))
    log.write_bytes(gzip.compress(body.encode())[:-20])
    words = [f"{log}:", "truncated or damaged after line", "again"]
    assert_refused(cli("prepare", log, "--out", tmp_path / "out"), words, tmp_path, "log.csv.gz")


JSON_GOOD = '{"reviewerID": "A1", "asin": "B1", "unixReviewTime": 5}\n'
JSON_FAULTS = {
    "broken": (JSON_GOOD + '{"reviewerID": "A1",\n', ["{log}:2", "not valid JSON", "mend"]),
    "broken first": ("{]\n", ["{log}:1", "not valid JSON", "one JSON object a line"]),
    "array": (JSON_GOOD + "[1]\n", ["{log}:2", "not a JSON object", "'[1]'"]),
    "no time": (
        JSON_GOOD + '{"reviewerID": "A1", "asin": "B1"}\n',
        ["{log}:2", "empty timestamp", "fill it in"],
    ),
    "no item key": (
        '{"reviewerID": "A1", "unixReviewTime": 5}\n',
        ["{log}:1", "no item column", "reviewerID, unixReviewTime", "--item-col"],
    ),
    "byte order mark": ("\ufeff" + JSON_GOOD, ["{log}:1", "byte order mark", "save the file"]),
    "half a pair": (JSON_GOOD.replace("A1", "\\ud800"), ["{log}:1", "half of a surrogate pair"]),
    "half a pair before text": (
        JSON_GOOD.replace("B1", "\\ud83dx"),
        ["{log}:1", "half of a surrogate pair"],
    ),
    "word as time": (JSON_GOOD.replace("5", '"x"'), ["{log}:1", "'x'", "seconds"]),
}


@pytest.mark.parametrize("name", JSON_FAULTS)
def test_faulty_json_lines(name: str, cli: Callable, tmp_path: Path) -> None:
    content, words = JSON_FAULTS[name]
    log = tmp_path / "books.jsonl"
    log.write_text(content, encoding="utf-8")
    words = [word.format(log=log) for word in words]
    assert_refused(cli("prepare", log, "--out", tmp_path / "out"), words, tmp_path, "books.jsonl")


def test_faulty_parquet(cli: Callable, tmp_path: Path) -> None:
    import polars as pl

    log = tmp_path / "log.parquet"
    frame = pl.DataFrame(
        {"user_id": [1, 1], "item_id": ["a", "b"], "domain": "x", "timestamp": [1, -2]}
    )
    frame.write_parquet(log)
    words = [f"{log}: row 2", "negative", "'-2'"]
    assert_refused(cli("prepare", log, "--out", tmp_path / "out"), words, tmp_path, "log.parquet")
    frame.drop("item_id").write_parquet(log)
    words = [str(log), "no item column", "user_id, domain, timestamp"]
    assert_refused(cli("prepare", log, "--out", tmp_path / "out"), words, tmp_path, "log.parquet")
    log.write_bytes(b"PAR1 and no more")
    words = [str(log), "not a readable Parquet file"]
    assert_refused(cli("prepare", log, "--out", tmp_path / "out"), words, tmp_path, "log.parquet")


def test_item_in_two_domains_of_two_files(cli: Callable, tmp_path: Path) -> None:
    books = write_log(tmp_path / "books.csv", [("a", "x", 1)], ("user_id", "item_id", "timestamp"))
    films = write_log(tmp_path / "films.csv", [("b", "x", 2)], ("user_id", "item_id", "timestamp"))
    outcome = cli("prepare", books, films, "--out", tmp_path / "out")
    words = [f"{films}:2", "'x'", "'films'", f"'books' at {books}:2"]
    assert_refused(outcome, words, tmp_path, "books.csv", "films.csv")


def test_two_files_that_would_be_one_domain(cli: Callable, tmp_path: Path) -> None:
    header = ("user_id", "item_id", "timestamp")
    one = write_log(tmp_path / "in" / "a" / "log.csv", [("a", "x", 1)], header)
    two = write_log(tmp_path / "in" / "b" / "log.csv", [("a", "y", 1)], header)
    outcome = cli("prepare", one, two, "--out", tmp_path / "out")
    assert_refused(outcome, ["'log'", "NAME=PATH"], tmp_path, "in")


# name: (arguments after the log, words of the message)
USAGE = {
    "filters leave nothing": (
        ["--min-item", "9"],
        ["--min-item 9", "none of the 1 events", "lower"],
    ),
    "negative filter": (["--min-user", "-1"], ["--min-user -1", "0 or more"]),
    "unknown column": (["--user-col", "usr_id"], [":1", "'usr_id'", "--user-col user_id"]),
    "unknown format": (["--format", "cvs"], ["'cvs'", "csv", "amazon-ratings"]),
    "missing file": (["nowhere.csv"], ["nowhere.csv", "no such file"]),
    "folder as file": (["."], ["is a folder", "name the log files"]),
    "same file twice": (["{log}"], ["given twice"]),
    "empty domain name": (["={log}"], ["domain before '=' is empty"]),
    "not amazon ratings": (["--format", "amazon-ratings"], [":1", "'timestamp'", "seconds"]),
}


@pytest.mark.parametrize("name", USAGE)
def test_bad_usage(name: str, cli: Callable, tmp_path: Path) -> None:
    args, words = USAGE[name]
    log = tmp_path / "log.csv"
    log.write_text(HEADER + GOOD)
    args = [arg.format(log=log) for arg in args]
    outcome = cli("prepare", log, "--out", tmp_path / "out", *args)
    assert_refused(outcome, words, tmp_path, "log.csv")


def test_existing_output(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "b", "books", 1), ("a", "c", "films", 2)])
    out = tmp_path / "out"
    assert cli("prepare", log, "--out", out).code == 0
    before = (out / "manifest.json").read_bytes()
    write_log(log, [("a", "b", "books", 1)])
    outcome = cli("prepare", log, "--out", out)
    assert_refused(outcome, [str(out), "exists", "--force"], tmp_path, "log.csv", "out")
    assert (out / "manifest.json").read_bytes() == before
    # A failing run with --force leaves the old store as it was.
    write_log(log, [("a", "b", "books", "x")])
    assert cli("prepare", log, "--out", out, "--force").code == 2
    assert (out / "manifest.json").read_bytes() == before
    write_log(log, [("a", "b", "books", 1)])
    assert cli("prepare", log, "--out", out, "--force").code == 0
    assert json.loads((out / "manifest.json").read_text())["interactions"] == 1


def test_force_never_replaces_what_is_no_store(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "b", "books", 1)])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for args in (["--force"], []):
        outcome = cli("prepare", log, "--out", precious, *args)
        words = [str(precious), "not a prepared store", "another --out"]
        assert_refused(outcome, words, tmp_path, "log.csv", "precious")
    assert (precious / "thesis.txt").read_text() == "years of work"
    outcome = cli("prepare", log, "--out", log, "--force")
    assert_refused(outcome, [str(log), "is a file"], tmp_path, "log.csv", "precious")


def test_disk_that_refuses_is_no_user_error(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "b", "books", 1)])

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hstu_xd.data.store_files.np.save", full)
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "No space left" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_parquet_columns_that_are_no_log(cli: Callable, tmp_path: Path) -> None:
    import polars as pl

    log = tmp_path / "log.parquet"
    good = pl.DataFrame(
        {"user_id": ["a", "b"], "item_id": ["c", "d"], "domain": "x", "timestamp": [1, 2]}
    )
    odd = {
        "user_id": [pl.Series([[1], [2]]), pl.Series([True, False])],
        "timestamp": [
            pl.Series([True, False]),
            pl.Series([time(1, 2), time(3, 4)]),
            pl.Series([timedelta(1), timedelta(2)]),
            pl.Series([[1], [2]]),
        ],
    }
    for name, columns in odd.items():
        for column in columns:
            good.with_columns(column.alias(name)).write_parquet(log)
            words = [str(log), f"column {name!r}", str(column.dtype)]
            outcome = cli("prepare", log, "--out", tmp_path / "out")
            assert_refused(outcome, words, tmp_path, "log.parquet")
    good.with_columns(user_id=pl.Series([b"\xff\xfe", b"a"])).write_parquet(log)
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert_refused(outcome, [str(log), "cannot be read as a log"], tmp_path, "log.parquet")


@pytest.mark.parametrize(
    "content",
    [(HEADER + GOOD).replace("\n", "\r"), HEADER.strip() + "," + "x" * 200_000 + "\n" + GOOD],
    ids=["returns for line ends", "endless field"],
)
def test_first_line_that_is_none(content: str, cli: Callable, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes(content.encode())
    limit = csv.field_size_limit(131_072)  # as it is when Python starts
    try:
        outcome = cli("prepare", log, "--out", tmp_path / "out")
    finally:
        csv.field_size_limit(limit)
    assert_refused(outcome, [f"{log}:1", "not readable as a delimited line"], tmp_path, "log.csv")


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="no /proc here, Linux's folder that takes no file"
)
def test_a_folder_that_takes_no_file(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "b", "books", 1)])
    outcome = cli("prepare", log, "--out", "/proc/none")
    assert outcome.code == 1
    assert "/proc/.none.lock: No such file or directory" in outcome.err
