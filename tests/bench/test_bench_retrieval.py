"""``bench serving --retrieval-items``: rows of both kinds of retrieval. Never a timed claim."""

import importlib.util
import json

import pytest

from hstu_xd.bench import serving
from hstu_xd.cli import app
from hstu_xd.errors import InputError
from hstu_xd.serving import retrieval

TINY = [
    *("bench", "serving", "--json", "--provider", "state float16", "--layers", "1"),
    *("--seq-len", "12", "--num-domains", "2", "--width", "16", "--repeats", "2"),
    *("--threads", "1", "--retrieval-items", "5000"),
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_ITEMS", 60)
    monkeypatch.setattr(retrieval, "_INDEXED_FROM", 1000)
    monkeypatch.setattr(retrieval, "_LARGEST_SHARE", 0.1)


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    assert app.run(TINY) == 0
    state, *found = json.loads(capsys.readouterr().out)
    assert state["provider"] == "state float16"
    assert [row["provider"] for row in found] == ["exact retrieval", "approximate retrieval"]
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None,
    reason="no faiss here: the benchmark of approximate retrieval is NOT covered",
)
def test_rows_report_recall_and_time_of_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    exact, approximate = rows(capsys)
    for row in (exact, approximate):
        assert row["items"] == 5000
        assert row["width"] == 16
        assert row["correct"] is True
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
    assert exact["recall"] == 1
    # A tenth of the items is looked at: what is found is neither everything nor by chance.
    assert 0.3 < approximate["recall"] < 1
    assert approximate["times_faster_than_exact"] > 0
    assert "times_faster_than_exact" not in exact


def test_without_the_library_only_the_exact_row_has_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise InputError("FAISS is not installed")

    monkeypatch.setattr(retrieval, "load_faiss", missing)
    exact, approximate = rows(capsys)
    assert exact["ms_median"] > 0
    assert approximate["absent"] == "FAISS is not installed"
    assert approximate["ms_median"] is None
