"""Every provider computes what it says it computes, and says why it is absent where it is."""

from dataclasses import replace
from importlib.util import find_spec
from math import inf
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench_runs import run_bench
from torch import Tensor

from hstu_xd.bench import attention_passes, passes, providers
from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.roofline import Ceilings, Work, delta, visible_pairs
from hstu_xd.bench.timing import Computation
from hstu_xd.ops import domain_attention
from hstu_xd.ops.grouping import DomainGrouping

CASE = Case("attention", 20, 3, batch_size=2, heads=2, dqk=4, dv=4, width=8, layers=1)
UPSTREAM = find_spec("generative_recommenders") and find_spec("fbgemm_gpu")
needs_upstream = pytest.mark.skipif(
    not UPSTREAM,
    reason="generative_recommenders with fbgemm_gpu is not importable: NOT covered is that the "
    "providers of upstream call its code right",
)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(
    ("what", "name"),
    [(what, name) for what, known in providers.PROVIDERS.items() for name in known],
)
def test_a_provider_computes_what_it_says(what: str, name: str, bias: bool) -> None:
    case = replace(CASE, what=what, biased=bias)
    if why := providers.PROVIDERS[what][name].missing(case):
        pytest.skip(f"{name} cannot run here ({why}): NOT covered is what it computes")
    assert passes.largest_error(name, case) <= 1


@pytest.mark.parametrize("what", ["attention", "encoder"])
def test_many_domains_pass_the_gate(what: str) -> None:
    """Queries with one key, whose gradients nearly vanish: no float32 gets within the budget."""
    case = Case(what, 4096, 64, batch_size=1, heads=1, dqk=8, dv=8, width=8)
    for name in ("eager", "reference"):
        assert passes.largest_error(name, case) <= 1


