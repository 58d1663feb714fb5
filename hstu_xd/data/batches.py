"""Splits of a store, turned into jagged batches by array arithmetic alone."""

from enum import Enum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hstu_xd.batch import JaggedBatch
from hstu_xd.data.cuts import TimeCuts, events_before
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.window import Window, latest_of_each
from hstu_xd.errors import InputError

# Events that are looked through at once for the older ones that windows keep.
_OLDER_AT_ONCE = 4_000_000


class Split(str, Enum):
    """Which of each user's events is the last target: one that trains, validates or tests."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"

    def measured(self, *, read_test: bool = True) -> "tuple[Split, ...]":
        """Return what a model is measured by whose training went up to this split's targets."""
        later = tuple(Split)[tuple(Split).index(self) + 1 :]
        return later if read_test else tuple(s for s in later if s is not Split.TEST)


class SequenceData:
    """The users of one split and their windows of history.

    Leave-one-out: the last event of a user is the test target, the one before it the validation
    target; training predicts every event before those from the second on. Users of fewer than three
    events train only. Cut in time: training predicts every event before ``valid_from`` from the
    user's second on, and the last event of a user in a later period is its target; users without
    an event before the period are left out. A window ends before the last target. Where
    validation, or validation and test, are trained on as well, training goes on up to the last
    target of that split.

    Of one domain alone: the log is read as if it had no other events. Held-out targets are the same
    as of the whole log, those of other domains left out, and so are users without an event of the
    domain before their target.

    Args:
        store: the prepared interactions.
        split: which targets.
        window: which events before the last target are read; a number: so many latest ones.
        cuts: where the log is cut in time; None: leave-one-out.
        domain: id of the only domain to read; None: all.
        until: the last split whose targets train.

    Raises:
        InputError: no user has enough events for the split.
    """

    def __init__(
        self,
        store: InteractionStore,
        split: Split,
        window: Window | int,
        cuts: TimeCuts | None = None,
        domain: int | None = None,
        until: Split = Split.TRAIN,
    ) -> None:
        self.split, self.window = split, Window.of(window)
        self._item_ids, self._timestamps = store.item_ids, store.timestamps
        self._item_domains = store.catalog.item_domains.numpy(force=True)
        self._cuts, self._is_whole, self._until = cuts, domain is None, until
        offsets = np.asarray(store.offsets)
        begin, end = _places(split, store, cuts, until)
        if domain is not None:
            own = np.flatnonzero(self._item_domains[self._item_ids] == domain)
            begin, end, offsets = _places_among(own, split, begin, end, offsets)
            self._item_ids, self._timestamps = self._item_ids[own], self._timestamps[own]
        # Users whose period has a target, and of those the ones with an event before it.
        is_asked = end > begin
        has_history = begin >= 1
        self.users = np.flatnonzero(is_asked & has_history)
        self._without_history = int((is_asked & ~has_history).sum())
        if self.users.size == 0:
            needed = "users of at least 3 events are needed (4 to train on)"
            if cuts is not None:
                needed = (
                    "users with an event before its time and one in it are needed (2 to train on)"
                )
            if domain is not None:
                needed += f", and of the domain {store.domain_names[domain]!r} 2 each"
            raise InputError(
                f"{store.path}: no user has enough events for the {split.value} split; {needed}"
            )
        self._offsets, self._first = offsets, offsets[:-1]  # event index where each user begins
        self._begin = self._first.copy()  # event index where each user's window may begin
        self._last = offsets[:-1] + end - 1  # event index of each user's last target

    @cached_property
    def counts(self) -> dict[str, float]:
        """Count whom a cut in time or in domains leaves out, and what is new after a cut in time.

        Returns:
            ``count_without_history``, users with a target and no earlier event that may be read,
            who are left out; ``count_new_items``, targets that are items without an event that
            trains. What there is none of is not told, and nothing of a whole log under
            leave-one-out.
        """
        if self.split is Split.TRAIN or (self._cuts is None and self._is_whole):
            return {}
        found = {"count_without_history": self._without_history}
        if self._cuts is not None:
            found["count_new_items"] = self._count_new_items(self._cuts)
        return {name: number for name, number in found.items() if number}

    def _count_new_items(self, cuts: TimeCuts) -> int:
        end = cuts.valid_from if self._until is Split.TRAIN else cuts.test_from
        is_known = np.zeros(len(self._item_domains), np.bool_)
        is_known[self._item_ids[self._timestamps < end]] = True
        return int((~is_known[self._item_ids[self._last[self.users]]]).sum())

    def begin_at_news(self, time: int, context: int) -> np.ndarray:
        """Let windows begin shortly before what an earlier log had not; return who has some.

        Args:
            time: of the earlier log's last event; later events are new, and so are those that were
                held out of it where they train now.
            context: events that are read before the first one whose target was none then.

        Returns:
            (B,) int64 users whose last target was not among the earlier log's, ascending; the
            windows of the others are what they were.

        Raises:
            InputError: the log is cut in time, or read for one domain.
        """
        if self._cuts is not None or not self._is_whole:
            raise InputError(
                "what is new in a log is known under leave-one-out and for all domains alone; "
                "continue with xd_evaluate.split = 'leave-one-out' and without xd_train.domain, or "
                "train from nothing"
            )
        before = np.concatenate([[0], np.cumsum(np.asarray(self._timestamps) <= time)])
        sizes = before[self._offsets[1:]] - before[self._offsets[:-1]]
        earlier = self._first + _end(self.split, self.split, sizes) - 1
        users = self.users[earlier[self.users] < self._last[self.users]]
        self._begin[users] = np.maximum(self._first[users], earlier[users] - context)
        self.__dict__.pop("_older", None)
        return users

    def lengths(self, users: np.ndarray) -> np.ndarray:
        """Tokens in each user's window: (B,) int64."""
        older = self._older[1]
        return self._last[users] - self._latest(users) + older[users + 1] - older[users]

    def _latest(self, users: np.ndarray) -> np.ndarray:
        """Event index where the latest events of each user's window begin: (B,) int64."""
        return np.maximum(self._begin[users], self._last[users] - self.window.latest)

    @cached_property
    def _older(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the events that are read from before the latest ones, and (U + 1,) offsets.

        Those of a user stand together in the order of time, users ascending.
        """
        number, older = len(self._first), self.window.older
        sizes, found = np.zeros(number, np.int64), []
        if older:
            before = np.zeros(number, np.int64)
            before[self.users] = self._latest(self.users) - self._first[self.users]
            some = np.flatnonzero(before)
            for users in _parts_of(some, before[some], _OLDER_AT_ONCE):
                events, _ = self._events_before(users, self._first[users] + before[users])
                owners = np.repeat(users, before[users])
                domains = self._item_domains[self._item_ids[events]]
                kept = latest_of_each(
                    torch.from_numpy(domains), torch.from_numpy(owners), older
                ).numpy()
                found.append(events[kept])
                sizes += np.bincount(owners[kept], minlength=number)
        return (
            np.concatenate([np.empty(0, np.int64), *found]),
            np.concatenate([[0], np.cumsum(sizes)]),
        )

    def batch(self, users: np.ndarray) -> tuple[JaggedBatch, Tensor]:
        """Histories and the item that follows each of their tokens.

        Args:
            users: (B,) user indices out of ``self.users``.

        Returns:
            The batch and (L,) int64 target item ids.
        """
        events, offsets = self._windows(users)
        following = np.append(events[1:], 0)
        following[offsets[1:] - 1] = self._last[users]
        items = self._item_ids[events].astype(np.int64)
        targets = self._item_ids[following].astype(np.int64)
        batch = JaggedBatch(
            item_ids=torch.from_numpy(items),
            timestamps=torch.from_numpy(self._timestamps[events]),
            next_timestamps=torch.from_numpy(self._timestamps[following]),
            target_domains=torch.from_numpy(self._item_domains[targets]),
            offsets=torch.from_numpy(offsets),
        )
        return batch, torch.from_numpy(targets)

    def _windows(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the events in users' windows, and offsets by user."""
        lengths = self.lengths(users)
        offsets = np.zeros(users.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        events = np.arange(offsets[-1])
        latest = events + np.repeat(self._last[users] - offsets[1:], lengths)
        older, begin = self._older
        if not older.size:
            return latest, offsets
        place = events - np.repeat(offsets[:-1], lengths)
        (is_older,) = np.nonzero(place < np.repeat(begin[users + 1] - begin[users], lengths))
        latest[is_older] = older[(place + np.repeat(begin[users], lengths))[is_older]]
        return latest, offsets

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


def _parts_of(users: np.ndarray, sizes: np.ndarray, most: int) -> list[np.ndarray]:
    """Cut users into parts that own about so many events each, or one user."""
    return np.split(users, np.flatnonzero(np.diff(np.cumsum(sizes) // most)) + 1)


def _places(
    split: Split, store: InteractionStore, cuts: TimeCuts | None, until: Split
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of each user's events come before a split's targets, and up to the last one.

    Training asks for all events but the first of a user: its targets begin after that one, and end
    with the last one of the split ``until``.

    Returns:
        (U,) int64 each; both are equal where a user has no target.
    """
    offsets = np.asarray(store.offsets)
    sizes = np.diff(offsets)
    last = until if split is Split.TRAIN else split
    if cuts is None:
        end = _end(split, last, sizes)
        before = np.maximum(end - 1, 0)
    else:
        before_valid = events_before(store.timestamps, offsets, cuts.valid_from)
        before_test = events_before(store.timestamps, offsets, cuts.test_from)
        before, end = {
            Split.TRAIN: (np.zeros_like(sizes), before_valid),
            Split.VALID: (before_valid, before_test),
            Split.TEST: (before_test, sizes),
        }[last]
    return (np.minimum(end, 1) if split is Split.TRAIN else before), end


def _end(split: Split, last: Split, sizes: np.ndarray) -> np.ndarray:
    """Return how many events each user has up to a split's last target, under leave-one-out.

    Args:
        split: which targets.
        last: the split whose target is the last one of these, another than ``split`` in training.
        sizes: (U,) events of each user.

    Returns:
        (U,) int64; 0 for users of fewer than three events, where the split is not training.
    """
    held_out = {Split.TRAIN: 2, Split.VALID: 1, Split.TEST: 0}[last]
    few = sizes if split is Split.TRAIN else 0
    return np.where(sizes >= 3, sizes - held_out, few)


def _places_among(
    own: np.ndarray, split: Split, begin: np.ndarray, end: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn places among all events of users into places among some of them.

    Args:
        own: (E,) indices of those events, ascending.
        split: where it trains, every one of them but a user's first is a target; otherwise the last
            event of all is, if it is among them.
        begin: (U,) of :func:`_places`.
        end: (U,) of :func:`_places`.
        offsets: (U + 1,) of all events.

    Returns:
        Both places (U,) and the offsets (U + 1,) among those events.
    """
    own_offsets = np.searchsorted(own, offsets)
    own_end = np.searchsorted(own, offsets[:-1] + end) - own_offsets[:-1]
    if split is Split.TRAIN:
        return np.minimum(own_end, 1), own_end, own_offsets
    is_asked = (end > begin) & (begin >= 1)
    is_own = np.zeros(len(end), np.bool_)
    is_own[is_asked] = np.isin(offsets[:-1][is_asked] + end[is_asked] - 1, own, assume_unique=True)
    return np.where(is_own, own_end - 1, own_end), own_end, own_offsets
