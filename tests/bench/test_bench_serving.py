"""``bench serving``: rows, the gate before any time, ratios within one run. Never a timed claim."""

import json

import pytest
import torch
from bench_runs import call
from torch import Tensor

from hstu_xd.bench import providers, serving
from hstu_xd.errors import HstuXdError
from hstu_xd.serving import EncoderSession

TINY = {"heads": 2, "dqk": 4, "dv": 4, "width": 8, "layers": 2}
RATIOS = {
    "append": {"times_faster_than_re_encode", "times_faster_than_dense"},
    "ask all": {"times_of_ask_one"},
    "together": {"times_faster_than_in_turn"},
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_ITEMS", 60)
    monkeypatch.setattr(providers, "importable", lambda name: False)


def run_bench(capsys: pytest.CaptureFixture[str], **options: object) -> dict[str, dict]:
    call("serving", json=True, threads=1, **(TINY | {"repeats": 2} | options))
    return {row["provider"]: row for row in json.loads(capsys.readouterr().out)}


def test_rows_say_how_much_faster_one_event_is(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_bench(capsys, seq_len=[20], num_domains=[3])
    assert list(rows) == list(serving.PROVIDERS)
    for name, row in rows.items():
        assert row["seq_len"] == 20
        assert row["num_domains"] == 3
        assert {key for key in row if key.startswith("times_")} == RATIOS.get(name, set())
        if name == "upstream":
            assert "generative_recommenders" in row["absent"]
            assert row["correct"] is None
        elif name == "state float16":
            assert row["ms_median"] is None
            assert row["state_bytes"] >= row["formula_bytes"] > 0
        else:
            assert row["correct"] is True
            assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
            assert 0 < row["error_of_budget"] <= 1


def test_a_session_that_answers_otherwise_gets_no_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = EncoderSession.query

    def query(self: EncoderSession, *arguments: object) -> Tensor:
        vectors = honest(self, *arguments)
        return vectors + 1e-3 * torch.ones_like(vectors)

    monkeypatch.setattr(EncoderSession, "query", query)
    with pytest.raises(HstuXdError, match="append, ask all, ask one, in turn, together disagrees"):
        call("serving", json=True, threads=1, repeats=1, seq_len=12, num_domains=2, **TINY)
    rows = {row["provider"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["append"]["correct"] is False
    assert rows["append"]["ms_median"] is None
    assert rows["re-encode"]["ms_median"] > 0


def test_a_crowd_of_long_histories_is_not_made(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_bench(capsys, seq_len=[2001], num_domains=[3], provider=["together"], repeats=1)
    assert rows["together"]["absent"] == "64 users have at most 2000 events each"
    assert rows["together"]["ms_median"] is None


def test_a_long_state_takes_what_the_formula_says(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_bench(
        capsys, seq_len=[400], num_domains=[3], provider=["state float16"], layers=1, repeats=1
    )
    row = rows["state float16"]
    assert row["correct"] is True
    assert row["state_bytes"] == pytest.approx(row["formula_bytes"], rel=0.05)
