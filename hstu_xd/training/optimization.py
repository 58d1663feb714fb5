"""How weights follow their gradients: AdamW, the learning rate's schedule, averaged weights."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hstu_xd.model.hstu import CrossDomainHSTU

SCHEDULES = ("constant", "linear", "cosine")
_BETAS = (0.9, 0.98)
_AVERAGED = "averaged."
Tensors = tuple[Tensor, ...] | list[Tensor]


class AdamW(torch.optim.AdamW):
    """torch's AdamW without its import of torch's compiler, which takes seconds of every training.

    torch imports it in order to keep it away from these methods, which nothing here compiles.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def optimizer_of(model: CrossDomainHSTU, train: Any, *, sparse_table: bool = False) -> AdamW:
    """Make the optimiser of a training.

    Args:
        model: on its device.
        train: :class:`hstu_xd.training.settings.TrainSettings`.
        sparse_table: have the item table give sparse gradients, see :class:`RowGradients`.
    """
    table = list(model.item_table.parameters())
    in_table = set(map(id, table))
    rest = [x for x in model.parameters() if id(x) not in in_table]
    decay = train.weight_decay
    optimizer = AdamW(
        [
            {"params": table, "weight_decay": decay * train.embedding_decay_share},
            {"params": rest, "weight_decay": decay},
        ],
        lr=train.learning_rate,
        betas=_BETAS,
        fused=True,
    )
    if sparse_table:
        rows = RowGradients(model.item_table.give_sparse_gradients())
        optimizer.register_step_pre_hook(lambda *_: rows.spread())
    return optimizer


class RowGradients:
    """The dense gradient of a table that gives sparse ones, in memory that is kept.

    A step reads few rows of a large table. Autograd's dense gradients would be zeros of the whole
    table, twice a step, in memory that the system has to find each time.

    Args:
        table: (I, K), a leaf.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._dense: Tensor | None = None
        self._rows = torch.empty(0, dtype=torch.int64)

    def spread(self) -> None:
        """Put the dense gradient in the place of the sparse one; a dense one stays."""
        gradient = self._table.grad
        if gradient is None or not gradient.is_sparse:
            return
        if self._dense is None:
            self._dense = torch.zeros_like(self._table)
        gradient = gradient.coalesce()
        self._dense.index_fill_(0, self._rows, 0)
        self._rows = gradient.indices()[0]
        self._table.grad = self._dense.index_copy_(0, self._rows, gradient.values())


def rate_at(train: Any, step: int, done: float) -> float:
    """Return the learning rate of a step: linear warm-up, then the schedule's way down.

    Args:
        train: :class:`hstu_xd.training.settings.TrainSettings`.
        step: steps taken before this one.
        done: share of the training that was over before this step, in 0..1.

    Example:
        >>> from hstu_xd.training.settings import TrainSettings
        >>> train = TrainSettings(learning_rate=1.0, learning_rate_schedule="cosine")
        >>> [round(rate_at(train, 500, done), 3) for done in (0, 0.25, 0.5, 1)]
        [1.0, 0.854, 0.5, 0.0]
    """
    left = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
    }[train.learning_rate_schedule]
    share = train.final_rate_share
    warm = min(1.0, (step + 1) / max(1, train.num_warmup_steps))
    return train.learning_rate * warm * (share + (1 - share) * left)


class WeightAverage:
    """An exponential moving average of a model's weights, which is evaluated and saved for it.

    It begins with the weights after the first step. After ``n`` steps it keeps at most
    ``(1 + n) / (10 + n)`` of itself, so that a short training is not averaged with its beginning.

    Args:
        model: that is trained.
        decay: what the average keeps of itself in a step at most, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._of = model

        def take_in(averaged: Tensors, new: Tensors, steps: Tensor | int) -> None:
            kept = min(decay, (1 + int(steps)) / (10 + int(steps)))
            get_ema_multi_avg_fn(kept)(averaged, new, steps)

        self._averaged = AveragedModel(model, multi_avg_fn=take_in)

    @property
    def model(self) -> Any:
        """The model of averaged weights."""
        return self._averaged.module

    def update(self) -> None:
        """Take in the weights after a step."""
        self._averaged.update_parameters(self._of)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a resumable state holds of it."""
        return {f"{_AVERAGED}{k}": v for k, v in self._averaged.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what :meth:`tensors` returned, out of a whole state."""
        own = {k.removeprefix(_AVERAGED): v for k, v in tensors.items() if k.startswith(_AVERAGED)}
        self._averaged.load_state_dict(own)
