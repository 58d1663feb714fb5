"""Seeded mutants: wrong attentions that look plausible. The oracle check must reject every one.

Each mutant wraps the public function or changes what it is given (grouping fields, bias methods,
inputs, outputs, gradients), so the list outlives changes inside the implementations.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import Attention, Spec, draw, errors_against_oracle
from torch import Tensor
from torch.nn.functional import silu

from hstu_xd.ops import RelativeBias, domain_attention
from hstu_xd.ops.grouping import DomainGrouping

eager = partial(domain_attention, impl="eager")

SUITE = [
    Spec((0, 1, 2, 7, 17, 65), num_domains=3, dqk=6, dv=6, target_view=target, biased=biased)
    for target in (False, True)
    for biased in (True, False)
]


def check(attention: Attention) -> None:
    """What test_domain_attention_oracle.py asks of an implementation, on a few shapes."""
    for spec in SUITE:
        errors_against_oracle(attention, draw(spec), torch.float32).check()


MUTANTS: dict[str, Attention] = {}


def mutant(function: Attention) -> Attention:
    MUTANTS[function.__name__] = function
    return function


def change_grouping(name: str, change: Callable[[DomainGrouping], DomainGrouping]) -> None:
    def mutated(q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, **rest: Any) -> Tensor:
        return eager(q, k, v, change(grouping), **rest)

    MUTANTS[name] = mutated


def change_bias(name: str, change: Callable[[RelativeBias, DomainGrouping], RelativeBias]) -> None:
    def mutated(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grouping: DomainGrouping,
        *,
        norm_length: int,
        bias: RelativeBias | None,
    ) -> Tensor:
        wrong = None if bias is None else change(bias, grouping)
        return eager(q, k, v, grouping, norm_length=norm_length, bias=wrong)

    MUTANTS[name] = mutated


def change_output(name: str, change: Callable[[Tensor, DomainGrouping], Tensor]) -> None:
    def mutated(q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, **rest: Any) -> Tensor:
        return change(eager(q, k, v, grouping, **rest), grouping)

    MUTANTS[name] = mutated


# Grouping: which keys a query reads.


def rank_in_group(grouping: DomainGrouping) -> Tensor:
    """(L,) position of each token inside its group."""
    return grouping.inverse - grouping.offsets[grouping.group_of]


def group_domains(grouping: DomainGrouping) -> Tensor:
    return grouping.group_of % grouping.num_domains


def shift_one_boundary(grouping: DomainGrouping) -> DomainGrouping:
    """The first token of the last group goes to the group before it."""
    offsets = grouping.offsets.clone()
    offsets[offsets == offsets[-2]] += 1
    return replace(grouping, offsets=offsets)


def forget_user_borders(grouping: DomainGrouping) -> DomainGrouping:
    one_user = torch.tensor([0, grouping.num_tokens])
    merged = DomainGrouping.from_jagged(
        group_domains(grouping.keys), one_user, grouping.num_domains
    )
    merged = replace(merged, positions=grouping.positions, batch_offsets=grouping.batch_offsets)
    if grouping.key_grouping is None:
        return merged
    target = DomainGrouping.from_jagged(group_domains(grouping), one_user, grouping.num_domains)
    return replace(
        target,
        positions=grouping.positions,
        batch_offsets=grouping.batch_offsets,
        key_grouping=merged,
    )


def with_key_positions(
    grouping: DomainGrouping, move: Callable[[DomainGrouping], Tensor]
) -> DomainGrouping:
    keys = grouping.keys
    return replace(grouping, key_grouping=replace(keys, positions=move(keys), key_grouping=None))


change_grouping("mask_dropped", lambda g: DomainGrouping.single(g.batch_offsets, g.num_tokens))
change_grouping("strictly_causal", lambda g: with_key_positions(g, lambda x: x.positions + 1))
change_grouping("one_future_key", lambda g: with_key_positions(g, lambda x: x.positions - 1))
change_grouping("not_causal", lambda g: with_key_positions(g, lambda x: x.positions * 0))
change_grouping("causal_by_rank_in_group", lambda g: with_key_positions(g, rank_in_group))
change_grouping("target_view_ignored", lambda g: g.keys)
change_grouping(
    "views_exchanged", lambda g: replace(g.keys, key_grouping=replace(g, key_grouping=None))
)
change_grouping("group_offset_off_by_one", shift_one_boundary)
change_grouping(
    "last_group_lost", lambda g: replace(g, offsets=g.offsets.clamp(max=int(g.offsets[-2])))
)
change_grouping("users_merged", forget_user_borders)
change_grouping("order_in_group_reversed", lambda g: replace(g, permutation=g.permutation.flip(0)))
change_grouping("permutation_inverted", lambda g: replace(g, permutation=g.inverse))


# Bias: coordinates and table rows.


def with_methods(bias: RelativeBias, wrong: type[RelativeBias]) -> RelativeBias:
    return wrong(**{f.name: getattr(bias, f.name) for f in fields(RelativeBias)})


class PositionShifted(RelativeBias):
    def position_index(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return super().position_index(query_positions, key_positions) - 1


class PositionMirrored(RelativeBias):
    def position_index(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return 2 * (self.max_length - 1) - super().position_index(query_positions, key_positions)


class BucketEdgeOff(RelativeBias):
    """Rounds instead of cutting."""

    def time_index(self, query_next_times: Tensor, key_times: Tensor) -> Tensor:
        difference = query_next_times.unsqueeze(-1) - key_times.unsqueeze(-2)
        bucket = difference.abs().clamp(min=1).float().log().div(0.301).round().long()
        return bucket.clamp(max=self.time_weights.numel() - 1)


class BucketWidthOff(RelativeBias):
    def time_index(self, query_next_times: Tensor, key_times: Tensor) -> Tensor:
        difference = query_next_times.unsqueeze(-1) - key_times.unsqueeze(-2)
        bucket = difference.abs().clamp(min=1).float().log().div(0.3).long()
        return bucket.clamp(max=self.time_weights.numel() - 1)


class TimeOfTheQuery(RelativeBias):
    """One time for all keys: that of the query's own next event less the query's time."""

    def time_index(self, query_next_times: Tensor, key_times: Tensor) -> Tensor:
        return (
            super()
            .time_index(query_next_times, key_times)[..., :1]
            .expand(*query_next_times.shape, key_times.shape[-1])
        )


for broken in (PositionShifted, PositionMirrored, BucketEdgeOff, BucketWidthOff, TimeOfTheQuery):
    change_bias(broken.__name__, lambda b, _, broken=broken: with_methods(b, broken))

change_bias("time_of_the_token", lambda b, _: replace(b, next_timestamps=b.timestamps))
change_bias("positions_in_the_group", lambda b, g: replace(b, positions=rank_in_group(g.keys)))
change_bias("positions_in_the_batch", lambda b, _: replace(b, positions=b.positions // 2))
change_bias(
    "times_in_grouped_order", lambda b, g: replace(b, timestamps=b.timestamps[g.permutation])
)
change_bias(
    "position_table_reversed", lambda b, _: replace(b, position_weights=b.position_weights.flip(0))
)
change_bias("time_table_rolled", lambda b, _: replace(b, time_weights=b.time_weights.roll(1)))


# Output.


def without_last_rows(out: Tensor, grouping: DomainGrouping) -> Tensor:
    keep = torch.ones(len(out), 1, 1)
    keep[grouping.batch_offsets[1:] - 1] = 0
    return out * keep


def divided_by_own_length(out: Tensor, grouping: DomainGrouping) -> Tensor:
    lengths = grouping.batch_offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return out * (int(lengths.max()) + 3) / lengths[owner].view(-1, 1, 1)


change_output("all_zero", lambda out, _: out * 0)
change_output("last_row_zero", without_last_rows)
change_output("divided_by_own_length", divided_by_own_length)
change_output("heads_exchanged", lambda out, _: out.flip(1))
change_output("left_in_grouped_order", lambda out, g: out[g.permutation])
change_output("permuted_twice", lambda out, g: out[g.inverse])
change_output("error_of_one_in_ten_thousand", lambda out, _: out * 1.0001)


# Inputs and gradients.


class ExchangeGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first.clone(), second.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[1], gradients[0]


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


@mutant
def divided_by_one_more(
    q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, *, norm_length: int, **rest: Any
) -> Tensor:
    return eager(q, k, v, grouping, norm_length=norm_length + 1, **rest)


@mutant
def self_left_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None,
) -> Tensor:
    """Strictly causal by arithmetic, whatever the implementation does with positions."""
    out = eager(q, k, v, grouping, norm_length=norm_length, bias=bias)
    score = (q * k).sum(2, keepdim=True)
    if bias is not None:
        token = torch.arange(len(q)).unsqueeze(1)
        score = score + bias.dense(token, token)
    reads_itself = (grouping.group_of == grouping.keys.group_of).view(-1, 1, 1)
    return out - reads_itself * silu(score) * v / norm_length


@mutant
def queries_and_keys_exchanged(
    q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, **rest: Any
) -> Tensor:
    return eager(k, q, v, grouping, **rest)


@mutant
def values_in_grouped_order(
    q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, **rest: Any
) -> Tensor:
    return eager(q, k, v[grouping.permutation], grouping, **rest)


@mutant
def bias_forgotten(
    q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, *, norm_length: int, **rest: Any
) -> Tensor:
    return eager(q, k, v, grouping, norm_length=norm_length)


@mutant
def softmax_scale(q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, **rest: Any) -> Tensor:
    return eager(q * q.shape[2] ** -0.5, k, v, grouping, **rest)


@mutant
def dk_and_dv_exchanged(
    q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, **rest: Any
) -> Tensor:
    return eager(q, *ExchangeGradients.apply(k, v), grouping, **rest)


@mutant
def dq_and_dk_exchanged(
    q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, **rest: Any
) -> Tensor:
    return eager(*ExchangeGradients.apply(q, k), v, grouping, **rest)


@mutant
def dv_of_last_rows_lost(
    q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, **rest: Any
) -> Tensor:
    factor = without_last_rows(torch.ones_like(v[:, :1, :1]), grouping)
    return eager(q, k, ScaleGradient.apply(v, factor), grouping, **rest)


@mutant
def dq_without_norm(
    q: Tensor, k: Tensor, v: Tensor, grouping: DomainGrouping, *, norm_length: int, **rest: Any
) -> Tensor:
    scaled = ScaleGradient.apply(q, torch.tensor(float(norm_length)))
    return eager(scaled, k, v, grouping, norm_length=norm_length, **rest)


@mutant
def bias_without_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None,
) -> Tensor:
    if bias is not None:
        zero = torch.tensor(0.0)
        bias = replace(
            bias,
            position_weights=ScaleGradient.apply(bias.position_weights, zero),
            time_weights=ScaleGradient.apply(bias.time_weights, zero),
        )
    return eager(q, k, v, grouping, norm_length=norm_length, bias=bias)


def test_the_check_accepts_the_implementation() -> None:
    check(eager)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_rejects_the_mutant(name: str) -> None:
    with pytest.raises(AssertionError, match="error"):
        check(MUTANTS[name])
