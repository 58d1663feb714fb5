"""The fused DDSR kernels against the definition in float64; on a GPU, or else interpreted."""

from dataclasses import replace

import pytest
import torch
from attention_cases import whole_tensor
from kernel_cases import poisoned_memory
from state_cases import Spec, check_against_definition, draw
from triton_marks import needs_triton

pytestmark = needs_triton

MANY = Spec((40, 1, 17), 5, 4)
SPECS = [
    *(
        Spec((9, 0, 3, 1), num_domains, num_states)
        for num_domains in (1, 2)
        for num_states in (1, 4)
    ),
    # Around the 16 tokens of a tile, the 16 states of a tile of keys and the 16 rows of a step.
    *(Spec((15, 16, 17, 31, 33), 5, num_states, heads=1) for num_states in (1, 4)),
    *(Spec((40, 3), 64, num_states, heads=1) for num_states in (1, 4)),
    replace(MANY, visited=3, biased=False),
    replace(MANY, tile=32),
    *(Spec((20,), 3, heads=1, dqk=width, dv=width) for width in (8, 25, 50, 100, 128)),
    Spec((20, 3), 2, heads=3, dqk=1, dv=33),
    Spec((), 2),  # an empty batch
    Spec((0, 0), 2, 4),  # users without history
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_float32_stays_within_budget(spec: Spec) -> None:
    check_against_definition(spec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precisions_err_no_more_than_twice_the_definition(dtype: torch.dtype) -> None:
    """Under the interpreter bfloat16 is computed in float32: its own arithmetic is wrong."""
    case = draw(MANY)
    case = replace(case, numbers={n: x.to(dtype).float() for n, x in case.numbers.items()})
    case = replace(case, grad_out=case.grad_out.to(dtype).float())
    with poisoned_memory():
        found = case.fused(dtype)
    low, exact = case.by_definition(dtype), case.by_definition()
    for name, truth in exact.items():
        reached, expected = (whole_tensor(x[name].cpu(), truth.numpy(), None) for x in (found, low))
        assert reached <= 2 * expected, name


def test_forward_and_backward_repeat_to_the_last_bit() -> None:
    # On a GPU a race would show in some of many runs; an interpreter has none.
    case = draw(MANY)
    first = case.fused(torch.float32)
    for _ in range(50 if torch.cuda.is_available() else 1):
        again = case.fused(torch.float32)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_a_wide_table_of_ages() -> None:
    """More rows than there are buckets: initial states have the last one, the rest no gradient."""
    case = draw(replace(MANY, heads=1))
    narrow = case.fused(torch.float32)
    bias = case.numbers["bias"]
    wide = torch.cat([bias[:-1], torch.full((71, 1), 9.0), bias[-1:]])
    found = replace(case, numbers=case.numbers | {"bias": wide}).fused(torch.float32)
    assert torch.equal(found["out"], narrow["out"])
    assert not found["bias"][128:-1].any()
    assert torch.equal(found["bias"][-1], narrow["bias"][-1])
