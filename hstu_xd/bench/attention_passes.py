"""Passes of attention alone: ``domain_attention``, upstream's kernel, PyTorch with a dense mask."""

from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hstu_xd.bench.cases import Draw
from hstu_xd.bench.timing import Builder, Computation, Pass, phased
from hstu_xd.ops import RelativeBias, domain_attention
from hstu_xd.ops.grouping import DomainGrouping

_TIME_BUCKETS = 128


class _Numbers(NamedTuple):
    """The inputs that get a gradient, by name, q, k and v first; and the gradient of the output."""

    leaves: dict[str, Tensor]
    grad_out: Tensor

    @classmethod
    def from_draw(cls, draw: Draw, dtype: torch.dtype, computes: Computation) -> "_Numbers":
        case = draw.case
        rows = draw.num_tokens, case.heads
        shapes: dict[str, tuple[int, ...]] = {
            "q": (*rows, case.dqk),
            "k": (*rows, case.dqk),
            "v": (*rows, case.dv),
        }
        if computes.biased:
            shapes["position_weights"] = (2 * case.seq_len - 1,)
            shapes["time_weights"] = (_TIME_BUCKETS + 1,)
        leaves = {
            name: draw.normal(*shape, dtype=dtype, seed=seed).requires_grad_()
            for seed, (name, shape) in enumerate(shapes.items())
        }
        return cls(leaves, draw.normal(*rows, case.dv, dtype=dtype, seed=9))

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.leaves["q"], self.leaves["k"], self.leaves["v"]


def own(impl: str) -> Builder:
    """Return a builder of passes through this package's attention by ``impl``."""

    def build(draw: Draw, dtype: torch.dtype, computes: Computation) -> Pass:
        numbers = _Numbers.from_draw(draw, dtype, computes)

        def forward(grouping: DomainGrouping) -> Tensor:
            bias = None
            if computes.biased:
                bias = RelativeBias(
                    numbers.leaves["position_weights"],
                    numbers.leaves["time_weights"],
                    grouping.positions,
                    draw.timestamps,
                    draw.next_timestamps,
                )
            return domain_attention(
                *numbers.qkv,
                grouping,
                norm_length=draw.case.seq_len,
                bias=bias,
                normalization=computes.normalization,
                impl=impl,
            )

        plan = partial(draw.grouping, masked=computes.masked)
        return phased(draw.case, plan, forward, *numbers)

    return build


def upstream(kernel: str) -> Builder:
    """Return a builder of passes through ``hstu_mha`` of generative-recommenders.

    Inside domains it gets the regrouped sequence, one sequence for each user and domain. Bringing
    the rows into that order and back is part of the forward pass, because its inputs lie in the
    batch's order.

    Args:
        kernel: one of its kernels, "TRITON" or "PYTORCH".
    """

    def build(draw: Draw, dtype: torch.dtype, computes: Computation) -> Pass:
        hstu_mha = import_module("generative_recommenders.ops.hstu_attention").hstu_mha
        kernels = import_module("generative_recommenders.common").HammerKernel
        numbers = _Numbers.from_draw(draw, dtype, computes)

        def attend(offsets: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # alpha scales the scores; max_seq_len is also the length that they are divided by.
            return hstu_mha(
                max_seq_len=draw.case.seq_len,
                alpha=1.0,
                q=q,
                k=k,
                v=v,
                seq_offsets=offsets,
                kernel=kernels[kernel],
            )

        def regrouped(grouping: DomainGrouping) -> Tensor:
            rows = (x.index_select(0, grouping.permutation) for x in numbers.qkv)
            return attend(grouping.offsets, *rows).index_select(0, grouping.inverse)

        def mixed(offsets: Tensor) -> Tensor:
            return attend(offsets, *numbers.qkv)

        if computes.masked:
            plan = partial(draw.grouping, masked=True)
            return phased(draw.case, plan, regrouped, *numbers)
        return phased(draw.case, lambda: draw.offsets, mixed, *numbers)

    return build


def dense_mask(draw: Draw, dtype: torch.dtype, computes: Computation) -> Pass:
    """Build the pass of PyTorch's ``scaled_dot_product_attention`` with a dense mask."""
    case = draw.case
    numbers = _Numbers.from_draw(draw, dtype, computes)
    shape = case.batch_size, case.seq_len

    def plan() -> Tensor:
        domains = draw.domains.view(shape)
        same = domains.unsqueeze(2) == domains.unsqueeze(1)
        return same.tril().unsqueeze(1)

    def forward(mask: Tensor) -> Tensor:
        heads_first = (x.unflatten(0, shape).transpose(1, 2) for x in numbers.qkv)
        out = scaled_dot_product_attention(*heads_first, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1)

    return phased(case, plan, forward, *numbers)
