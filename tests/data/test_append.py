"""prepare --append: reading what is new gives the bytes of reading all, or is refused."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from hstu_xd.cli.app import run
from hstu_xd.data import merging
from hstu_xd.data.store_files import ALL_FILES

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
