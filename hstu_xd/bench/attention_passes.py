"""Passes of attention alone: ``domain_attention``, others' kernels, PyTorch with a dense mask."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
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


# Attends over several sequences: their offsets (S + 1,) int64, then q, k and v (L, H, d).
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def varlen(kernel: Callable[[Draw], Varlen]) -> Builder:
    """Return a builder of passes through another's kernel for sequences of several lengths.

    Inside domains it gets the regrouped sequence, one sequence for each user and domain. Bringing
    the rows into that order and back is part of the forward pass, because its inputs lie in the
    batch's order.

    Args:
        kernel: loads the kernel and fits it to the sizes of a batch.
    """

    def build(draw: Draw, dtype: torch.dtype, computes: Computation) -> Pass:
        attend, numbers = kernel(draw), _Numbers.from_draw(draw, dtype, computes)

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


def upstream(kernel: str) -> Callable[[Draw], Varlen]:
    """Return what loads ``hstu_mha`` of generative-recommenders.

    Args:
        kernel: one of its kernels, "TRITON" or "PYTORCH".
    """

    def load(draw: Draw) -> Varlen:
        hstu_mha = import_module("generative_recommenders.ops.hstu_attention").hstu_mha
        kernels = import_module("generative_recommenders.common").HammerKernel

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

        return attend

    return load


def upstream_cuda(draw: Draw) -> Varlen:
    """Load generative-recommenders' operator in CUDA; runs of a user are its groups."""
    cuda_hstu_mha = import_module("generative_recommenders.ops.cpp.cuda_hstu_attention")

    def attend(offsets: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cuda_hstu_mha.cuda_hstu_mha(
            max_seq_len=draw.case.seq_len,
            alpha=1.0,
            q=q,
            k=k,
            v=v,
            seq_offsets=offsets,
            causal=True,
            num_groups=(offsets.numel() - 1) // draw.case.batch_size,
        )

    return attend


# Where ``hstu_attn_varlen_func`` is found: NVIDIA's package, then FBGEMM's two.
CUTLASS_MODULES = ("hstu_attn", "fbgemm_gpu.experimental.hstu", "hstu")


def cutlass(draw: Draw) -> Varlen:
    """Load ``hstu_attn_varlen_func``, the CUTLASS kernel of NVIDIA and FBGEMM."""
    module = import_module(next(filter(importable, CUTLASS_MODULES)))
    function = module.hstu_attn_varlen_func
    # Releases name some parameters differently; they divide by scaling_seqlen or by max_seqlen_q.
    known = signature(function).parameters
    length = draw.case.seq_len
    fixed = {
        "max_seqlen_q": length,
        "max_seqlen_k": length,
        "scaling_seqlen": length,
        "seqused_q": None,
        "seqused_k": None,
        "num_contexts": None,
        "num_targets": None,
        "window_size": (-1, 0),
        "alpha": 1.0,
    }

    def attend(offsets: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = offsets.to(torch.int32)
        names = ("cu_seqlens_q", "cu_seqlens_k", "seq_offsets_q", "seq_offsets_k")
        named = fixed | dict.fromkeys(names, starts)
        return function(q, k, v, **{name: x for name, x in named.items() if name in known})

    return attend


def importable(module: str) -> bool:
    """Return whether a module is found; none of its packages may be missing or broken."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


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
