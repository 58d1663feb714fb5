"""What every launch of a kernel does to its arguments first."""

import torch
import triton
from torch import Tensor

from hstu_xd.ops import triton_blocks

# Triton's interpreter runs kernels on the CPU; they are no compiled functions then.
INTERPRETED = not isinstance(triton_blocks.load_rows, triton.runtime.JITFunction)


def computable(x: Tensor) -> Tensor:
    """Rows of numbers that lie together, (L, H, d), in a type that computes here.

    The interpreter multiplies bfloat16 wrongly and cuts instead of rounding to it: float32 there.
    """
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(2) == 1 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of tokens and of heads, as the kernels name them."""
    named = {}
    for name, tensor in tensors.items():
        named[f"{name}_token"], named[f"{name}_head"] = tensor.stride()[:2]
    return named


def widths(q: Tensor, v: Tensor) -> dict[str, int]:
    """Widths of heads and the powers of two that hold them, as the kernels name them."""
    width_qk, width_v = q.shape[2], v.shape[2]
    block_qk, block_v = (max(16, triton.next_power_of_2(x)) for x in (width_qk, width_v))
    return {"WIDTH_QK": width_qk, "WIDTH_V": width_v, "BLOCK_QK": block_qk, "BLOCK_V": block_v}
