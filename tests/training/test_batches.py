"""Windows, targets and held-out events against a slow reading of the protocol."""

import numpy as np
import pytest
import torch

from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore

HELD_OUT = {Split.TRAIN: 2, Split.VALID: 1, Split.TEST: 0}


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("max_length", [3, 100])
def test_batch_holds_the_window_before_the_last_target(
    store: InteractionStore, split: Split, max_length: int
) -> None:
    data = SequenceData(store, split, max_length)
    users = np.random.default_rng(0).permutation(data.users)[:40]
    batch, targets = data.batch(users)
    assert batch.offsets[-1] == targets.numel() == data.lengths(users).sum()
    domains = store.catalog.item_domains
    for row, user in enumerate(users):
        items, times = store.history(int(user))
        last = len(items) - 1 - HELD_OUT[split]
        first = max(0, last - max_length)
        tokens = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        assert batch.item_ids[tokens].tolist() == items[first:last].tolist()
        assert targets[tokens].tolist() == items[first + 1 : last + 1].tolist()
        assert batch.timestamps[tokens].tolist() == times[first:last].tolist()
        assert batch.next_timestamps[tokens].tolist() == times[first + 1 : last + 1].tolist()
        assert torch.equal(batch.target_domains[tokens], domains[targets[tokens]])


def test_training_never_reads_the_held_out_events(store: InteractionStore) -> None:
    data = SequenceData(store, Split.TRAIN, 1000)
    for user in data.users:
        items, _ = store.history(int(user))
        batch, targets = data.batch(np.array([user]))
        assert batch.item_ids.numel() == len(items) - 3
        assert targets[-1] == items[-3]


def test_seen_items_reach_beyond_the_window(store: InteractionStore) -> None:
    data = SequenceData(store, Split.TEST, 2)
    users = data.users[:5]
    seen, offsets = data.seen(users)
    for row, user in enumerate(users):
        items, _ = store.history(int(user))
        assert seen[offsets[row] : offsets[row + 1]].tolist() == items[:-1].tolist()
