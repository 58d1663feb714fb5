"""Random logs, sound and spoilt: read as what they are, or refused in one line; nothing else."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hstu_xd.cli.app import run
from hstu_xd.data import InteractionStore
from hstu_xd.data.sources.parquet import parquet_batches

START = 1_500_000_000
NAMES = ("user_id", "item_id", "domain", "timestamp", "title")


class Event(NamedTuple):
    user: str
    item: str
    domain: str
    time: int
    title: str


@st.composite
def logs(draw: st.DrawFn) -> list[Event]:
    """A few events whose users meet in two domains, and titles as people write them."""
    title = st.sampled_from(["", "plain", "a, b", "tea\ttime", "it's", "x|y", "two; three"])
    count = draw(st.integers(4, 12))
    events = []
    for n in range(count):
        item = draw(st.integers(0, 7))
        user = f"u{draw(st.integers(0, 3)) if n else 0}"
        time = START + draw(st.integers(0, 10**8))
        events.append(Event(user, f"i{item}", ("books", "films")[item % 2], time, draw(title)))
    return events


def as_csv(events: list[Event], separator: str = ",", *, times: Callable = str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    writer.writerow(NAMES)
    writer.writerows([(*e[:3], times(e.time), e.title) for e in events])
    return text.getvalue()


def as_json(events: list[Event]) -> str:
    return "".join(json.dumps(dict(zip(NAMES, event, strict=True))) + "\n" for event in events)


def line_of(text: str, n: int, change: Callable[[str], str]) -> bytes:
    lines = text.splitlines()
    at = 1 + n % (len(lines) - 1)
    lines[at] = change(lines[at])
    return "".join(line + "\n" for line in lines).encode()


def plain(events: list[Event]) -> list[Event]:
    return [event._replace(title="t") for event in events]


def field(text: str, n: int, at: int, value: str | Callable[[str], str]) -> bytes:
    """The log with one field of one line replaced; its titles hold no separator."""

    def change(line: str) -> str:
        fields = line.split(",")
        fields[at] = value(fields[at]) if callable(value) else value
        return ",".join(fields)

    return line_of(text, n, change)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


# Name -> (file name, content from events and a number, what has to happen). "same": the store
# holds the events; "refused"; "either": one of the two.
KINDS: dict[str, tuple[str, Callable[[list[Event], int], bytes], str]] = {
    "csv": ("log.csv", lambda e, n: as_csv(e).encode(), "same"),
    "tsv": ("log.tsv", lambda e, n: as_csv(e, "\t").encode(), "same"),
    "semicolon": ("log.txt", lambda e, n: as_csv(e, ";").encode(), "same"),
    "json": ("log.jsonl", lambda e, n: as_json(e).encode(), "same"),
    "gzip": ("log.csv.gz", lambda e, n: gzip.compress(as_csv(e).encode()), "same"),
    "bzip2": ("log.csv.bz2", lambda e, n: bz2.compress(as_csv(e).encode()), "same"),
    "xz": ("log.csv.xz", lambda e, n: lzma.compress(as_csv(e).encode()), "same"),
    "zstd": ("log.jsonl.zst", lambda e, n: zstd(as_json(e).encode()), "same"),
    "mark and returns": (
        "log.csv",
        lambda e, n: b"\xef\xbb\xbf" + as_csv(e).replace("\n", "\r\n").encode(),
        "same",
    ),
    "milliseconds": (
        "log.csv",
        lambda e, n: as_csv(e, times=lambda t: 1000 * t + n % 1000).encode(),
        "same",
    ),
    "nanoseconds": ("log.csv", lambda e, n: as_csv(e, times=lambda t: t * 10**9).encode(), "same"),
    "float times": ("log.csv", lambda e, n: as_csv(e, times=lambda t: f"{t}.5").encode(), "same"),
    "spaces after commas": (
        "log.csv",
        lambda e, n: as_csv(plain(e)).replace(",", ", ").encode(),
        "same",
    ),
    "a title of two lines": (
        "log.csv",
        lambda e, n: line_of(as_csv(plain(e)), n, lambda x: x[:-1] + '"one\ntwo"'),
        "either",
    ),
    "inches": ("log.csv", lambda e, n: field(as_csv(plain(e)), n, 4, '12" vinyl'), "same"),
    "a title opens a quote": (
        "log.csv",
        lambda e, n: field(as_csv(plain(e)), n, 4, '"Heroes'),
        "same",
    ),
    "two titles open quotes": (
        "log.csv",
        lambda e, n: field(field(as_csv(plain(e)), n, 4, '"A').decode(), n + 1, 4, '"B'),
        "same",
    ),
    "a title opens, another closes": (
        "log.csv",
        lambda e, n: field(field(as_csv(plain(e)), 0, 4, '"A').decode(), 2, 4, 'B"'),
        "either",
    ),
    "a user opens a quote": (
        "log.csv",
        lambda e, n: field(as_csv(plain(e)), n, 0, '"u'),
        "refused",
    ),
    "one time in milliseconds": (
        "log.csv",
        lambda e, n: field(as_csv(plain(e)), n, 3, lambda t: t + "000"),
        "refused",
    ),
    "one time is zero": ("log.csv", lambda e, n: field(as_csv(plain(e)), n, 3, "0"), "refused"),
    "one time is a word": (
        "log.csv",
        lambda e, n: field(as_csv(plain(e)), n, 3, "soon"),
        "refused",
    ),
    "one time is a date": (
        "log.csv",
        lambda e, n: field(as_csv(plain(e)), n, 3, "2019-05-01"),
        "refused",
    ),
    "an id is missing": ("log.csv", lambda e, n: field(as_csv(plain(e)), n, n % 3, ""), "refused"),
    "a field is missing": (
        "log.csv",
        lambda e, n: line_of(as_csv(plain(e)), n, lambda x: x.rpartition(",")[0]),
        "refused",
    ),
    "a field too many": (
        "log.csv",
        lambda e, n: line_of(as_csv(plain(e)), n, lambda x: x + ",1"),
        "refused",
    ),
    "no header": ("log.csv", lambda e, n: as_csv(e).partition("\n")[2].encode(), "refused"),
    "no UTF-8": (
        "log.csv",
        lambda e, n: field(as_csv(plain(e)), n, 4, "\x80").replace(b"\xc2\x80", b"\x80"),
        "refused",
    ),
    "UTF-16": ("log.csv", lambda e, n: as_csv(e).encode("utf-16"), "refused"),
    "gzip cut off": (
        "log.csv.gz",
        lambda e, n: gzip.compress(as_csv(e).encode())[: -1 - n % 20],
        "refused",
    ),
    "zstd cut off": ("log.csv.zst", lambda e, n: zstd(as_csv(e).encode())[: -1 - n % 9], "refused"),
    "NaN in an unused key": (
        "log.jsonl",
        lambda e, n: line_of(as_json(plain(e)), n, lambda x: x[:-1] + ', "r": NaN}'),
        "same",
    ),
    "NaN as time": (
        "log.jsonl",
        lambda e, n: line_of(as_json(plain(e)), n, lambda x: x.replace('p": ', 'p": NaN, "v": ')),
        "refused",
    ),
    "an object cut off": (
        "log.jsonl",
        lambda e, n: line_of(as_json(plain(e)), n, lambda x: x[:-2]),
        "refused",
    ),
    "a list as id": (
        "log.jsonl",
        lambda e, n: line_of(as_json(plain(e)), n, lambda x: x.replace('"u', '["u"], "v": "', 1)),
        "refused",
    ),
    "one array": (
        "log.json",
        lambda e, n: json.dumps([dict(zip(NAMES, event, strict=True)) for event in e]).encode(),
        "refused",
    ),
}


@contextlib.contextmanager
def prepared(name: str, content: bytes, *args: str) -> Iterator[tuple[int, str, Path]]:
    """Exit code, standard error and folder of a run of ``prepare`` on one file."""
    with TemporaryDirectory() as folder:
        log = Path(folder, name)
        log.write_bytes(content)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(["prepare", str(log), "--out", f"{folder}/out", *args])
        yield code, err.getvalue(), Path(folder)


def stored(folder: Path) -> list[tuple[str, str, str, int]]:
    store = InteractionStore.open(folder, verify=True)
    items = pl.read_parquet(folder / "catalog.parquet").select("item", "domain").rows()
    found = []
    for user in range(store.num_users):
        ids, times = store.history(user)
        token = store.user_token(user)
        found += [(token, *items[n - 1], t) for n, t in zip(ids.tolist(), times.tolist())]
    return sorted(found)


def check(name: str, content: bytes, expected: list[tuple] | None, what: str) -> None:
    with prepared(name, content) as (code, err, folder):
        left = {path.name for path in folder.iterdir()}
        if code == 2 and what != "same":
            assert err.startswith("hstu-xd: ")
            assert err.count("\n") == 1
            assert left == {name}
        else:
            assert code == 0, err
            assert what != "refused"
            assert left == {name, "out"}
            assert stored(folder / "out") == expected


SLOWLY = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3)
@given(events=logs(), number=st.integers(0, 10**6))
def test_kinds_of_logs(kind: str, events: list[Event], number: int) -> None:
    name, content, what = KINDS[kind]
    check(name, content(events, number), sorted(event[:4] for event in events), what)


@pytest.mark.slow
@SLOWLY
@given(kind=st.sampled_from(sorted(KINDS)), events=logs(), number=st.integers(0, 10**6))
def test_many_logs(kind: str, events: list[Event], number: int) -> None:
    name, content, what = KINDS[kind]
    check(name, content(events, number), sorted(event[:4] for event in events), what)


def spoilt(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """The content with bytes taken away and put in."""
    for place, length, text in edits:
        at = place % (len(content) + 1)
        content = content[:at] + text + content[at + length :]
    return content


PIECES = [
    b"",
    b",",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b" ",
    b"\t",
    b"\\",
    b"{",
    b"nan",
    b"-",
    b"9",
]
edits = st.lists(
    st.tuples(st.integers(0, 10**4), st.integers(0, 3), st.sampled_from(PIECES)), max_size=3
)


def counted(content: bytes, quoting: int) -> int | None:
    """The number of events that Python's csv reads, None where it cannot."""
    lines = io.StringIO(content.decode().replace("\r", ""))
    try:
        return sum(map(bool, csv.reader(lines, quoting=quoting))) - 1  # type: ignore[arg-type]
    except csv.Error:
        return None


