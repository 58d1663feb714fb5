"""What stands in for PyTorch's own gives its numbers: dropout, look-ups, unit vectors."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from torch.nn import functional

from hstu_xd.model.inputs import TransitionAwarePositionalEmbedding, dropout, look_up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.999])
def test_dropout_draws_as_pytorch_does(rate: float, dtype: torch.dtype) -> None:
    x = torch.randn(70, 1030, dtype=dtype)
    torch.manual_seed(5)
    expected, following = functional.dropout(x, rate), torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, rate=rate, training=True), expected)
    assert torch.equal(torch.rand(3), following)  # as many draws
    assert dropout(x, rate=rate, training=False) is x


def test_dropped_entries_have_no_gradient() -> None:
    x = torch.ones(1000, requires_grad=True)
    out = dropout(x, rate=0.4, training=True)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())


@pytest.mark.parametrize("shape", [(0,), (300,), (7, 40)])
def test_a_look_up_is_the_table_s_own(shape: tuple[int, ...]) -> None:
    table = nn.Embedding(50, 16)
    ids = torch.randint(50, shape)
    weights = torch.randn(*shape, 16)
    gradients = []
    for found in (table(ids), look_up(table.weight, ids)):
        assert torch.equal(found, table(ids))
        gradients += torch.autograd.grad((found * weights).sum(), table.weight)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("width", [16, 25, 64])
def test_unit_vectors_are_pytorch_s_short_ones_too(width: int) -> None:
    x = torch.randn(300, width) * torch.logspace(-9, 2, 300).unsqueeze(1)
    x[7] = 0
    x.requires_grad_()
    weights = torch.randn(300, width)
    gradients = []
    expected = functional.normalize(x, dim=-1, eps=1e-6)
    for found in (expected, tiny_model().unit_vectors(x)):
        assert torch.equal(found, expected)
        gradients += torch.autograd.grad((found * weights).sum(), x)
    assert torch.equal(*gradients)


def test_several_threads_sum_the_gradients_of_transitions_in_one_order() -> None:
    tape = TransitionAwarePositionalEmbedding(4, 64)
    nn.init.ones_(tape.get_parameter("_scale"))
    domains, targets = torch.randint(4, (2, 20_000))
    weights, threads = torch.randn(20_000, 64), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, *others = (
            torch.autograd.grad((tape(domains, targets) * weights).sum(), list(tape.parameters()))
            for _ in range(8)
        )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
