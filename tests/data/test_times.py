"""What the times of a file are is decided by plausibility, printed, and can be overruled."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_files import write_log

from hstu_xd.data import InteractionStore
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.data.times import KINDS, TIME_UNITS, decide_kind
from hstu_xd.errors import InputError

SECOND = 1_601_510_399  # 2020-09-30 23:59:59, the last second of a month
DAY = 1_601_424_000


def seconds_of(folder: Path, times: Sequence[object], **options: object) -> list[int]:
    """The seconds that prepare stores for one user's events at these times."""
    rows = [("u", f"i{n}", "d", time) for n, time in enumerate(times)]
    log = write_log(folder / "log.csv", rows)
    prepare_logs([str(log)], folder / "out", **options)  # type: ignore[arg-type]
    store = InteractionStore.open(folder / "out")
    items, found = store.history(0)
    names = pl.read_parquet(folder / "out" / "catalog.parquet")["item"].to_list()
    places = [int(names[item - 1][1:]) for item in items]
    return [int(found[places.index(n)]) for n in range(len(times))]


MOMENT = datetime(2020, 9, 30, 23, 59, 59, tzinfo=timezone.utc)
WRITTEN = {
    "seconds": SECOND,
    "float seconds": f"{SECOND}.25",
    "exponent": "1.601510399e9",
    "milliseconds": SECOND * 1000 + 999,
    "float milliseconds": f"{SECOND * 1000}.5",
    "microseconds": SECOND * 10**6 + 1,
    "nanoseconds": SECOND * 10**9 + 1,
    "digits": "20200930235959",
    "ISO": "2020-09-30T23:59:59",
    "ISO with Z": "2020-09-30T23:59:59Z",
    "ISO with fraction": "2020-09-30T23:59:59.999999Z",
    "ISO with zone": "2020-10-01T05:29:59+05:30",
    "ISO with a short zone": "2020-09-30T19:59:59-04",
    "date and time": "2020-09-30 23:59:59",
    "with UTC": "2020-09-30 23:59:59 UTC",
    "slashes": "2020/09/30 23:59:59",
    "basic ISO": "20200930T235959Z",
    "spaces around": f"  {SECOND} ",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_ways_to_write_a_moment(name: str, tmp_path: Path) -> None:
    assert seconds_of(tmp_path, [WRITTEN[name]]) == [SECOND]


@pytest.mark.parametrize("text", ["20200930", "2020-09-30", "20200930.0", "202009300000"])
def test_ways_to_write_a_day(text: str, tmp_path: Path) -> None:
    assert seconds_of(tmp_path, [text]) == [DAY]


def test_days_over_the_end_of_a_month(tmp_path: Path) -> None:
    assert np.diff(seconds_of(tmp_path, [20200930, 20201001, 20201231, 20210101])).tolist() == [
        86_400,
        91 * 86_400,
        86_400,
    ]


@given(
    st.lists(st.datetimes(datetime(1991, 1, 1), datetime(2032, 1, 1)), min_size=2, max_size=20),
    st.sampled_from(["s", "ms", "us", "ns", "YYYYMMDDhhmmss", "iso without zone"]),
)
@settings(max_examples=60)
def test_kinds_agree(moments: list[datetime], name: str) -> None:
    seconds = [
        round((m.replace(microsecond=0) - datetime(1970, 1, 1)).total_seconds()) for m in moments
    ]
    written = {
        "s": [str(s) for s in seconds],
        "ms": [str(1000 * s + m.microsecond // 1000) for s, m in zip(seconds, moments)],
        "us": [str(10**6 * s + m.microsecond) for s, m in zip(seconds, moments)],
        "ns": [str(10**9 * s + 1000 * m.microsecond) for s, m in zip(seconds, moments)],
        "YYYYMMDDhhmmss": [f"{m:%Y%m%d%H%M%S}" for m in moments],
        "iso without zone": [m.isoformat() for m in moments],
    }[name]
    kind = decide_kind(written)
    assert kind.name == name
    assert kind.read(pl.Series(written)).seconds.to_list() == seconds


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([2020093012, 2020100112], ["s or YYYYMMDDhh", "--time-unit s", "--time-unit YYYYMMDDhh"]),
        ([132_000_000_000_000_000], ["no dates between 1990 and 2100 in any unit", "--time-unit"]),
        ([SECOND, SECOND * 1000], ["only 1 of the first 2 times", "--time-unit"]),
        ([SECOND, SECOND, SECOND * 1000], [":4: timestamp '1601510399000'", "--skip-faulty"]),
        ([SECOND, SECOND, 0], [":4: timestamp '0' is 1970-01-01", "seconds", "--time-unit"]),
        ([SECOND, "2020-09-30"], ["'2020-09-30' and '1601510399'", "two ways"]),
        (["2020-09-30T10:00:00", "2020-09-30T10:00:00Z"], ["differ in zone"]),
        (["2020-09-30", "2020-02-30"], [":3: unreadable timestamp '2020-02-30'", "dates"]),
        ([*range(1200), SECOND], [":1202: timestamp", "not between 1990 and 2100"]),
        (["30.09.2020"], [":2: unreadable timestamp '30.09.2020'", "dates such as 2020-01-30"]),
        (["2020-W05-4"], [":2: unreadable timestamp '2020-W05-4'", "dates such as 2020-01-30"]),
    ],
)
def test_times_without_margin(
    times: list[object], words: list[str], cli: Callable, tmp_path: Path
) -> None:
    rows = [("u", f"i{n}", "d", time) for n, time in enumerate(times)]
    log = write_log(tmp_path / "log.csv", rows)
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    for word in words:
        assert word in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("unit", "time", "second"),
    [
        ("s", 20200930, 20200930),
        ("ms", SECOND, SECOND // 1000),
        ("d", 18_535, 18_535 * 86_400),
        ("h", 444_863, 444_863 * 3600),
        ("YYYYMMDDhh", 2020093012, DAY + 12 * 3600),
        ("iso", "2020-09-30", DAY),
    ],
)
def test_time_unit_overrules(unit: str, time: object, second: int, tmp_path: Path) -> None:
    assert seconds_of(tmp_path, [time], time_unit=unit) == [second]


def test_unknown_time_unit(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("u", "i", "d", 1)])
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--time-unit", "sec")
    assert outcome.code == 2
    assert "--time-unit 'sec' is unknown; use one of auto, s, ms" in outcome.err
    assert set(KINDS) < set(TIME_UNITS)


