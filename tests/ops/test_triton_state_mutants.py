"""Seeded mutants of the DDSR kernels' source: the check of test_triton_states.py rejects each."""

import sys
from pathlib import Path

import pytest
from source_mutants import load
from state_cases import Spec, check_against_definition
from triton_marks import needs_triton

from hstu_xd.ops.state_attention import state_table

pytestmark = [needs_triton, pytest.mark.slow]

# Several tiles, a domain that nobody visits, more visits than states; short enough to interpret.
SPEC = Spec((0, 21, 4), num_domains=4, num_states=2, visited=3, heads=2, dqk=6, dv=6)

# Name: file, text, what stands there instead.
MUTANTS: dict[str, tuple[str, str, str]] = {
    # Which states are seen.
    "replaced_states_stay": (
        "ops.state_attention.triton_kernels",
        "(place[:, None] < until[None, :])",
        "(until[None, :] >= 0)",
    ),
    "replaced_one_token_late": (
        "ops.state_attention.triton_kernels",
        "(place[:, None] < until[None, :])",
        "(place[:, None] <= until[None, :])",
    ),
    "replaced_states_get_gradients": (
        "ops.state_attention.triton_kernels",
        "(token[None, :] < until[:, None])",
        "(until[:, None] >= 0)",
    ),
    "own_state_not_seen": (
        "ops.state_attention.triton_kernels",
        "(since[None, :] <= place[:, None])",
        "(since[None, :] < place[:, None])",
    ),
    "future_states_seen": (
        "ops.state_attention.triton_kernels",
        "(since[None, :] <= place[:, None])",
        "(since[None, :] < 2**30)",
    ),
    "initial_states_missing": (
        "ops.state_attention.triton_kernels",
        "(end == begin) & (back == 0)",
        "(end == begin) & (back < 0)",
    ),
    "initial_state_for_every_missing_visit": (
        "ops.state_attention.triton_kernels",
        "(end == begin) & (back == 0)",
        "(visit < begin)",
    ),
    "initial_states_stay": (
        "ops.state_attention.triton_kernels",
        "tl.load(first_visits + group, mask=initial, other=-1)",
        "num_tokens",
    ),
    "initial_state_of_another_domain": (
        "ops.state_attention.triton_kernels",
        "num_tokens + domain, token)",
        "num_tokens, token)",
    ),
    "another_user_s_visits": (
        "ops.state_attention.triton_kernels",
        "(visit >= begin)",
        "(visit >= 0)",
    ),
    "last_domain_lost": (
        "ops.state_attention.triton_kernels",
        "carried = slot < num_domains * depth",
        "carried = slot < (num_domains - 1) * depth",
    ),
    "visits_one_too_few": (
        "ops.state_attention.triton_kernels",
        "end - 1 - back",
        "end - 2 - back",
    ),
    "visits_counted_into_the_tile": (
        "ops.state_attention.state_table",
        "grouping.first_row(group, position)",
        "grouping.first_row(group, position + 1)",
    ),
    "replaced_a_visit_early": (
        "ops.grouping",
        "visit = rows + states_per_domain",
        "visit = rows + max(1, states_per_domain - 1)",
    ),
    "some_states_without_gradient": (
        "ops.state_attention.triton_launch",
        "height, num_domains = key_height(table.tile),",
        "height, num_domains = key_height(table.tile) // 2,",
    ),
    "last_step_lost": (
        "ops.state_attention.triton_kernels",
        "range(0, num_domains * depth + stop - first, STEP)",
        "range(0, num_domains * depth + stop - first - STEP + 1, STEP)",
    ),
    # Arithmetic.
    "no_running_maximum": (
        "ops.state_attention.triton_kernels",
        "kept = tl.exp(top - level)",
        "kept = tl.exp(level - level)",
    ),
    "denominator_left_out": (
        "ops.state_attention.triton_kernels",
        "answer = total / mass[:, None]",
        "answer = total",
    ),
    "mean_left_out_of_dq": (
        "ops.state_attention.triton_kernels",
        "weights * (grad_weights - product[:, None])",
        "weights * grad_weights",
    ),
    "mean_left_out_of_dk": (
        "ops.state_attention.triton_kernels",
        "weights * (grad_weights - product[None, :])",
        "weights * grad_weights",
    ),
    "heads_mixed": ("ops.state_attention.triton_kernels", "v + head * v_head, row", "v, row"),
    "share_of_initial_gradients_lost": (
        "ops.state_attention.triton_launch",
        "*grad.shape[1:]).sum(0)",
        "*grad.shape[1:])[0]",
    ),
    # Ages.
    "age_of_the_query": (
        "ops.state_attention.triton_kernels",
        "bucket_of(next_time - time,",
        "bucket_of(next_time - next_time + time * 0,",
    ),
    "initial_states_have_an_age": (
        "ops.state_attention.triton_kernels",
        "bucket = tl.where(initial, last_bucket, bucket)",
        "bucket = tl.where(initial, 0, bucket)",
    ),
    "age_gradient_of_initial_states_lost": (
        "ops.state_attention.triton_kernels",
        "sums += tl.where(ages == last_bucket, never, 0.0)",
        "sums += 0.0",
    ),
    "age_gradient_of_initial_states_twice": (
        "ops.state_attention.triton_kernels",
        "dated = seen & ~initial[None, :]",
        "dated = seen",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_rejects_the_mutant(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hstu_xd.ops.state_attention import triton_launch

    package = sys.modules["hstu_xd.ops.state_attention"]

    file, text, instead = MUTANTS[name]
    mutant = load(file, tmp_path, text, instead)
    if file == "ops.state_attention.triton_kernels":
        monkeypatch.setattr(triton_launch, "kernels", mutant)
    elif file == "ops.state_attention.triton_launch":
        monkeypatch.setattr(package, "triton_launch", mutant)
    elif file == "ops.grouping":
        monkeypatch.setattr(state_table, "replacements", mutant.replacements)
    else:
        monkeypatch.setattr(state_table.StateTable, "build", mutant.StateTable.build)
    with pytest.raises(AssertionError, match="error"):
        check_against_definition(SPEC)
