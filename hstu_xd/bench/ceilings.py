"""The fastest that the machine does here and now: one large matrix product, one large copy."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from hstu_xd.bench.cases import Case

_TRIES = 10


@dataclass(frozen=True)
class Ceilings:
    """Best of several tries.

    Attributes:
        tflops: 1e12 floating-point operations a second of a square matrix product.
        gbs: 1e9 bytes a second, read and written, of a copy.
    """

    tflops: float
    gbs: float

    @classmethod
    def of(cls, case: Case) -> "Ceilings":
        """Of the case's dtype on its device, measured once a process."""
        return _measure(case.device, case.dtype, torch.get_num_threads())

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline: whichever takes longer at full speed, arithmetic or traffic."""
        return max(flops / (self.tflops * 1e12), moved / (self.gbs * 1e9))


@cache
def _measure(device: str, dtype: str, threads: int) -> Ceilings:
    like = Case("attention", 1, 1, device=device, dtype=dtype).torch_dtype
    on_cuda = device != "cpu"
    side, numbers = (8192, 2**29) if on_cuda else (512, 2**24)
    a, b = (torch.randn(side, side, device=device).to(like) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(numbers, dtype=like, device=device)
    target = torch.empty_like(source)
    flops, moved = 2 * side**3, 2 * numbers * like.itemsize
    return Ceilings(
        tflops=flops / _fastest(lambda: torch.matmul(a, b, out=product), on_cuda) / 1e12,
        gbs=moved / _fastest(lambda: target.copy_(source), on_cuda) / 1e9,
    )


def _fastest(run: Callable[[], object], on_cuda: bool) -> float:
    """Seconds of the fastest try."""
    seconds = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        run()
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
