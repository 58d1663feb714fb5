"""A double quote is what makes every line an event; where two readings are possible it is asked."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_xd.data import InteractionStore
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.sources.delimited import csv_rows, decide_quoting
from hstu_xd.errors import InputError

HEADER = "user_id,item_id,domain,timestamp,title\n"


def events_of(tmp_path: Path, text: str, name: str = "log.csv", **options: str) -> list[tuple]:
    """User, item and time of the events that prepare finds in a text."""
    log = tmp_path / name
    log.write_text(text, encoding="utf-8")
    prepare_logs([str(log)], tmp_path / "out", force=True, **options)  # type: ignore[arg-type]
    store = InteractionStore.open(tmp_path / "out")
    names = pl.read_parquet(store.path / "catalog.parquet")["item"].to_list()
    found = []
    for user in range(store.num_users):
        items, times = store.history(user)
        found += [(store.user_token(user), names[i - 1], t) for i, t in zip(items, times.tolist())]
    return sorted(found, key=lambda event: event[2])


FOUR = [("u1", "i1", 1), ("u1", "i2", 2), ("u2", "i3", 3), ("u2", "i4", 4)]
# Titles of four events; they hold quotes in every way that leaves one reading.
TITLES = {
    "inches": ['12" vinyl', "x", '7" single', '5"'],
    "quoted and inches": ['"a, b"', '12" vinyl', '"c ""d"" e"', "x"],
    "opens on one line": ['"Heroes', "x", "y", "z"],
    "opens on two lines": ['"Heroes', "x", "y", '"Lodger'],
    "closes only": ['Heroes"', "x", "y", "z"],
    "opens and goes on": ['"Heroes" live', "x", "y", "z"],
    "quoted": ['"a"', '"b, c"', '""', '"d ""e"""'],
    "two lines": ['"a\nb"', "x", "y", "z"],
    "three lines with commas": ['"a, b\n\nc, d, e"', "x", "y", "z"],
    "apostrophes": ["'", "it's", "o'clock", "''"],
    "backslash": [r"a\b", "x", "y\\", "z"],
}


@pytest.mark.parametrize("name", TITLES)
@pytest.mark.parametrize("last", [True, False])
def test_titles_with_quotes(name: str, last: bool, tmp_path: Path) -> None:
    lines = []
    for (user, item, time), title in zip(FOUR, TITLES[name]):
        fields = [user, item, "d", str(time)]
        fields.insert(4 if last else 2, title)
        lines.append(",".join(fields) + "\n")
    header = HEADER if last else "user_id,item_id,title,domain,timestamp\n"
    assert events_of(tmp_path, header + "".join(lines)) == FOUR


def test_a_quoted_title_that_looks_like_events(cli: Callable, tmp_path: Path) -> None:
    text = HEADER + 'u1,i1,d,1,"Heroes\nu1,i2,d,2,x\nu2,i3,d,3,Lodger"\nu2,i4,d,4,z\n'
    log = tmp_path / "log.csv"
    log.write_text(text)
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    for word in (f"{log}:2", "two ways", "--quote none", "--quote double", "--quote backslash"):
        assert word in outcome.err
    assert not (tmp_path / "out").exists()
    assert events_of(tmp_path, text, quote="none") == FOUR
    assert events_of(tmp_path, text, quote="double") == [FOUR[0], FOUR[3]]


@pytest.mark.parametrize("field", ['"u1', 'u1"', '"u"1', '"'])
def test_a_lone_quote_in_a_column_that_is_read(field: str, cli: Callable, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(HEADER + "u0,i0,d,5,x\n" + f"{field},i1,d,6,y\nu2,i2,d,7,z\n")
    outcome = cli("prepare", log, "--out", tmp_path / "out")
    if field == 'u1"':  # a quote that opens nothing is text for every reader
        assert outcome.code == 0
        return
    assert outcome.code == 2
    assert f"{log}:3" in outcome.err
    assert cli("prepare", log, "--out", tmp_path / "out", "--quote", "none").code == 0
    assert InteractionStore.open(tmp_path / "out").has_user(field)


def test_backslash_escapes(tmp_path: Path) -> None:
    text = HEADER + 'u1,i1,d,1,"a \\", b"\nu1,i2,d,2,"\\\\"\nu2,i3,d,3,x\nu2,i4,d,4,"c, d"\n'
    with pytest.raises(InputError, match=r":2: .* --quote backslash"):
        events_of(tmp_path, text)
    assert events_of(tmp_path, text, quote="backslash") == FOUR


def test_tabs_and_semicolons(tmp_path: Path) -> None:
    for name, separator in (("log.tsv", "\t"), ("log.csv", ";")):
        text = (HEADER + 'u1,i1,d,1,"Heroes\nu1,i2,d,2,x\nu2,i3,d,3,"y\nu2,i4,d,4,5"\n').replace(
            ",", separator
        )
        assert events_of(tmp_path, text, name) == FOUR


def test_unknown_style(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--quote 'single' is unknown; use one of auto, double"):
        events_of(tmp_path, HEADER + "u1,i1,d,1,x\n", quote="single")


fields = st.text(alphabet='a"", \n\\', max_size=6)


@settings(max_examples=200)
@given(st.lists(st.tuples(fields, fields), min_size=1, max_size=5))
def test_a_quick_decision_is_what_csv_reads(rows: list[tuple[str, str]]) -> None:
    """Where quotes are found plain, the fast reader and Python's csv read the same fields."""
    from tempfile import TemporaryDirectory

    text = "user,title\n" + "".join(f"{user},{title}\n" for user, title in rows)
    with TemporaryDirectory() as folder:
        log = Path(folder, "log.csv")
        log.write_text(text, encoding="utf-8")
        try:
            quoting = decide_quoting(log, ",", 2, {"user": 0}, style="auto", header=True)
        except InputError:
            return
        if not quoting.is_plain:
            return
        read = [fields for _, fields in csv_rows(log, ",", quoting.style)][1:]
        if any(not isinstance(fields, list) or len(fields) != 2 for fields in read):
            return
        fast = pl.read_csv(
            log, infer_schema=False, quote_char=None if quoting.style == "none" else '"'
        ).fill_null("")
        assert [list(row) for row in fast.rows()] == read
