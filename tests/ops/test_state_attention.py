"""DDSR's public operator: the definition against a loop in float64, the others against it."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import Errors, worst_row
from state_cases import DEVICE, Case, Spec, draw
from torch import Tensor

from hstu_xd import ops
from hstu_xd.errors import InputError
from hstu_xd.ops import StateReads, available_state_impls, state_attention
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.state_attention import eager

# Blocks of the most tokens that the loops in C take at a time.
LARGE = Spec((90, 300), 200, 2)
SPECS = [
    Spec((9, 0, 3, 1), 2),
    Spec((9, 0, 3, 1), 2, 4, biased=False),
    Spec((40, 1, 17), 5, 3, visited=3),
    Spec((15, 16, 17, 33), 64, 2, heads=1),
    LARGE,
    Spec((20,), 1, 8, dqk=1, dv=33),
    Spec((0, 0), 2, 4),  # users without history
    Spec((), 2),  # an empty batch
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
every_impl = pytest.mark.parametrize("impl", available_state_impls())


def by_loop(case: Case) -> np.ndarray:
    """(L, H, dv) float64: token by token, domain by domain, visit by visit."""
    numbers = {name: x.double().numpy() for name, x in case.numbers.items()}
    q, k, v, bias = (numbers.get(name) for name in ("q", "k", "v", "bias"))
    assert q is not None
    assert k is not None
    assert v is not None
    spec, out = case.spec, np.zeros((len(q), *v.shape[1:]))
    domains, bounds = case.domains.tolist(), case.offsets.tolist()
    for begin, end in pairwise(bounds):
        for token in range(begin, end):
            read: list[tuple[int, int]] = []
            for domain in range(spec.num_domains):
                visits = [t for t in range(token, begin - 1, -1) if domains[t] == domain]
                for visit in visits[: spec.num_states]:
                    age = abs(int(case.next_times[token]) - int(case.times[visit]))
                    bucket = math.floor(np.float32(math.log(max(1, age))) / np.float32(0.301))
                    read.append((visit, min(bucket, 128)))
                if not visits:
                    read.append((len(q) + domain, 128))
            rows, ages = map(list, zip(*read))
            scores = np.einsum("hd,shd->sh", q[token], k[rows])
            if bias is not None:
                scores = scores + bias[ages]
            weights = np.exp(scores - scores.max(0))
            out[token] = np.einsum("sh,shd->hd", weights / weights.sum(0), v[rows])
    return out


@every_spec
def test_the_reference_is_the_formula(spec: Spec) -> None:
    case = draw(spec)
    found = state_attention(**case.leaves(torch.float64), reads=case.reads(), impl="reference")
    np.testing.assert_allclose(found.detach().numpy(), by_loop(case), rtol=1e-12, atol=1e-12)


def test_the_gradients_of_the_reference_are_derivatives() -> None:
    case = draw(Spec((6, 0, 2), 3, 2, visited=2, heads=2, dqk=2, dv=3))
    reads, leaves = case.reads(), case.leaves(torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return state_attention(q, k, v, reads, bias=bias, impl="reference")

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


@pytest.mark.parametrize(
    ("spec", "impl"),
    # Triton's interpreter takes a minute for the large one, and has no such blocks.
    [
        (spec, impl)
        for spec in SPECS
        for impl in available_state_impls()
        if (spec, impl, DEVICE.type) != (LARGE, "triton", "cpu")
    ],
    ids=str,
)
def test_float32_stays_within_budget(spec: Spec, impl: str) -> None:
    """Row by row 1e-5 forward and 2e-5 for every gradient, against the reference in float64."""
    case, device = draw(spec), DEVICE if impl == "triton" else "cpu"
    leaves = case.leaves(torch.float32, device)
    out = state_attention(**leaves, reads=case.reads(device), impl=impl)
    assert out.dtype == torch.float32
    assert out.device == leaves["q"].device
    mass = case.mass()
    rows = {}
    found = case.with_gradients(out, leaves)
    for name, exact in case.by_definition().items():
        scale = mass[name].numpy() if name in mass else None
        rows[name] = worst_row(found[name].cpu(), exact.numpy(), scale)
    Errors(rows.pop("out"), rows).check()


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_float64_and_half_precisions_keep_their_type(impl: str) -> None:
    case = draw(SPECS[2])
    exact = case.by_definition()["out"]
    for dtype, error in ((torch.float64, 1e-12), (torch.bfloat16, 0.05)):
        found = state_attention(**case.leaves(dtype), reads=case.reads(), impl=impl)
        assert found.dtype == dtype
        assert (found.double() - exact).norm() <= error * exact.norm()


@every_impl
def test_later_tokens_and_other_users_change_nothing(impl: str) -> None:
    case = draw(Spec((12, 9), 3, 2))
    given, device = case.leaves(torch.float32), DEVICE if impl == "triton" else "cpu"

    def run(changed: int | None) -> Tensor:
        leaves = {name: x.detach().clone() for name, x in given.items()}
        if changed is not None:
            for name in "qkv":
                leaves[name][changed] += 1
        moved = {name: x.to(device) for name, x in leaves.items()}
        return state_attention(**moved, reads=case.reads(device), impl=impl).cpu()

    before, after = run(None), run(7)
    assert torch.equal(before[:7], after[:7])
    assert torch.equal(before[12:], after[12:])
    assert not torch.equal(before[7], after[7])


@every_impl
def test_a_plan_of_inference_serves_training(impl: str) -> None:
    case, device = draw(Spec((12, 9), 3, 2)), DEVICE if impl == "triton" else "cpu"
    leaves, drawn = case.leaves(torch.float32, device), case.reads(device)
    reads = replace(drawn)  # without the layout that the tests of kernels wish for
    with torch.inference_mode():
        first = state_attention(**leaves, reads=reads, impl=impl)
    out = state_attention(**leaves, reads=reads, impl=impl)
    out.sum().backward()
    assert torch.equal(out, first)


def test_the_function_and_its_implementations_are_public() -> None:
    """A subpackage has the function's name; the attribute must be the function all the same."""
    assert callable(ops.state_attention)
    assert callable(ops.domain_attention)
    assert available_state_impls()[:2] == ("reference", "eager")
    assert set(available_state_impls()[2:]) <= {"native", "triton"}


