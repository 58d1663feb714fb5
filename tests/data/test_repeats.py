"""Repeated events are counted and said, and dropped exactly where that is asked for."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_files import contents, write_log

from hstu_xd.data.order import Histories
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.repeats import drop_repeats
from hstu_xd.errors import InputError

START = 1_500_000_000
Event = tuple[int, int, int]


def brute_force(events: list[Event], window: int) -> list[Event]:
    """Keep an event unless a kept one of the same user and item is at most a window older."""
    last: dict[tuple[int, int], int] = {}
    kept = []
    for user, time, item in events:
        before = last.get((user, item))
        if before is None or time - before > window:
            last[user, item] = time
            kept.append((user, time, item))
    return kept


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 3)), max_size=60),
    st.integers(0, 8),
)
def test_drop_repeats(events: list[Event], window: int) -> None:
    events = sorted(events)
    user, time, item = np.array(events, np.int64).reshape(-1, 3).T
    histories = Histories(user.astype(np.int32), item.astype(np.int32), time)
    left = drop_repeats(histories, window)
    found = list(zip(left.user.tolist(), left.time.tolist(), left.item.tolist()))
    assert found == brute_force(events, window)


def rows(count: int = 60) -> list[tuple[str, str, str, int]]:
    return [
        (f"u{n % 5}", f"i{n}", ("books", "films")[n % 2], START + 100 * n) for n in range(count)
    ]


def test_the_same_log_twice(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", rows())
    shuffled = write_log(tmp_path / "again.csv", rows()[::-1], separator=";")
    zipped = tmp_path / "zipped.csv.gz"
    zipped.write_bytes(gzip.compress(log.read_bytes()))
    once = cli("prepare", log, "--out", tmp_path / "once")
    assert once.err == ""
    for other in (shuffled, zipped):
        outcome = cli("prepare", log, other, "--out", tmp_path / other.stem)
        assert outcome.code == 0
        assert f"{log} and {other} hold the same 60 events; leave one out" in outcome.err
        assert "60 of 120 events repeat the event before them" in outcome.err
        assert "50.0% of all targets" in outcome.err
        assert "--drop-repeats exact" in outcome.err
        dropped = tmp_path / f"{other.stem}.dropped"
        args = ("--out", dropped, "--drop-repeats", "exact")
        assert "dropped 60 events" in cli("prepare", log, other, *args).out
        found, expected = contents(dropped), contents(tmp_path / "once")
        assert {n for n in found if found[n] != expected[n]} == {"manifest.json"}
        assert json.loads(found["manifest.json"])["repeats"] == {
            "found": 60,
            "window_seconds": 0,
            "dropped": 60,
        }


def test_a_link_to_the_same_file(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", rows())
    (tmp_path / "link.csv").symlink_to(log)
    (tmp_path / "hard.csv").hardlink_to(log)
    for name in ("link.csv", "hard.csv"):
        with pytest.raises(InputError, match="given twice"):
            prepare_logs([str(log), str(tmp_path / name)], tmp_path / "out")


def test_parts_that_overlap(cli: Callable, tmp_path: Path) -> None:
    first = write_log(tmp_path / "first.csv", rows()[:40])
    second = write_log(tmp_path / "second.csv", rows()[20:])
    outcome = cli("prepare", first, second, "--out", tmp_path / "out")
    assert "20 of 80 events repeat the event before them" in outcome.err
    assert "hold the same" not in outcome.err


def test_a_window(tmp_path: Path) -> None:
    plays = [("u", "a", "d", START + 50 * n) for n in range(10)] + [("u", "b", "d", START + 120)]
    log = write_log(tmp_path / "log.csv", plays)
    manifest = prepare_logs([str(log)], tmp_path / "out", drop_repeats="100")
    assert manifest["interactions"] == 5  # a at 0, 150, 300 and 450, and b
    assert manifest["repeats"] == {"found": 0, "window_seconds": 100, "dropped": 6}
    assert manifest["filters"]["dropped"]["interactions"] == 0


@pytest.mark.parametrize("rule", ["soon", "-1", "1.5", ""])
def test_a_rule_that_is_none(rule: str, cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", rows())
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--drop-repeats", rule)
    assert outcome.code == 2
    assert "give exact (same user, item and second) or a number of seconds" in outcome.err


def test_targets_met_before(cli: Callable, tmp_path: Path) -> None:
    """Of four users the first two end with an old item, the third before his last one."""
    histories = ["abcab", "abca", "abcbd", "abcde", "aa"]
    log = write_log(
        tmp_path / "log.csv",
        [
            (f"u{u}", item, "books" if item < "c" else "films", START + n)
            for u, items in enumerate(histories)
            for n, item in enumerate(items)
        ],
    )
    manifest = prepare_logs([str(log)], tmp_path / "out")
    assert manifest["targets"] == {
        "test": {"targets": 4, "met_before": 2},
        "valid": {"targets": 4, "met_before": 2},
    }
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--force")
    assert "2 of 4 test targets are items their user had before" in outcome.out
    assert "WARNING: 2 of 4 test targets" in outcome.err
