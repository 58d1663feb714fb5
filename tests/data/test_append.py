"""prepare --append: reading what is new gives the bytes of reading all, or is refused."""

import json
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hstu_xd.cli.app import run
from hstu_xd.data import filters, merging, repeats
from hstu_xd.data.append import append_logs
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.store_files import ALL_FILES
from hstu_xd.files import HashedFile

HEADER = "user,item,domain,timestamp"
BEGIN = 1_500_000_000
Row = tuple[str, str, str, str]


def row(user: int | str, item: int | str, domain: str, time: float | str) -> Row:
    return (f"u{user}", f"{domain}-{item}", domain, str(time))


def write(file: Path, rows: Sequence[Sequence[str]], header: str = HEADER) -> Path:
    file.write_text("\n".join([header, *(",".join(each) for each in rows)]) + "\n")
    return file


def prepare(*words: str | Path) -> int:
    return run(["prepare", *map(str, words)])


def compare(folder: Path, old: Sequence[Row], new: Sequence[Row], *options: str) -> dict:
    """Prepare rows at once and in two steps; return the manifest that both have."""
    first, second = write(folder / "old.csv", old), write(folder / "new.csv", new)
    assert prepare(first, second, "--out", folder / "all", *options) == 0
    assert prepare(first, "--out", folder / "store", *options) == 0
    kept = [each for each in options if each not in ("--exact-ids", "--prefix-items")]
    assert prepare(second, "--append", folder / "store", "--out", folder / "both", *kept) == 0
    at_once, in_steps = (
        {file.name: file.read_bytes() for file in (folder / name).iterdir()}
        for name in ("all", "both")
    )
    assert at_once.keys() == in_steps.keys()
    for name in at_once:
        assert at_once[name] == in_steps[name], name
    return json.loads(at_once["manifest.json"])


