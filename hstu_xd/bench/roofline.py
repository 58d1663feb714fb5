"""The roofline: the least time that a case can take on this machine.

The work of a case is its visible pairs, their arithmetic and the memory traffic of a pass; the
ceilings are the speed of one large matrix product and of one large copy, measured here and now.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from hstu_xd.bench.cases import Case, Draw
from hstu_xd.ops.grouping import num_pairs

# Forward attention is two matrix products; backward computes the scores again and four more.
_BACKWARD_OF_ATTENTION = 2.5
# The backward pass of a matrix product computes two of them.
_BACKWARD_OF_PRODUCT = 2.0


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products, and bytes that must move, of both passes.

    Bytes count every input and output of attention and of the projections once, as if all in
    between stayed on the chip.
    """

    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float

    @classmethod
    def from_draw(cls, draw: Draw, *, masked: bool) -> "Work":
        """Count the work of an attention or an encoder case.

        There are ``2 H (dqk + dv)`` operations forward for each visible pair, whether or not a
        provider computes others too, and 2.5 times as many backward.

        Args:
            draw: the batch.
            masked: whether only pairs inside domains are visible.
        """
        case = draw.case
        attention = _attention(case, draw.num_tokens, visible_pairs(draw, masked=masked))
        if case.what == "attention":
            return attention
        layer = _layer(case, draw.num_tokens, attention)
        return cls(
            forward_flops=case.layers * layer.forward_flops,
            backward_flops=case.layers * layer.backward_flops,
            forward_bytes=case.layers * layer.forward_bytes,
            backward_bytes=case.layers * layer.backward_bytes,
        )


def visible_pairs(draw: Draw, *, masked: bool) -> int:
    """Count the pairs of a query and a key that it may see, itself included, in the whole batch."""
    return num_pairs(draw.grouping(masked=masked))


def delta(draw: Draw) -> float:
    """Return the mean over users of ``sum_d (s_d / S)^2``: the share of pairs a mask leaves."""
    lengths = draw.grouping(masked=True).lengths.view(draw.case.batch_size, -1)
    return float((lengths / draw.case.seq_len).double().square().sum(1).mean())


def _attention(case: Case, tokens: int, pairs: int) -> Work:
    flops = 2 * case.heads * (case.dqk + case.dv) * pairs
    numbers = tokens * case.heads * case.torch_dtype.itemsize
    return Work(
        forward_flops=flops,
        backward_flops=_BACKWARD_OF_ATTENTION * flops,
        # q, k, v, out; then q, k, v, the gradient of out, and three gradients.
        forward_bytes=numbers * (2 * case.dqk + 2 * case.dv),
        backward_bytes=numbers * (4 * case.dqk + 3 * case.dv),
    )


def _layer(case: Case, tokens: int, attention: Work) -> Work:
    """Count a layer: attention between the projection to u, v, q, k and that of the output."""
    projected, gated = 2 * case.heads * (case.dqk + case.dv), case.heads * case.dv
    flops = 2 * tokens * case.width * (projected + gated)
    numbers = tokens * (2 * case.width + projected + gated) + case.width * (projected + gated)
    moved = numbers * case.torch_dtype.itemsize
    return Work(
        forward_flops=attention.forward_flops + flops,
        backward_flops=attention.backward_flops + _BACKWARD_OF_PRODUCT * flops,
        forward_bytes=attention.forward_bytes + moved,
        backward_bytes=attention.backward_bytes + 2 * moved,
    )


# Tries of each ceiling, of which the fastest counts.
_TRIES = 10


@dataclass(frozen=True)
class Ceilings:
    """The speed that this machine reaches, the best of several tries.

    Attributes:
        tflops: 1e12 floating-point operations a second of a square matrix product.
        gbs: 1e9 bytes a second, read and written, of a copy.
    """

    tflops: float
    gbs: float

    @classmethod
    def measure(cls, case: Case) -> "Ceilings":
        """Measure the ceilings of the case's dtype on its device, once in a process."""
        return _measure(case.device, case.dtype, torch.get_num_threads())

    def seconds(self, flops: float, moved: float) -> float:
        """Return the time of whichever takes longer at full speed, arithmetic or traffic."""
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
    """Return the seconds of the fastest try."""
    seconds = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        run()
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
