"""Seeded mutants of the kernels' source. The checks of test_triton_kernels.py must reject each."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kernel_cases import OWN, TARGET, check_against_oracle, check_bucket_edges
from source_mutants import load
from triton_marks import needs_triton

from hstu_xd.ops.domain_attention import fused, tile_table

pytestmark = [needs_triton, pytest.mark.slow]


def own_view() -> None:
    check_against_oracle(replace(OWN, biased=False))


def four_heads() -> None:
    """More than a program takes."""
    check_against_oracle(replace(OWN, biased=False, heads=4))


def target_view() -> None:
    check_against_oracle(replace(TARGET, biased=False))


def with_bias() -> None:
    check_against_oracle(OWN)


def with_target() -> None:
    check_against_oracle(TARGET)


# Name: file, text, what stands there instead, the check that is to see it.
Check = Callable[[], None]
MUTANTS: dict[str, tuple[str, str, str, Check]] = {}


def kernel(name: str, text: str, instead: str, check: Check = own_view) -> None:
    MUTANTS[name] = "ops.domain_attention.triton_kernels", text, instead, check


def bias(name: str, text: str, instead: str, check: Check = with_bias) -> None:
    MUTANTS[name] = "ops.domain_attention.triton_kernels", text, instead, check


def block(name: str, text: str, instead: str, check: Check = with_bias) -> None:
    MUTANTS[name] = "ops.triton_blocks", text, instead, check


def tiles(name: str, text: str, instead: str, check: Check = own_view) -> None:
    MUTANTS[name] = "ops.domain_attention.tile_table", text, instead, check


def ends(name: str, text: str, instead: str, check: Check = own_view) -> None:
    MUTANTS[name] = "ops.grouping", text, instead, check


# Which pairs are seen.
kernel("mask_dropped", "sees(place[:, None], key_place[None, :])", "there[None, :] & here[:, None]")
kernel(
    "mask_of_key_gradients_dropped",
    "sees(query_place[None, :], place[:, None])",
    "there[None, :] & here[:, None]",
)
kernel("strictly_causal", "key_place <= query_place", "key_place < query_place")
kernel("one_later_key", "key_place <= query_place", "key_place <= query_place + 1", target_view)
kernel(
    "causal_by_rank_in_group",
    "place = tl.load(places + row, mask=here, other=ABSENT)",
    "place = tl.where(here, row, ABSENT)",
    target_view,
)
kernel("first_key_of_a_group_lost", "tl.load(entry + 2)", "tl.load(entry + 2) + 1")
kernel(
    "last_step_lost",
    "range(key_first, key_stop, STEP)",
    "range(key_first, key_stop - STEP + 1, STEP)",
)
kernel(
    "queries_without_keys_skipped",
    "key_first, key_stop = _share(tiles, heads, HEADS)\n    if first >= stop:",
    "key_first, key_stop = _share(tiles, heads, HEADS)\n    if key_first >= key_stop:",
    target_view,
)
kernel("last_row_lost", "here = row < stop", "here = row < stop - 1")
kernel("heads_mixed", "k + (head + one) * k_head", "k + head * k_head")
kernel("programs_share_heads", "% shares) * HEADS)", "% shares))", four_heads)
kernel("unseen_pairs_weigh", "tl.where(seen, begun, _UNSEEN)", "begun")
MUTANTS["group_offset_off_by_one"] = (
    "ops.triton_support",
    "first = offsets[group] +",
    "first = 1 + offsets[group] +",
    own_view,
)
ends(
    "last_key_not_met",
    "first_row(group, query_position + 1)",
    "first_row(group, query_position)",
    target_view,
)
ends(
    "first_query_not_met",
    "first_row(group, key_position)",
    "first_row(group, key_position + 1)",
    target_view,
)
tiles(
    "groups_exchanged",
    "key_first = grouping.keys.offsets[group]",
    "key_first = grouping.offsets[group]",
    target_view,
)

# Arithmetic.
kernel("divided_by_one_more", "sums[one] / norm, WIDTH", "sums[one] / (norm + 1), WIDTH")
kernel(
    "last_row_zero",
    "out_head, token, out_token, here, total,",
    "out_head, token, out_token, here & (row < stop - 1), total,",
)
kernel(
    "left_in_grouped_order",
    "out_head, token, out_token, here, total,",
    "out_head, row, out_token, here, total,",
)
kernel(
    "dk_and_dv_exchanged",
    "tl.dot(weights.to(grad.dtype), grad, total_v[one],",
    "tl.dot(weights.to(grad.dtype), query, total_v[one],",
)
block(
    "slope_forgotten", "return opened * (1.0 + scores * (1.0 - opened))", "return opened", own_view
)

# Bias.
bias("position_row_off_by_one", "num_positions // 2 - query", "num_positions // 2 + 1 - query")
bias(
    "position_in_the_group",
    "position = tl.load(positions + row, mask=here, other=0)",
    "position = row",
)
bias(
    "stale_time_of_the_query",
    "row, stop, query_tokens, query_places, query_positions, next_times,",
    "row, stop, query_tokens, query_places, query_positions, times,",
)
tiles("times_in_order_of_the_batch", "bias.timestamps[keys]", "bias.timestamps", with_bias)
tiles("positions_of_the_queries", "bias.positions[keys]", "bias.positions[queries]", with_target)
block("bucket_one_too_low", "look_up(edges, at_least + 1)", "look_up(edges, at_least + 2)")
block("bucket_edge_excluded", "(bits >= look_up", "(bits > look_up", check_bucket_edges)
bias(
    "gradient_of_the_last_head_lost",
    "for index in range(heads):",
    "for index in range(heads - 1):",
)
block("gradient_of_the_last_bucket_lost", "range(lowest, highest + 1)", "range(lowest, highest)")
bias("gradient_of_unseen_pairs", "total = tl.where(seen, total, 0.0)", "total = total + 0.0")
bias("gradient_of_some_tiles_lost", "tl.num_programs(0)):", "tl.num_programs(0) + 1):")
MUTANTS["one_copy_of_the_sums"] = (
    "ops.domain_attention.triton_launch",
    "position_sums.sum(0)",
    "position_sums[0]",
    with_bias,
)
MUTANTS["dq_not_divided"] = (
    "ops.domain_attention.triton_launch",
    "norm=float(given.norm_length),\n        **strides(out=grad_out, grad=grad_q)",
    "norm=1.0,\n        **strides(out=grad_out, grad=grad_q)",
    own_view,
)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_reject_the_mutant(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hstu_xd.ops.domain_attention import triton_launch

    package = sys.modules["hstu_xd.ops.domain_attention"]

    file, text, instead, check = MUTANTS[name]
    mutant = load(file, tmp_path, text, instead)
    if file == "ops.domain_attention.triton_kernels":
        monkeypatch.setattr(triton_launch, "kernels", mutant)
    elif file == "ops.triton_blocks":
        for part in ("load_rows", "store_rows", "bucket_of", "slope", "add_by_bucket"):
            monkeypatch.setattr(triton_launch.kernels, part, getattr(mutant, part))
    elif file == "ops.domain_attention.tile_table":
        monkeypatch.setattr(fused, "PairPlan", mutant.PairPlan)
    elif file == "ops.triton_support":
        monkeypatch.setattr(tile_table, "split", mutant.split)
    elif file == "ops.grouping":
        monkeypatch.setattr(tile_table, "seen_end", mutant.seen_end)
        monkeypatch.setattr(tile_table, "seeing_start", mutant.seeing_start)
    else:
        monkeypatch.setattr(package, "triton_launch", mutant)
    with pytest.raises(AssertionError, match="error"):
        check()
