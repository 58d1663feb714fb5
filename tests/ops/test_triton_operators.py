"""The kernels as PyTorch sees them: registered, traceable, without a wait for the device."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from attention_cases import Case, Spec, draw
from torch import Tensor
from triton_marks import needs_triton, on_a_cpu, on_a_gpu

from hstu_xd.errors import InputError
from hstu_xd.ops import RelativeBias, available_impls, domain_attention
from hstu_xd.ops.domain_attention import fused
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.triton_support import rounds_to_tf32

pytestmark = needs_triton

SPEC = Spec((9, 0, 3), 2, heads=1)


def arguments(case: Case) -> tuple[Any, ...]:
    """Of the operators, on the CPU."""
    seen: list[Any] = []
    leaves = case.tensors(torch.float32)
    real = fused.domain_attention, fused.traced
    fused.domain_attention, fused.traced = lambda *a: seen.extend(a), lambda q: True
    try:
        q, k, v = (leaves[x] for x in "qkv")
        fused.fused_domain_attention(
            q, k, v, case.grouping(), norm_length=9, bias=case.relative_bias(leaves)
        )
    finally:
        fused.domain_attention, fused.traced = real
    return tuple(seen)


@on_a_cpu
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_opcheck_of_the_forward(biased: bool) -> None:
    case = draw(Spec((5, 0, 3), 2, heads=1, dqk=2, dv=3, biased=biased, target_view=biased))
    torch.library.opcheck(fused.domain_attention, arguments(case))


@on_a_cpu
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_opcheck_of_the_gradients(biased: bool) -> None:
    case = draw(Spec((5, 0, 3), 2, heads=1, dqk=2, dv=3, biased=biased))
    given = [x.detach() if isinstance(x, Tensor) else x for x in arguments(case)]
    grad_out = torch.from_numpy(case.grad_out)
    torch.library.opcheck(fused.domain_attention_gradients, (grad_out, *given, biased))


def test_tables_that_need_no_gradient_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu_xd.ops.domain_attention import triton_launch

    q, k, v, *tables, plan, norm_length, tile = arguments(draw(SPEC))
    fixed = [x.detach() for x in tables]

    def gradient(*tables: Tensor) -> Tensor:
        out = fused.domain_attention(q, k, v, *tables, plan, norm_length, tile)
        return torch.autograd.grad(out.sum(), q)[0]

    expected = gradient(*tables)
    monkeypatch.setattr(triton_launch, "_table_gradients", None)
    assert torch.equal(gradient(*fixed), expected)


def test_a_second_derivative_is_refused() -> None:
    q, k, v, *tables, plan, norm_length, tile = arguments(draw(SPEC))
    out = fused._plain(q, k, v, *tables, plan, norm_length, tile)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


def test_operators_and_plain_functions_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: what is compiled computes what is not."""
    case = draw(SPEC)

    def found() -> list[Tensor]:
        leaves = case.tensors(torch.float32)
        q, k, v = (leaves[x] for x in "qkv")
        bias = case.relative_bias(leaves)
        out = domain_attention(q, k, v, case.grouping(), norm_length=9, bias=bias, impl="triton")
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    plain = found()
    monkeypatch.setattr(fused, "traced", lambda q: True)
    assert all(map(torch.equal, plain, found()))


def test_a_plan_is_made_once_for_the_same_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a model share one; other times of the same grouping get their own."""
    made: list[Any] = []
    build = fused.PairPlan.build
    monkeypatch.setattr(
        fused.PairPlan, "build", staticmethod(lambda *a: made.append(a) or build(*a))
    )
    case = draw(SPEC)
    leaves, grouping = case.tensors(torch.float32), case.grouping()
    q, k, v = (leaves[x] for x in "qkv")
    bias = case.relative_bias(leaves)
    first, again = (attend(q, k, v, grouping, bias) for _ in range(2))
    assert torch.equal(first, again)
    assert len(made) == 1
    later = replace(bias, next_timestamps=bias.next_timestamps + 10**6)
    assert not torch.equal(attend(q, k, v, grouping, later), first)
    assert len(made) == 2
    fused.fused_domain_attention(q, k, v, grouping, norm_length=9)
    assert len(made) == 3


SWITCHES = [
    "",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
]


@pytest.mark.parametrize("switch", SWITCHES, ids=["none", *SWITCHES[1:]])
def test_products_round_to_tf32_where_pytorch_says_so(switch: str) -> None:
    """In a process of its own: PyTorch refuses to go from one kind of switch to the other."""
    if "fp32_precision" in switch and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("PyTorch before 2.9 has no fp32_precision: NOT covered: that switch")
    program = f"""
import torch
from hstu_xd.ops.first_use import KernelUse
from hstu_xd.ops.triton_blocks import precision
{switch}
q = torch.zeros(1, 2, 16)
use = lambda impl: KernelUse.build("domain_attention", q, q, biased=True, impl=impl)
uses = use("triton"), use("native")
print([precision(x) for x in (torch.float32, torch.bfloat16)], *uses, sep="; ")
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    in_tf32 = ("tf32", "tf32") if switch else ("ieee", "float32")
    assert found == (
        f"['{in_tf32[0]}', 'ieee']; the fused kernel of domain_attention in {in_tf32[1]} with 2 "
        "heads of 16; the loop in C of domain_attention in float32 with 2 heads of 16\n"
    )


