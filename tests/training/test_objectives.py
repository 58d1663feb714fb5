"""Objectives: the default one is the sampled softmax, and what a sampler of one's own may draw."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_loss import NothingIsReadBack
from tiny_models import draw_histories, tiny_model, to_batch
from torch import Tensor, nn

from hstu_xd.errors import InputError
from hstu_xd.objectives.objective import DotProduct, check_objective
from hstu_xd.objectives.retrieval import Retrieval, sample_negatives
from hstu_xd.objectives.sampled_softmax import count_per_domain, sampled_softmax_loss


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def targets_of(domains: Tensor) -> Tensor:
    """The first item of each domain: tiny catalogues number domains in turn."""
    return domains + 1


@pytest.mark.parametrize("scope", ["domain", "catalogue"])
def test_retrieval_is_the_sampled_softmax_to_the_bit(scope: str) -> None:
    model, batch = tiny_model(ddsr=True), to_batch(draw_histories([5, 0, 9]))
    targets = targets_of(batch.target_domains)
    found = Retrieval(scope, 5, 0.1).loss(model, batch, targets, generator())
    negatives = sample_negatives(model.catalog, 5, generator(), scope=scope)
    expected = sampled_softmax_loss(model, model(batch), targets, negatives, temperature=0.1)
    assert found.item() == expected.item() > 0
    counts = count_per_domain(batch.target_domains, model.catalog.num_domains)
    known = replace(batch, targets_per_domain=tuple(counts)).to(torch.device("cpu"))
    assert Retrieval(scope, 5, 0.1).loss(model, known, targets, generator()).item() == found.item()


def test_a_step_of_the_objective_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for its encoder, which is tested by itself."""
    model, batch = tiny_model(), to_batch(draw_histories([5, 9]))
    counts = count_per_domain(batch.target_domains, model.catalog.num_domains)
    batch = replace(batch, targets_per_domain=tuple(counts))
    vectors = model(batch).detach().requires_grad_()
    monkeypatch.setattr(model, "forward", lambda batch: vectors)
    with NothingIsReadBack():
        Retrieval().loss(model, batch, targets_of(batch.target_domains), generator()).backward()
    assert vectors.grad is not None


def test_a_sampler_of_ones_own_draws_the_negatives() -> None:
    model, batch = tiny_model(), to_batch(draw_histories([5, 9]))
    targets = targets_of(batch.target_domains)

    def sampler(catalog: Any, count: int, generator: torch.Generator) -> list[Tensor]:
        assert count == 3
        return [catalog.items_of(d)[torch.tensor([4, 1, 1])] for d in range(catalog.num_domains)]

    found = Retrieval(sampler, 3, 0.1).loss(model, batch, targets, generator())
    negatives = [model.catalog.items_of(d)[[1, 4]] for d in range(model.catalog.num_domains)]
    expected = sampled_softmax_loss(model, model(batch), targets, negatives, temperature=0.1)
    assert found.item() == expected.item()


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (None, "returned a NoneType; a list of 3 int64 tensors"),
        ([torch.tensor([1]), torch.tensor([2])], "returned 2 tensors; a list of 3"),
        ([torch.tensor([1.0])], r"returned torch.float32 of shape \(1,\)"),
        ([3], "returned 3; a list of 3"),
        ([torch.tensor([], dtype=torch.int64)], "returned none for domain 0"),
    ],
)
def test_what_a_sampler_may_not_return(drawn: Any, message: str) -> None:
    model, batch = tiny_model(), to_batch(draw_histories([5]))
    objective = Retrieval(lambda catalog, count, generator: drawn)
    with pytest.raises(InputError, match=message):
        objective.loss(model, batch, targets_of(batch.target_domains), generator())


def test_scores_are_dot_products_of_unit_vectors() -> None:
    model = tiny_model()
    items, users = torch.tensor([1, 5, 2]), torch.randn(2, 16)
    scorer = Retrieval().scorer(model)
    assert isinstance(scorer, DotProduct)
    assert torch.equal(scorer(items)(users), users @ model.item_vectors(items).T)


class Whole:
    """An objective with everything that is needed."""

    def __init__(self) -> None:
        self.metrics: Any = {}

    def loss(self, model: Any, batch: Any, targets: Any, generator: Any) -> Tensor:
        return torch.zeros(())

    def scorer(self, model: Any) -> Any:
        return None


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.zeros(()))
        self.metrics: dict[str, Any] = {}
        self.loss = self.scorer = lambda *given: given


def without(name: str) -> Any:
    return type("Partial", (Whole,), {name: None})()


def with_list() -> Any:
    objective = Whole()
    objective.metrics = [len]
    return objective


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: without("loss"), "is a Partial without loss; an object with loss"),
        (lambda: without("scorer"), "is a Partial without scorer"),
        (lambda: len, "without loss and scorer and metrics"),
        (lambda: Whole, "is the class Whole; .*@my_objective()"),
        (with_list, "metrics is a list; a dictionary"),
        (Learned, "has parameters of its own"),
    ],
)
def test_what_is_no_objective_is_refused(make: Callable[[], Any], message: str) -> None:
    check_objective(Whole(), "@x()")
    with pytest.raises(InputError, match=message):
        check_objective(make(), "@x()")
