"""``bench search`` proves the index right before it is timed."""

from typing import Any

import numpy as np
import pytest
from bench_runs import run_bench

from hstu_xd.bench import search
from hstu_xd.search import Found, HardIndex
from hstu_xd.search.soft import SoftSearch


def test_index_and_scan_agree(capsys: pytest.CaptureFixture[str]) -> None:
    index, scan, *soft = run_bench(capsys, "search", events=[500], k=20, candidates=4, repeats=2)
    assert (index["provider"], scan["provider"]) == ("index", "scan")
    assert [row["provider"] for row in soft] == ["soft", "soft-dense"]
    assert all(row["correct"] and row["ms_per_candidate"] > 0 for row in soft)
    assert soft[0]["times_faster_than_soft-dense"] > 0
    assert index["correct"] is True
    assert index["times_faster_than_scan"] > 0
    assert index["bytes_per_event"] < 40


def test_a_wrong_index_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = HardIndex.search

    def wrong(self: HardIndex, *asked: object, **rest: object) -> Found:
        found = right(self, *asked, **rest)  # type: ignore[arg-type]
        return Found(np.flip(found.events, 1), found.levels)

    monkeypatch.setattr(HardIndex, "search", wrong)
    row, *_ = search.measure_search([300], k=5, candidates=2, repeats=1)
    assert row["correct"] is False
    assert "us_per_candidate" not in row


def test_a_wrong_soft_search_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SoftSearch.search

    def wrong(self: SoftSearch, *asked: Any, chunk: int | None = None, **rest: Any) -> Any:
        found = right(self, *asked, chunk=chunk, **rest)
        return found if chunk else found.roll(1, 1)

    monkeypatch.setattr(SoftSearch, "search", wrong)
    *_, row = search.measure_search([300], k=5, candidates=2, repeats=1)
    assert (row["provider"], row["correct"]) == ("soft", False)
    assert "ms_per_candidate" not in row


def test_the_opening_of_a_long_log_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"events": [100], "opening": 5_050, "k": 5, "candidates": 2, "repeats": 1}
    *_, row = run_bench(capsys, "search", **options)
    assert (row["provider"], row["log_events"], row["users"]) == ("opening", 5_000, 50)
    assert row["correct"] is True
    assert row["open_ms"] > 0
    assert row["first_ms_median"] > 0
    assert row["bytes_per_event"] < 40


def test_an_opened_index_that_finds_something_else_gets_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = HardIndex.open

    def wrong(at: object) -> HardIndex:
        index = opened(at)  # type: ignore[arg-type]
        monkeypatch.setattr(index, "search", lambda *asked: Found.nothing(1, asked[-1]))
        return index

    monkeypatch.setattr(HardIndex, "open", wrong)
    row = search.measure_opening(1_000, 5)
    assert row["correct"] is False
    assert "open_ms" not in row
