"""``bench search`` proves the index right before it is timed."""

import numpy as np
import pytest
from bench_runs import run_bench

from hstu_xd.bench import search
from hstu_xd.search import Found, HardIndex


def test_index_and_scan_agree(capsys: pytest.CaptureFixture[str]) -> None:
    index, scan = run_bench(capsys, "search", events=[500], k=20, candidates=4, repeats=2)
    assert (index["provider"], scan["provider"]) == ("index", "scan")
    assert index["correct"] is True
    assert index["times_faster_than_scan"] > 0
    assert index["bytes_per_event"] < 40


def test_a_wrong_index_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = HardIndex.search

    def wrong(self: HardIndex, *asked: object, **rest: object) -> Found:
        found = right(self, *asked, **rest)  # type: ignore[arg-type]
        return Found(np.flip(found.events, 1), found.levels)

    monkeypatch.setattr(HardIndex, "search", wrong)
    (row,) = search.measure_search([300], k=5, candidates=2, repeats=1)
    assert row["correct"] is False
    assert "us_per_candidate" not in row
