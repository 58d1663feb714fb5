"""Samples of a prepared store, or of upstream's own files, for upstream's research trainer."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hstu_xd.data.store import InteractionStore
from hstu_xd.data.upstream_csv import MIN_EVENTS, RATING
from hstu_xd.errors import InputError

logger = logging.getLogger(__name__)

# Events at the end of every history that training and evaluation leave out.
SPLITS = {"upstream": (1, 0), "valid": (2, 1), "test": (2, 0)}
# Private to upstream's DatasetV2.
_IGNORED, _CACHE = "_ignore_last_n", "_cache"

UpstreamDataset = TypeVar("UpstreamDataset", bound=Dataset)


class StoreDataset(Dataset[dict[str, Any]]):
    """One sample a user: the sample dictionary of upstream's chronological ``DatasetV2``.

    =====================  =====  =================================================
    user_id                int    the user's number in the store
    historical_ids         (N,)   int64, oldest first, zeros after the last event
    historical_ratings     (N,)   int64, 5 at events
    historical_timestamps  (N,)   int64, seconds
    history_lengths        int    events in the history, 1..N
    target_ids             int    the item that follows the history
    target_ratings         int    5
    target_timestamps      int    seconds
    =====================  =====  =================================================

    A store knows no ratings. Upstream's model ignores them; its metrics ``*_>=4`` count targets
    rated 4 and up, so that with 5 throughout they equal the metrics of all targets.

    Users of too few events for a history and a target are left out. Pickled, a dataset is its path
    and its settings: a worker process maps the files itself.

    Args:
        store: the prepared interactions.
        max_sequence_length: N; of longer histories the newest N events are read.
        ignore_last: events at the end of every history that are left out; 0 makes the last event
            the target, 1 the one before it.
        sample_ratio: keep each event, the target's too, with this probability, drawn at every
            access from torch's generator as upstream does. Where fewer than two events would be
            left, the newest two are kept as well.
        min_events: also leave out users of fewer events in all.

    Raises:
        InputError: an argument out of range, or no user is left.

    Example:
        >>> dataset = StoreDataset(InteractionStore.open("prepared"), 200, ignore_last=1)
        >>> dataset[0]["historical_ids"].shape
        torch.Size([200])
    """

    def __init__(
        self,
        store: InteractionStore,
        max_sequence_length: int,
        *,
        ignore_last: int,
        sample_ratio: float = 1.0,
        min_events: int = 0,
    ) -> None:
        super().__init__()
        if max_sequence_length < 1:
            raise InputError(f"max_sequence_length is {max_sequence_length}; at least 1 is needed")
        if ignore_last < 0:
            raise InputError(f"ignore_last is {ignore_last}; 0 or more events can be left out")
        if not 0 < sample_ratio <= 1:
            raise InputError(
                f"sample_ratio is {sample_ratio}; a share above 0 and up to 1 is needed"
            )
        self.max_sequence_length = max_sequence_length
        self.ignore_last = ignore_last
        self.sample_ratio = sample_ratio
        self.min_events = min_events
        self._attach(store)

    def _attach(self, store: InteractionStore) -> None:
        self.store = store
        offsets = np.asarray(store.offsets)
        needed = max(self.ignore_last + 2, self.min_events)
        self.users = np.flatnonzero(np.diff(offsets) >= needed)
        if self.users.size == 0:
            raise InputError(
                f"{store.path}: no user has the {needed} events needed when the last "
                f"{self.ignore_last} are left out; prepare a longer log"
            )
        self._first, self._stop = offsets[self.users], offsets[self.users + 1] - self.ignore_last
        # Plain views of the maps: indexing them skips the bookkeeping of np.memmap.
        self._item_ids, self._timestamps = np.asarray(store.item_ids), np.asarray(store.timestamps)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("max_sequence_length", "ignore_last", "sample_ratio", "min_events")
        return {"path": self.store.path.absolute(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path = state.pop("path")
        self.__dict__.update(state)
        self._attach(InteractionStore.open(path))

    def __len__(self) -> int:
        return self.users.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Gather the samples of many users at once; torch's DataLoader calls this for a batch."""
        rows = np.asarray(indices, np.int64)
        first, stop = self._first[rows], self._stop[rows]
        items, times = self._item_ids, self._timestamps
        if self.sample_ratio < 1:
            events, first, stop = self._sampled(first, stop)
            items, times = items[events], times[events]
        targets = stop - 1
        first = np.maximum(first, targets - self.max_sequence_length)
        lengths = targets - first
        column = np.arange(self.max_sequence_length)
        places, padding = first[:, None] + column, column >= lengths[:, None]
        samples: dict[str, Sequence[Any]] = {
            "user_id": self.users[rows].tolist(),
            "historical_ids": _padded(items, places, padding),
            "historical_ratings": torch.from_numpy(np.where(padding, 0, RATING)).unbind(),
            "historical_timestamps": _padded(times, places, padding),
            "history_lengths": lengths.tolist(),
            "target_ids": items[targets].tolist(),
            "target_ratings": [RATING] * rows.size,
            "target_timestamps": times[targets].tolist(),
        }
        return [dict(zip(samples, values)) for values in zip(*samples.values())]

    def _sampled(
        self, first: np.ndarray, stop: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keep events by chance: their places in the log, and each sample's range of those."""
        ends = np.cumsum(stop - first)
        begins = np.concatenate([[0], ends[:-1]])
        kept = (torch.rand(int(ends[-1])) < self.sample_ratio).numpy()
        few = ends[np.add.reduceat(kept, begins, dtype=np.int64) < 2]
        kept[few - 1] = kept[few - 2] = True
        chosen = np.flatnonzero(kept)
        lows, highs = np.searchsorted(chosen, begins), np.searchsorted(chosen, ends)
        return chosen + np.repeat(first - begins, highs - lows), lows, highs


def _padded(values: np.ndarray, places: np.ndarray, padding: np.ndarray) -> Sequence[Tensor]:
    """Rows of the (B, N) int64 matrix of ``values[places]``, zeros at padding."""
    # Places of padding may lie beyond the log's end, where any value will do.
    matrix = values.take(places, mode="clip").astype(np.int64, copy=False)
    matrix[padding] = 0
    return torch.from_numpy(matrix).unbind()


def split_datasets(
    store: InteractionStore, max_sequence_length: int, *, sample_ratio: float = 1.0, split: str
) -> tuple[StoreDataset, StoreDataset]:
    """Build training and evaluation samples of a store.

    Upstream evaluates on the last event and trains on all before it, and so picks the best epoch
    on the events it reports. The other two splits mend that: neither trains on the last two
    events; tune and pick on "valid", whose target is the last but one, and report "test", whose
    target is the last. Every split evaluates the users of at least three events.

    Args:
        store: the prepared interactions.
        max_sequence_length: longest history.
        sample_ratio: for training; evaluation reads every event.
        split: "upstream", "valid" or "test".

    Raises:
        InputError: unknown split, or no user is left.
    """
    train, evaluate = _held_out(split)
    return (
        StoreDataset(store, max_sequence_length, ignore_last=train, sample_ratio=sample_ratio),
        StoreDataset(store, max_sequence_length, ignore_last=evaluate, min_events=MIN_EVENTS),
    )


def hold_out(
    train: UpstreamDataset, evaluate: UpstreamDataset, *, split: str
) -> tuple[UpstreamDataset, UpstreamDataset]:
    """Make the splits of :func:`split_datasets` of upstream's own ``DatasetV2`` objects.

    Args:
        train: upstream's training data.
        evaluate: upstream's evaluation data.
        split: "upstream", "valid" or "test".

    Returns:
        Copies that share the table of ratings; the arguments stay as they are. Users of too few
        events, on whom upstream's class would stop, are left out with a warning.

    Raises:
        InputError: unknown split, or not a ``DatasetV2``.
    """
    held_out = _held_out(split)
    if split == "upstream":
        return train, evaluate
    return _leaving_out(train, held_out[0]), _leaving_out(evaluate, held_out[1])


def _held_out(split: str) -> tuple[int, int]:
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return SPLITS[split]


def _leaving_out(dataset: UpstreamDataset, ignore_last: int) -> UpstreamDataset:
    if not isinstance(getattr(dataset, _IGNORED, None), int):
        raise InputError(
            f"{type(dataset).__name__} has no {_IGNORED}; only datasets of "
            "generative-recommenders' DatasetV2 can be split this way"
        )
    changed: Any = copy.copy(dataset)
    setattr(changed, _IGNORED, ignore_last)
    if hasattr(changed, _CACHE):
        setattr(changed, _CACHE, {})  # a sample made before has the target of before
    frame = getattr(changed, "ratings_frame", None)
    if frame is not None:
        events = frame["sequence_item_ids"].astype(str).str.rstrip(",").str.count(",") + 1
        enough = events >= ignore_last + 2
        if not enough.all():
            logger.warning(
                "%d of %d users are left out: they have fewer than %d events",
                int((~enough).sum()),
                len(frame),
                ignore_last + 2,
            )
            changed.ratings_frame = frame[enough]
    return changed
