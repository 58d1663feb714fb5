"""REC's data sets with the times that its own leave out of a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from REC.data.dataset import SeqEvalDataset, SEQTrainDataset


class TimedTrainDataset(SEQTrainDataset):
    """Training samples with the events' times behind REC's own entries.

    Args:
        config: REC's configuration.
        data: REC's interactions, built.
    """

    def __init__(self, config: Any, data: Any) -> None:
        super().__init__(config, data)
        self._times = data.train_feat["time_seq"]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """REC's sample and (N + 1,) int64 times, zeros at padding."""
        sample = super().__getitem__(index)
        times = _left_padded(self._times[index], self.max_seq_length)
        return (*sample, torch.tensor(times))


class TimedEvalDataset(SeqEvalDataset):
    """Evaluation samples whose time entry is raw seconds, the target's own behind the history."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """REC's sample with (N + 1,) int64 times in place of calendar fields."""
        sample = list(super().__getitem__(index))
        times = self.time_seq[index]
        request = len(sample[0])  # the target follows the history
        history = _left_padded(times[:request], self.max_item_list_length)
        sample[3] = [*history, int(times[request])]
        return tuple(sample)


def _left_padded(values: Sequence[int], length: int) -> list[int]:
    latest = [int(value) for value in values[-length:]]
    return [0] * (length - len(latest)) + latest