def check_spoilt(events: list[Event], name: str, changes: list[tuple[int, int, bytes]]) -> None:
    """A spoilt text is refused, or the store holds the events that Python's csv reads in it."""
    whole = as_json(events) if name.endswith("jsonl") else as_csv(events)
    content = spoilt(whole.encode(), changes)
    with prepared(name, content) as (code, err, folder):
        assert code in (0, 2), err
        left = {path.name for path in folder.iterdir()}
        if code == 2:
            assert err.startswith("hstu-xd: ")
            assert err.count("\n") == 1
            assert left == {name}
            return
        assert left == {name, "out"}
        found = stored(folder / "out")
        if name.endswith("csv"):
            counts = {counted(content, style) for style in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE)}
        else:
            counts = {sum(bool(line.strip()) for line in content.split(b"\n"))}
        assert len(found) in counts


@settings(max_examples=25)
@given(logs(), st.sampled_from(["log.csv", "log.jsonl"]), edits)
def test_spoilt_logs(events: list[Event], name: str, changes: list) -> None:
    check_spoilt(events, name, changes)


@pytest.mark.slow
@SLOWLY
@given(logs(), st.sampled_from(["log.csv", "log.jsonl"]), edits)
def test_many_spoilt_logs(events: list[Event], name: str, changes: list) -> None:
    check_spoilt(events, name, changes)


