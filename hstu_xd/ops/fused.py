"""Domain attention by fused Triton kernels: what the kernels need, prepared without a host wait.

``hstu_xd.ops.triton_kernels`` describes the kernels, ``triton_launch`` their block sizes,
``triton_ops`` the operators that PyTorch sees.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hstu_xd.errors import InputError
from hstu_xd.grouping import DomainGrouping
from hstu_xd.ops import triton_ops
from hstu_xd.ops.relative_bias import RelativeBias
from hstu_xd.ops.tile_table import key_tiles, query_tiles

_FOUND = find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD = 256

# Of every grouping in use, its tile tables by tile height: all layers of a model share them.
_tile_tables = WeakIdKeyDictionary()


def installed() -> bool:
    """Whether the kernels can run here: triton, and a CUDA device or Triton's interpreter."""
    return _FOUND and (torch.cuda.is_available() or _interpreting())


def suits(q: Tensor, v: Tensor) -> bool:
    """Whether "auto" takes the kernels: for tensors on a CUDA device that they accept."""
    width = max(q.shape[2], v.shape[2])
    return q.is_cuda and q.dtype in DTYPES and width <= WIDEST_HEAD and installed()


def fused_domain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None = None,
) -> Tensor:
    """See :func:`hstu_xd.ops.domain_attention`; q, k (L, H, dqk), v (L, H, dv) -> (L, H, dv).

    Raises:
        InputError: a dtype or a head width that the kernels do not have, tensors on a CPU without
            the interpreter, or (on CPU, where looking costs no wait) positions that the position
            table does not cover. On CUDA the rows of such positions come out as NaN.
    """
    check_kernels_take(q, v)
    _check_positions(bias)
    if not grouping.num_tokens:
        # No tokens: nothing to launch, but still part of the graph.
        return v.clone()
    keys = grouping.keys
    tile = _tile_height(q, v, grouping)
    plan = triton_ops.Plan(
        *_tables(grouping, tile),
        query_tokens=grouping.permutation,
        key_tokens=keys.permutation,
        query_order=grouping.positions,
        key_order=keys.positions,
    )
    position_weights = time_weights = None
    if bias is not None:
        position_weights, time_weights = bias.position_weights, bias.time_weights
        plan = plan._replace(
            positions=bias.positions, next_times=bias.next_timestamps, times=bias.timestamps
        )
    return triton_ops.domain_attention(
        q, k, v, position_weights, time_weights, plan.tensors(), norm_length, tile
    )


def check_kernels_take(q: Tensor, v: Tensor) -> None:
    """Refuse (L, H, d) tensors of a type, a width or a device that the kernels do not have."""
    if q.dtype not in DTYPES:
        raise InputError(
            f"q is {q.dtype}; impl 'triton' needs float32, float16 or bfloat16: "
            "convert q, k and v or use impl='eager'"
        )
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[2] > WIDEST_HEAD:
            raise InputError(
                f"{name} has heads of width {tensor.shape[2]}; impl 'triton' takes up to "
                f"{WIDEST_HEAD}: use more heads or impl='eager'"
            )
    if q.device.type == "cpu" and not _interpreting():
        raise InputError(
            f"q is on {q.device}; impl 'triton' needs a CUDA device, or TRITON_INTERPRET=1 set "
            "before triton is imported: use impl='eager'"
        )


def _check_positions(bias: RelativeBias | None) -> None:
    if bias is None or bias.positions.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bias.positions.numel():
        span = int(bias.positions.max() - bias.positions.min())
        if span >= bias.max_length:
            raise InputError(
                f"bias.positions span {span + 1} positions; bias.position_weights covers "
                f"{bias.max_length}: make the table longer or cut the histories"
            )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _tile_height(q: Tensor, v: Tensor, grouping: DomainGrouping) -> int:
    """Rows of a tile, from what the host knows: nothing here may wait for the device."""
    if q.device.type == "cpu":
        return 32
    wide = max(q.shape[2], v.shape[2]) > 128
    if wide or q.dtype == torch.float32:
        return 32
    if torch.compiler.is_compiling():
        # The mean length differs from batch to batch: it must not lead to another compilation.
        return 64
    mean_length = grouping.num_tokens / max(1, grouping.offsets.numel() - 1)
    return 32 if mean_length < 40 else 64


def _tables(grouping: DomainGrouping, tile: int) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return query_tiles(grouping, tile), key_tiles(grouping, tile)
    known = _tile_tables.setdefault(grouping, {})
    if tile not in known:
        known[tile] = query_tiles(grouping, tile), key_tiles(grouping, tile)
    return known[tile]
