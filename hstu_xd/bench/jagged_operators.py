"""The jagged operators that upstream's dense layers call: fbgemm's, or plain PyTorch in its place.

fbgemm is large and tied to one release of PyTorch. Upstream's layers spend next to nothing in these
two operators, so that they can be measured without it; every row says whose there are.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

# A library takes its operators along when it goes.
_libraries: list[torch.library.Library] = []


def source() -> str:
    """Whose operators :func:`provide` provides here."""
    return "fbgemm" if find_spec("fbgemm_gpu") else "plain PyTorch"


@cache
def provide() -> None:
    """Make ``torch.ops.fbgemm`` know the two operators."""
    if source() == "fbgemm":
        import_module("fbgemm_gpu")
    else:
        register("fbgemm")


def register(namespace: str) -> None:
    """Register the plain ones under fbgemm's names and signatures."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    library.define(
        "jagged_to_padded_dense(Tensor values, Tensor[] offsets, SymInt[] max_lengths, "
        "float padding_value=0) -> Tensor"
    )
    library.define(
        "dense_to_jagged(Tensor dense, Tensor[] x_offsets, SymInt? total_L=None) "
        "-> (Tensor, Tensor[])"
    )
    for function in (jagged_to_padded_dense, dense_to_jagged):
        library.impl(function.__name__, function, "CompositeImplicitAutograd")


def jagged_to_padded_dense(
    values: Tensor, offsets: Sequence[Tensor], max_lengths: Sequence[int], padding_value: float = 0
) -> Tensor:
    """(L, K) -> (B, N, K), each sequence padded or cut to ``max_lengths[0]``."""
    (starts,), (columns,) = offsets, max_lengths
    column = torch.arange(columns, device=values.device)
    inside = column < starts.diff().unsqueeze(1)
    row = (starts[:-1].unsqueeze(1) + column).masked_fill(~inside, 0)
    return values[row].masked_fill(~inside.unsqueeze(2), padding_value)


def dense_to_jagged(
    dense: Tensor, x_offsets: Sequence[Tensor], total_L: int | None = None
) -> tuple[Tensor, list[Tensor]]:
    """(B, N, K) -> (L, K), the leading rows of each sequence, and the offsets."""
    (starts,) = x_offsets
    inside = torch.arange(dense.shape[1], device=dense.device) < starts.diff().unsqueeze(1)
    return dense[inside], list(x_offsets)
