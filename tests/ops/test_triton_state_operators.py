"""The fused DDSR as PyTorch sees it: registered, chosen, refused; and how much memory it takes."""

from typing import Any

import pytest
import torch
from state_cases import Case, Spec, draw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_marks import needs_triton, on_a_cpu

from hstu_xd.errors import InputError
from hstu_xd.model import ddsr
from hstu_xd.model.ddsr import DynamicDomainState
from hstu_xd.ops.domain_attention import fused
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.state_attention import fused as fused_states
from hstu_xd.ops.state_attention.fused import fused_state_attention
from hstu_xd.ops.state_attention.state_reads import StateReads
from hstu_xd.ops.state_attention.state_table import StateTable

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
    torch.library.opcheck(fused.state_attention, arguments(draw(spec)))


@on_a_cpu
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_opcheck_of_the_gradients(biased: bool) -> None:
    case = draw(Spec((5, 0, 3), 2, 2, heads=1, dqk=2, dv=3, biased=biased))
    given = [x.detach() if isinstance(x, Tensor) else x for x in arguments(case)]
    out, log_mass = fused_states.state_attention(*given)
    torch.library.opcheck(fused.state_attention_gradients, (case.grad_out, out, log_mass, *given))


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
@pytest.mark.parametrize(
    ("impl", "suitable", "unused"),
    [
        ("auto", True, "state_attention"),
        ("triton", False, "state_attention"),
        ("auto", False, "fused_state_attention"),
        ("eager", True, "fused_state_attention"),
        ("reference", True, "fused_state_attention"),
    ],
)
def test_which_implementation_runs(
    impl: str, suitable: bool, unused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "auto" follows ``fused.suits``, which says yes to tensors on a CUDA device."""
    module, inputs = module_and_inputs(impl=impl)
    monkeypatch.setattr(fused, "suits", lambda q, v: suitable)
    monkeypatch.setattr(ddsr, unused, fail)
    assert module(*inputs).shape == (8, 8)


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
    inputs = fused_states.Inputs(*(x if x is None else x.detach() for x in tensors), layout)
    with LargestTensor() as seen:
        out, log_mass = triton_launch.forward(inputs)
        triton_launch.gradients(case.grad_out, out, log_mass, inputs)
    # Gradients of initial states are summed in two shares here.
    assert 0 < seen.bytes <= 2 * 64 * 7 * 4


@on_a_cpu
def test_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(SPEC)
    leaves = case.leaves(torch.float64)
    with pytest.raises(InputError, match=r"q is torch.float64; impl 'triton' needs float32"):
        fused_state_attention(leaves["q"], leaves["k"], leaves["v"], case.table())
    wide = torch.zeros(8, 1, 257)
    with pytest.raises(InputError, match="q has heads of width 257; impl 'triton' takes up to 256"):
        fused_state_attention(wide, wide, wide, case.table())
    monkeypatch.delenv("TRITON_INTERPRET")
    leaves = case.leaves(torch.float32)
    with pytest.raises(InputError, match="q is on cpu; impl 'triton' needs a CUDA device, or"):
        fused_state_attention(leaves["q"], leaves["k"], leaves["v"], case.table())