def test_compiled_code_reads_the_switch() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + rounds_to_tf32(x.dtype), fullgraph=True, backend="eager")
    try:
        for name, expected in (("highest", 0), ("high", 1), ("highest", 0)):
            torch.set_float32_matmul_precision(name)
            assert compiled(torch.zeros(1)) == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def attend(q: Tensor, k: Tensor, v: Tensor, g: DomainGrouping, bias: RelativeBias) -> Tensor:
    return domain_attention(q, k, v, g, norm_length=9, bias=bias, impl="triton")


@pytest.mark.slow
@on_a_cpu
def test_a_compiled_graph_is_whole_and_serves_other_lengths() -> None:
    torch._dynamo.reset()
    compilations = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=compilations)
    for lengths in ((9, 0, 3), (4, 2, 8), (11, 6, 1)):
        case = draw(Spec(lengths, 2, heads=2, dqk=4, dv=4))
        leaves = case.tensors(torch.float32)
        given = *(leaves[x] for x in "qkv"), case.grouping(), case.relative_bias(leaves)
        found, expected = compiled(*given), attend(*given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        gradients = (torch.autograd.grad(x.sum(), list(leaves.values())) for x in (found, expected))
        for a, b in zip(*gradients):
            assert (a - b).norm() <= 2e-5 * b.norm()
    assert compilations.frame_count == 1


@pytest.mark.parametrize("target_view", [False, True], ids=["own", "target"])
def test_no_step_asks_for_contents(target_view: bool) -> None:
    """Tensors of the meta device have none: asking for a number raises, where a GPU would wait."""
    length = 12

    def integers(size: int = length) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device="meta")

    shapes = (length, 2, 8), (length, 2, 8), (length, 2, 5), (23,), (129,)
    leaves = [torch.zeros(shape, device="meta", requires_grad=True) for shape in shapes]
    q, k, v, *tables = leaves
    grouping = DomainGrouping.from_jagged(integers(), integers(4), 3)
    if target_view:
        grouping = grouping.target_view(integers())
    bias = RelativeBias(*tables, grouping.positions, integers(), integers())
    out = domain_attention(q, k, v, grouping, norm_length=9, bias=bias, impl="triton")
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [x.shape for x in gradients] == list(shapes)


@on_a_gpu
def test_nothing_waits_on_a_gpu() -> None:
    case = draw(SPEC)
    leaves = {name: x.detach().cuda() for name, x in case.tensors(torch.float32).items()}
    q, k, v, *tables = (x.requires_grad_() for x in leaves.values())
    domains, offsets, times = (
        torch.from_numpy(x).cuda() for x in (case.domains, case.offsets, case.bias.times)
    )

    def step() -> None:
        grouping = DomainGrouping.from_jagged(domains, offsets, 2)
        bias = RelativeBias(*tables, grouping.positions, times, times)
        out = domain_attention(q, k, v, grouping, norm_length=9, bias=bias)
        torch.autograd.grad(out, (q, k, v, *tables), torch.ones_like(out))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_importing_the_package_does_not_load_triton() -> None:
    code = (
        "import sys, hstu_xd.ops; hstu_xd.ops.available_impls(); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@on_a_cpu
def test_auto_does_not_interpret_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "domain_attention", None)
    case = draw(SPEC)
    leaves = case.tensors(torch.float32)
    q, k, v = (leaves[x] for x in "qkv")
    domain_attention(q, k, v, case.grouping(), norm_length=9, bias=case.relative_bias(leaves))


def call(*, dtype: torch.dtype = torch.float32, width: int = 4, rows: int = 7) -> Tensor:
    grouping = DomainGrouping.single(torch.tensor([0, 3]), 3)
    x = torch.ones(3, 1, width, dtype=dtype)
    time = torch.arange(3)
    bias = RelativeBias(torch.zeros(rows), torch.zeros(9), time, time, time)
    return fused.fused_domain_attention(x, x, x, grouping, norm_length=3, bias=bias)


@on_a_cpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "q is torch.float64; impl 'triton' needs float32, float16"),
        ({"width": 257}, "q has heads of width 257; impl 'triton' takes up to 256"),
        ({"rows": 3}, "bias.positions span 3 positions; bias.position_weights covers 2"),
    ],
)
def test_messages(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(**changes)


def attend_anyway() -> Tensor:
    grouping = DomainGrouping.single(torch.tensor([0, 3]), 3)
    x = torch.ones(3, 1, 1)
    return domain_attention(x, x, x, grouping, norm_length=1, impl="triton")


@on_a_cpu
def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "triton" not in available_impls()
    with pytest.raises(InputError, match="q is on cpu; impl 'triton' needs a CUDA device, or"):
        call()
    with pytest.raises(InputError, match="impl 'triton' is not available here; use auto, ref"):
        attend_anyway()
