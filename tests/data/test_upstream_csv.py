"""The CSV for generative-recommenders against one built in plain Python from the log."""

import csv
import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path

import polars as pl
import pytest
from log_files import contents, write_log

from hstu_xd.data import InteractionStore, upstream_csv
from hstu_xd.data.encode import read_events
from hstu_xd.data.filters import Filters
from hstu_xd.data.prepare import build_log, prepare_logs
from hstu_xd.data.sources import open_sources
from hstu_xd.errors import InputError

Row = tuple[str, str, str, int]
NAMES = {upstream_csv.SEQUENCES, upstream_csv.ITEM_DOMAINS}


def random_rows() -> list[Row]:
    """Times differ, so that the order is certain; users have 1 to 40 events."""
    draw = random.Random(1)
    rows, time = [], 0
    for user in range(40):
        for _ in range(user + 1):
            item, time = draw.randrange(30), time + draw.randrange(1, 10**6)
            rows.append((f"u{user:02}", f"i{item:02}", "a, b" if item % 3 else "c", time))
    draw.shuffle(rows)
    return rows


def plain(rows: list[Row]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Both tables as the format's description has them."""
    items = sorted({(domain, item) for _, item, domain, _ in rows})
    number = {item: n + 1 for n, (_, item) in enumerate(items)}
    histories = defaultdict(list)
    for user, item, _, time in rows:
        histories[user].append((time, number[item]))
    sequences = []
    for n, user in enumerate(sorted(histories)):
        events = sorted(histories[user])
        if len(events) >= 3:
            sequences.append(
                {
                    "user_id": str(n),
                    "sequence_item_ids": ",".join(str(item) for _, item in events),
                    "sequence_ratings": ",".join("5" for _ in events),
                    "sequence_timestamps": ",".join(str(time) for time, _ in events),
                }
            )
    domains = [{"item": str(n + 1), "domain": domain} for n, (domain, _) in enumerate(items)]
    return sequences, domains


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(
        tmp_path / "log.csv",
        [(user, item, f'"{domain}"', time) for user, item, domain, time in random_rows()],
    )


def test_tables(tmp_path: Path, log: Path) -> None:
    manifest = prepare_logs([str(log)], tmp_path / "out", write_upstream=True)
    sequences, domains = plain(random_rows())
    assert table(tmp_path / "out" / upstream_csv.SEQUENCES) == sequences
    assert table(tmp_path / "out" / upstream_csv.ITEM_DOMAINS) == domains
    assert (manifest["upstream_csv"]["users"], manifest["upstream_csv"]["left_out"]) == (38, 2)
    assert manifest["warnings"] == [
        "sasrec_format.csv leaves out 2 of 40 users: upstream cannot train on fewer than 3 events"
    ]


@pytest.mark.parametrize("block_events", [1, 45, 10**6])
def test_blocks_change_nothing(tmp_path: Path, log: Path, block_events: int) -> None:
    built, _ = build_log(read_events(open_sources([str(log)])), Filters())
    upstream_csv.write_upstream_csv(tmp_path, built, block_events=block_events)
    assert table(tmp_path / upstream_csv.SEQUENCES) == plain(random_rows())[0]
    assert table(tmp_path / upstream_csv.ITEM_DOMAINS) == plain(random_rows())[1]


def test_the_store_is_the_same_without(tmp_path: Path, log: Path) -> None:
    """And its manifest's hashes, which runs compare, too."""
    manifest = prepare_logs([str(log)], tmp_path / "with", write_upstream=True)
    without = prepare_logs([str(log)], tmp_path / "without")
    files = contents(tmp_path / "with")
    for name in NAMES:
        facts, data = manifest["upstream_csv"]["files"][name], files.pop(name)
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(manifest["upstream_csv"]["files"]) == NAMES
    assert files.pop("manifest.json") != (tmp_path / "without" / "manifest.json").read_bytes()
    assert files.items() <= contents(tmp_path / "without").items()
    assert (manifest["hashes"], manifest["sizes"]) == (without["hashes"], without["sizes"])
    assert "upstream_csv" not in without
    (tmp_path / "with" / upstream_csv.SEQUENCES).unlink()
    assert InteractionStore.open(tmp_path / "with").num_users == 40


def test_same_input_same_bytes(tmp_path: Path, log: Path) -> None:
    rows = log.read_text().splitlines(keepends=True)
    again = tmp_path / "again.csv"
    again.write_text("".join([rows[0], *reversed(rows[1:])]))
    for name, file in (("a", log), ("b", again)):
        prepare_logs([str(file)], tmp_path / name, write_upstream=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_command_line(tmp_path: Path, log: Path, cli) -> None:
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--write-upstream")
    assert outcome.code == 0
    assert "WARNING: sasrec_format.csv leaves out 2 of 40 users" in outcome.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(contents(tmp_path / "out")) == {*manifest["hashes"], *NAMES, "manifest.json"}


def test_nobody_long_enough(tmp_path: Path, cli) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "x", "d", 1), ("a", "y", "e", 2)])
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--write-upstream")
    assert outcome.code == 2
    assert "no user has 3 events, the fewest upstream can train on; prepare a" in outcome.err
    assert {file.name for file in tmp_path.iterdir()} == {"log.csv"}


def test_nothing_is_left_of_a_failure(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: pl.DataFrame, **_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_csv", full)
    with pytest.raises(Exception, match="No space left on device"):
        prepare_logs([str(log)], tmp_path / "out", write_upstream=True)
    assert {file.name for file in tmp_path.iterdir()} == {"log.csv"}


def test_rows_are_what_upstream_evaluates(tmp_path: Path, log: Path) -> None:
    """Its reader calls eval() on each field; a list of numbers must come out."""
    prepare_logs([str(log)], tmp_path / "out", write_upstream=True)
    store = InteractionStore.open(tmp_path / "out")
    for row in table(tmp_path / "out" / upstream_csv.SEQUENCES):
        items, times = store.history(int(row["user_id"]))
        assert eval(row["sequence_item_ids"]) == tuple(items.tolist())
        assert eval(row["sequence_timestamps"]) == tuple(times.tolist())
        assert eval(row["sequence_ratings"]) == (upstream_csv.RATING,) * len(items)
    with pytest.raises(InputError, match="exists; add --force"):
        prepare_logs([str(log)], tmp_path / "out", write_upstream=True)