def test_what_was_decided_is_printed(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("u", "i", "d", 20200930), ("u", "i", "d", 20201001)])
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert "dates as numbers YYYYMMDD; 2 events from 2020-09-30 00:00:00 to 2020-10" in outcome.out
    log = write_log(tmp_path / "log.csv", [("u", "i", "d", 3), ("u", "i", "d", 20)])
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--force")
    assert "numbers that are no dates in any unit, kept as seconds; 2 events from 3 to 20" in (
        outcome.out
    )


HEADER = ("user_id", "item_id", "timestamp")


def test_files_that_disagree(cli: Callable, tmp_path: Path) -> None:
    books = write_log(tmp_path / "books.csv", [("u", "b", SECOND)], HEADER)
    films = write_log(tmp_path / "films.csv", [("u", "f", 17)], HEADER)
    outcome = cli("prepare", books, films, "--out", tmp_path / "out")
    assert outcome.code == 2
    for word in (f"{films}: its times (17 to 17) are no dates", str(books), "--time-unit"):
        assert word in outcome.err
    assert cli("prepare", books, films, "--out", tmp_path / "out", "--time-unit", "s").code == 0


def test_files_in_two_units_meet(tmp_path: Path) -> None:
    books = [("u", f"b{n}", SECOND + 10 * n) for n in range(3)]
    films = [("u", f"f{n}", (SECOND + 10 * n + 5) * 1000) for n in range(3)]
    prepare_logs(
        [
            str(write_log(tmp_path / "books.csv", books, HEADER)),
            str(write_log(tmp_path / "films.csv", films, HEADER)),
        ],
        tmp_path / "out",
    )
    store = InteractionStore.open(tmp_path / "out")
    assert store.item_ids.tolist() == [1, 4, 2, 5, 3, 6]
    assert np.diff(store.timestamps).tolist() == [5] * 5


def test_days_beside_times_of_day(cli: Callable, tmp_path: Path) -> None:
    books = write_log(tmp_path / "books.csv", [("u", "b", 20200930), ("u", "c", 20201001)], HEADER)
    films = write_log(tmp_path / "films.csv", [("u", "f", SECOND)], HEADER)
    outcome = cli("prepare", books, films, "--out", tmp_path / "out")
    assert "books.csv has dates without a time of day" in outcome.err


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_parquet_of_the_wrong_unit_is_pointed_out(unit: str, cli: Callable, tmp_path: Path) -> None:
    wrong = pl.Series([SECOND, SECOND + 5]).cast(pl.Datetime(unit))
    frame = pl.DataFrame({"user_id": "u", "item_id": ["a", "b"], "domain": "d", "timestamp": wrong})
    frame.write_parquet(tmp_path / "log.parquet")
    outcome = cli("prepare", tmp_path / "log.parquet", "--out", tmp_path / "out")
    assert "times from 1970-01" in outcome.err
    assert "reach beyond 1990 to 2100" in outcome.err


