"""The benchmark command: rows, the gate, usage errors. Never a timed assertion."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from bench_runs import KEYS, call, run_bench
from torch import Tensor

from hstu_xd.bench import passes, providers, train_step
from hstu_xd.bench.cases import DTYPES, PLANS, Case, Draw, sweep
from hstu_xd.bench.rows import markdown, render
from hstu_xd.bench.timing import Builder, Computation, Mark, Pass, phased, unmarked
from hstu_xd.cli import bench_options
from hstu_xd.cli.app import run
from hstu_xd.errors import HstuXdError, InputError

SMALL = {"batch_size": 2, "heads": 2, "dqk": 4, "dv": 4, "width": 8, "layers": 1}


def replace_builder(monkeypatch: pytest.MonkeyPatch, what: str, name: str, build: Builder) -> None:
    changed = replace(providers.PROVIDERS[what][name], build=build)
    monkeypatch.setitem(providers.PROVIDERS[what], name, changed)


@pytest.mark.parametrize("what", ["encoder", "attention"])
def test_rows_have_the_keys_of_the_contract(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in providers.PROVIDERS[what] if "triton" not in name]
    rows = run_bench(
        capsys, what, seq_len=[12], num_domains=[1, 3], skew=[0.0, 0.8], provider=names
    )
    assert [row["provider"] for row in rows] == names * 4
    assert {(row["num_domains"], row["skew"]) for row in rows} == {
        (1, 0.0), (1, 0.8), (3, 0.0), (3, 0.8),
    }  # fmt: skip
    for row in rows:
        assert row.keys() >= KEYS
        assert row["seq_len"] == 12
        if row["absent"]:
            assert row["ms_median"] is None
            assert row["correct"] is None
            continue
        assert row["correct"] is True
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert row["peak_bytes"] > 0
        assert row["times_faster_than_reference"] > 0
        for phase in ("forward", "backward"):
            assert 0 < row[f"ms_{phase}"] <= row["ms_p80"]
            assert row[f"tflops_{phase}"] > 0
            assert row[f"gbs_{phase}"] > 0
            assert row[f"roofline_{phase}"] > 0
        for condition in ("device_name", "torch", "python", "hstu_xd", "command"):
            assert row[condition]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("what", ["encoder", "attention"])
def test_half_precisions_pass_their_gate(
    what: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_bench(
        capsys, what, seq_len=[12], num_domains=[3], dtype=dtype, bias=False, plan="once",
        interleaving=["blocks"], provider=["eager", "reference", "eager-softmax"],
    )  # fmt: skip
    for row in rows:
        assert row["correct"] is True
        assert (row["dtype"], row["biased"]) == (dtype, False)
        assert (row["interleaving"], row["plan"]) == ("blocks", "once")


def sabotaged(honest: Builder, name: str, factor: float) -> Builder:
    """The last row of one result, off by a factor."""

    def build(draw: Draw, dtype: torch.dtype, computes: Computation) -> Pass:
        run = honest(draw, dtype, computes)

        def wrong(mark: Mark) -> dict[str, Tensor]:
            found = run(mark)
            found[name][-1] *= factor
            return found

        return wrong

    return build


@pytest.mark.parametrize("name", ["out", "x"])
@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.001), ("bfloat16", 1.2)])
def test_a_wrong_provider_gets_no_time(
    name: str,
    dtype: str,
    factor: float,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = providers.PROVIDERS["encoder"]["eager"].build
    replace_builder(monkeypatch, "encoder", "eager", sabotaged(honest, name, factor))
    with pytest.raises(HstuXdError, match="eager disagrees with the reference"):
        run_bench(
            capsys, "encoder", seq_len=[12], num_domains=[2], dtype=dtype,
            provider=["eager", "reference"],
        )  # fmt: skip
    eager, reference = json.loads(capsys.readouterr().out)
    assert eager["correct"] is False
    assert eager["error_of_budget"] > 1
    assert eager["ms_median"] is eager["ms_p20"] is eager["ms_p80"] is None
    assert eager["peak_bytes"] is None
    assert reference["correct"] is True
    assert reference["ms_median"] > 0


def test_a_provider_that_raises_says_why_and_the_others_are_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = providers.PROVIDERS["attention"]["sdpa"].build

    def build(draw: Draw, dtype: torch.dtype, computes: Computation) -> Pass:
        if draw.case.seq_len > 70:
            raise torch.OutOfMemoryError("no room\nand a long story")
        return honest(draw, dtype, computes)

    replace_builder(monkeypatch, "attention", "sdpa", build)
    with pytest.raises(HstuXdError, match=r"sdpa failed: OutOfMemoryError: no room$"):
        run_bench(
            capsys, "attention", seq_len=[80], num_domains=[2], provider=["sdpa", "eager"],
            against=["eager", "sdpa"],
        )  # fmt: skip
    sdpa, eager = json.loads(capsys.readouterr().out)
    assert sdpa["failed"] == "OutOfMemoryError: no room"
    assert sdpa["correct"] is True
    assert sdpa["ms_median"] is None
    assert eager["times_faster_than_eager"] == 1.0
    assert eager["failed"] is None
    assert "times_faster_than_sdpa" not in eager


def test_the_gate_runs_the_code_that_is_timed() -> None:
    case = Case("encoder", 80, 3, **SMALL)
    assert case.small.seq_len == 70
    assert 0 < passes.largest_error("eager", case) <= 1


@pytest.mark.parametrize(
    ("found", "truth", "error"),
    [
        ([[1.0, 0.0], [0.0, 2.2]], [[1.0, 0.0], [0.0, 2.0]], 0.1),
        ([1.0, 2.1], [1.0, 2.0], 0.1 / 5**0.5),
        ([[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]], 0.0),
        ([[0.0, 1e-3], [2.0, 0.0]], [[0.0, 0.0], [2.0, 0.0]], 1.0),
        ([[float("nan")]], [[1.0]], float("inf")),
    ],
)
def test_row_error(found: list, truth: list, error: float) -> None:
    assert passes.row_error(torch.tensor(found), torch.tensor(truth)) == pytest.approx(error)


def test_providers_take_turns_and_only_their_own_phases_are_clocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[str] = []

    def noting(name: str) -> Builder:
        def run(mark: Mark) -> dict[str, Tensor]:
            turns.append(name)
            for phase in ("plan", "forward", "backward"):
                mark(phase)
            return {}

        return lambda *_: run

    for name in ("eager", "reference"):
        replace_builder(monkeypatch, "attention", name, noting(name))
    monkeypatch.setattr(passes, "largest_error", lambda name, case: 0.0)
    cases = [Case("attention", 4, 1)]
    rows = list(passes.measure(cases, ["eager", "reference"], threads=1, repeats=2))
    assert turns == ["eager", "reference"] * 3
    for row in rows:
        phases = [row[f"ms_{phase}"] for phase in ("plan", "forward", "backward")]
        assert all(0 <= phase <= row["ms_p80"] for phase in phases)


@pytest.mark.parametrize(("plan", "times"), [("each", 3), ("once", 1)])
def test_a_plan_is_made_in_each_pass_or_once(plan: str, times: int) -> None:
    made: list[int] = []
    x = torch.ones(2, requires_grad=True)
    case = Case("attention", 4, 1, plan=plan)
    run = phased(case, lambda: made.append(1), lambda _: 2 * x, {"x": x}, torch.ones(2))
    for _ in range(3):
        assert torch.equal(run(unmarked)["x"], torch.full((2,), 2.0))
    assert len(made) == times


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("encoder", {"provider": "refrence"}, "did you mean 'reference'?"),
        ("attention", {"provider": "upstream"}, "There are triton, triton-unbiased, native, eager"),
        ("train-step", {"provider": "hst"}, "did you mean 'hstu'? There are dense, hstu, mask"),
        ("serving", {"provider": "apend"}, "did you mean 'append'?"),
        ("attention", {"against": "nobody"}, "no provider 'nobody'. There are"),
        (
            "attention",
            {"provider": "eager", "against": "sdpa"},
            "--against sdpa is not measured; add --provider sdpa",
        ),
        ("encoder", {"seq_len": 0}, "seq_len is 0; at least 1"),
        ("encoder", {"skew": 1.5}, "skew is 1.5"),
        ("encoder", {"interleaving": "sorted"}, "interleaving is 'sorted'; one of random, blocks"),
        ("encoder", {"sweep": True, "seq_len": 8}, "drop --seq-len"),
        ("encoder", {"skew": 0.5, "num_domains": 1}, "no effect on a single domain"),
        ("serving", {"interleaving": "blocks", "num_domains": 1}, "no effect on a single domain"),
        ("attention", {"bias": False, "provider": ["sdpa", "flex"]}, "--no-bias has no effect"),
        ("encoder", {"out": "rows.txt"}, "rows.txt: rows are stored as .json or"),
        ("sampler", {"out": "no/such/rows.csv"}, "there is no folder no/such"),
    ],
)
def test_values_that_are_refused(what: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        call(what, **options)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command says."""
    assert run(["bench", *line.split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("hstu-xd: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("encodr", "No such command 'encodr'. Did you mean 'encoder'?"),
        ("train-stop", "No such command 'train-stop'. Did you mean 'train-step'?"),
        ("encoder --device gpu", "'gpu' is not one of 'cpu', 'cuda'"),
        ("encoder --dtype half", "'half' is not one of 'float32', 'bfloat16', 'float16'"),
        ("encoder --plan never", "'never' is not one of 'each', 'once'"),
        ("encoder a.json", "unexpected extra argument"),
        ("plot a.json", "Missing option '--out'"),
        ("plot --out figures", "Missing argument 'ROWS...'"),
    ],
)
def test_usage_errors(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(line, capsys)


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("prepare --dtype bfloat16 --sweep --device cuda --against nobody", "--dtype"),
        ("prepare --seq-len 8", "--seq-len"),
        ("sampler --retrieval-items 5000", "--retrieval-items"),
        ("sampler --num-domains 3", "--num-domains"),
        ("attention --width 8", "--width"),
        ("attention --layers 3", "--layers"),
        ("train-step --dtype bfloat16", "--dtype"),
        ("train-step --no-bias", "--no-bias"),
        ("train-step --plan once", "--plan"),
        ("serving --against append", "--against"),
        ("serving --batch-size 8", "--batch-size"),
        ("serving --device cuda", "--device"),
        ("service --provider triton", "--provider"),
        ("service --skew 0.5", "--skew"),
        ("plot a.json --out figures --json", "--json"),
    ],
)
def test_what_a_benchmark_does_not_heed_is_no_option_of_it(
    line: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(line, capsys)
    assert "No such option" in said
    assert option in said
    assert f"See hstu-xd bench {line.split()[0]} --help" in said


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"biased": False}, {"plan": "once"}])
def test_a_training_step_has_one_precision_bias_and_plan(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="train-step measures float32"):
        train_step.measure([Case("train-step", 8, 1, **changes)], ["hstu"], threads=1, repeats=1)