@needs_upstream
@pytest.mark.parametrize("masked", [True, False], ids=["grouped", "mixed"])
def test_upstreams_fused_attention_is_called_right(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its PyTorch kernel, which takes the same arguments as the one for GPUs."""
    name = "upstream-triton-grouped" if masked else "upstream-triton-mixed"
    timed = providers.PROVIDERS["attention"][name]
    assert timed.masked is masked
    assert timed.computation(CASE) == Computation(masked, "silu", biased=False)
    by_pytorch = replace(timed, build=attention_passes.varlen(attention_passes.upstream("PYTORCH")))
    monkeypatch.setitem(providers.PROVIDERS["attention"], name, by_pytorch)
    assert passes.largest_error(name, CASE) <= 1


def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, length: int) -> Tensor:
    """What others' kernels compute, by the definition: offsets of sequences, divided by length."""
    grouping = DomainGrouping.single(offsets.long(), len(q))
    return domain_attention(q, k, v, grouping, norm_length=length, impl="reference")


def by_fbgemm(
    q, k, v, seq_offsets_q, seq_offsets_k, max_seqlen_q, max_seqlen_k,
    num_contexts=None, num_targets=None, window_size=(-1, -1), alpha=1.0,
):  # fmt: skip
    assert (window_size, alpha, seq_offsets_q.dtype) == ((-1, 0), 1.0, torch.int32)
    return attend(q, k, v, seq_offsets_q, max_seqlen_q)


def by_nvidia(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
    scaling_seqlen, num_contexts, num_targets, window_size=(-1, -1), alpha=1.0,
):  # fmt: skip
    assert (window_size, alpha, seqused_q, num_targets) == ((-1, 0), 1.0, None, None)
    return attend(q, k, v, cu_seqlens_q, scaling_seqlen)


def by_upstream_cuda(max_seq_len, alpha, q, k, v, seq_offsets, causal, num_groups):
    assert causal
    assert num_groups in (1, CASE.num_domains)
    return attend(q, k, v, seq_offsets, max_seq_len)


@pytest.mark.parametrize("order", ["mixed", "grouped"])
@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("cutlass", "hstu", by_fbgemm),
        ("cutlass", "hstu_attn", by_nvidia),
        ("upstream-cuda", "generative_recommenders.ops.cpp.cuda_hstu_attention", by_upstream_cuda),
    ],
)
def test_others_kernels_are_called_right(
    name: str, module: str, function: Any, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By stand-ins with the parameters of the releases; the kernels need a GPU."""
    called = "cuda_hstu_mha" if name == "upstream-cuda" else "hstu_attn_varlen_func"
    stand_in = SimpleNamespace(**{called: function})
    known = {module, "generative_recommenders", "hstu._C"}
    monkeypatch.setattr(attention_passes, "importable", known.__contains__)
    monkeypatch.setattr(attention_passes, "import_module", {module: stand_in}.__getitem__)
    whole = f"{name}-{order}"
    assert providers.PROVIDERS["attention"][whole].masked is (order == "grouped")
    assert passes.largest_error(whole, CASE) <= 1


def test_absent_kernels_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "importable", lambda name: False)
    known = providers.PROVIDERS["attention"]
    assert known["cutlass-mixed"].missing(CASE) == (
        "hstu_attn or fbgemm_gpu.experimental.hstu or hstu not importable"
    )
    found = known["upstream-cuda-grouped"].missing(CASE)
    assert found == "generative_recommenders and hstu._C not importable"


@pytest.mark.parametrize(
    "change", [{"masked": False}, {"normalization": "softmax"}, {"bias": "never"}], ids=str
)
def test_the_gate_rejects_another_computation(
    change: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eager pass of one computation, held against the definition of another."""
    honest = providers.PROVIDERS["attention"]["eager"]
    computes = replace(honest, **change).computation(CASE)
    wrong = replace(honest, build=lambda draw, dtype, _: honest.build(draw, dtype, computes))
    monkeypatch.setitem(providers.PROVIDERS["attention"], "eager", wrong)
    if "bias" in change:
        with pytest.raises(KeyError, match="position_weights"):
            passes.largest_error("eager", CASE)
    else:
        assert passes.largest_error("eager", CASE) > 1


@pytest.mark.parametrize(
    ("foreign", "errors", "verdict"),
    [
        (True, {"bfloat16": 0.4}, {"correct": True, "error_of_budget": 0.4}),
        (
            True,
            {"bfloat16": 2.5, "float32": 0.9},
            {"correct": True, "error_of_budget": 2.5, "judged_in": "float32"},
        ),
        (
            True,
            {"bfloat16": 2.5, "float32": 1.1},
            {"correct": False, "error_of_budget": 2.5, "judged_in": "float32"},
        ),
        (True, {"bfloat16": 2.5}, {"correct": False, "error_of_budget": 2.5}),
        # No rounding: another function in halves than in float32.
        (True, {"bfloat16": 4.1, "float32": 0.9}, {"correct": False, "error_of_budget": 4.1}),
        (True, {"bfloat16": inf, "float32": 0.9}, {"correct": False, "error_of_budget": inf}),
        (False, {"bfloat16": 2.5, "float32": 0.9}, {"correct": False, "error_of_budget": 2.5}),
        (True, {"float32": 1.1}, {"correct": False, "error_of_budget": 1.1}),
    ],
)
def test_who_is_judged_in_float32(
    foreign: bool,
    errors: dict[str, float],
    verdict: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another's code that half precisions are too coarse for; not all of it has float32."""
    monkeypatch.setattr(passes, "largest_error", lambda name, case: errors[case.dtype])
    known = providers.PROVIDERS["attention"]
    monkeypatch.setitem(known, "eager", replace(known["eager"], foreign=foreign))
    assert passes.judge("eager", replace(CASE, dtype=next(iter(errors)))) == verdict


def test_whose_code_is_foreign() -> None:
    for what, named in providers.PROVIDERS.items():
        found = {name for name, one in named.items() if one.foreign}
        assert found == {name for name in named if name.startswith(("upstream", "cutlass"))}, what


@pytest.mark.parametrize(
    ("what", "name", "changes", "reason"),
    [
        ("attention", "flex", {}, "needs a CUDA device"),
        ("encoder", "flex", {}, "needs a CUDA device"),
        ("attention", "sdpa", {}, None),
        ("encoder", "eager", {}, None),
        ("encoder", "upstream", {"biased": False}, "always has the relative bias"),
    ],
)
def test_reasons_to_be_absent(
    what: str, name: str, changes: dict, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "importable", lambda name: True)
    case = replace(CASE, what=what, **changes)
    assert providers.PROVIDERS[what][name].missing(case) == reason


@pytest.mark.parametrize(("dqk", "dv", "reason"), [(25, 32, "dqk is 25"), (32, 8, "dv is 8")])
def test_upstreams_kernel_takes_powers_of_two(
    dqk: int, dv: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "importable", lambda name: True)
    on_a_gpu = replace(providers.PROVIDERS["attention"]["upstream-triton-mixed"], needs="nothing")
    assert on_a_gpu.missing(replace(CASE, dqk=32, dv=32)) is None
    found = on_a_gpu.missing(replace(CASE, dqk=dqk, dv=dv))
    assert found == f"{reason}; it takes powers of two from 16 on"


def test_an_absent_provider_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "importable", lambda name: False)
    (row,) = run_bench(capsys, "encoder", seq_len=[8], num_domains=[2], provider=["upstream"])
    assert row["absent"] == "generative_recommenders not importable"
    assert row["ms_median"] is row["correct"] is None


def test_skew_is_the_share_of_the_first_domain() -> None:
    draw = Draw.from_case(Case("encoder", 1000, 4, skew=0.8))
    share = np.bincount(draw.domains.numpy(), minlength=4) / draw.num_tokens
    np.testing.assert_allclose(share, [0.8, 0.2 / 3, 0.2 / 3, 0.2 / 3], atol=0.02)
    balanced = Draw.from_case(Case("encoder", 1000, 4)).domains
    np.testing.assert_allclose(np.bincount(balanced.numpy()) / 8000, 0.25, atol=0.02)


def test_blocks_are_the_same_events_one_domain_after_the_other() -> None:
    random = Draw.from_case(CASE).domains.view(2, 20)
    blocks = Draw.from_case(replace(CASE, interleaving="blocks")).domains.view(2, 20)
    assert torch.equal(blocks, random.sort(1).values)
    assert not torch.equal(blocks, random)


def test_numbers_are_those_of_the_dtype() -> None:
    draw = Draw.from_case(replace(CASE, dtype="bfloat16"))
    exact = draw.normal(50, dtype=torch.float64, seed=3)
    assert torch.equal(exact, exact.bfloat16().double())


@pytest.mark.parametrize("masked", [True, False])
def test_visible_pairs_are_counted_one_by_one(masked: bool) -> None:
    draw = Draw.from_case(CASE)
    domains = draw.domains.view(2, 20)
    pairs = sum(
        1
        for user in domains.tolist()
        for i in range(20)
        for j in range(i + 1)
        if user[i] == user[j] or not masked
    )
    assert visible_pairs(draw, masked=masked) == pairs


def test_work_of_attention() -> None:
    """One user, two domains of one and two events: four pairs."""
    case = Case("attention", 3, 2, batch_size=1, heads=5, dqk=7, dv=11, dtype="bfloat16")
    draw = replace(Draw.from_case(case), domains=torch.tensor([0, 1, 0]))
    work = Work.from_draw(draw, masked=True)
    assert work.forward_flops == 2 * 5 * (7 + 11) * 4
    assert work.backward_flops == 2.5 * work.forward_flops
    assert work.forward_bytes == 2 * 3 * 5 * (7 + 7 + 11 + 11)
    assert work.backward_bytes == 2 * 3 * 5 * (7 + 7 + 11 + 11 + 7 + 7 + 11)
    assert delta(draw) == pytest.approx((2 / 3) ** 2 + (1 / 3) ** 2)


def test_work_of_an_encoder_adds_the_projections() -> None:
    sizes = {"batch_size": 1, "heads": 2, "dqk": 3, "dv": 4, "width": 6}
    attention, encoder = (
        Work.from_draw(Draw.from_case(Case(what, 8, 1, layers=3, **sizes)), masked=True)
        for what in ("attention", "encoder")
    )
    projected = 2 * 8 * 6 * (2 * (4 + 4 + 3 + 3) + 2 * 4)
    assert encoder.forward_flops == 3 * (attention.forward_flops + projected)
    assert encoder.backward_flops == 3 * (attention.backward_flops + 2 * projected)


def test_the_roofline_is_what_takes_longer() -> None:
    ceilings = Ceilings(tflops=2.0, gbs=100.0)
    assert ceilings.seconds(flops=4e12, moved=1e9) == 2.0
    assert ceilings.seconds(flops=4e12, moved=1e12) == 10.0


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = Ceilings.measure(CASE)
    assert found.tflops > 0
    assert found.gbs > 0
