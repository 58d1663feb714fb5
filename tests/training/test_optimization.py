"""The optimiser, and the item table's gradient, sparse from look-ups and dense for it."""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from hstu_xd.model.featured_items import FeaturedItemEmbedding, FeatureTable
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.inputs import ItemEmbedding
from hstu_xd.training.optimization import AdamW, optimizer_of
from hstu_xd.training.settings import TrainSettings

ITEMS, WIDTH = 300, 8


def featured() -> FeaturedItemEmbedding:
    draw = torch.Generator().manual_seed(1)
    table = FeatureTable(
        categories={"brand": ["a", "b", "c"]},
        widths={"price": 1},
        codes=torch.randint(4, (ITEMS + 1, 1), generator=draw),
        numbers=torch.rand(ITEMS + 1, 1, generator=draw),
        is_met=torch.rand(ITEMS + 1, generator=draw) < 0.9,
    )
    return FeaturedItemEmbedding(ITEMS, WIDTH, table, row_dropout=0.0)


def read_twice(table: ItemEmbedding, step: int) -> Tensor:
    """Read a few rows for the input and a few for the loss, some of them in both and twice."""
    draw = torch.Generator().manual_seed(step)
    first, second = (torch.randint(1, 40, (30,), generator=draw) + 7 * step for _ in range(2))
    return (table(first) * table(second).roll(1, 0)).square().sum()


def read_whole(table: ItemEmbedding, step: int) -> Tensor:
    """Read rows, and the table as it is beside."""
    return read_twice(table, step) + next(table.parameters()).sin().sum()


def nothing_at_times(table: ItemEmbedding, step: int) -> Tensor:
    return read_twice(table, step) if step % 2 else table(torch.tensor([2])).detach().sum()


def trained(
    model: CrossDomainHSTU, loss: Callable[[ItemEmbedding, int], Tensor], *, sparse: bool
) -> list[Tensor]:
    model = copy.deepcopy(model)
    settings = TrainSettings(learning_rate=0.1, weight_decay=0.1)
    optimizer = optimizer_of(model, settings, sparse_table=sparse)
    found = []
    for step in range(6):
        optimizer.zero_grad(set_to_none=True)
        value = loss(model.item_table, step)
        if value.requires_grad:
            value.backward()
        optimizer.step()
        found += [x.detach().clone() for x in model.item_table.parameters()]
    return found


@pytest.mark.parametrize("loss", [read_twice, nothing_at_times])
@pytest.mark.parametrize("make", [lambda: ItemEmbedding(ITEMS, WIDTH), featured])
def test_sparse_gradients_train_the_table_as_dense_ones_do(
    make: Callable[[], ItemEmbedding], loss: Callable[[ItemEmbedding, int], Tensor]
) -> None:
    torch.manual_seed(0)
    model = tiny_model()
    model._embedding_module = make()
    dense, sparse = (trained(model, loss, sparse=sparse) for sparse in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(dense, sparse, strict=True))
    assert not torch.equal(dense[0], dense[-1])


def test_a_loss_on_the_table_itself_is_trained_as_well() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    model._embedding_module = ItemEmbedding(ITEMS, WIDTH)
    dense, sparse = (trained(model, read_whole, sparse=sparse) for sparse in (False, True))
    for x, y in zip(dense, sparse, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_a_step_holds_one_gradient_of_the_whole_table() -> None:
    model = tiny_model()
    model._embedding_module = ItemEmbedding(ITEMS, WIDTH)
    optimizer = optimizer_of(model, TrainSettings(), sparse_table=True)
    (weight,) = model.item_table.parameters()
    held = set()
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        read_twice(model.item_table, step).backward()
        assert weight.grad is not None
        assert weight.grad.is_sparse
        assert weight.grad.coalesce().indices().shape[1] < ITEMS / 2
        optimizer.step()
        assert weight.grad.layout == torch.strided
        held.add(weight.grad.data_ptr())
    assert len(held) == 1


STEPS = """
import sys, torch
from hstu_xd.training.optimization import AdamW
weight = torch.nn.Parameter(torch.ones(4))
optimizer = AdamW([weight], fused=True)
for _ in range(2):
    optimizer.zero_grad()
    weight.square().sum().backward()
    optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
sys.exit("torch._dynamo" in sys.modules or bool((weight == 1).any()))
"""


def test_training_does_not_wait_for_the_compiler() -> None:
    assert subprocess.run([sys.executable, "-c", STEPS], check=False).returncode == 0


def test_steps_are_those_of_torch() -> None:
    found = []
    for kind in (torch.optim.AdamW, AdamW):
        torch.manual_seed(0)
        weight, late = (torch.nn.Parameter(torch.randn(5)) for _ in range(2))
        called: list[object] = []
        optimizer = kind([weight], lr=0.1, fused=True)
        optimizer.add_param_group({"params": [late], "lr": 0.2})
        optimizer.register_step_pre_hook(lambda *_, called=called: called.append(_))
        for step in range(4):
            optimizer.zero_grad(set_to_none=step != 2)
            (weight.sin().sum() + late.cos().sum() * step).backward()
            optimizer.step()
            if step == 1:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert len(called) == 4
        assert weight.requires_grad
        found.append(torch.cat([weight.detach(), late.detach()]))
    assert torch.equal(*found)
