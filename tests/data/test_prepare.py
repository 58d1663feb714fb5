"""What prepare promises: same events, same bytes; a readable summary; counts that are right."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_files import HEADER, contents, write_log

from hstu_xd.data import InteractionStore
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.statistics import describe

REAL = Path(os.environ.get("HSTU_XD_DATA", Path(__file__).parents[3] / "shared" / "data"))


def random_rows(count: int, seed: int = 0) -> list[tuple[str, str, str, int]]:
    """Events with many ties and some exact repetitions."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        item = draw.randrange(60)
        domain = ("books", "films", "music")[item % 3]
        rows.append((f"u{draw.randrange(40)}", f"i{item}", domain, draw.randrange(20)))
    return rows


def test_row_order_leaves_no_trace(tmp_path: Path) -> None:
    rows = random_rows(3000)
    prepare_logs([str(write_log(tmp_path / "a.csv", rows))], tmp_path / "a")
    random.Random(1).shuffle(rows)
    prepare_logs([str(write_log(tmp_path / "b.csv", rows))], tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_spread_over_files_leaves_no_trace(tmp_path: Path) -> None:
    rows = random_rows(3000)
    prepare_logs([str(write_log(tmp_path / "all.csv", rows))], tmp_path / "all")
    parts = [str(write_log(tmp_path / f"p{k}.csv", rows[k::3])) for k in range(3)]
    prepare_logs(parts, tmp_path / "parts")
    prepare_logs(parts[::-1], tmp_path / "reversed")
    header = (HEADER[0], HEADER[1], HEADER[3])
    domains = []
    for domain in ("music", "books", "films"):
        part = [(user, item, time) for user, item, d, time in rows if d == domain]
        domains.append(str(write_log(tmp_path / "d" / f"{domain}.csv", part, header)))
    prepare_logs(domains, tmp_path / "domains")
    for name in ("parts", "reversed", "domains"):
        assert contents(tmp_path / name) == contents(tmp_path / "all"), name


def test_threads_and_processes_leave_no_trace(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", random_rows(5000))
    for threads in ("1", "3"):
        subprocess.run(
            [sys.executable, "-m", "hstu_xd", "prepare", log, "--out", tmp_path / threads],
            env={**os.environ, "POLARS_MAX_THREADS": threads},
            check=True,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_manifest_names_no_machine(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", random_rows(500))
    manifest = prepare_logs([str(log)], tmp_path / "out")
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert json.loads(text) == manifest
    assert str(tmp_path) not in text
    assert manifest["synthetic"] is False
    assert manifest["format_version"] == 1
    for name, digest in manifest["hashes"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        assert len(data) == manifest["sizes"][name]
    assert set(contents(tmp_path / "out")) == {*manifest["hashes"], "manifest.json"}


def test_repeated_events_are_kept_and_counted(tmp_path: Path) -> None:
    rows = [("a", "x", "d", 1)] * 3 + [("a", "x", "d", 2), ("b", "x", "d", 1), ("a", "y", "d", 1)]
    log = write_log(tmp_path / "log.csv", rows)
    manifest = prepare_logs([str(log)], tmp_path / "out")
    assert manifest["interactions"] == 6
    assert manifest["duplicates"] == 2


def test_time_spans_too_wide_for_one_key(tmp_path: Path) -> None:
    rows = [(f"u{n % 5}", f"i{n}", "d", t) for n, t in enumerate([0, 2**62, 7, 2**62, 3] * 3)]
    log = write_log(tmp_path / "log.csv", rows)
    prepare_logs([str(log)], tmp_path / "out", time_unit="s")
    store = InteractionStore.open(tmp_path / "out")
    times = {store.user_token(u): store.history(u)[1].tolist() for u in range(store.num_users)}
    assert times == {f"u{u}": [rows[u][3]] * 3 for u in range(5)}
    narrow = [(user, item, domain, time % 1000) for user, item, domain, time in rows]
    prepare_logs([str(write_log(tmp_path / "n.csv", narrow))], tmp_path / "narrow")
    items = InteractionStore.open(tmp_path / "narrow").item_ids
    assert items.tolist() == store.item_ids.tolist()


def test_summary_and_one_domain_warning(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("a", "x", "books", 1), ("a", "y", "books", 2)])
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--min-user", "1")
    assert outcome.code == 0
    assert "1 users, 2 items, 2 interactions, 1 domains" in outcome.out
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("WARNING: one domain only ('books')")
    assert InteractionStore.open(tmp_path / "out").manifest["warnings"]


def test_no_warning_without_reason(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", random_rows(300))
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--min-item", "8")
    assert outcome.err == ""
    assert "filters dropped" in outcome.out


@pytest.mark.parametrize(
    ("name", "users", "items", "events", "domains", "mean", "median", "longest", "switches"),
    [("amazon4.csv.gz", 9_581, 25_440, 249_160, 4, 26, 17, 100, 0.50)],
)
def test_counts_of_a_real_log(
    name: str,
    users: int,
    items: int,
    events: int,
    domains: int,
    mean: int,
    median: int,
    longest: int,
    switches: float,
    tmp_path: Path,
) -> None:
    log = REAL / name
    if not log.is_file():
        pytest.skip(f"{log} is absent; set HSTU_XD_DATA to the folder that holds {name}")
    manifest = prepare_logs([str(log)], tmp_path / "out")
    counts = (manifest["users"], manifest["items"], manifest["interactions"])
    assert counts == (users, items, events)
    assert len(manifest["domains"]) == domains
    assert round(manifest["history_length"]["mean"]) == mean
    assert manifest["history_length"]["median"] == median
    assert manifest["history_length"]["max"] == longest
    assert manifest["switch_share"] == pytest.approx(switches, abs=0.005)
    assert sum(d["interactions"] for d in manifest["domains"].values()) == events
    assert sum(d["items"] for d in manifest["domains"].values()) == items
    with gzip.open(log, "rt") as lines:
        next(lines)
        user, _, _, first = next(lines).strip().split(",")
    store = InteractionStore.open(tmp_path / "out")
    assert store.history(store.user_index(user))[1][0] == int(first)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_lengths_of_histories(lengths: list[int]) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids, domain = np.ones(offsets[-1], np.int32), np.zeros(1, np.int32)
    found = describe(offsets, ids, domain, ["books"])["history_length"]
    assert found["median"] == np.median(lengths)
    assert found["max"] == max(lengths)
    assert found["mean"] == pytest.approx(np.mean(lengths), abs=1e-9)
