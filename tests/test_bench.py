"""The benchmark command: rows, the gate, usage errors. Never a timed assertion."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu_xd.bench import gate, memory, passes, providers, train_step
from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.table import render
from hstu_xd.cli.bench import bench
from hstu_xd.errors import HstuXdError, InputError

KEYS = {
    "provider", "seq_len", "num_domains", "skew", "dtype", "device",
    "ms_median", "ms_p20", "ms_p80", "peak_bytes", "correct",
}  # fmt: skip
TINY = {"batch_size": 2, "heads": 2, "dqk": 4, "dv": 4, "width": 8, "layers": 1}


@pytest.fixture(autouse=True)
def _no_subprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda provider, case, threads: 4096)


def run_bench(capsys: pytest.CaptureFixture[str], what: str, **options: object) -> list[dict]:
    """Rows that the command prints, as the first thing a user would do with them."""
    bench(what, as_json=True, threads=1, repeats=2, **(TINY | options))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("what", ["encoder", "attention"])
def test_rows_have_the_keys_of_the_contract(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_bench(capsys, what, seq_len=[12], num_domains=[1, 3], skew=[0.0, 0.8])
    names = providers.PROVIDERS[what]
    assert [row["provider"] for row in rows] == [*names] * 4
    assert {(row["num_domains"], row["skew"]) for row in rows} == {
        (1, 0.0), (1, 0.8), (3, 0.0), (3, 0.8),
    }  # fmt: skip
    for row in rows:
        assert row.keys() >= KEYS
        assert row["seq_len"] == 12
        if "absent" in row:
            assert row["ms_median"] is None
            assert row["correct"] is None
            continue
        assert row["correct"] is True
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert row["peak_bytes"] > 0
        assert row["times_faster_than_reference"] > 0


def test_an_absent_provider_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    *_, row = run_bench(capsys, "encoder", seq_len=[8], num_domains=[2])
    assert row["provider"] == "upstream"
    assert "generative_recommenders" in row["absent"]
    assert row["ms_median"] is None


@pytest.mark.parametrize("sabotaged", ["out", "x"])
def test_a_wrong_provider_gets_no_time(
    sabotaged: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = providers.build

    def build(
        provider: str, draw: Draw, dtype: torch.dtype, *, masked: bool = True
    ) -> providers.Pass:
        run = honest(provider, draw, dtype, masked=masked)

        def wrong() -> dict[str, Tensor]:
            found = run()
            found[sabotaged][-1] *= 1.001
            return found

        return wrong if provider == "eager" else run

    monkeypatch.setattr(providers, "build", build)
    with pytest.raises(HstuXdError, match="eager disagrees with the reference"):
        run_bench(capsys, "encoder", seq_len=[12], num_domains=[2])
    eager, reference, _ = json.loads(capsys.readouterr().out)
    assert eager["correct"] is False
    assert eager["error_of_budget"] > 1
    assert eager["ms_median"] is eager["ms_p20"] is eager["ms_p80"] is None
    assert eager["peak_bytes"] is None
    assert reference["correct"] is True
    assert reference["ms_median"] > 0


def test_the_gate_runs_the_code_that_is_timed() -> None:
    case = Case("encoder", 80, 3, **TINY)
    assert case.small.seq_len == 70
    assert 0 < gate.largest_error("eager", case) <= 1


@pytest.mark.parametrize(
    ("found", "truth", "error"),
    [
        ([[1.0, 0.0], [0.0, 2.2]], [[1.0, 0.0], [0.0, 2.0]], 0.1),
        ([1.0, 2.1], [1.0, 2.0], 0.1 / 5**0.5),
        ([[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]], 0.0),
        ([[float("nan")]], [[1.0]], float("inf")),
    ],
)
def test_row_error(found: list, truth: list, error: float) -> None:
    assert gate.row_error(torch.tensor(found), torch.tensor(truth)) == pytest.approx(error)


def test_skew_is_the_share_of_the_first_domain() -> None:
    draw = Draw.of(Case("encoder", 1000, 4, skew=0.8))
    share = np.bincount(draw.domains.numpy(), minlength=4) / draw.num_tokens
    np.testing.assert_allclose(share, [0.8, 0.2 / 3, 0.2 / 3, 0.2 / 3], atol=0.02)
    balanced = Draw.of(Case("encoder", 1000, 4)).domains
    np.testing.assert_allclose(np.bincount(balanced.numpy()) / 8000, 0.25, atol=0.02)


def test_providers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    monkeypatch.setattr(providers, "build", lambda name, *_, **__: lambda: turns.append(name) or {})
    monkeypatch.setattr(gate, "largest_error", lambda name, case: 0.0)
    list(passes.measure([Case("attention", 4, 1)], ["eager", "reference"], threads=1, repeats=2))
    assert turns == ["eager", "reference"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": "encodr"}, "no benchmark 'encodr'; did you mean 'encoder'?"),
        ({"what": "train-stop"}, "no benchmark 'train-stop'; did you mean 'train-step'"),
        ({"what": "encoder", "provider": ["refrence"]}, "did you mean 'reference'?"),
        ({"what": "attention", "provider": ["upstream"]}, "There are eager, reference"),
        ({"what": "encoder", "seq_len": [0]}, "seq_len is 0; at least 1"),
        ({"what": "encoder", "skew": [1.5]}, "skew is 1.5"),
        ({"what": "encoder", "device": "gpu"}, "device is 'gpu'"),
    ],
)
def test_usage_errors(arguments: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        bench(**arguments)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_sampler_reads_what_a_loop_over_users_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hstu_xd.data.synthetic import synthesize
    from hstu_xd.data.world import SynthOptions

    store = tmp_path / "store"
    synthesize(store, SynthOptions(users=40, domains=2, items_per_domain=30, mean_length=12.0))
    capsys.readouterr()
    rows = run_bench(capsys, "sampler", data=store, seq_len=[10], batch_size=16)
    assert [row["provider"] for row in rows] == ["batches", "one by one"]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["correct"] is True
        assert row["samples_per_second"] > 0


def test_prepare_rows_are_passed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = pytest.importorskip("hstu_xd.bench.prepare")
    row = {"provider": "a", "rows": 1000, "seconds": 0.5, "correct": True}
    monkeypatch.setattr(prepare, "run", lambda rows, out: [row | {"rows": rows}])
    assert run_bench(capsys, "prepare", rows=500, out=tmp_path) == [row | {"rows": 500}]


def test_the_table_shows_what_is_known() -> None:
    rows = [
        {"provider": "eager", "ms_median": 12.345, "correct": True},
        {"provider": "upstream", "ms_median": None, "correct": None, "absent": "not importable"},
    ]
    assert render(rows).splitlines() == [
        "provider  correct    ms          absent",
        "eager         yes  12.3               -",
        "upstream        -     -  not importable",
    ]


def test_memory_of_a_real_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = Case("attention", 400, 1, batch_size=2, heads=2, dqk=4, dv=4)
    dense = case.batch_size * case.heads * case.seq_len**2 * 4
    assert memory.peak_bytes("reference", case, 1) > dense
    with pytest.raises(HstuXdError, match="measuring the memory of nobody failed"):
        memory.peak_bytes("nobody", case, 1)


def test_train_step_compares_models_and_reading_in_equal_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "_ITEMS", 60)
    rows = run_bench(capsys, "train-step", seq_len=[8, 16], num_domains=[3])
    assert [row["provider"] for row in rows] == ["dense", "hstu", "mask", "all"] * 2
    for row in rows:
        assert row.keys() >= KEYS
        assert row["correct"] is True
        assert row["times_faster_than_dense"] > 0
    assert [r["equal_time_seq_len"] for r in rows if r["provider"] == "dense"] == [8, 16]


def test_equal_time_is_interpolated_between_measured_lengths_only() -> None:
    case = {"num_domains": 2, "skew": 0.0, "batch_size": 4, "device": "cpu"}
    times = {("dense", 100): 10.0, ("dense", 200): 40.0, ("all", 100): 5.0, ("all", 400): 20.0}
    rows = [
        {**case, "provider": name, "seq_len": n, "ms_median": ms} for (name, n), ms in times.items()
    ]
    found = [train_step._equal_time(row, rows) for row in rows]
    assert found == [100, 200, 200, None]
