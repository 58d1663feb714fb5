"""The fused DDSR as PyTorch sees it: registered, chosen, refused; and how much memory it takes."""

from importlib import import_module
from typing import Any

import pytest
import torch
from state_cases import Case, Spec, draw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_marks import needs_triton, on_a_cpu

from hstu_xd import ops
from hstu_xd.errors import InputError
from hstu_xd.model.ddsr import DynamicDomainState
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.state_attention import api
from hstu_xd.ops.state_attention import fused as fused_states
from hstu_xd.ops.state_attention.fused import fused_state_attention
from hstu_xd.ops.state_attention.state_reads import StateReads
from hstu_xd.ops.state_attention.state_table import StateKernelInputs, StateTable

pytestmark = needs_triton

SPEC = Spec((5, 0, 3), 2, 2, heads=1, dqk=2, dv=3)


def arguments(case: Case) -> tuple[Any, ...]:
    """Of the operator, on the CPU."""
    leaves, table = case.leaves(torch.float32), case.table()
    tensors = leaves["q"], leaves["k"], leaves["v"], leaves.get("bias")
    return *tensors, table.tensors(), table.tile, table.states_per_domain


@on_a_cpu
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_opcheck_of_the_forward(biased: bool) -> None:
    spec = Spec((5, 0, 3), 2, 2, heads=1, dqk=2, dv=3, biased=biased)
    torch.library.opcheck(fused_states.state_attention, arguments(draw(spec)))


@on_a_cpu
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_opcheck_of_the_gradients(biased: bool) -> None:
    case = draw(Spec((5, 0, 3), 2, 2, heads=1, dqk=2, dv=3, biased=biased))
    given = [x.detach() if isinstance(x, Tensor) else x for x in arguments(case)]
    out, log_mass = fused_states.state_attention(*given)
    torch.library.opcheck(
        fused_states.state_attention_gradients, (case.grad_out, out, log_mass, *given)
    )


def module_and_inputs(**options: Any) -> tuple[DynamicDomainState, tuple[Any, ...]]:
    case = draw(SPEC)
    grouping = DomainGrouping.from_jagged(case.domains, case.offsets, 2)
    reads = StateReads(grouping, case.times, case.next_times, 2)
    module = DynamicDomainState(6, 2, 2, 3, 4, states_per_domain=2, **options)
    hidden, states = torch.randn(2, len(case.domains), 6)
    return module, (hidden, states, reads, case.domains)


def fail(*_args: Any, **_named: Any) -> Tensor:
    raise AssertionError("the other implementation was called")


@on_a_cpu
@pytest.mark.parametrize("impl", ["auto", "triton", "eager", "reference"])
def test_which_implementation_runs(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's choice reaches the operator; "auto" means plain PyTorch on a CPU."""
    module, inputs = module_and_inputs(impl=impl)
    for name in ("reference", "eager", "triton"):
        if name != ("eager" if impl == "auto" else impl):
            monkeypatch.setitem(api._IMPLS, name, fail)
    assert module(*inputs).shape == (8, 8)


@on_a_cpu
@pytest.mark.parametrize(
    ("dtype", "width", "runs"),
    [
        (torch.float32, 256, "triton"),
        (torch.bfloat16, 5, "triton"),
        (torch.float64, 5, "eager"),
        (torch.float32, 257, "eager"),
    ],
)
def test_auto_takes_the_kernels_on_a_gpu_where_they_fit(
    dtype: torch.dtype, width: int, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both operators; tensors without contents pass for those of a GPU."""
    case, ran = draw(SPEC), []
    reads, module = case.reads(), import_module("hstu_xd.ops.domain_attention.api")
    for impls in (api._IMPLS, module._IMPLS["silu"]):
        for name in ("reference", "eager", "triton"):
            monkeypatch.setitem(impls, name, lambda *_, name=name, **__: ran.append(name))
    with FakeTensorMode():
        q = torch.empty(8, 1, 2, dtype=dtype, device="cuda")
        v = torch.empty(8, 1, width, dtype=dtype, device="cuda")
        k, wide = (torch.empty(10, 1, x, dtype=dtype, device="cuda") for x in (2, width))
    ops.state_attention(q, k, wide, reads)
    ops.domain_attention(q, q, v, reads.grouping, norm_length=9)
    assert ran == [runs, runs]


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        sizes = [x.nbytes for x in tree_leaves(given) if isinstance(x, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return given


@on_a_cpu
def test_no_tensor_holds_the_states_of_every_token() -> None:
    """(L, D, M, d) would be 40 * 64 * 2 * 5 numbers, 102,400 bytes."""
    from hstu_xd.ops.state_attention import triton_launch

    case = draw(Spec((40,), 64, 2, heads=1, biased=False))
    *tensors, table, tile, states_per_domain = arguments(case)
    layout = StateTable(*table, tile=tile, states_per_domain=states_per_domain)
    inputs = StateKernelInputs(*(x if x is None else x.detach() for x in tensors), layout)
    with LargestTensor() as seen:
        out, log_mass = triton_launch.forward(inputs)
        triton_launch.gradients(case.grad_out, out, log_mass, inputs)
    # Gradients of initial states are summed in two shares here.
    assert 0 < seen.bytes <= 2 * 64 * 7 * 4


@on_a_cpu
def test_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(SPEC)
    reads = case.reads()
    with pytest.raises(InputError, match=r"q is torch.float64; impl 'triton' needs float32"):
        fused_state_attention(**case.leaves(torch.float64), reads=reads)
    wide = torch.zeros(8, 1, 257)
    with pytest.raises(InputError, match="q has heads of width 257; impl 'triton' takes up to 256"):
        fused_state_attention(wide, wide, wide, reads)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="q is on cpu; impl 'triton' needs a CUDA device, or"):
        fused_state_attention(**case.leaves(torch.float32), reads=reads)