def a_parquet() -> bytearray:
    """Return a file of 40 events in two groups of rows."""
    frame = pl.DataFrame(
        [(f"u{n % 3}", f"i{n % 7}", f"d{n % 7}", START + n) for n in range(40)],
        schema=list(NAMES[:4]),
        orient="row",
    )
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="uncompressed", row_group_size=20)
    return bytearray(buffer.getvalue())


def check_parquet(at: int, change: int) -> None:
    content = a_parquet()
    content[at % len(content)] ^= change
    with prepared("log.parquet", bytes(content)) as (code, err, folder):
        assert code in (0, 2)
        if code == 2:
            assert "hstu-xd: " in err
            assert {path.name for path in folder.iterdir()} == {"log.parquet"}
        else:
            assert len(stored(folder / "out")) == 40


@settings(max_examples=20)
@given(st.integers(0, 10**5), st.integers(1, 255))
@example(2044, 8)  # a group states fewer rows than its columns have
def test_damaged_parquet(at: int, change: int) -> None:
    check_parquet(at, change)


@pytest.mark.slow
@SLOWLY
@given(st.integers(0, 10**5), st.integers(1, 255))
def test_many_damaged_parquets(at: int, change: int) -> None:
    check_parquet(at, change)


@pytest.mark.slow
def test_no_bit_of_a_parquet_hides_rows(tmp_path: Path) -> None:
    """Every third bit is flipped in turn; of those files that are read, none has lost a row."""
    content, file, read = a_parquet(), tmp_path / "log.parquet", 0
    for bit in range(0, 8 * len(content), 3):
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            rows = sum(len(batch) for batch in parquet_batches(file, list(NAMES[:4])))
        except pl.exceptions.ComputeError:
            continue
        assert rows == 40, bit
        read += 1
    assert read > len(content) // 3  # nothing is noticed of most bits of the values
