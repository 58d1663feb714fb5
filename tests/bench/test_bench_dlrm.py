"""``bench dlrm`` proves layers and batches right before they are timed."""

import dataclasses
import json
from pathlib import Path

import pytest
from bench_runs import call, run_bench

from hstu_xd.bench import dlrm
from hstu_xd.bench.cases import Case
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import InputError
from hstu_xd.plugins.dlrm_v3 import HOST

try:
    dlrm.check_upstream()
    MISSING = ""
except InputError as error:
    MISSING = str(error)
needs_upstream = pytest.mark.skipif(
    bool(MISSING), reason=f"{MISSING}: NOT covered is the benchmark of the production path"
)
SMALL = Case("dlrm", 60, 3, batch_size=2, width=8, heads=2, dqk=4, dv=4, layers=1)


@needs_upstream
def test_layers_agree_with_stock_ones_run_domain_by_domain(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = run_bench(capsys, "dlrm", seq_len=[40], num_domains=[1, 3], batch_size=2, repeats=2)
    assert [row["provider"] for row in rows] == list(dlrm.PROVIDERS) * 2
    assert all(row["correct"] and row["ms_median"] > 0 for row in rows)
    assert rows[1]["times_faster_than_stock"] > 0


@needs_upstream
def test_wrong_layers_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu_xd.plugins.dlrm_v3 import bucketed_layer

    original = bucketed_layer._attend_padded

    def wrong(*arguments: object, norm: int, **others: object) -> object:
        return original(*arguments, norm=norm + 1, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(bucketed_layer, "_attend_padded", wrong)
    (row,) = dlrm.measure_stack([SMALL], ["mask"], threads=1, repeats=1)
    assert row["correct"] is False
    assert row["ms_median"] is None


@needs_upstream
def test_batches_have_the_same_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesize(tmp_path / "store", SynthOptions(users=40, domains=3, items_per_domain=30))
    sizes = {"data": tmp_path / "store", "batch_size": 8, "repeats": 2}
    call("dlrm", json=True, seq_len=20, **sizes)
    rows = json.loads(capsys.readouterr().out)
    names = [row["provider"] for row in rows]
    assert names == ["whole", "layout", "samples", "collate"]
    assert all(row["correct"] for row in rows)
    for row in rows[:2]:
        assert row["times_faster_than_samples"] > row["times_faster_than_collate"] > 0
    monkeypatch.setattr(dlrm, "_same", lambda *batches: False)
    rows = dlrm.measure_batches(tmp_path / "store", 20, 8, 1)
    assert not any(row["correct"] or "ms_median" in row for row in rows)


@needs_upstream
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": [10]}, "seq_len is 10; above 10 candidates is needed"),
        ({"data": "STORE", "threads": 2}, "--threads has no effect on batches that are read"),
        ({"data": "STORE", "seq_len": [20, 30]}, "with --data one length is measured; give one"),
        ({"data": "STORE", "batch_size": 999}, "--batch-size 999: the store has 40 requests"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    if "data" in options:
        synthesize(tmp_path / "store", SynthOptions(users=40, domains=3, items_per_domain=30))
        options = options | {"data": tmp_path / "store"}
    with pytest.raises(InputError, match=message):
        call("dlrm", **options)


def test_without_upstream_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dlrm, "HOST", dataclasses.replace(HOST, package="no_such_package"))
    with pytest.raises(InputError, match="bench dlrm needs dlrm_v3: no_such_package is not"):
        dlrm.check_upstream()
