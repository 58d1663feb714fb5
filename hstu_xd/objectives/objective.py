"""The contract of an objective: the loss a trainer minimises, and what ranks items for a user.

Trainer, evaluation, recommendation and serving ask an objective and nothing else. One of your own
is any object with the members of :class:`Objective`; examples/own_parts shows one.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hstu_xd.batch import JaggedBatch
from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU

# Given the (C,) ids of items, a function from (Q, K) user vectors to (Q, C) scores.
Scorer = Callable[[Tensor], Callable[[Tensor], Tensor]]

# Given the (Q,) ranks of targets from 1, a number for each: (Q,).
Metric = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """What a model is trained for."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Further functions of ranks by name, reported beside hr, ndcg and mrr; may be empty."""
        ...

    def loss(
        self,
        model: CrossDomainHSTU,
        batch: JaggedBatch,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the loss of a batch, summed over its tokens.

        The whole call runs under the run's autocast; what needs float32 switches it off.

        Args:
            model: ``model(batch)`` gives (L, K) user vectors, one a token, and
                ``model.item_vectors(ids)`` those of items.
            batch: histories, on the device of the model.
            targets: (L,) int64, the item that follows each token.
            generator: on the CPU, seeded by the step and the same in every process of a job; draws
                from it alone repeat after a resume.

        Returns:
            Scalar; the trainer divides it by the number of tokens of all processes.
        """
        ...

    def scorer(self, model: CrossDomainHSTU) -> Scorer:
        """Return what ranks items for user vectors: see :data:`Scorer`."""
        ...


@runtime_checkable
class PreparesBatches(Protocol):
    """An objective that readies batches on the host, before they are copied to a GPU: optional."""

    def prepare(
        self,
        catalog: DomainCatalog,
        batch: JaggedBatch,
        targets: Tensor,
        generator: torch.Generator,
    ) -> JaggedBatch:
        """Return the batch with what the loss is to find in it.

        Args:
            catalog: item -> domain table.
            batch: histories, on the CPU; of this process alone.
            targets: (L,) int64, the item that follows each token.
            generator: the one that the loss gets next; every process of a job has to draw as much
                from it, whatever its batch.
        """
        ...


class DotProduct:
    """Score items by the dot products of user vectors with their vectors.

    Args:
        item_vectors: (C,) int64 item ids -> (C, K) float.

    Example:
        >>> table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
        >>> scores = DotProduct(lambda items: table[items])(torch.tensor([1, 2]))
        >>> scores(torch.tensor([[0.0, 1.0]]))
        tensor([[0.0000, 0.8000]])
    """

    def __init__(self, item_vectors: Callable[[Tensor], Tensor]) -> None:
        self.item_vectors = item_vectors

    def __call__(self, items: Tensor) -> Callable[[Tensor], Tensor]:
        """Prepare (C,) int64 items: a function from (Q, K) user vectors to (Q, C) scores."""
        vectors = self.item_vectors(items).T
        return lambda users: users @ vectors


def check_objective(objective: Any, name: str) -> None:
    """Refuse what is no objective.

    Args:
        objective: what was given.
        name: how the user wrote it.

    Raises:
        InputError: a method is missing, ``metrics`` is no mapping, or there are parameters, which
            nothing would train or store.
    """
    missing = [x for x in ("loss", "scorer") if not callable(getattr(objective, x, None))]
    missing += [] if hasattr(objective, "metrics") else ["metrics"]
    if missing or isinstance(objective, type):
        given = (
            f"the class {objective.__name__}"
            if isinstance(objective, type)
            else f"a {type(objective).__name__} without {' and '.join(missing)}"
        )
        raise InputError(
            f"xd_train.objective = {name} is {given}; an object with loss(model, batch, targets, "
            "generator), scorer(model) and metrics is needed: xd_train.objective = @my_objective()"
        )
    if not isinstance(objective.metrics, Mapping):
        raise InputError(
            f"xd_train.objective = {name}: metrics is a {type(objective.metrics).__name__}; a "
            "dictionary of functions of ranks by name is needed, {} for none"
        )
    if isinstance(objective, nn.Module) and any(True for _ in objective.parameters()):
        raise InputError(
            f"xd_train.objective = {name} has parameters of its own, which would be neither "
            "trained nor stored; put them into a layer: xd_encoder.layer = @MyLayer"
        )
