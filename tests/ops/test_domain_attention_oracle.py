"""The PyTorch implementations against the float64 oracle, over the shapes that break first."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from attention_cases import (
    Spec,
    draw,
    errors_against_oracle,
    every_cpu_impl,
    every_float64_impl,
    whole_tensor,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_xd.ops import domain_attention
from hstu_xd.ops.domain_attention import tiles

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


@every_cpu_impl
@every_view
def test_float32_stays_within_budget(spec: Spec, impl: str) -> None:
    attention = partial(domain_attention, impl=impl)
    errors_against_oracle(attention, draw(spec), torch.float32).check()


@every_float64_impl
@every_view
def test_float64_is_exact(spec: Spec, impl: str) -> None:
    attention = partial(domain_attention, impl=impl)
    errors_against_oracle(attention, draw(spec), torch.float64).check(
        forward=1e-12, gradients=1e-12
    )


def test_more_lengths_than_the_planner_tells_apart() -> None:
    """Groups of 100 lengths, which are rounded up to fewer before they are cut into buckets."""
    spec = Spec(tuple(range(100)), num_domains=1, heads=1, biased=False)
    errors_against_oracle(domain_attention, draw(spec), torch.float32).check()


@pytest.mark.parametrize("name", ["_BLOCK_ROWS", "_TILE_SCORES", "_REMEMBERED_PAIRS"])
@pytest.mark.parametrize("size", [1, 7, 300])
@pytest.mark.parametrize("target_view", [False, True], ids=["own", "target"])
def test_tile_sizes_change_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, size: int, target_view: bool
) -> None:
    """Small tiles put a border between any two rows, groups and remembered pairs."""
    monkeypatch.setattr(tiles, name, size)
    case = draw(Spec((0, 1, 2, 7, 17, 65), num_domains=3, target_view=target_view))
    errors_against_oracle(domain_attention, case, torch.float64).check(
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
    )
)
@settings(max_examples=60)
def test_any_structure_is_exact_in_float64(spec: Spec) -> None:
    errors_against_oracle(domain_attention, draw(spec), torch.float64).check(
        forward=1e-11, gradients=1e-11
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
