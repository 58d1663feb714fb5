"""The steps of an epoch: how many users each takes, and where a training stands among them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hstu_xd.training.epochs import EpochProgress
from hstu_xd.training.settings import TrainSettings

# Where the users of a step follow from its events: the fewest of them, and the steps of an epoch.
_FEWEST_USERS, _STEPS_OF_EPOCH = 32, 32


def users_per_step(settings: TrainSettings, events: np.ndarray) -> int:
    """Return how many users a process takes in a step.

    Users of some logs have a handful of events and those of others hundreds: a recipe that is right
    for one of them is right for steps of as many events, not of as many users.

    Args:
        settings: of the training.
        events: (users,) int, training events of each user of an epoch.
    """
    if settings.local_batch_size:
        return settings.local_batch_size
    enough = round(settings.events_per_step * events.size / max(1, int(events.sum())))
    return max(1, min(max(_FEWEST_USERS, enough), events.size // _STEPS_OF_EPOCH))


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