def test_the_options_offer_what_a_case_takes() -> None:
    offered = {
        name: get_args(get_args(getattr(bench_options, name))[0]) for name in ("DType", "Plan")
    }
    assert offered == {"DType": tuple(DTYPES), "Plan": PLANS}
    with pytest.raises(InputError, match="device is 'gpu'"):
        Case("encoder", 8, 1, device="gpu")
    with pytest.raises(InputError, match="dtype is 'half'; one of float32, bfloat16"):
        Case("encoder", 8, 1, dtype="half")
    with pytest.raises(InputError, match="plan is 'never'; one of each, once"):
        Case("encoder", 8, 1, plan="never")


def test_the_sweep_changes_one_size_at_a_time() -> None:
    base = Case("attention", 5, 2, heads=3)
    cases = list(sweep(base))
    assert len(set(cases)) == len(cases)
    assert {case.seq_len for case in cases} >= {256, 16384}
    assert {case.num_domains for case in cases} >= {1, 64}
    centre = {"seq_len": 4096, "num_domains": 8, "skew": 0.0, "interleaving": "random"}
    for case in cases:
        assert case.heads == 3
        assert sum(getattr(case, name) != value for name, value in centre.items()) <= 1


def test_the_command_sweeps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(cases: list[Case], *_: Any, **__: Any) -> list[dict]:
        return [{"provider": "eager", "seq_len": x.seq_len, "correct": True} for x in cases]

    monkeypatch.setattr(passes, "measure", measure)
    rows = run_bench(capsys, "attention", sweep=True)
    assert [row["seq_len"] for row in rows] == [
        case.seq_len for case in sweep(Case("attention", 1, 1))
    ]