@pytest.mark.parametrize("digits", [1, 3, 6, 9])
def test_fractions_order_events(digits: int, tmp_path: Path) -> None:
    """Full precision orders what the store keeps in whole seconds, also in nanoseconds."""
    order = np.random.default_rng(digits).permutation(9)
    rows = [
        (
            "u",
            f"i{n}",
            f"d{n % 2}",
            f"{SECOND}{n + 1:0{digits}d}" if digits > 1 else f"{SECOND}.{n}",
        )
        for n in order.tolist()
    ]
    prepare_logs([str(write_log(tmp_path / "log.csv", rows))], tmp_path / "out")
    store = InteractionStore.open(tmp_path / "out")
    names = pl.read_parquet(tmp_path / "out" / "catalog.parquet")["item"].to_list()
    assert [names[item - 1] for item in store.item_ids] == [f"i{n}" for n in range(9)]
    assert set(store.timestamps.tolist()) == {SECOND}
    assert store.manifest["ties"]["events"] == 0


@pytest.mark.parametrize("kind", ["number", "decimal", "date"])
def test_a_column_orders_ties(kind: str, cli: Callable, tmp_path: Path) -> None:
    start = datetime(2020, 9, 30)
    values = {
        "number": lambda n: n * 1000 - 3000,
        "decimal": lambda n: n / 4,
        "date": lambda n: (start + timedelta(minutes=n)).isoformat(),
    }
    order = np.random.default_rng(1).permutation(12).tolist()
    rows = [("u", f"i{n:02d}", f"d{n % 2}", 20200930, values[kind](n)) for n in order]
    log = write_log(tmp_path / "log.csv", rows, ("user_id", "item_id", "domain", "date", "seq"))
    columns = ("--time-col", "date")
    hashed = cli("prepare", log, "--out", tmp_path / "hashed", *columns)
    assert "100.0% of events share user and time with another; their order is by hash" in hashed.out
    outcome = cli("prepare", log, "--out", tmp_path / "out", *columns, "--order-col", "seq")
    assert outcome.code == 0
    store = InteractionStore.open(tmp_path / "out")
    names = pl.read_parquet(tmp_path / "out" / "catalog.parquet")["item"].to_list()
    assert [names[item - 1] for item in store.item_ids] == [f"i{n:02d}" for n in range(12)]
    assert set(store.timestamps.tolist()) == {DAY}
    assert store.manifest["ties"]["order"] == "column, then hash"


def test_a_column_that_cannot_order(cli: Callable, tmp_path: Path) -> None:
    rows = [("u", "i", "d", SECOND, 1), ("u", "j", "d", SECOND, "second")]
    log = write_log(tmp_path / "log.csv", rows, ("user_id", "item_id", "domain", "time", "seq"))
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--order-col", "seq")
    assert outcome.code == 2
    assert ":3: the column that orders ties is 'second'" in outcome.err
    with pytest.raises(InputError, match=r"no order column 'seqn'.*did you mean 'seq'"):
        prepare_logs([str(log)], tmp_path / "out", columns=ColumnOptions(order="seqn"))


@pytest.mark.parametrize("zone", ["UTC", "Europe/Paris", "+05:30", "-0800"])
def test_zones_of_parquet(zone: str, tmp_path: Path) -> None:
    """The zone is how a moment is shown, be it one that polars knows or not."""
    moments = pa.array([MOMENT, MOMENT + timedelta(seconds=1)], pa.timestamp("ms", tz=zone))
    columns = {"user_id": ["u", "u"], "item_id": ["x", "y"], "timestamp": moments}
    other = pa.array([MOMENT, MOMENT], pa.timestamp("us", tz=zone))
    pq.write_table(pa.table({**columns, "seen": other}), tmp_path / "log.parquet")
    prepare_logs([f"d={tmp_path / 'log.parquet'}"], tmp_path / "out")
    assert InteractionStore.open(tmp_path / "out").history(0)[1].tolist() == [SECOND, SECOND + 1]


def test_times_as_short_floats_have_lost_seconds(tmp_path: Path) -> None:
    times = pl.Series([SECOND, SECOND + 1], dtype=pl.Float32)
    frame = pl.DataFrame({"user_id": "u", "item_id": ["x", "y"], "timestamp": times})
    frame.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(InputError, match="'timestamp' is Float32 and holds numbers up to 16015104"):
        prepare_logs([f"d={tmp_path / 'log.parquet'}"], tmp_path / "out")
