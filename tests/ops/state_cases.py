"""Inputs of the fused DDSR tests and the check against the definition in float64."""

from dataclasses import dataclass
from typing import Any

import torch
from attention_cases import Errors, worst_row
from kernel_cases import poisoned_memory
from torch import Tensor

from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.state_attention.fused import fused_state_attention
from hstu_xd.ops.state_attention.reference import (
    last_state_index,
    reference_state_attention,
    state_age_bucket,
    state_weights,
)
from hstu_xd.ops.state_attention.state_reads import StateReads
from hstu_xd.ops.state_attention.state_table import StateTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Spec:
    """What to draw. ``visited``: how many of the domains occur (default: all)."""

    lengths: tuple[int, ...]
    num_domains: int = 2
    num_states: int = 1
    heads: int = 2
    dqk: int = 5
    dv: int = 7
    biased: bool = True
    visited: int | None = None
    tile: int = 16

    def __str__(self) -> str:
        shown = "-".join(map(str, self.lengths)) or "none"
        bias = "bias" if self.biased else "plain"
        return f"{shown},D={self.num_domains},M={self.num_states},{self.dqk}/{self.dv},{bias}"


@dataclass(frozen=True, eq=False)
class Case:
    """Unit-normal float32 draws of a spec."""

    spec: Spec
    numbers: dict[str, Tensor]
    grad_out: Tensor
    domains: Tensor
    offsets: Tensor
    times: Tensor
    next_times: Tensor

    def leaves(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """q, k, v and, where biased, the bias by age."""
        return {
            name: x.to(device, dtype, copy=True).requires_grad_()
            for name, x in self.numbers.items()
        }

    def reads(self, device: torch.device | str = "cpu") -> StateReads:
        """The plan, with tiles of the height that the spec wants for the kernels."""
        domains, offsets, times, next_times = (
            x.to(device) for x in (self.domains, self.offsets, self.times, self.next_times)
        )
        grouping = DomainGrouping.from_jagged(domains, offsets, self.spec.num_domains)
        reads = StateReads(grouping, times, next_times, self.spec.num_states)
        vars(reads)["table"] = StateTable.build(
            grouping,
            times,
            next_times,
            states_per_domain=self.spec.num_states,
            tile=self.spec.tile,
        )
        return reads

    def table(self) -> StateTable:
        return self.reads(DEVICE).table

    def fused(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients by the kernels."""
        leaves = self.leaves(dtype, DEVICE)
        out = fused_state_attention(**leaves, reads=self.reads(DEVICE))
        assert out.dtype == dtype
        return self.with_gradients(out, leaves)

    def by_definition(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Output and gradients by looking every state up."""
        leaves = self.leaves(dtype)
        return self.with_gradients(reference_state_attention(**leaves, reads=self.reads()), leaves)

    def mass(self) -> dict[str, Tensor]:
        """Absolute terms behind each row of the gradients of scores: (rows,) float64 by name.

        ``ds = w (dw - sum_s w_s dw_s)`` is a difference of like numbers where one weight is all.
        """
        leaves = {name: x.double() for name, x in self.numbers.items()}
        v, reads = leaves.pop("v"), self.reads()
        row, weights = state_weights(**leaves, reads=reads)
        grad_weights = torch.einsum("lhv,lshv->lsh", self.grad_out.double(), v[row])
        mean = (weights * grad_weights).sum(1, keepdim=True)
        terms = weights * (grad_weights.abs() + mean.abs())
        by_query = terms * leaves["k"][row].norm(dim=3)
        by_key = terms * leaves["q"].norm(dim=2).unsqueeze(1)

        def summed(parts: Tensor, rows: Tensor, size: int) -> Tensor:
            sums = parts.new_zeros(size, parts.shape[2])
            return sums.index_add_(0, rows.flatten(), parts.flatten(0, 1)).norm(dim=1)

        return {
            "q": by_query.sum(1).norm(dim=1),
            "k": summed(by_key, row, len(v)),
            "bias": summed(terms, self.ages(), 129),
        }

    def ages(self) -> Tensor:
        spec = self.spec
        index = last_state_index(self.domains, self.offsets, spec.num_domains, spec.num_states)
        return state_age_bucket(index, self.times, self.next_times)

    def with_gradients(self, out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        grad_out = self.grad_out.to(out)
        found = torch.autograd.grad(out, list(leaves.values()), grad_out)
        return {"out": out.detach(), **dict(zip(leaves, found))}


def draw(spec: Spec, seed: int = 0) -> Case:
    """Unit-normal numbers for a spec, always the same."""
    generator = torch.Generator().manual_seed(seed)
    length, rows = sum(spec.lengths), sum(spec.lengths) + spec.num_domains
    shapes = {
        "q": (length, spec.heads, spec.dqk),
        "k": (rows, spec.heads, spec.dqk),
        "v": (rows, spec.heads, spec.dv),
    }
    if spec.biased:
        shapes["bias"] = (129, spec.heads)
    numbers = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}

    def integers(limit: int) -> Tensor:
        return torch.randint(limit, (length,), generator=generator)

    # A few domains often, some rarely.
    share = torch.rand(length, generator=generator) ** 2
    times = (integers(2) * integers(5000)).cumsum(0)
    return Case(
        spec,
        numbers,
        grad_out=torch.randn(length, spec.heads, spec.dv, generator=generator),
        domains=(share * (spec.visited or spec.num_domains)).long(),
        offsets=torch.tensor([0, *spec.lengths]).cumsum(0),
        times=times,
        next_times=times + integers(100_000),
    )


def check_against_definition(spec: Spec) -> None:
    """Output and gradients within the budget of float32, row by row."""
    case = draw(spec)
    with poisoned_memory():
        found = case.fused(torch.float32)
    mass = case.mass()
    rows: dict[str, Any] = {
        name: worst_row(
            found[name].cpu(), exact.numpy(), mass[name].numpy() if name in mass else None
        )
        for name, exact in case.by_definition().items()
    }
    Errors(rows.pop("out"), rows).check()
