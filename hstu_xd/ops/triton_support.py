"""What the fused operators share before a kernel is launched; loading it does not load triton.

Whether the kernels can run here, which tensors they take, and how rows are cut into the tiles that
their programs own.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hstu_xd.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD = 256

_FOUND = find_spec("triton") is not None


def interpreting() -> bool:
    """Return whether Triton is asked to interpret kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed() -> bool:
    """Return whether the kernels can run: triton, and a CUDA device or Triton's interpreter."""
    return _FOUND and (torch.cuda.is_available() or interpreting())


def rounds_to_tf32(dtype: torch.dtype) -> bool:
    """Return whether factors of products are rounded to TF32: float32 where PyTorch's switch says.

    It is ``fp32_precision`` of ``torch.backends.cuda.matmul``, or ``allow_tf32``, off unless
    somebody turns it on, as generative-recommenders does by ``train_fn.enable_tf32``.
    """
    if dtype != torch.float32:
        return False
    switches = torch.backends.cuda.matmul
    # Since PyTorch 2.9, which refuses to read the other one once this one is set.
    newer = getattr(switches, "fp32_precision", None)
    return bool(switches.allow_tf32) if newer is None else newer == "tf32"


# As torch.compiler.assume_constant_result does, which would load the compiler: it cannot read the
# switch itself, and compiles again where somebody turns it.
vars(rounds_to_tf32)["_dynamo_marked_constant"] = True


def suits(q: Tensor, v: Tensor) -> bool:
    """Return whether "auto" takes the kernels for these tensors of a CUDA device."""
    width = max(q.shape[2], v.shape[2])
    return q.dtype in DTYPES and width <= WIDEST_HEAD and _FOUND


def traced(q: Tensor) -> bool:
    """Return whether PyTorch wants an operator that it knows: code that it compiles or exports.

    So it is for tensors without contents. Where it just runs, a plain function is quicker to call.
    """
    return torch.compiler.is_compiling() or q.is_meta or type(q) not in (Tensor, Parameter)


def plain(
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """Make a plain function with derivatives of an operator's parts; to call it costs less.

    Args:
        forward: computes the outputs.
        setup_context: keeps what ``backward`` needs.
        backward: as PyTorch registers it for the operator; it computes the gradients by its
            argument ``by``, of itself by the operator, and returns a list for a list of tensors.
        gradients: what takes the operator's place there. Where a derivative of the gradients may be
            asked for the operator stays, as it refuses that: who records the function would go
            without and not know.
    """

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return forward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
            by = {} if torch.is_grad_enabled() else {"by": gradients}
            grads = backward(ctx, *grad_outputs, **by)
            return tuple(None if isinstance(grad, list) else grad for grad in grads)

    return Plain.apply


def check_kernels_take(q: Tensor, v: Tensor) -> None:
    """Refuse (L, H, d) tensors of a type, a width or a device that the kernels do not have.

    Raises:
        InputError: the message names the tensor and what to do.
    """
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
    if q.device.type == "cpu" and not interpreting():
        raise InputError(
            f"q is on {q.device}; impl 'triton' needs a CUDA device, or TRITON_INTERPRET=1 set "
            "before triton is imported: use impl='eager'"
        )


def split(offsets: Tensor, length: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut groups of rows into tiles, where the rows lie and without a wait of the host.

    Args:
        offsets: (groups + 1,) int64, where the groups begin.
        length: rows ``L`` of all groups together.
        tile: rows of a tile at most.

    Returns:
        Group, first row and end of every tile, ``(L // tile + min(L, groups),)`` int64 each; empty
        tiles come last.
    """
    lengths = offsets.diff()
    groups = lengths.numel()
    counts = (lengths + (tile - 1)) // tile
    ends = counts.cumsum(0)
    index = torch.arange(length // tile + min(length, groups), device=ends.device)
    group = torch.searchsorted(ends, index, right=True).clamp_(max=groups - 1)
    first = offsets[group] + (index - (ends - counts)[group]) * tile
    end = offsets[group + 1]
    return group, torch.minimum(first, end), torch.minimum(first + tile, end)