def call(change: Callable[[dict[str, Any]], Any]) -> Tensor:
    given: dict[str, Any] = {
        "q": torch.zeros(3, 2, 4),
        "k": torch.zeros(5, 2, 4),
        "v": torch.zeros(5, 2, 6),
        "bias": torch.zeros(129, 2),
        "impl": "auto",
        "reads": reads(),
    }
    given.update(change(given))
    return state_attention(**given)


def reads(**change: Any) -> StateReads:
    times = torch.arange(3)
    grouping = DomainGrouping.from_jagged(torch.tensor([0, 1, 0]), torch.tensor([0, 3]), 2)
    return replace(StateReads(grouping, times, times, 1), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"q": x["q"][:2]}, "q has shape (2, 2, 4); (3, heads, width) is needed for "),
        (lambda x: {"q": x["q"].flatten(1)}, "q has shape (3, 8); (3, heads, width) is needed"),
        (lambda x: {"k": x["k"][:3]}, "k has shape (3, 2, 4); (5, heads, width) is needed for "),
        (lambda x: {"v": x["v"][:3]}, "v has shape (3, 2, 6); (5, heads, width) is needed"),
        (lambda x: {"k": x["v"]}, "k has shape (5, 2, 6); the 2 heads of width 4 of q are needed"),
        (lambda x: {"v": x["v"][:, :1]}, "v has 1 heads; the 2 of q and k are needed"),
        (lambda x: {"v": x["v"].double()}, "v is torch.float64; q, k and v need one float dtype"),
        (lambda x: {"q": x["q"].long()}, "q is torch.int64; q, k and v need one float dtype"),
        (
            lambda x: {"bias": x["bias"][1:]},
            "bias is torch.float32 of shape (128, 2); float of",
        ),
        (
            lambda x: {"bias": x["bias"].int()},
            "bias is torch.int32 of shape (129, 2); float of",
        ),
        (lambda x: {"impl": "flex"}, "impl 'flex' is not available here; use auto, reference, eag"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        call(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestamps": torch.arange(2)}, "reads.timestamps is torch.int64 of shape (2,); torch."),
        ({"next_timestamps": torch.ones(3)}, "reads.next_timestamps is torch.float32 of shape (3,"),
        ({"states_per_domain": 0}, "reads.states_per_domain is 0; at least 1 is needed"),
        (
            {"grouping": reads().grouping.target_view(torch.tensor([0, 0, 1]))},
            "reads.grouping is a target view; the grouping of the tokens by their own domain",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        reads(**change)


def test_the_reference_reaches_the_model() -> None:
    """Half of a model is DDSR: with impl="reference" it has to be the definition as well."""
    from tiny_models import EVERYTHING, draw_histories, tiny_model, to_batch

    batch = to_batch(draw_histories([20, 1, 24, 7], seed=6))
    run = partial(tiny_model, **EVERYTHING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "_attend", None)
        by_definition = run(impl="reference").double()(batch)
    tiles = run(impl="eager").double()(batch)
    torch.testing.assert_close(tiles, by_definition, rtol=1e-10, atol=1e-10)
