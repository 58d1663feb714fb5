"""Compiles every kernel for compute capability 9.0 as it would be launched; needs no GPU.

Run without TRITON_INTERPRET; prints the names of the kernels. Launches are taken as they are, with
the block sizes meant for a GPU, but for the last step: instead of running, a kernel is compiled.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
from attention_cases import Spec as AttentionSpec
from attention_cases import draw as draw_attention
from state_cases import Spec as StateSpec
from state_cases import draw as draw_states
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hstu_xd.ops import triton_support
from hstu_xd.ops.domain_attention import fused, triton_launch
from hstu_xd.ops.state_attention import triton_launch as triton_state_launch

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiled:
    """Stands in for a kernel: ``kernel[grid](...)`` compiles it for these arguments."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.fn = kernel.fn

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, **given: Any) -> None:
        options = {name: given.pop(name) for name in ("num_warps", "num_stages")}
        options["enable_fp_fusion"] = given.pop("enable_fp_fusion")
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        for place, parameter in enumerate(self._kernel.params):
            value = given.pop(parameter.name)
            # A launch takes a 1 for a constant as well, unless the kernel forbids it.
            is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or is_one:
                signature[parameter.name] = "constexpr"
                constants[(place,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        assert not given, f"{self._kernel.fn.__name__} does not take {', '.join(given)}"
        source = ASTSource(self._kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]
        print(self._kernel.fn.__name__, flush=True)


def compile_all(dtype: torch.dtype, width: int, *, biased: bool) -> None:
    """All kernels for one type and width, through both passes of both operators."""
    shape = {"heads": 2, "dqk": width, "dv": width, "biased": biased}
    case = draw_attention(AttentionSpec((5, 0, 70), 2, **shape))
    leaves = case.tensors(dtype)
    q, k, v = (leaves[x] for x in "qkv")
    out = fused.fused_domain_attention(
        q, k, v, case.grouping(), norm_length=99, bias=case.relative_bias(leaves)
    )
    torch.autograd.grad(out.sum(), list(leaves.values()))
    draw_states(StateSpec((5, 0, 70), 3, 2, tile=64, **shape)).fused(dtype)


def compile_ones() -> None:
    """All kernels where every number is 1 that can be: heads, domains, states, positions."""
    shape = {"heads": 1, "dqk": 16, "dv": 16}
    case = draw_attention(AttentionSpec((1, 1), 1, **shape))
    leaves = case.tensors(torch.bfloat16)
    position_weights = leaves["position_weights"] = torch.zeros(1, requires_grad=True)
    bias = replace(case.relative_bias(leaves), position_weights=position_weights)
    q, k, v = (leaves[x] for x in "qkv")
    out = fused.fused_domain_attention(q, k, v, case.grouping(), norm_length=1, bias=bias)
    torch.autograd.grad(out.sum(), list(leaves.values()))
    draw_states(StateSpec((1, 1), 1, 1, **shape)).fused(torch.bfloat16)


if __name__ == "__main__":
    for module in (triton_launch.kernels, triton_state_launch.kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Compiled(getattr(module, name)))
    # Tensors on the CPU pass for those of a GPU.
    triton_support.interpreting = lambda: True
    compile_all(torch.bfloat16, 64, biased=True)
    compile_all(torch.float32, 25, biased=False)
    compile_ones()