def test_prepare_rows_are_passed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = pytest.importorskip("hstu_xd.bench.prepare")
    row = {"provider": "a", "rows": 1000, "seconds": 0.5, "correct": True}
    monkeypatch.setattr(prepare, "measure_prepare", lambda rows, out: [row | {"rows": rows}])
    assert run_bench(capsys, "prepare", rows=500, out=tmp_path) == [row | {"rows": 500}]


def test_prepare_and_append_write_the_same_bytes(tmp_path: Path) -> None:
    prepare = pytest.importorskip("hstu_xd.bench.prepare")
    rows = prepare.measure_prepare(2000, tmp_path)
    assert [(row["provider"], row["rows"]) for row in rows] == [
        ("hstu-xd prepare", 2000),
        ("hstu-xd prepare --append", 2000),
        ("hstu-xd prepare", 100),
        ("csv + dict", 100),
    ]
    assert all(row["correct"] and row["cpu_seconds"] > 0 for row in rows)


def test_sampler_reads_what_a_loop_over_users_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hstu_xd.data.synthetic import SynthOptions, synthesize

    store = tmp_path / "store"
    synthesize(store, SynthOptions(users=40, domains=2, items_per_domain=30, mean_length=12.0))
    capsys.readouterr()
    rows = run_bench(capsys, "sampler", data=store, seq_len=[10], batch_size=16)
    assert [row["provider"] for row in rows] == ["batches", "one by one"]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["correct"] is True
        assert row["samples_per_second"] > 0


TABLE = [
    {"provider": "eager", "ms_median": 12.345, "correct": True, "times_faster_than_dense": 2.0},
    {"provider": "upstream", "ms_median": None, "correct": None, "absent": "not importable"},
]


def test_the_table_shows_what_is_known() -> None:
    assert render(TABLE).splitlines() == [
        "provider  correct    ms          absent  x faster than dense",
        "eager         yes  12.3               -                 2.00",
        "upstream        -     -  not importable                    -",
    ]
    assert markdown(TABLE).splitlines()[:3] == [
        "| provider | correct | ms | absent | x faster than dense |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| eager | yes | 12.3 | - | 2.00 |",
    ]


@pytest.mark.slow
def test_memory_of_a_real_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = Case("attention", 400, 1, batch_size=2, heads=2, dqk=4, dv=4)
    dense = case.batch_size * case.heads * case.seq_len**2 * 4
    assert passes.peak_bytes("reference", case, 1, lambda mark: {}) > dense
    with pytest.raises(HstuXdError, match="measuring the memory of nobody failed"):
        passes.peak_bytes("nobody", case, 1, lambda mark: {})
