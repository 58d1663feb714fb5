"""Inputs of the attention tests, drawn once, and the check that every implementation must pass."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from attention_oracle import OracleBias, OracleResult, oracle_attention
from torch import Tensor

from hstu_xd.ops import RelativeBias, available_impls, domain_attention
from hstu_xd.ops.grouping import DomainGrouping

Attention = Callable[..., Tensor]

every_impl = pytest.mark.parametrize("impl", available_impls())
# The kernels have no float64 and their own shapes (test_triton_kernels.py): where there is no GPU,
# every program of a kernel is interpreted.
every_float64_impl = pytest.mark.parametrize("impl", ["reference", "eager"])
# Those that are quick on a CPU.
every_cpu_impl = pytest.mark.parametrize("impl", [x for x in available_impls() if x != "triton"])

# Times are multiples of this, chosen so that no difference falls on the edge of a time bucket,
# where float32 and float64 logarithms may disagree (test_time_bucket.py proves it).
TIME_UNIT = 997
MAX_TIME_STEPS = 4000

# A row whose terms cancel to less than this share of a typical row is judged like one of that
# size: its relative error tells of SiLU's zero slope, not of the implementation.
SMALLEST_ROW = 0.01


@dataclass(frozen=True)
class Spec:
    """What to draw. ``visited``: how many of the domains occur (default: all)."""

    lengths: tuple[int, ...]
    num_domains: int = 3
    heads: int = 2
    dqk: int = 5
    dv: int = 7
    target_view: bool = False
    biased: bool = True
    visited: int | None = None
    softmax: bool = False

    def __str__(self) -> str:
        shown = "-".join(map(str, self.lengths[:9])) or "none"
        if len(self.lengths) > 9:
            shown += f"-...{len(self.lengths)}"
        view = "target" if self.target_view else "own"
        bias = "bias" if self.biased else "plain"
        softmax = ",softmax" * self.softmax
        return f"{shown},D={self.num_domains},{self.dqk}/{self.dv},{view},{bias}{softmax}"


def implementation(impl: str) -> Attention:
    """``domain_attention`` by ``impl``; kernels get their inputs on the GPU, if there is one."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grouping: DomainGrouping,
        *,
        norm_length: int,
        bias: RelativeBias | None = None,
    ) -> Tensor:
        if impl != "triton" or not torch.cuda.is_available():
            return domain_attention(
                q, k, v, grouping, norm_length=norm_length, bias=bias, impl=impl
            )
        return domain_attention(
            *(x.cuda() for x in (q, k, v)),
            _on_gpu(grouping),
            norm_length=norm_length,
            bias=None if bias is None else _on_gpu(bias),
            impl=impl,
        ).cpu()

    return attention


def _on_gpu(x: Any) -> Any:
    moved = {}
    for field in fields(x):
        value = getattr(x, field.name)
        if isinstance(value, DomainGrouping):
            moved[field.name] = _on_gpu(value)
        elif isinstance(value, Tensor):
            moved[field.name] = value.cuda()
    return replace(x, **moved)


