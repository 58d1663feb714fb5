"""DDSR's attention by loops in C: the fastest way on a CPU, in float32.

It walks over every history once and holds the states that a token can see, so nothing is planned
or gathered. See ``native.c`` for how, and :mod:`hstu_xd.ops.native_library` for who compiles it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu_xd.ops.native_library import NativeLibrary, check_fits, fits
from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS, bucket_edges
from hstu_xd.ops.state_attention.state_reads import StateReads

LIBRARY = NativeLibrary(
    Path(__file__).with_name("native.c"),
    "q k v grad_out offsets query_of state_of domains timestamps next_timestamps bias edges "
    "out dq dk dv_out bias_sums",
    "q_stride k_stride v_stride grad_out_stride tokens states heads dqk dv users num_domains "
    "states_per_domain never_written threads",
)


def suits(q: Tensor, reads: StateReads, bias: Tensor | None) -> bool:
    """Return whether "auto" takes the loops for these tensors.

    Sizes that follow from shapes alone, as an exported program has them, are for plain PyTorch.
    """
    if reads.grouping.padded_length is not None:
        return False
    return fits(q, *(() if bias is None else (bias,))) and LIBRARY.problem() is None


def check(q: Tensor, bias: Tensor | None) -> None:
    """Refuse tensors that are float64 or not on the CPU.

    Raises:
        InputError: the message names the tensor and what to do.
    """
    check_fits(q=q, bias=bias)


def native_state_attention(
    q: Tensor, k: Tensor, v: Tensor, reads: StateReads, *, bias: Tensor | None = None
) -> Tensor:
    """Compute :func:`hstu_xd.ops.state_attention`; see there for the arguments.

    Raises:
        InputError: there is no compiler.
    """
    table = None if bias is None else bias.float()
    out: Tensor = _NativeStates.apply(q.float(), k.float(), v.float(), table, reads)
    return out.to(v.dtype)


class _NativeStates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, reads: StateReads
    ) -> Tensor:
        ctx.reads = reads
        ctx.save_for_backward(q, k, v, bias)
        out = q.new_empty(q.shape[0], *v.shape[1:])
        _call("hstu_xd_ask_states", (q, k, v), bias, reads, out=out)
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]  # the decorator makes ctx positional only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        written = {"dq": dq, "dk": dk, "dv_out": dv}
        if bias is not None:
            written["bias_sums"] = bias.new_zeros(bias.shape[::-1], dtype=torch.float64)
        _call(
            "hstu_xd_ask_states_backward",
            (q, k, v),
            bias,
            ctx.reads,
            grad_out=grad_outputs[0],
            **written,
        )
        # Laid out as the table is, or DDP would copy it in every step.
        of_bias = None if bias is None else written["bias_sums"].t().float().contiguous()
        return dq, dk, dv, of_bias, None


def _call(
    function: str,
    inputs: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    reads: StateReads,
    *,
    grad_out: Tensor | None = None,
    **written: Tensor,
) -> None:
    """Hand tensors and what they are of over to a function of the library."""
    rows = dict(zip(("q", "k", "v"), inputs))
    if grad_out is not None:
        rows["grad_out"] = grad_out
    q, v, grouping = rows["q"], rows["v"], reads.grouping
    others = {
        "offsets": grouping.batch_offsets,
        "query_of": reads.query_of,
        "state_of": reads.state_of,
        "domains": grouping.domains,
        "timestamps": reads.timestamps,
        "next_timestamps": reads.next_timestamps,
        "edges": bucket_edges(q.device),
    }
    if bias is not None:
        others["bias"] = bias
    LIBRARY.call(
        function,
        rows,
        others,
        written,
        tokens=grouping.num_tokens,
        states=reads.num_states,
        heads=q.shape[1],
        dqk=q.shape[2],
        dv=v.shape[2],
        users=grouping.batch_offsets.numel() - 1,
        num_domains=grouping.num_domains,
        states_per_domain=reads.states_per_domain,
        never_written=NUM_TIME_BUCKETS,
    )
