"""Passes of providers: what they compute, how they take turns, and a clock for every phase.

A pass has the phases "plan", "forward" and "backward". Providers take turns, so that what disturbs
the machine disturbs all of them.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from hstu_xd.bench.cases import Case, Draw

# A pass calls it with the name of each phase that is over.
Mark = Callable[[str], None]
# Runs one pass and returns the output ("out") and all gradients, by name.
Pass = Callable[[Mark], dict[str, Tensor]]
# Milliseconds of every timed pass, "total" and by phase. On a CPU there is also "cpu", the time
# that the processors spent on it, which leaves out what other processes took of the clock.
Times = dict[str, list[float]]

_Plan = TypeVar("_Plan")


@dataclass(frozen=True)
class Computation:
    """The function that a provider computes.

    Attributes:
        masked: whether attention stays inside domains; else it goes to everything.
        normalization: "silu" or "softmax".
        biased: whether there is a relative bias of position and time.
    """

    masked: bool
    normalization: str
    biased: bool


# Makes a pass from a batch, the dtype of its numbers and what is to be computed.
Builder = Callable[[Draw, torch.dtype, Computation], Pass]


def phased(
    case: Case,
    plan: Callable[[], _Plan],
    forward: Callable[[_Plan], Tensor],
    leaves: Mapping[str, Tensor],
    grad_out: Tensor,
) -> Pass:
    """Build the pass of a provider from its parts.

    Args:
        case: case that says how often the plan is made.
        plan: makes what depends on the structure of the batch alone.
        forward: computes the output from the plan.
        leaves: tensors to take the gradients of, by name.
        grad_out: gradient of the output.
    """
    made = cache(plan) if case.plan == "once" else plan

    def run(mark: Mark) -> dict[str, Tensor]:
        ready = made()
        mark("plan")
        out = forward(ready)
        mark("forward")
        gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
        mark("backward")
        return {"out": out.detach(), **dict(zip(leaves, gradients))}

    return run


def unmarked(phase: str) -> None:
    """Do nothing: the mark of a pass that is not timed."""


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch use so many threads inside the block, and as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_turns(
    runs: Mapping[str, Pass], failed: dict[str, str], *, device: str, repeats: int
) -> dict[str, Times]:
    """Time passes in turns (A B A B ...), after one turn that warms up.

    Whatever disturbs the machine disturbs all of them, so that ratios within a turn hold.

    Args:
        runs: passes by name.
        failed: gets the reason of every provider whose pass raises; it has no times then.
        device: where the passes run.
        repeats: number of timed turns.
    """
    times: dict[str, Times] = {name: {} for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            if name in failed:
                continue
            with noting_failure(name, failed):
                watch = _Stopwatch(device)
                run(watch.mark)
                for phase, milliseconds in watch.read().items():
                    if turn:
                        times[name].setdefault(phase, []).append(milliseconds)
    return {name: found for name, found in times.items() if name not in failed}


@contextmanager
def noting_failure(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Keep the reason why a provider failed, so that the others are still measured."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines()
        failed[name] = ": ".join([type(error).__name__, *lines[:1]])


class _Stopwatch:
    """Clocks one pass; on CUDA by events in the stream, so that nothing waits inside the pass."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device != "cpu"
        if self._on_cuda:
            torch.cuda.synchronize()
        self._cpu = time.process_time()
        self._marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Return the milliseconds of each phase, and of all together until now."""
        end = self._now()
        if self._on_cuda:
            torch.cuda.synchronize()
        phases = {
            phase: self._between(before, after)
            for (_, before), (phase, after) in pairwise(self._marks)
        }
        found = phases | {"total": self._between(self._marks[0][1], end)}
        if not self._on_cuda:
            found["cpu"] = (time.process_time() - self._cpu) * 1e3
        return found

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self._on_cuda else (end - start) * 1e3
