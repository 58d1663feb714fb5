"""REC's data sets with the times that its own leave out of a batch."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from REC.data.dataset import SeqEvalDataset, SEQTrainDataset, TextSEQTrainDataset

from hstu_xd.catalog import DomainCatalog
from hstu_xd.plugins.bridge import draw_within
from hstu_xd.plugins.rec.loss import own_generator


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
        """Return REC's sample and (N + 1,) int64 times, zeros at padding."""
        sample = super().__getitem__(index)
        times = _left_padded(self._times[index], self.max_seq_length)
        return (*sample, torch.tensor(times))


class ScopedTextDataset(TextSEQTrainDataset):
    """Training samples with the texts of items, their times and negatives of their own domains.

    Args:
        config: REC's configuration.
        data: REC's interactions, built.

    Attributes:
        xd_catalog: what negatives are drawn by; None draws them as REC does.
        xd_rank: number of the process, whose draws are its own.
    """

    def __init__(self, config: Any, data: Any) -> None:
        super().__init__(config, data)
        self.xd_catalog: DomainCatalog | None = None
        self.xd_rank = dist.get_rank()

    def reconstruct_train_data(self, item_seq: Sequence[int]) -> tuple[Any, ...]:
        """Return REC's items (N + 1,), negatives (R,) and validity (N,), all int64.

        Domain-scoped, a place's negative comes from the domain of the item there; a number of
        negatives that is set, from the domains of the sample's events at random.
        """
        items, drawn, valid = super().reconstruct_train_data(item_seq)
        if self.xd_catalog is None:
            return items, drawn, valid
        draws = own_generator(self.xd_rank)
        places = items
        if self.num_negatives:
            events = items[-1 - int(valid.sum()) :]
            places = events[torch.randint(len(events), (self.num_negatives,), generator=draws)]
        domains = self.xd_catalog.item_domains[places]
        return items, draw_within(domains, self.xd_catalog, 1, draws).squeeze(-1), valid

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return REC's sample and ``xd_times`` (N + 1,) int64, zeros at padding."""
        sample = super().__getitem__(index)
        times = _left_padded(self.train_time_seq[index], self.max_seq_length)
        return sample | {"xd_times": torch.tensor(times)}


class TimedEvalDataset(SeqEvalDataset):
    """Evaluation samples whose time entry is raw seconds, the target's own behind the history."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return REC's sample with (N + 1,) int64 times in place of calendar fields."""
        sample = list(super().__getitem__(index))
        times = self.time_seq[index]
        request = len(sample[0])  # the target follows the history
        history = _left_padded(times[:request], self.max_item_list_length)
        sample[3] = [*history, int(times[request])]
        return tuple(sample)


def _left_padded(values: Sequence[int], length: int) -> list[int]:
    latest = [int(value) for value in values[-length:]]
    return [0] * (length - len(latest)) + latest
