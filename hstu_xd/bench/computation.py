"""What a provider computes, and its pass: plan, forward, backward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.timing import Mark, Pass

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
