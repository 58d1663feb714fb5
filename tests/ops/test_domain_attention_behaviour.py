"""How the op behaves beside being right: repeatable, differentiable, indifferent to strides."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from attention_cases import (
    Case,
    Spec,
    draw,
    errors_against_oracle,
    every_float64_impl,
    every_impl,
    implementation,
)
from torch import Tensor

both_views = pytest.mark.parametrize("target_view", [False, True], ids=["own", "target"])
with_and_without_bias = pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])

SPEC = Spec((70, 0, 1, 17), num_domains=3)
# A tile and a half: every program of a kernel may have to be interpreted.
KERNEL_SPEC = Spec((40, 0, 1), num_domains=1)


def spec_of(impl: str) -> Spec:
    return KERNEL_SPEC if impl == "triton" else SPEC


def run(case: Case, leaves: dict[str, Tensor], impl: str) -> Tensor:
    return implementation(impl)(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        case.grouping(),
        norm_length=case.norm_length,
        bias=case.relative_bias(leaves),
    )


@every_float64_impl
@both_views
@with_and_without_bias
def test_gradcheck(impl: str, target_view: bool, biased: bool) -> None:
    case = draw(Spec((4, 0, 1, 3), 2, dqk=2, dv=3, target_view=target_view, biased=biased))
    leaves = case.tensors(torch.float64)

    def attention(*tensors: Tensor) -> Tensor:
        return run(case, dict(zip(leaves, tensors)), impl)

    assert torch.autograd.gradcheck(attention, tuple(leaves.values()))


@every_impl
@both_views
def test_the_same_bits_on_every_run(impl: str, target_view: bool) -> None:
    case = draw(replace(SPEC, target_view=target_view))
    leaves = case.tensors(torch.float32)
    outputs = [run(case, leaves, impl) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@every_impl
@both_views
def test_a_grouping_serves_several_layers(impl: str, target_view: bool) -> None:
    """What is remembered in a plan must not carry one layer's tables into the next."""
    case = draw(replace(spec_of(impl), target_view=target_view))
    grouping = case.grouping()
    for factor in (1.0, 2.0, -1.0):
        leaves = {name: x.detach() * factor for name, x in case.tensors(torch.float32).items()}
        fresh = run(case, leaves, impl)
        shared = implementation(impl)(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            grouping,
            norm_length=case.norm_length,
            bias=case.relative_bias(leaves),
        )
        assert torch.equal(shared, fresh)


