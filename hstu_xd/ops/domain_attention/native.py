"""Domain attention by loops in C: the fastest way on a CPU, in float32 and with SiLU.

It walks from group to group and knows no padding, so nothing is planned for a batch beyond its
grouping. See ``native.c`` for how, and :mod:`hstu_xd.ops.native_library` for who compiles it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu_xd.errors import InputError
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.native_library import NativeLibrary, check_fits, fits
from hstu_xd.ops.relative_bias import RelativeBias, bucket_edges

LIBRARY = NativeLibrary(
    Path(__file__).with_name("native.c"),
    "q k v grad_out query_tokens query_offsets key_tokens key_offsets query_places places "
    "position_weights time_weights query_positions positions timestamps next_timestamps edges out "
    "dq dk dv_out position_sums time_sums",
    "q_stride k_stride v_stride grad_out_stride heads dqk dv groups max_length "
    "last_bucket norm_length threads",
)


def suits(q: Tensor, grouping: DomainGrouping, bias: RelativeBias | None) -> bool:
    """Return whether "auto" takes the loops for these tensors.

    Sizes that follow from shapes alone, as an exported program has them, are for plain PyTorch.
    """
    tables = () if bias is None else (bias.position_weights, bias.time_weights)
    if grouping.rule is not None or grouping.padded_length is not None:
        return False
    return fits(q, *tables) and LIBRARY.problem() is None


def check(q: Tensor, grouping: DomainGrouping, bias: RelativeBias | None) -> None:
    """Refuse what the loops cannot compute.

    Raises:
        InputError: tensors that are float64 or not on the CPU, or a grouping with a rule of its
            own.
    """
    tables = (None, None) if bias is None else (bias.position_weights, bias.time_weights)
    check_fits(q=q, position_weights=tables[0], time_weights=tables[1])
    if grouping.rule is not None:
        raise InputError(
            "grouping has a rule of its own, which impl 'native' cannot ask: use impl='eager'"
        )


def native_domain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None = None,
) -> Tensor:
    """Compute :func:`hstu_xd.ops.domain_attention` with SiLU; see there for the arguments.

    Raises:
        InputError: positions beyond the table, or no compiler.
    """
    position_weights = time_weights = None
    if bias is not None:
        bias.check_span()
        position_weights, time_weights = bias.position_weights.float(), bias.time_weights.float()
    out: Tensor = _NativeAttention.apply(
        q.float(), k.float(), v.float(), position_weights, time_weights, grouping, norm_length, bias
    )
    return out.to(v.dtype)


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_weights: Tensor | None,
        time_weights: Tensor | None,
        grouping: DomainGrouping,
        norm_length: int,
        bias: RelativeBias | None,
    ) -> Tensor:
        tables = [x for x in (position_weights, time_weights) if x is not None]
        inputs = [q, k, v, *tables]
        ctx.rest = grouping, norm_length, bias
        ctx.save_for_backward(*inputs)
        out = v.new_empty(*q.shape[:2], v.shape[2])
        _call("hstu_xd_attend", inputs, grouping, norm_length, bias, out=out)
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]  # the decorator makes ctx positional only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in inputs[:3])
        # Thousands of pairs meet in one entry of a table.
        sums = [torch.zeros_like(x, dtype=torch.float64) for x in inputs[3:]]
        written = dict(zip(("position_sums", "time_sums"), sums))
        _call(
            "hstu_xd_attend_backward",
            inputs,
            *ctx.rest,
            grad_out=grad_outputs[0],
            dq=dq,
            dk=dk,
            dv_out=dv,
            **written,
        )
        of_tables = [x.float() for x in sums] or [None, None]
        return dq, dk, dv, *of_tables, None, None, None


def _call(
    function: str,
    inputs: Sequence[Tensor],
    grouping: DomainGrouping,
    norm_length: int,
    bias: RelativeBias | None,
    *,
    grad_out: Tensor | None = None,
    **written: Tensor,
) -> None:
    """Hand tensors and coordinates over to a function of the library."""
    rows = dict(zip(("q", "k", "v"), inputs))
    if grad_out is not None:
        rows["grad_out"] = grad_out
    q, v, keys = rows["q"], rows["v"], grouping.keys
    others = {
        "query_tokens": grouping.permutation,
        "query_offsets": grouping.offsets,
        "key_tokens": keys.permutation,
        "key_offsets": keys.offsets,
        "query_places": grouping.positions,
        "places": keys.positions,
    }
    sizes = {"max_length": 1, "last_bucket": 0}
    if bias is not None:
        others |= {
            "position_weights": inputs[3],
            "time_weights": inputs[4],
            "query_positions": grouping.of_tokens(bias.positions),
            "positions": keys.of_tokens(bias.positions),
            "timestamps": keys.of_tokens(bias.timestamps),
            "next_timestamps": grouping.of_tokens(bias.next_timestamps),
            "edges": bucket_edges(q.device),
        }
        sizes = {"max_length": bias.max_length, "last_bucket": bias.time_weights.numel() - 1}
    LIBRARY.call(
        function,
        rows,
        others,
        written,
        heads=q.shape[1],
        dqk=q.shape[2],
        dv=v.shape[2],
        groups=grouping.offsets.numel() - 1,
        norm_length=norm_length,
        **sizes,
    )