def random_rows(
    draw: random.Random, number: int, users: int, items: int, domains: str, span: int
) -> list[Row]:
    """Rows of a few users, items and seconds, so that all that can coincide does."""
    found = []
    for _ in range(number):
        item = draw.randrange(items)
        domain = domains[item % len(domains)]
        found.append(row(draw.randrange(users), item, domain, BEGIN + draw.randrange(span)))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_new_users_items_domains_and_interleaved_times(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old rows and new ones share seconds, and new ones come before, between and after."""
    draw = random.Random(seed)
    monkeypatch.setattr(merging, "_BLOCK_ROWS", draw.choice([1, 7, 1000]))
    span = draw.choice([3, 40, 100_000])
    old = random_rows(draw, draw.randrange(1, 120), 9, 30, "abc", span)
    # The new ones have users and items in between, and of all domains some more.
    more = random_rows(draw, draw.randrange(1, 80), 14, 40, "abc", span)
    extra = [row("00", "x", "a0", BEGIN), row("zz", "y", "zz", BEGIN)] * (seed % 2)
    manifest = compare(tmp_path, old, more + extra)
    assert manifest["interactions"] == len(old) + len(more) + len(extra)


def test_rows_that_are_there_already_are_repeats(tmp_path: Path) -> None:
    rows = [row(user, item, "books", BEGIN + item) for user in range(3) for item in range(4)]
    assert compare(tmp_path, rows, rows)["duplicates"] == 12


def test_of_a_second_apart_nothing_is_tied(tmp_path: Path) -> None:
    old = [row(user, item, "books", BEGIN + 2 * item) for user in range(3) for item in range(4)]
    new = [row(user, item, "films", BEGIN + 2 * item + 1) for user in range(3) for item in range(4)]
    assert compare(tmp_path, old, new)["ties"]["events"] == 0


def test_nothing_but_known_ids_leaves_the_tables_as_they_are(tmp_path: Path) -> None:
    old = [row(user, item, "books", BEGIN + item) for user in range(3) for item in range(5)]
    new = [row(user, item, "books", BEGIN + 9 + item) for user in range(2) for item in range(2)]
    manifest = compare(tmp_path, old, new)
    assert (manifest["users"], manifest["items"], manifest["interactions"]) == (3, 5, 19)


def as_json(file: Path, rows: Sequence[Row], more: str = "") -> Path:
    """Write rows as JSON lines, the last one with something more."""
    lines = [
        f'{{"user": "{user}", "item": "{item}", "domain": "{domain}", "timestamp": {time}}}'
        for user, item, domain, time in rows
    ]
    file.write_text("\n".join([*lines[:-1], lines[-1][:-1] + more + "}"]) + "\n")
    return file


def test_lines_that_are_read_again_after_known_ids(tmp_path: Path) -> None:
    """The fast reader gives NaN up, and what it had learnt from the lines before is none."""
    old = [row(user, item, "books", BEGIN + item) for user in range(3) for item in range(3)]
    new = [row(user, item, "films", BEGIN + item) for user in range(2, 5) for item in range(3)]
    first, second = write(tmp_path / "old.csv", old), tmp_path / "new.jsonl"
    as_json(second, new, ', "rating": NaN')
    assert prepare(first, second, "--out", tmp_path / "all") == 0
    assert prepare(first, "--out", tmp_path / "store") == 0
    both = tmp_path / "both"
    assert prepare(second, "--append", tmp_path / "store", "--out", both) == 0
    for file in (tmp_path / "all").iterdir():
        assert file.read_bytes() == (both / file.name).read_bytes(), file.name


def test_what_is_no_id_is_none_where_an_old_one_is_written_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user called true, and a truth value in JSON, which the fast reader takes for that text."""
    old = write(tmp_path / "old.csv", [("true", "b1", "books", str(BEGIN))])
    new = as_json(tmp_path / "new.jsonl", [("u1", "b1", "books", str(BEGIN + 1))])
    new.write_text(new.read_text().replace('"u1"', "true"))
    assert prepare(old, "--out", tmp_path / "store") == 0
    capsys.readouterr()
    assert prepare(new, "--append", tmp_path / "store", "--out", tmp_path / "both") == 2
    alone = capsys.readouterr().err
    assert "new.jsonl:1" in alone
    assert prepare(old, new, "--out", tmp_path / "all") == 2
    assert capsys.readouterr().err == alone


def test_an_item_of_the_store_in_another_domain_beside_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write(tmp_path / "old.csv", [("u1", "b1", "books", str(BEGIN))])
    rows = [("u1", "b1", domain, str(BEGIN)) for domain in ("books", "films")]
    new = write(tmp_path / "new.csv", rows)
    assert prepare(old, "--out", tmp_path / "store") == 0
    assert prepare(new, "--append", tmp_path / "store", "--out", tmp_path / "both") == 2
    assert "item 'b1' is in domains 'books' and 'films'" in capsys.readouterr().err


def test_upstreams_files_are_written_for_the_whole(tmp_path: Path) -> None:
    old = [row(user, item, "books", BEGIN + item) for user in range(3) for item in range(5)]
    new = [row(user, item, "films", BEGIN + item) for user in range(4) for item in range(2)]
    manifest = compare(tmp_path, old, new, "--write-upstream")
    assert manifest["upstream_csv"]["left_out"] == 1
    assert (tmp_path / "both" / "sasrec_format.csv").exists()


def test_what_was_done_with_ids_is_done_again(tmp_path: Path) -> None:
    old = [row(user, f"{item}.0", "books", BEGIN + item) for user in "ab" for item in range(3)]
    new = [row(user, f"{item} ", "films", BEGIN + item) for user in "bc" for item in range(3)]
    manifest = compare(tmp_path, old, new, "--exact-ids", "--prefix-items")
    assert manifest["exact_ids"]
    assert manifest["prefixed_items"]


def test_spaces_around_new_ids_are_taken_away_as_before(tmp_path: Path) -> None:
    old = [row(user, item, "books", BEGIN + item) for user in range(3) for item in range(3)]
    new = [(f" {user} ", f" {item}", domain, time) for user, item, domain, time in old]
    assert compare(tmp_path, old, new)["users"] == 3


def test_ids_like_missing_values_are_warned_of(tmp_path: Path) -> None:
    old = [("nan", "i1", "books", str(BEGIN)), ("u1", "i1", "books", str(BEGIN))]
    new = [("nan", "i2", "films", str(BEGIN + 1)), ("u1", "none", "films", str(BEGIN + 1))]
    warnings = compare(tmp_path, old, new)["warnings"]
    assert any("'nan' (2 events)" in text for text in warnings)


def test_ids_that_differ_by_little_are_warned_of(tmp_path: Path) -> None:
    old = [("007", "1.23E+15", "books", str(BEGIN)), ("u2", "'b'", "books", str(BEGIN))]
    new = [("7", "caf\u00e9", "books", str(BEGIN + 9)), ("u3", "'c'", "films", str(BEGIN))]
    told = compare(tmp_path, old, new)["warnings"]
    for words in ("by leading zeros only", "a spreadsheet has shortened", "hold their quotes"):
        assert any(words in each for each in told), words


def test_times_finer_than_seconds_that_meet_no_old_second(tmp_path: Path) -> None:
    old = [row(user, item, "books", BEGIN + item) for user in range(3) for item in range(3)]
    new = [
        row(user, item, "films", f"{BEGIN + 5}.{draw}")
        for user in range(3)
        for item, draw in ((1, 75), (2, 25), (3, 25))
    ]
    assert compare(tmp_path, old, new)["ties"]["events"] == 6


def test_a_column_that_orders_ties_goes_on_ordering_them(tmp_path: Path) -> None:
    header = HEADER + ",place"
    old, new = (
        write(
            tmp_path / f"{name}.csv",
            [(*row(u, i, "ab"[i % 2], BEGIN + later), str(9 - i)) for u in "abc" for i in range(5)],
            header,
        )
        for name, later in (("old", 0), ("new", 1))
    )
    order = ("--order-col", "place")
    assert prepare(old, new, "--out", tmp_path / "all", *order) == 0
    assert prepare(old, "--out", tmp_path / "store", *order) == 0
    both = tmp_path / "both"
    assert prepare(new, "--append", tmp_path / "store", "--out", both, *order) == 0
    for file in (tmp_path / "all").iterdir():
        assert file.read_bytes() == (both / file.name).read_bytes(), file.name
    assert prepare(new, "--append", tmp_path / "store", "--out", both, "--force") == 2
    assert prepare(old, "--append", tmp_path / "store", "--out", both, "--force", *order) == 2


def test_the_store_itself_may_be_replaced(tmp_path: Path) -> None:
    old = [row(user, item, "books", BEGIN + item) for user in range(3) for item in range(3)]
    new = [row(user, item, "films", BEGIN + item) for user in range(3) for item in range(3)]
    compare(tmp_path, old, new)
    store = tmp_path / "store"
    assert prepare(tmp_path / "new.csv", "--append", store, "--out", store) == 2
    assert prepare(tmp_path / "new.csv", "--append", store, "--out", store, "--force") == 0
    for file in store.iterdir():
        assert file.name in ALL_FILES
        assert file.read_bytes() == (tmp_path / "all" / file.name).read_bytes()


OLD = [row(user, item, "books", BEGIN + item) for user in range(4) for item in range(4)]
NEW = [row(user, item, "films", BEGIN + item) for user in range(4) for item in range(2)]
FINER = [row(user, item, "books", f"{BEGIN}.{item}5") for user in range(4) for item in range(4)]
DECIMAL = [row(user, f"{item}", "books", BEGIN) for user in range(4) for item in (1, 2)]
DECIMAL = [(user, item[-1] + ".0", domain, time) for user, item, domain, time in DECIMAL]

ACCENT = [(user, "Cafe\u0301", "books", time) for user, _, _, time in OLD]


@pytest.mark.parametrize(
    ("old", "new", "before", "now", "said"),
    [
        (OLD, NEW, ["--min-item", "2"], [], "it was filtered (--min-item 2), and what left it"),
        (OLD, NEW, ["--drop-repeats", "exact"], [], "repeats were dropped from it"),
        (OLD, NEW, ["--event-cols", "user"], [], "its events have fields (--event-cols)"),
        (OLD, [row(1, 1, "books", BEGIN + 0.5)], [], [], "which fractions of a second or"),
        (FINER, OLD, [], [], "user 'u0' has old and new events at 2017-07-14 02:40:00"),
        (OLD, [("u1", "books-1", "films", str(BEGIN))], [], [], "item 'books-1' is in domains"),
        (DECIMAL, OLD, ["--prefix-items"], [], "how ids such as '1.0' are written"),
        (OLD, ACCENT, [], [], "how ids such as 'Cafe\u0301' are written"),
        (ACCENT, OLD, [], [], "how ids such as 'Cafe\u0301' are written"),
        (OLD, DECIMAL, [], [], "how ids such as '1.0' are written (decimals, accents, unseen"),
        (DECIMAL, OLD, [], [], "how ids such as '1.0' are written (decimals, accents, unseen"),
        (OLD, NEW, [], ["--min-user", "2"], "--min-user 2 does not go with --append"),
        (OLD, NEW, [], ["--exact-ids"], "--exact-ids does not go with --append"),
        (OLD, NEW, [], ["--skip-faulty"], "--skip-faulty does not go with --append"),
        (OLD, NEW, [], ["--order-col", "item"], "no column orders its ties, but --order-col"),
        (OLD, [], [], [], "no events"),
    ],
)
def test_what_cannot_be_the_same_bytes_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: list[Row],
    new: list[Row],
    before: list[str],
    now: list[str],
    said: str,
) -> None:
    first, second = write(tmp_path / "old.csv", old), write(tmp_path / "new.csv", new)
    assert prepare(first, "--out", tmp_path / "store", *before) == 0
    assert prepare(second, "--append", tmp_path / "store", "--out", tmp_path / "out", *now) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_stores_that_are_none_or_no_logs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = write(tmp_path / "new.csv", NEW)
    assert prepare(new, "--append", tmp_path, "--out", tmp_path / "out") == 2
    assert "no prepared store here" in capsys.readouterr().err
    synthetic = tmp_path / "synthetic"
    assert run(["synth", "--out", str(synthetic), "--users", "20"]) == 0
    assert prepare(new, "--append", synthetic, "--out", tmp_path / "out") == 2
    assert "it is synthetic" in capsys.readouterr().err
    faulty = write(tmp_path / "faulty.csv", [*OLD, ("u1", "", "books", str(BEGIN))])
    assert prepare(faulty, "--out", tmp_path / "skipped", "--skip-faulty") == 0
    assert prepare(new, "--append", tmp_path / "skipped", "--out", tmp_path / "out") == 2
    assert "faulty lines were left out of it" in capsys.readouterr().err


