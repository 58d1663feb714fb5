"""Where tests of the fused kernels can run; a skipped one says what then stays untested."""

from collections.abc import Callable

import pytest
import torch

from hstu_xd.ops import available_impls

needs_triton = pytest.mark.skipif(
    "triton" not in available_impls(),
    reason="triton is not importable (pip install hstu-xd[gpu]): NOT covered: the fused kernels",
)
on_a_cpu = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="there is a GPU: NOT covered in this run: the kernels under Triton's interpreter",
)
_on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: NOT covered in this run: the compiled kernels, their waits and CUDA graphs",
)


def on_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test as one of ``pytest -m gpu`` that nothing else can stand in for."""
    return pytest.mark.gpu(_on_a_gpu(test))