@every_impl
def test_a_grouping_serves_other_coordinates(impl: str) -> None:
    """Positions and times of a second bias must not be those remembered of the first."""
    case = draw(spec_of(impl))
    leaves = case.tensors(torch.float32)
    bias = case.relative_bias(leaves)
    assert bias is not None
    grouping = case.grouping()
    changes = {
        "times": replace(bias, timestamps=bias.timestamps // 3),
        "next times": replace(bias, next_timestamps=bias.next_timestamps * 5),
        "positions": replace(bias, positions=bias.positions // 2),
        "number of buckets": replace(bias, time_weights=bias.time_weights[:4]),
    }
    attention = partial(implementation(impl), norm_length=case.norm_length)
    tensors = leaves["q"], leaves["k"], leaves["v"]
    attention(*tensors, grouping, bias=bias)
    for name, changed in changes.items():
        fresh = attention(*tensors, case.grouping(), bias=changed)
        assert torch.equal(attention(*tensors, grouping, bias=changed), fresh), name


@every_impl
@both_views
def test_a_grouping_of_inference_serves_training(impl: str, target_view: bool) -> None:
    """What is kept of it then is saved for the way back later."""
    case = draw(replace(spec_of(impl), target_view=target_view))
    leaves, grouping = case.tensors(torch.float32), case.grouping()
    bias = case.relative_bias(leaves)
    attention = partial(implementation(impl), norm_length=case.norm_length, bias=bias)
    given = leaves["q"], leaves["k"], leaves["v"], grouping
    with torch.inference_mode():
        first = attention(*given)
    out = attention(*given)
    out.sum().backward()
    assert torch.equal(out, first)


@every_impl
@both_views
def test_a_grouping_serves_any_number_of_heads(impl: str, target_view: bool) -> None:
    case = draw(replace(SPEC, heads=3, target_view=target_view))
    leaves = case.tensors(torch.float32)
    grouping, bias = case.grouping(), case.relative_bias(leaves)
    whole = run(case, leaves, impl)
    for heads in (slice(0, 3), slice(0, 1), slice(1, 3)):
        part = implementation(impl)(
            *(leaves[name][:, heads] for name in ("q", "k", "v")),
            grouping,
            norm_length=case.norm_length,
            bias=bias,
        )
        torch.testing.assert_close(part, whole[:, heads], rtol=1e-5, atol=1e-6)


@every_impl
def test_strides_do_not_matter(impl: str) -> None:
    """A model hands in slices of one projection, head slices of those, and expanded gradients."""
    case = draw(spec_of(impl))
    leaves = case.tensors(torch.float32)

    def strided(q: Tensor, k: Tensor, v: Tensor, *rest: object, **options: object) -> Tensor:
        wide = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)
        parts = wide.split([q[0].numel(), k[0].numel(), v[0].numel()], dim=1)
        views = (part.view(x.shape) for part, x in zip(parts, (q, k, v)))
        return implementation(impl)(*views, *rest, **options)

    errors_against_oracle(strided, case, torch.float32).check()
    out = run(case, leaves, impl)
    expanded = torch.autograd.grad(out.sum(), leaves["v"], retain_graph=True)[0]
    dense = torch.autograd.grad(out, leaves["v"], torch.ones_like(out))[0]
    torch.testing.assert_close(expanded, dense, rtol=1e-5, atol=1e-6)


@every_impl
@pytest.mark.parametrize("wanted", ["q", "k", "v", "position_weights", "time_weights"])
def test_one_gradient_alone(impl: str, wanted: str) -> None:
    case = draw(spec_of(impl))
    leaves = case.tensors(torch.float32)
    alone = {name: x.detach().requires_grad_(name == wanted) for name, x in leaves.items()}
    grad_out = torch.from_numpy(case.grad_out)
    together = torch.autograd.grad(run(case, leaves, impl), leaves[wanted], grad_out)[0]
    single = torch.autograd.grad(run(case, alone, impl), alone[wanted], grad_out)[0]
    torch.testing.assert_close(single, together, rtol=1e-6, atol=1e-6)


@every_float64_impl
def test_second_derivatives_are_right_or_refused(impl: str) -> None:
    case = draw(Spec((4, 2), 2, dqk=2, dv=2))
    leaves = case.tensors(torch.float64)

    def attention(*tensors: Tensor) -> Tensor:
        return run(case, dict(zip(leaves, tensors)), impl)

    inputs = tuple(leaves.values())
    try:
        first = torch.autograd.grad(attention(*inputs).sum(), leaves["q"], create_graph=True)[0]
        torch.autograd.grad(first.sum(), inputs)
    except RuntimeError:
        return
    assert torch.autograd.gradgradcheck(attention, inputs)


@every_impl
@both_views
def test_autocast_keeps_tables_in_float32(impl: str, target_view: bool) -> None:
    """Mixed precision: q, k, v arrive in bfloat16, the tables stay parameters in float32."""
    case = draw(replace(spec_of(impl), target_view=target_view)).rounded(torch.bfloat16)
    leaves = case.tensors(torch.float32)
    narrow = {n: x.bfloat16() if n in "qkv" else x for n, x in leaves.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = run(case, narrow, impl)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    exact = torch.from_numpy(case.oracle.out)
    assert (out.double() - exact).norm() <= 0.01 * exact.norm()
    for gradient in torch.autograd.grad(out.float().square().sum(), list(leaves.values())):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised buffers are filled with NaN, so that reading one shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@every_impl
@both_views
@with_and_without_bias
@pytest.mark.usefixtures("poisoned_memory")
def test_no_uninitialised_memory_is_read(impl: str, target_view: bool, biased: bool) -> None:
    case = draw(replace(spec_of(impl), target_view=target_view, biased=biased))
    errors_against_oracle(implementation(impl), case, torch.float32).check()


@every_impl
def test_large_scores_stay_finite(impl: str) -> None:
    case = draw(spec_of(impl))
    small = case.tensors(torch.float32)
    leaves = {name: (x.detach() * 1e4).requires_grad_() for name, x in small.items()}
    out = run(case, leaves, impl)
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), list(leaves.values())):
        assert gradient.isfinite().all()
