"""What stands in for PyTorch's own on a CPU gives the same numbers: dropout and look-ups."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hstu_xd.model.inputs import dropout, look_up


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
    for found in (table(ids), look_up(table, ids)):
        assert torch.equal(found, table(ids))
        gradients += torch.autograd.grad((found * weights).sum(), table.weight)
    assert torch.equal(*gradients)
