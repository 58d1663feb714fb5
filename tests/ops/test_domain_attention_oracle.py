"""Every implementation against the float64 oracle, over the shapes that break kernels first."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from attention_cases import Spec, draw, errors_against_oracle, whole_tensor

from hstu_xd.ops import available_impls, domain_attention

EDGE_LENGTHS = [
    (0, 1, 2, 7, 15, 16, 17),
    (63, 0, 64, 65),
    (127, 128, 129),
    (),  # an empty batch
    (0, 0),  # users without history
    (300, *(1, 2, 3) * 15),  # one long user among many short
    (40,) * 60,  # many alike: more scores than one tile holds
]
SPECS = [
    *(Spec(lengths, domains) for lengths in EDGE_LENGTHS for domains in (1, 2, 500)),
    *(Spec((33, 70, 5), dqk=width, dv=width) for width in (8, 25, 50, 64)),
    Spec((50, 0, 20), num_domains=5, visited=3),  # two domains nobody visits
    Spec((50, 0, 20), num_domains=5, visited=1),
    Spec((31, 80), heads=1, dqk=64, dv=8),
    Spec((31, 80), heads=5, dqk=1, dv=1),
]
VIEWS = [
    replace(spec, target_view=target, biased=biased)
    for spec in SPECS
    for target in (False, True)
    for biased in (True, False)
]
every_view = pytest.mark.parametrize("spec", VIEWS, ids=str)
every_impl = pytest.mark.parametrize("impl", available_impls())


@every_impl
@every_view
def test_float32_stays_within_budget(spec: Spec, impl: str) -> None:
    attention = partial(domain_attention, impl=impl)
    errors_against_oracle(attention, draw(spec), torch.float32).check()


@every_impl
@every_view
def test_float64_is_exact(spec: Spec, impl: str) -> None:
    attention = partial(domain_attention, impl=impl)
    errors_against_oracle(attention, draw(spec), torch.float64).check(
        forward=1e-12, gradients=1e-12
    )


@pytest.mark.parametrize("spec", [v for v in VIEWS if v.dqk == v.dv > 1], ids=str)
def test_bfloat16_errs_no_more_than_twice_the_reference(spec: Spec) -> None:
    case = draw(spec).rounded(torch.bfloat16)
    reference, fast = (
        errors_against_oracle(
            partial(domain_attention, impl=impl), case, torch.bfloat16, measure=whole_tensor
        )
        for impl in ("reference", "auto")
    )
    assert fast.forward <= 2 * reference.forward
    for name, error in reference.gradients.items():
        assert fast.gradients[name] <= 2 * error, name
