"""A net under fast code: where nobody has verified it, its first use is compared.

Before a fused kernel on an unverified GPU, or a loop in C, serves a device, a dtype and widths for
the first time in a process, a small batch of the same dtype and widths goes through it and through
plain PyTorch in float64, forward and backward. Where it does not compile, launch or agree, one
WARNING says so and plain PyTorch takes over; who insists on it gets an error instead.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.errors import HstuXdError
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.triton_support import rounds_to_tf32

_logger = logging.getLogger(__name__)

# GPU, torch and triton on which the kernels as they are now were proved right: none. Those that the
# rows in examples/results/gpu are of, on an H200 with 2.11.0 and 3.6.0, have been changed since.
VERIFIED: frozenset[tuple[str, str, str]] = frozenset()

# Largest error of a row over its length or that of an average row.
_BUDGETS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TF32_BUDGET = 2e-2
# More than a tile, no event at all, a single one, and a short history.
_LENGTHS = (150, 0, 1, 40)
_DOMAINS = 2
_MOST_SECONDS = 10_000_000


# Implementation -> what it is called.
_NAMES = {"triton": "the fused kernel", "native": "the loop in C"}


class KernelUse(NamedTuple):
    """What a kernel is compiled for, or a loop in C called with.

    Attributes:
        operator: name of the operator.
        device: where it runs.
        dtype: type of queries, keys and values.
        heads: number of heads ``H``.
        dqk: width of queries and keys in a head.
        dv: width of values in a head.
        biased: whether there is a bias.
        impl: "triton" or "native".
        tf32: whether factors of products are rounded to TF32.
    """

    operator: str
    device: torch.device
    dtype: torch.dtype
    heads: int
    dqk: int
    dv: int
    biased: bool
    impl: str = "triton"
    tf32: bool = False

    @classmethod
    def build(cls, operator: str, q: Tensor, v: Tensor, *, biased: bool, impl: str) -> "KernelUse":
        """Return the use of tensors (L, H, dqk) and (..., H, dv)."""
        # A graph that is being compiled has names for sizes; of these it needs the numbers.
        heads, dqk, dv = (index(size) for size in (*q.shape[1:], v.shape[2]))
        tf32 = impl == "triton" and rounds_to_tf32(q.dtype)
        return cls(operator, q.device, q.dtype, heads, dqk, dv, biased, impl, tf32)

    def __str__(self) -> str:
        name = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        widths = f"{self.dqk}" if self.dqk == self.dv else f"{self.dqk} and {self.dv}"
        what = f"{self.operator} in {name} with {self.heads} heads of {widths}"
        return f"{_NAMES[self.impl]} of {what}"


@dataclass(frozen=True, eq=False)
class SmallBatch:
    """A few histories, always the same ones, to try a kernel on.

    Attributes:
        grouping: by user and domain.
        targets: (L,) int64, domain of the event after each one.
        timestamps: (L,) int64.
        next_timestamps: (L,) int64.
        generator: what the next numbers are drawn from.
    """

    grouping: DomainGrouping
    targets: Tensor
    timestamps: Tensor
    next_timestamps: Tensor
    generator: torch.Generator

    @classmethod
    def draw(cls, device: torch.device) -> "SmallBatch":
        """Draw the histories on a device."""
        generator = torch.Generator().manual_seed(0)
        length = sum(_LENGTHS)
        offsets = pad(torch.tensor(_LENGTHS).cumsum(0), (1, 0))
        domains, targets = torch.randint(_DOMAINS, (2, length), generator=generator)
        times = torch.randint(_MOST_SECONDS, (length,), generator=generator).cumsum(0)
        grouping = DomainGrouping.from_jagged(domains.to(device), offsets.to(device), _DOMAINS)
        following = pad(times[1:], (0, 1), value=int(times[-1]))
        targets, times, following = (x.to(device) for x in (targets, times, following))
        return cls(grouping, targets, times, following, generator)

    def normal(self, use: KernelUse, *shape: int) -> Tensor:
        """Draw unit-normal numbers that the dtype of a use holds exactly."""
        return torch.randn(shape, generator=self.generator).to(use.device, use.dtype)


# Runs an implementation on a small batch: numbers of the use's dtype, or, where the flag is set,
# the same numbers in float64. Returns the output and all gradients, by name.
Trial = Callable[[KernelUse, bool], dict[str, Tensor]]


def holds(use: KernelUse, trial: Trial, *, insists: bool) -> bool:
    """Return whether fast code may be used; tried out on the first call of a process.

    Args:
        use: what they are to be used for.
        trial: runs it, or plain PyTorch in float64.
        insists: whether the caller wants it and nothing else.

    Raises:
        HstuXdError: it failed and the caller insists on it.
    """
    problem = _problem(trial, *use)
    if problem and insists:
        raise HstuXdError(
            f"{use} cannot be used on {_name(use.device)}: {problem}; "
            "use impl='auto' or impl='eager' (xd_encoder.impl)"
        )
    return not problem


def in_doubt(device: torch.device) -> bool:
    """Return whether kernels have to prove themselves on a device, and can: not in a capture."""
    if device.type != "cuda" or not _unverified(device):
        return False
    return not torch.cuda.is_current_stream_capturing()


@cache
def _unverified(device: torch.device) -> bool:
    """Return whether there is a GPU of which no rows are stored; asked once, as it takes long."""
    if not torch.cuda.is_available():
        return False
    name = torch.cuda.get_device_name(device)
    return (name, version("torch").partition("+")[0], version("triton")) not in VERIFIED


def _problem(trial: Trial, *use: Any) -> str | None:
    # A graph that is being compiled takes the answer for a constant, and can give plain arguments.
    asked = KernelUse(*use)
    in_question = asked.impl == "native" or in_doubt(asked.device)
    return _tried(asked, trial) if in_question else None


# As torch.compiler.assume_constant_result does, which would load the compiler, and triton with it.
vars(_problem)["_dynamo_marked_constant"] = True


@cache
def _tried(use: KernelUse, trial: Trial) -> str | None:
    """Return what is wrong with it, None where it holds; said once, at WARNING."""
    # In a thread of its own: autocast, inference mode and the like of the caller do not reach it.
    with ThreadPoolExecutor(max_workers=1) as pool:
        problem = pool.submit(_try, use, trial).result()
    if problem:
        _logger.warning(
            "%s cannot be used on %s: %s. Plain PyTorch (impl='eager') takes "
            "over; please report this",
            use,
            _name(use.device),
            problem,
        )
    return problem


def _try(use: KernelUse, trial: Trial) -> str | None:
    try:
        found = trial(use, False)
        truth = trial(use, True)
        errors = {name: _error(found[name], truth[name]) for name in truth}
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {first}".rstrip(": ")
    budget = _TF32_BUDGET if use.tf32 else _BUDGETS[use.dtype]
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= budget]
    if wrong:
        return f"it differs from plain PyTorch in {', '.join(wrong)} (at most {budget:.0e})"
    return None


def _error(found: Tensor, truth: Tensor) -> float:
    """Return the largest error of a row over its length, or the average one where it is shorter."""
    rows = truth.flatten(1) if truth.ndim > 1 else truth.unsqueeze(0)
    difference, size = (found.double().reshape(rows.shape) - rows).norm(dim=1), rows.norm(dim=1)
    return float((difference / size.clamp(min=float(size.mean()))).max())


def outputs(
    attend: Callable[..., Tensor], leaves: dict[str, Tensor], grad_out: Tensor, *, exact: bool
) -> dict[str, Tensor]:
    """Call ``attend`` with the leaves, as float64 where ``exact``; return output and gradients."""
    dtype = torch.float64 if exact else None
    given = {name: x.detach().to(dtype=dtype).requires_grad_() for name, x in leaves.items()}
    out = attend(**given)
    # A gradient that is handed over makes autograd import sympy, which costs most of a second.
    asked = (out * grad_out.to(out.dtype)).sum()
    found: Sequence[Tensor] = torch.autograd.grad(asked, list(given.values()))
    return {"out": out.detach(), **{f"gradient of {n}": x for n, x in zip(given, found)}}


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
