"""Leave-one-out splits of a store, turned into jagged batches by array arithmetic alone."""

from enum import Enum

import numpy as np
import torch
from torch import Tensor

from hstu_xd.batch import JaggedBatch
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError


class Split(str, Enum):
    """Which event of each user is the last target: test, the one before it, or the rest."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


class SequenceData:
    """The users of one split and their windows of history.

    The last event of a user is the test target, the one before it the validation target; training
    predicts every event before those from the second on. Users of fewer than three events train
    only. A window is the latest ``max_length`` events before the last target.

    Args:
        store: the prepared interactions.
        split: which targets.
        max_length: longest history that is read.

    Raises:
        InputError: no user has enough events for the split.
    """

    def __init__(self, store: InteractionStore, split: Split, max_length: int) -> None:
        self.split = split
        self.max_length = max_length
        self._item_ids, self._timestamps = store.item_ids, store.timestamps
        self._item_domains = store.catalog.item_domains.numpy(force=True)
        self._offsets = offsets = np.asarray(store.offsets)
        sizes = np.diff(offsets)
        last = _last_targets(sizes, split)
        self.users = np.flatnonzero(last >= 1 if split is Split.TRAIN else sizes >= 3)
        if self.users.size == 0:
            raise InputError(
                f"{store.path}: no user has enough events for the {split.value} split; users of at "
                "least 3 events are needed (4 to train on)"
            )
        self._first = offsets[:-1]  # event index where each user begins
        self._begin = self._first.copy()  # event index where each user's window may begin
        self._last = offsets[:-1] + last  # event index of each user's last target

    def begin_at_news(self, time: int, context: int) -> np.ndarray:
        """Let windows begin shortly before what an earlier log had not; return who has some.

        Args:
            time: of the earlier log's last event; later events are new.
            context: events that are read before the first one whose target was none then.

        Returns:
            (B,) int64 users whose last target was not among the earlier log's, ascending; the
            windows of the others are what they were.
        """
        before = np.concatenate([[0], np.cumsum(np.asarray(self._timestamps) <= time)])
        sizes = before[self._offsets[1:]] - before[self._offsets[:-1]]
        earlier = self._first + _last_targets(sizes, self.split)
        users = self.users[earlier[self.users] < self._last[self.users]]
        self._begin[users] = np.maximum(self._first[users], earlier[users] - context)
        return users

    def lengths(self, users: np.ndarray) -> np.ndarray:
        """Tokens in each user's window: (B,) int64."""
        last = self._last[users]
        return last - np.maximum(self._begin[users], last - self.max_length)

    def batch(self, users: np.ndarray) -> tuple[JaggedBatch, Tensor]:
        """Histories and the item that follows each of their tokens.

        Args:
            users: (B,) user indices out of ``self.users``.

        Returns:
            The batch and (L,) int64 target item ids.
        """
        lengths = self.lengths(users)
        first = self._last[users] - lengths
        offsets = np.zeros(users.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        events = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], lengths)
        items = self._item_ids[events].astype(np.int64)
        targets = self._item_ids[events + 1].astype(np.int64)
        batch = JaggedBatch(
            item_ids=torch.from_numpy(items),
            timestamps=torch.from_numpy(self._timestamps[events]),
            next_timestamps=torch.from_numpy(self._timestamps[events + 1]),
            target_domains=torch.from_numpy(self._item_domains[targets]),
            offsets=torch.from_numpy(offsets),
        )
        return batch, torch.from_numpy(targets)

    def seen(self, users: np.ndarray) -> tuple[Tensor, Tensor]:
        """All events before each user's last target, beyond the window too.

        Returns:
            Item ids (E,) int64 and offsets (B + 1,) int64.
        """
        events, offsets = self._events_before(users, self._last[users])
        items = self._item_ids[events].astype(np.int64)
        return torch.from_numpy(items), torch.from_numpy(offsets)

    def events(self) -> tuple[Tensor, Tensor, Tensor]:
        """All events of the split's users up to their last targets, and these, beyond the window.

        Returns:
            Item ids, timestamps and user indices: (E,) int64 each, in the order of the log.
        """
        events, offsets = self._events_before(self.users, self._last[self.users] + 1)
        users = np.repeat(self.users, np.diff(offsets))
        items = self._item_ids[events].astype(np.int64)
        times = self._timestamps[events].astype(np.int64)
        return torch.from_numpy(items), torch.from_numpy(times), torch.from_numpy(users)

    def _events_before(self, users: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of users' events before some of their own, and offsets by user."""
        lengths = end - self._first[users]
        offsets = np.zeros(users.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return np.arange(offsets[-1]) + np.repeat(
            self._first[users] - offsets[:-1], lengths
        ), offsets


def _last_targets(sizes: np.ndarray, split: Split) -> np.ndarray:
    """Place of the last target in histories of so many events each."""
    held_out = {Split.TRAIN: 2, Split.VALID: 1, Split.TEST: 0}[split]
    if split is Split.TRAIN:
        return sizes - 1 - np.where(sizes >= 3, held_out, 0)
    return sizes - 1 - held_out
