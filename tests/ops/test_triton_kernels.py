"""The fused kernels against the float64 oracle; on a GPU, or else under Triton's interpreter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_cases import Spec, draw, errors_against_oracle, implementation, whole_tensor
from kernel_cases import OWN, TARGET, check_against_oracle, check_bucket_edges, poisoned_memory
from triton_marks import needs_triton

pytestmark = needs_triton

SPECS = [
    *(replace(s, biased=b) for s in (OWN, TARGET) for b in (True, False)),
    # Around the 16 and 32 rows of a step and of a tile.
    Spec((15, 16, 17, 31, 32, 33), 1, heads=1),
    Spec((65,), 1, heads=1, target_view=True),
    Spec((7, 90), 2, heads=1, target_view=True),
    *(Spec((20, 3), 2, heads=1, dqk=width, dv=width) for width in (8, 25, 50, 100, 128)),
    Spec((20, 3), 2, heads=3, dqk=1, dv=33, biased=False),
    Spec((12,), 500, heads=1, target_view=True),
    Spec((), 2),  # an empty batch
    Spec((0, 0), 2, target_view=True),  # users without history
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_float32_stays_within_budget(spec: Spec) -> None:
    check_against_oracle(spec)


def test_every_bucket_edge_is_exact() -> None:
    check_bucket_edges()


@pytest.mark.parametrize("num_buckets", [0, 1, 40, 200])
def test_a_time_table_of_any_size(num_buckets: int) -> None:
    """Large differences share the last row; rows beyond every difference stay without gradient."""
    case = draw(replace(OWN, heads=1))
    table = np.random.default_rng(0).standard_normal(num_buckets + 1, dtype=np.float32)
    case = replace(case, bias=replace(case.bias, time_weights=table))
    with poisoned_memory():
        errors_against_oracle(implementation("triton"), case, torch.float32).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [OWN, replace(TARGET, heads=1, biased=False)], ids=str)
def test_half_precisions_err_no_more_than_twice_the_reference(
    spec: Spec, dtype: torch.dtype
) -> None:
    """Under the interpreter bfloat16 is computed in float32: its own arithmetic is wrong."""
    case = draw(spec).rounded(dtype)
    with poisoned_memory():
        found = errors_against_oracle(implementation("triton"), case, dtype, measure=whole_tensor)
    reference = errors_against_oracle(
        implementation("reference"), case, dtype, measure=whole_tensor
    )
    assert found.forward <= 2 * reference.forward
    for name, error in reference.gradients.items():
        assert found.gradients[name] <= 2 * error, name


@pytest.mark.parametrize("spec", [OWN, TARGET], ids=str)
def test_forward_and_backward_repeat_to_the_last_bit(spec: Spec) -> None:
    """Sums by position are integers, so that atomics cannot change them by their order."""
    case = draw(spec)

    def run() -> list[torch.Tensor]:
        leaves = case.tensors(torch.float32)
        q, k, v, *_ = leaves.values()
        out = implementation("triton")(
            q, k, v, case.grouping(), norm_length=9, bias=case.relative_bias(leaves)
        )
        gradients = torch.autograd.grad(out, list(leaves.values()), torch.from_numpy(case.grad_out))
        return [out, *gradients]

    # On a GPU a race would show in some of many runs; an interpreter has none.
    first = run()
    for _ in range(50 if torch.cuda.is_available() else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_gradients_of_any_size_keep_their_precision(factor: float) -> None:
    """The scale that makes sums by position integers follows the gradient."""
    case = draw(replace(OWN, heads=1))
    case = replace(case, grad_out=case.grad_out * torch.tensor(factor).numpy())
    errors_against_oracle(implementation("triton"), case, torch.float32).check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_tables(bad: float) -> None:
    case = draw(replace(OWN, heads=1))
    leaves = case.tensors(torch.float32)
    q, k, v, *tables = leaves.values()
    out = implementation("triton")(
        q, k, v, case.grouping(), norm_length=9, bias=case.relative_bias(leaves)
    )
    grad_out = torch.from_numpy(case.grad_out).clone()
    grad_out[-1] = bad
    by_position, by_time = torch.autograd.grad(out, tables, grad_out)
    assert not by_position.isfinite().all()
    assert not by_time.isfinite().all()