@dataclass(frozen=True, eq=False)
class Case:
    """Float32 numpy draws of a spec."""

    spec: Spec
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    grad_out: np.ndarray
    domains: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    norm_length: int
    bias: OracleBias

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Leaves: q, k, v and, where biased, both tables."""
        arrays = {"q": self.q, "k": self.k, "v": self.v}
        if self.spec.biased:
            arrays["position_weights"] = self.bias.position_weights
            arrays["time_weights"] = self.bias.time_weights
        return {n: torch.from_numpy(a).to(dtype).requires_grad_() for n, a in arrays.items()}

    def rounded(self, dtype: torch.dtype) -> "Case":
        """The same case in numbers that ``dtype`` holds exactly: the inputs carry no error."""

        def cut(array: np.ndarray) -> np.ndarray:
            return torch.from_numpy(array).to(dtype).float().numpy()

        bias = replace(
            self.bias,
            position_weights=cut(self.bias.position_weights),
            time_weights=cut(self.bias.time_weights),
        )
        numbers = {name: cut(getattr(self, name)) for name in ("q", "k", "v", "grad_out")}
        return replace(self, bias=bias, **numbers)

    def grouping(self) -> DomainGrouping:
        domains, offsets = torch.from_numpy(self.domains), torch.from_numpy(self.offsets)
        own = DomainGrouping.from_jagged(domains, offsets, self.spec.num_domains)
        return own.target_view(torch.from_numpy(self.targets)) if self.spec.target_view else own

    def relative_bias(self, leaves: dict[str, Tensor]) -> RelativeBias | None:
        if not self.spec.biased:
            return None
        lengths = np.diff(self.offsets)
        positions = np.concatenate([np.arange(n) for n in lengths] or [np.zeros(0)])
        return RelativeBias(
            leaves["position_weights"],
            leaves["time_weights"],
            torch.from_numpy(positions.astype(np.int64)),
            torch.from_numpy(self.bias.times),
            torch.from_numpy(self.bias.next_times),
        )

    @cached_property
    def oracle(self) -> OracleResult:
        """The float64 truth for exactly these float32 numbers."""
        wide = OracleBias(
            self.bias.position_weights.astype(np.float64),
            self.bias.time_weights.astype(np.float64),
            self.bias.times,
            self.bias.next_times,
        )
        return oracle_attention(
            *(x.astype(np.float64) for x in (self.q, self.k, self.v)),
            self.domains,
            self.targets if self.spec.target_view else self.domains,
            self.offsets,
            self.norm_length,
            wide if self.spec.biased else None,
            self.grad_out.astype(np.float64),
            softmax=self.spec.softmax,
        )


@lru_cache
def draw(spec: Spec) -> Case:
    """Unit-normal numbers for a spec, always the same."""
    rng = np.random.default_rng(len(spec.lengths) + 1000 * spec.num_domains + spec.dqk)
    offsets = np.concatenate([[0], np.cumsum(spec.lengths)]).astype(np.int64)
    length = int(offsets[-1])
    norm_length = max(spec.lengths, default=0) + 3

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    # A visit is as likely to follow its forerunner at once as after a long pause.
    pauses = rng.integers(0, 2, length) * rng.integers(0, 5, length)
    runs = [np.cumsum(pauses[start:end]) for start, end in pairwise(offsets)]
    steps = np.concatenate(runs or [pauses])
    next_steps = np.append(steps[1:], 0)[:length]
    last = offsets[1:][np.diff(offsets) > 0] - 1
    next_steps[last] = steps[last] + rng.integers(0, 1000, last.size)
    assert steps.max(initial=0) < MAX_TIME_STEPS
    visited = spec.visited or spec.num_domains
    return Case(
        spec,
        q=normal(length, spec.heads, spec.dqk),
        k=normal(length, spec.heads, spec.dqk),
        v=normal(length, spec.heads, spec.dv),
        grad_out=normal(length, spec.heads, spec.dv),
        domains=rng.integers(0, visited, length),
        targets=rng.integers(0, spec.num_domains, length),
        offsets=offsets,
        norm_length=norm_length,
        bias=OracleBias(
            normal(2 * norm_length - 1), normal(129), steps * TIME_UNIT, next_steps * TIME_UNIT
        ),
    )


@dataclass(frozen=True)
class Errors:
    """Largest relative error of any row of the output and of any row of any gradient."""

    forward: float
    gradients: dict[str, float]

    def check(self, *, forward: float = 1e-5, gradients: float = 2e-5) -> None:
        """The budget for float32 with unit-normal inputs is the default."""
        assert self.forward <= forward, f"forward error {self.forward:.2e} > {forward:.0e}"
        for name, error in self.gradients.items():
            assert error <= gradients, f"gradient of {name}: error {error:.2e} > {gradients:.0e}"


def errors_against_oracle(
    attention: Attention, case: Case, dtype: torch.dtype, measure: "Measure | None" = None
) -> Errors:
    """Run an implementation on a case, forward and backward, and compare with the oracle.

    ``measure`` is :func:`worst_row` unless given.
    """
    measure = measure or worst_row
    leaves = case.tensors(dtype)
    out = attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        case.grouping(),
        norm_length=case.norm_length,
        bias=case.relative_bias(leaves),
    )
    assert out.shape == case.v.shape
    assert out.dtype == dtype
    grad_out = torch.from_numpy(case.grad_out).to(dtype)
    found = torch.autograd.grad(out, list(leaves.values()), grad_out, materialize_grads=True)
    truth = case.oracle
    gradients = {}
    for name, gradient in zip(leaves, found):
        assert gradient.dtype == dtype
        gradients[name] = measure(gradient, truth.gradients[name], truth.mass.get(name))
    return Errors(measure(out, truth.out, None), gradients)


Measure = Callable[[Tensor, np.ndarray, np.ndarray | None], float]


def worst_row(found: Tensor, exact: np.ndarray, mass: np.ndarray | None) -> float:
    """Largest relative error of a row; a row that must be zero has to be zero.

    An error is relative to the row's norm or, where given, to the mass of the terms behind it.
    """
    if not len(exact):
        return 0.0
    scale = _row_scale(exact) if mass is None else mass
    error = _row_norms(found.detach().double().numpy() - exact)
    zero = scale == 0
    if error[zero].any():
        return float("inf")
    # NaN must fail: a comparison with NaN would let it pass through max().
    ratio = np.nan_to_num(error / np.where(zero, 1, scale), nan=np.inf)
    return float(ratio.max())


def whole_tensor(found: Tensor, exact: np.ndarray, mass: np.ndarray | None) -> float:
    """Norm of the error relative to the norm of the truth: for precisions with noisy rows."""
    error = np.linalg.norm(found.detach().double().numpy() - exact)
    return float(error / max(np.linalg.norm(exact), np.finfo(np.float64).tiny))


def _row_norms(x: np.ndarray) -> np.ndarray:
    """(L, H, d) -> (L,) norm of each token; (R,) -> (R,) magnitude of each table row."""
    return np.sqrt((x**2).sum(axis=tuple(range(1, x.ndim))))


def _row_scale(exact: np.ndarray) -> np.ndarray:
    """(L,) what each row's error is measured against; 0 where the row is exactly zero."""
    norms = _row_norms(exact)
    alive = norms[norms > 0]
    floor = SMALLEST_ROW * np.sqrt((alive**2).mean()) if alive.size else 0.0
    return np.where(norms > 0, np.maximum(norms, floor), 0.0)