def test_a_disk_that_is_full_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two files of events it is that no longer fits."""
    old, new = write(tmp_path / "old.csv", OLD), write(tmp_path / "new.csv", NEW)
    assert prepare(old, "--out", tmp_path / "store") == 0
    written = (tmp_path / "store" / "manifest.json").read_bytes()
    make = merging.HashedFile
    for name in ("item_ids.npy", "timestamps.npy"):

        def full(file: Path, name: str = name) -> HashedFile:
            if file.name == name:
                raise OSError(28, "No space left on device")
            return make(file)

        monkeypatch.setattr(merging, "HashedFile", full)
        options = ("--append", tmp_path / "store", "--out", tmp_path / "store", "--force")
        assert prepare(new, *options) == 1
        assert "No space left" in capsys.readouterr().err
        assert sorted(each.name for each in tmp_path.iterdir()) == ["new.csv", "old.csv", "store"]
        assert (tmp_path / "store" / "manifest.json").read_bytes() == written


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_BLOCK_ROWS", 500)
    monkeypatch.setattr(repeats, "_BLOCK_USERS", 7)
    monkeypatch.setattr(filters, "CELLS", 64)


@pytest.mark.usefixtures("small_blocks")
def test_events_of_another_day_come_after_all_old_ones(tmp_path: Path) -> None:
    """What is appended daily, of users with and without old events, in more than one block."""
    draw = random.Random(5)
    old = random_rows(draw, 3000, 90, 200, "abcd", 5000)
    new = [
        (user, item, domain, str(int(time) + 9000))
        for user, item, domain, time in random_rows(draw, 300, 100, 210, "abcd", 5000)
    ]
    assert compare(tmp_path, old, new)["interactions"] == 3300


@pytest.mark.usefixtures("small_blocks")
def test_the_log_is_not_held_in_memory(tmp_path: Path) -> None:
    """Of half a million events no array is held, beside blocks, a number of 4 bytes neither."""
    events, users = 500_000, 5_000
    rng = np.random.default_rng(3)
    item = rng.integers(0, 1000, events)
    table = pl.DataFrame(
        {
            "user": [f"u{user:04}" for user in rng.integers(0, users, events).tolist()],
            "item": [f"i{each:03}" for each in item.tolist()],
            "domain": ["ab"[each % 2] for each in item.tolist()],
            "timestamp": BEGIN + rng.permutation(events),
        }
    )
    table.write_parquet(tmp_path / "old.parquet")
    table.head(100).write_parquet(tmp_path / "new.parquet")
    prepare_logs([str(tmp_path / "old.parquet")], tmp_path / "store")
    tracemalloc.start()
    try:
        append_logs([str(tmp_path / "new.parquet")], tmp_path / "store", tmp_path / "both")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * events


def test_blocks_are_those_of_inserting_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for size, number in ((1, 1), (10, 3), (64, 200), (129, 0)):
        monkeypatch.setattr(merging, "_BLOCK_ROWS", int(rng.integers(1, 40)))
        old = rng.integers(0, 9, size)
        place = np.sort(rng.integers(0, size + 1, number))
        new, table = rng.integers(0, 9, number), rng.permutation(9)
        blocks = np.concatenate(list(merging.inserted(old, place, new)))
        np.testing.assert_array_equal(blocks, np.insert(old, place, new))
        blocks = np.concatenate(list(merging.inserted(old, place, new, table)))
        np.testing.assert_array_equal(blocks, np.insert(table[old], place, new))


def test_counts_do_not_depend_on_blocks(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    draw = random.Random(8)
    log = write(tmp_path / "log.csv", random_rows(draw, 5000, 400, 60, "abcde", 10**6))
    expected = prepare_logs([str(log)], tmp_path / "once")
    assert expected["targets"]["test"]["met_before"] > 0
    request.getfixturevalue("small_blocks")
    assert prepare_logs([str(log)], tmp_path / "blocks") == expected
