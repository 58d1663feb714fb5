"""What every training loop has: epochs until their number or the patience runs out.

A request to stop is met between two steps: what was done is saved, and a resumed run goes on there.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from hstu_xd.errors import Interrupted
from hstu_xd.training.interruption import StopRequest, signal_name
from hstu_xd.training.metrics_log import MetricsLog


@dataclass
class EpochProgress:
    """Where a training stands; stored with every resumable checkpoint.

    Attributes:
        epoch: that is under way, counted from 0, and so how many are finished.
        step: steps that are finished.
        best: the metric that picks the epoch, of the best one.
        best_epoch: that one; -1 before any is finished.
        loss_sum: loss of the epoch that is under way.
        train_seconds: spent in steps.
        metrics_bytes: of the metrics file when the last epoch was finished.
    """

    epoch: int = 0
    step: int = 0
    best: float = 0.0
    best_epoch: int = -1
    loss_sum: float = 0.0
    train_seconds: float = 0.0
    metrics_bytes: int = 0


@dataclass
class Progress(EpochProgress):
    """Where a training stands, by users and events.

    The place in an epoch is counted in users: steps depend on the number of processes.
    """

    users_in_epoch: int = 0
    loss_tokens: int = 0
    train_events: int = 0

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any], users_per_step: int) -> "Progress":
        """Read the progress of a checkpoint; old ones count the steps of an epoch instead."""
        values = dict(stored)
        steps = values.pop("step_in_epoch", 0)
        return cls(**{"users_in_epoch": steps * users_per_step} | values)


P = TypeVar("P", bound=EpochProgress)


class EpochTraining(ABC, Generic[P]):
    """Trains epoch by epoch; its subclasses say what an epoch is.

    Args:
        progress: at its beginning.
        log: of the run's metrics.
        num_epochs: most of them.
        patience: epochs without a better one before the training stops.

    Attributes:
        progress: of the training.
    """

    def __init__(self, progress: P, log: MetricsLog, num_epochs: int, patience: int) -> None:
        self.progress, self._log, self._request = progress, log, StopRequest()
        self._num_epochs, self._patience = num_epochs, patience

    @property
    def is_trained(self) -> bool:
        """Whether the epochs or the patience have run out."""
        progress = self.progress
        out_of_patience = progress.epoch - progress.best_epoch > self._patience
        return progress.epoch >= self._num_epochs or out_of_patience

    @abstractmethod
    def _train_epoch(self) -> None:
        """Take the steps of an epoch that are left."""

    @abstractmethod
    def _finish_epoch(self, began: float) -> None:
        """Measure an epoch, keep the best one, and save; ``began`` is when it did."""

    @abstractmethod
    def _save(self) -> None:
        """Write what a resumed run goes on with."""

    def _train_epochs(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: a signal asked to stop; what was done is saved.
        """
        try:
            while not self.is_trained:
                began = time.perf_counter()
                self._train_epoch()
                self._finish_epoch(began)
        except Interrupted:
            self._save()
            raise

    def _stop(self, number: int) -> NoReturn:
        """Leave because of a signal of this number."""
        progress = self.progress
        raise Interrupted(
            f"stopped by {signal_name(number)} after {progress.step:,} steps, in epoch "
            f"{progress.epoch}",
            number,
        )

    def _is_best(self, found: float) -> bool:
        """Note the epoch's metric; return whether it is the best so far, as the first always is."""
        progress = self.progress
        # A user's metric may be below any number.
        if progress.best_epoch >= 0 and found <= progress.best:
            return False
        progress.best, progress.best_epoch = found, progress.epoch
        return True

    @property
    def _best_told(self) -> str:
        """Say how the epoch's metric stands to the best."""
        progress = self.progress
        return "the best" if progress.best_epoch == progress.epoch else f"best {progress.best:.4f}"
