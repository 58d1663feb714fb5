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

# Called with a phase's name when that phase of a pass is over.
Mark = Callable[[str], None]
# One pass, "plan", "forward" and "backward": the output, and all gradients by name.
Pass = Callable[[Mark], dict[str, Tensor]]
# Milliseconds of every timed pass, "total" and by phase; on a CPU also "cpu", what the processors
# spent on it: what others on the machine take of the clock is not in there.
Times = dict[str, list[float]]

_Plan = TypeVar("_Plan")


@dataclass(frozen=True)
class Computation:
    """What comes out, whoever computes it.

    Attributes:
        masked: attention inside domains; else to everything.
        normalization: "silu" or "softmax".
        biased: with relative position and time bias.
    """

    masked: bool
    normalization: str
    biased: bool


# From a batch, the dtype of its numbers and what to compute to the pass.
Builder = Callable[[Draw, torch.dtype, Computation], Pass]


def phased(
    case: Case,
    plan: Callable[[], _Plan],
    forward: Callable[[_Plan], Tensor],
    leaves: Mapping[str, Tensor],
    grad_out: Tensor,
) -> Pass:
    """The pass of a provider.

    Args:
        case: says how often the plan is made.
        plan: makes what depends on the batch's structure alone.
        forward: from the plan to the output.
        leaves: what gradients are taken of, by name.
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
    """The mark of a pass that is not timed."""


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

    What disturbs the machine disturbs all of them, and ratios of the same turn hold.

    Args:
        runs: passes by name.
        failed: takes the reason for everyone whose pass raises; they get no times.
        device: where they run.
        repeats: timed turns.
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
    """Clocks one pass; on CUDA with events in the stream, so that nothing waits inside it."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device != "cpu"
        if self._on_cuda:
            torch.cuda.synchronize()
        self._cpu = time.process_time()
        self._marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Milliseconds of each phase, and of all together until now."""
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
