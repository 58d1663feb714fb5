"""Providers: the implementations that compete, what each computes, and what it needs to run.

This package's own are named by implementation: "triton" (the fused kernels; "triton-unbiased" tells
what the bias costs), "native" (the loops in C), "eager", and "reference", the dense masked
definition. "eager-softmax", "flex" (FlexAttention with a block mask on the mixed sequence) and
"sdpa" (with a dense mask) compute softmax inside domains. "upstream" is the dense layer stack of
generative-recommenders and "upstream-triton" its fused attention, "upstream-cuda" its operator in
CUDA, "cutlass" NVIDIA's and FBGEMM's ``hstu_attn_varlen_func``: they know no domains and so compute
full attention ("-mixed") whatever their number, or attention inside domains on the sequence as this
package regroups it ("-grouped").
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hstu_xd.bench import attention_passes, encoder_passes
from hstu_xd.bench.attention_passes import CUTLASS_MODULES, Varlen, importable
from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.timing import Builder, Computation, Pass
from hstu_xd.ops import triton_support
from hstu_xd.ops.domain_attention.native import LIBRARY


@dataclass(frozen=True)
class Provider:
    """An implementation that competes.

    Attributes:
        build: makes the pass.
        masked: whether it attends inside domains; else it attends to everything.
        normalization: "silu" or "softmax".
        bias: when it has the relative bias: "always", "never", or as the "case" says.
        modules: modules that must be importable, or tuples of which one must be.
        needs: "nothing", "kernels" (Triton, and a GPU or its interpreter), "cuda" (a GPU) or
            "loops" (a CPU and a C compiler).
        powers_of_two: whether head widths must be powers of two from 16 on.
        foreign: whether it is another's code, which may round to half precision where this
            package's does not.
    """

    build: Builder
    masked: bool = True
    normalization: str = "silu"
    bias: str = "case"
    modules: tuple[str | tuple[str, ...], ...] = ()
    needs: str = "nothing"
    powers_of_two: bool = False
    foreign: bool = False

    def computation(self, case: Case) -> Computation:
        """Return what it computes in a case."""
        biased = case.biased if self.bias == "case" else self.bias == "always"
        return Computation(self.masked, self.normalization, biased)

    def missing(self, case: Case) -> str | None:
        """Return why it cannot run here; None where it can."""
        groups = [(some,) if isinstance(some, str) else some for some in self.modules]
        absent = [" or ".join(some) for some in groups if not any(map(importable, some))]
        if absent:
            return f"{' and '.join(absent)} not importable"
        if self.needs == "cuda" and case.device == "cpu":
            return "needs a CUDA device"
        if self.needs == "loops":
            why = "is for the CPU" if case.device != "cpu" else LIBRARY.problem()
            if why or case.dtype == "float64":
                return why or "has no float64"
        if self.needs == "kernels" and not triton_support.installed():
            return "needs triton and a CUDA device"
        if self.bias == "always" and not case.biased:
            return "always has the relative bias"
        widths = {"dqk": case.dqk, "dv": case.dv}
        odd = [name for name, width in widths.items() if width < 16 or width & (width - 1)]
        if self.powers_of_two and odd:
            return f"{odd[0]} is {widths[odd[0]]}; it takes powers of two from 16 on"
        return None


_GR = "generative_recommenders"


def _another(kernel: Callable[[Draw], Varlen], *modules: str | tuple[str, ...]) -> Provider:
    return Provider(
        attention_passes.varlen(kernel),
        bias="never",
        modules=modules,
        needs="cuda",
        powers_of_two=True,
        foreign=True,
    )


# Kernels that know no domains, each called on the mixed and on the regrouped sequence.
_OTHERS = {
    "upstream-triton": _another(attention_passes.upstream("TRITON"), _GR, "triton"),
    "upstream-cuda": _another(attention_passes.upstream_cuda, _GR, "hstu._C"),
    "cutlass": _another(attention_passes.cutlass, CUTLASS_MODULES),
}

PROVIDERS: dict[str, dict[str, Provider]] = {
    "encoder": {
        "triton": Provider(encoder_passes.own("triton"), needs="kernels"),
        "native": Provider(encoder_passes.own("native"), needs="loops"),
        "eager": Provider(encoder_passes.own("eager")),
        "reference": Provider(encoder_passes.own("reference")),
        "upstream": Provider(
            encoder_passes.upstream, masked=False, bias="always", modules=(_GR,), foreign=True
        ),
        "eager-softmax": Provider(encoder_passes.own("eager"), normalization="softmax"),
        "flex": Provider(
            encoder_passes.own("flex"), normalization="softmax", bias="never", needs="cuda"
        ),
    },
    "attention": {
        "triton": Provider(attention_passes.own("triton"), needs="kernels"),
        "triton-unbiased": Provider(attention_passes.own("triton"), bias="never", needs="kernels"),
        "native": Provider(attention_passes.own("native"), needs="loops"),
        "eager": Provider(attention_passes.own("eager")),
        "reference": Provider(attention_passes.own("reference")),
        **{f"{name}-mixed": replace(one, masked=False) for name, one in _OTHERS.items()},
        **{f"{name}-grouped": one for name, one in _OTHERS.items()},
        "eager-softmax": Provider(attention_passes.own("eager"), normalization="softmax"),
        "flex": Provider(
            attention_passes.own("flex"), normalization="softmax", bias="never", needs="cuda"
        ),
        "sdpa": Provider(attention_passes.dense_mask, normalization="softmax", bias="never"),
    },
}

_DEFINITIONS = {
    "encoder": encoder_passes.own("reference"),
    "attention": attention_passes.own("reference"),
}


def definition(draw: Draw, dtype: torch.dtype, computes: Computation) -> Pass:
    """Build the pass of the dense masked definition of what is to be computed."""
    return _DEFINITIONS[draw.case.what](draw, dtype, computes)
