"""Softmax in place of SiLU: the PyTorch implementations and FlexAttention against the oracle."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import (
    Spec,
    draw,
    errors_against_oracle,
    every_float64_impl,
    whole_tensor,
    worst_row,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.ops import available_impls, domain_attention
from hstu_xd.ops.grouping import DomainGrouping

softmax_attention = partial(domain_attention, normalization="softmax")

EDGES = [
    Spec((0, 1, 2, 7, 15, 16, 17), num_domains=3),
    Spec((63, 0, 64, 65), num_domains=2, dqk=16, dv=16),
    Spec((127, 128, 129), num_domains=1, dqk=8, dv=25),
    Spec((), num_domains=2),
    Spec((0, 0), num_domains=2),
    Spec((90, *(1, 2, 3) * 5), num_domains=500),
    Spec((50, 0, 20), num_domains=5, visited=1, heads=1),
]
SPECS = [
    replace(spec, target_view=target, biased=biased, softmax=True)
    for spec in EDGES
    for target in (False, True)
    for biased in (True, False)
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


@every_float64_impl
@every_spec
def test_float32_stays_within_budget(spec: Spec, impl: str) -> None:
    attention = partial(softmax_attention, impl=impl)
    errors_against_oracle(attention, draw(spec), torch.float32).check()


@every_float64_impl
@every_spec
def test_float64_is_exact(spec: Spec, impl: str) -> None:
    attention = partial(softmax_attention, impl=impl)
    errors_against_oracle(attention, draw(spec), torch.float64).check(
        forward=1e-12, gradients=1e-12
    )


@given(
    st.builds(
        Spec,
        st.lists(st.integers(0, 20), max_size=6).map(tuple),
        st.sampled_from([1, 2, 3, 7]),
        heads=st.integers(1, 3),
        dqk=st.integers(1, 4),
        dv=st.integers(1, 4),
        target_view=st.booleans(),
        biased=st.booleans(),
        softmax=st.just(True),
    )
)
@settings(max_examples=40)
def test_any_structure_is_exact_in_float64(spec: Spec) -> None:
    errors_against_oracle(softmax_attention, draw(spec), torch.float64).check(
        forward=1e-11, gradients=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [s for s in SPECS if s.dqk == s.dv], ids=str)
def test_half_precisions_err_no_more_than_twice_the_reference(
    spec: Spec, dtype: torch.dtype
) -> None:
    case = draw(spec).rounded(dtype)
    reference, fast = (
        errors_against_oracle(
            partial(softmax_attention, impl=impl), case, dtype, measure=whole_tensor
        )
        for impl in ("reference", "auto")
    )
    assert fast.forward <= 2 * reference.forward
    for name, error in reference.gradients.items():
        assert fast.gradients[name] <= 2 * error, name


@pytest.mark.parametrize("impl", available_impls("softmax"))
def test_a_query_without_keys_gets_zeros_and_the_others_an_average(impl: str) -> None:
    case = draw(Spec((9, 40), target_view=True, biased=False, softmax=True))
    grouping = case.grouping()
    q, k = (torch.from_numpy(x) for x in (case.q, case.k))
    out = softmax_attention(
        q, k, torch.ones(49, 2, 3), grouping, norm_length=case.norm_length, impl=impl
    )
    reads = torch.from_numpy(case.oracle.out).abs().sum((1, 2)) > 0
    assert 0 < reads.sum() < len(reads)
    assert torch.equal(out[~reads], torch.zeros_like(out[~reads]))
    torch.testing.assert_close(out[reads], torch.ones_like(out[reads]))


@pytest.mark.parametrize("impl", available_impls("softmax"))
def test_scores_beyond_the_range_of_exp_stay_finite(impl: str) -> None:
    case = draw(Spec((30,), biased=False, softmax=True))
    q, k, v = (torch.from_numpy(x) for x in (case.q, case.k, case.v))
    out = softmax_attention(1e4 * q, k, v, case.grouping(), norm_length=33, impl=impl)
    assert out.isfinite().all()
    assert out.abs().amax() <= v.abs().amax() * 1.001


# FlexAttention; PyTorch has no backward pass of it on a CPU.


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.biased], ids=str)
@torch.no_grad()
def test_flex_attention_is_exact_forward(spec: Spec) -> None:
    case = draw(spec)
    leaves = case.tensors(torch.float64)
    found = softmax_attention(
        leaves["q"], leaves["k"], leaves["v"], case.grouping(), norm_length=1, impl="flex"
    )
    assert found.shape == case.v.shape
    assert worst_row(found, case.oracle.out, None) <= 1e-12


# Errors.


def call(**changes: Any) -> Tensor:
    grouping = DomainGrouping.from_jagged(torch.tensor([0, 1, 0]), torch.tensor([0, 3]), 2)
    given = {"normalization": "softmax", "norm_length": 3, **changes}
    x = given.pop("x", torch.ones(3, 1, 4))
    return domain_attention(x, x, x, grouping, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "relu"}, "normalization is 'relu'; one of silu, softmax"),
        (
            {"impl": "triton"},
            "impl 'triton' is not available here; use auto, reference, eager, flex for "
            "normalization 'softmax'",
        ),
        (
            {"impl": "flex", "normalization": "silu"},
            "impl 'flex' is not available here; use auto, reference, eager",
        ),
        (
            {"impl": "flex", "x": torch.ones(3, 1, 4, requires_grad=True)},
            "q, k or v on cpu needs gradients; impl 'flex' has them on CUDA only: use impl='eager'",
        ),
    ],
)
def test_messages(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        call(**changes)


def test_flex_attention_refuses_a_bias() -> None:
    case = draw(Spec((3,), num_domains=2))
    bias = case.relative_bias({n: x.detach() for n, x in case.tensors(torch.float32).items()})
    with pytest.raises(InputError, match="bias is given; impl 'flex' has no relative bias"):
        call(impl="flex", bias=bias)


# Mutants: wrong attentions that look plausible, all to be rejected.


def _alone(q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, **rest: Any) -> Tensor:
    everyone = DomainGrouping.single(grouping.batch_offsets, grouping.num_tokens)
    return softmax_attention(q, k, v, everyone, **rest)


def _later(q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, **rest: Any) -> Tensor:
    keys = replace(grouping.keys, positions=grouping.keys.positions - 1, key_grouping=None)
    return softmax_attention(q, k, v, replace(grouping, key_grouping=keys), **rest)


MUTANTS: dict[str, Callable[..., Tensor]] = {
    "silu": domain_attention,
    "divided_by_the_length": lambda *a, norm_length, **rest: (
        softmax_attention(*a, norm_length=norm_length, **rest) / norm_length
    ),
    "unscaled": lambda q, *a, **rest: softmax_attention(q * q.shape[2] ** 0.5, *a, **rest),
    "scaled_by_the_values_width": lambda q, k, v, *a, **rest: softmax_attention(
        q * (q.shape[2] / v.shape[2]) ** 0.5, k, v, *a, **rest
    ),
    "bias_forgotten": lambda *a, bias, **rest: softmax_attention(*a, **rest),
    "domains_merged": _alone,
    "one_future_key": _later,
    "queries_and_keys_exchanged": lambda q, k, *a, **rest: softmax_attention(k, q, *a, **rest),
    "error_of_one_in_ten_thousand": lambda *a, **rest: softmax_attention(*a, **rest) * 1.0001,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_rejects_the_mutant(name: str) -> None:
    case = draw(Spec((0, 1, 2, 7, 17, 65), dqk=6, dv=9, softmax=True))
    with pytest.raises((AssertionError, RuntimeError), match=r"error|unused"):
        errors_against_oracle(MUTANTS[name], case, torch.float32).check()
