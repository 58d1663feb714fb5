"""Some tokens alone as queries: answers and gradients are those of all tokens at these rows."""

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Spec, draw, whole_tensor, worst_row
from kernel_cases import poisoned_memory
from native_marks import needs_compiler
from state_cases import Spec as StateSpec
from state_cases import draw as draw_states
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.ops import available_impls, available_state_impls, domain_attention, state_attention
from hstu_xd.ops.grouping import DomainGrouping, num_pairs
from hstu_xd.ops.state_attention.state_reads import StateReads

LENGTHS = (0, 1, 2, 70, 17, 0, 33)
SPECS = [
    Spec(LENGTHS, visited=visited, target_view=target, biased=biased, softmax=softmax)
    for visited, target, biased in ((3, False, True), (2, True, True), (2, True, False))
    for softmax in (False, True)
]
CASES = [
    (spec, impl)
    for spec in SPECS
    for impl in available_impls("softmax" if spec.softmax else "silu")
    if impl not in ("flex", "triton") or not (spec.biased or impl == "triton")
]
NUMBER = sum(LENGTHS)


def drawn_tokens(number: int) -> Tensor:
    return torch.randperm(NUMBER, generator=torch.Generator().manual_seed(number))[:number]


EVERY = [drawn_tokens(0), drawn_tokens(1), drawn_tokens(40), drawn_tokens(NUMBER)]
every_choice = pytest.mark.parametrize("tokens", EVERY, ids=lambda tokens: str(len(tokens)))


def attended(
    case: Case, impl: str, tokens: Tensor, dtype: torch.dtype, *, alone: bool
) -> dict[str, Tensor]:
    """Outputs at tokens, and gradients of the leaves; ``alone``: no other token is a query."""
    leaves = case.tensors(dtype)
    grouping, numbers = case.grouping(), [leaves[name] for name in "qkv"]
    if alone:
        grouping = grouping.asking(tokens)
        sides = grouping, grouping.keys, grouping.keys
        numbers = [side.of_tokens(x) for side, x in zip(sides, numbers)]
    out = domain_attention(
        *numbers,
        grouping,
        norm_length=case.norm_length,
        bias=case.relative_bias(leaves),
        normalization="softmax" if case.spec.softmax else "silu",
        impl=impl,
    )
    out = out if alone else out[tokens]
    if impl == "flex":
        return {"out": out}  # it has no gradients on a CPU
    grad_out = torch.from_numpy(case.grad_out).to(dtype)[tokens]
    found = torch.autograd.grad(out, list(leaves.values()), grad_out, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, found))}


@pytest.mark.parametrize(("spec", "impl"), CASES, ids=str)
@every_choice
def test_attention_is_that_of_all_tokens(spec: Spec, impl: str, tokens: Tensor) -> None:
    case = draw(spec)
    with torch.set_grad_enabled(impl != "flex"), poisoned_memory():
        found = attended(case, impl, tokens, torch.float32, alone=True)
    needed = attended(case, "reference", tokens, torch.float64, alone=False)
    compare(found, needed)


def compare(found: dict[str, Tensor], needed: dict[str, Tensor]) -> None:
    for name, x in found.items():
        measure, budget = (worst_row, 1e-5) if name == "out" else (whole_tensor, 2e-5)
        exact = needed[name].numpy()
        assert x.shape == exact.shape
        assert measure(x, exact, None) <= budget if exact.any() else not x.any(), name


@needs_compiler
@pytest.mark.parametrize("spec", [s for s in SPECS if not s.softmax], ids=str)
def test_the_loops_in_c_add_in_the_same_order(spec: Spec) -> None:
    tokens = drawn_tokens(40)
    alone, every = (
        attended(draw(spec), "native", tokens, torch.float32, alone=alone)["out"]
        for alone in (True, False)
    )
    assert torch.equal(alone, every)


STATES = [
    StateSpec(LENGTHS, 4, num_states, visited=visited, biased=biased)
    for num_states, visited, biased in ((1, 4, True), (3, 3, True), (3, 4, False))
]


def answered(
    spec: StateSpec,
    impl: str,
    tokens: Tensor,
    dtype: torch.dtype,
    *,
    alone: bool,
    narrowed: bool = True,
) -> dict[str, Tensor]:
    """What :func:`attended` returns, of the domain states."""
    case = draw_states(spec)
    leaves, reads = case.leaves(dtype), case.reads()
    q, *memory = (leaves[name] for name in "qkv")
    if alone:
        reads = reads.asking(tokens, narrowed=narrowed)
        rows = torch.cat([reads.asked.states, torch.arange(NUMBER, NUMBER + spec.num_domains)])
        q, memory = q[tokens], [x[rows] for x in memory]
    out = state_attention(q, *memory, reads, bias=leaves.get("bias"), impl=impl)
    out = out if alone else out[tokens]
    grad_out = case.grad_out.to(dtype)[tokens]
    found = torch.autograd.grad(out, list(leaves.values()), grad_out, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, found))}


@pytest.mark.parametrize("spec", STATES, ids=str)
@pytest.mark.parametrize("impl", [x for x in available_state_impls() if x != "triton"])
@pytest.mark.parametrize("narrowed", [True, False])
@every_choice
def test_states_answer_as_they_answer_all_tokens(
    spec: StateSpec, impl: str, narrowed: bool, tokens: Tensor
) -> None:
    with poisoned_memory():
        found = answered(spec, impl, tokens, torch.float32, alone=True, narrowed=narrowed)
    compare(found, answered(spec, "reference", tokens, torch.float64, alone=False))


def grouped() -> DomainGrouping:
    domains, offsets = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 3, 5])
    return DomainGrouping.from_jagged(domains, offsets, 2)


def test_pairs_are_those_of_the_queries() -> None:
    assert num_pairs(grouped().asking(torch.tensor([2, 0, 4]))) == 2 + 1 + 2


def test_a_rule_knows_the_tokens() -> None:
    """It is asked for tokens of the batch, whatever numbers the queries have."""
    ruled = replace(grouped(), rule=lambda query, key: (query + key) % 3 > 0)
    tokens = torch.tensor([4, 2, 0])
    x = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0))
    for impl in ("reference", "eager"):
        needed = domain_attention(x, x, x, ruled, norm_length=3, impl=impl)[tokens]
        asked = ruled.asking(tokens)
        read = asked.keys.of_tokens(x)
        found = domain_attention(x[tokens], read, read, asked, norm_length=3, impl=impl)
        torch.testing.assert_close(found, needed)
    assert num_pairs(ruled.asking(tokens)) == 4


def test_a_token_is_asked_once() -> None:
    with pytest.raises(InputError, match="3 tokens are asked for, 2 different ones; name each"):
        grouped().asking(torch.tensor([1, 0, 1]))


def test_queries_of_another_number() -> None:
    asked, x = grouped().asking(torch.tensor([1])), torch.ones(5, 1, 4)
    with pytest.raises(InputError, match=r"q has shape \(5, 1, 4\);.* with L=1 tokens"):
        domain_attention(x, x, x, asked, norm_length=3)
    with pytest.raises(InputError, match=r"k has shape \(5, 1, 4\);.* with L=1 tokens"):
        domain_attention(x[:1], x, x, asked, norm_length=3)
    times = torch.arange(5)
    reads = StateReads(grouped(), times, times, 1).asking(torch.tensor([1]))
    with pytest.raises(InputError, match=r"q has shape \(5, 1, 4\); \(1, heads, width\)"):
        state_attention(x, torch.ones(7, 1, 4), torch.ones(7, 1, 4), reads)
