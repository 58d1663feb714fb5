"""Data sets for upstream's research trainer, with the domain of every item.

Samples come from a prepared store or from upstream's own files; for the latter a table names the
domains of the items.
"""

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.upstream_csv import MIN_EVENTS, RATING
from hstu_xd.errors import InputError
from hstu_xd.plugins.item_tables import ItemTable, read_item_table, warn_of_one_domain

_logger = logging.getLogger(__name__)

ITEM_COLUMNS = ("item", "item_id", "movie_id")


def read_item_domains(
    path: Path | str, all_item_ids: Sequence[int], max_item_id: int
) -> DomainCatalog:
    """Read which item is in which domain.

    The file is a CSV, a TSV (``.tsv``) or Parquet (``.parquet``) with a column ``item`` (or
    ``item_id``, ``movie_id``) and a column ``domain``, in any order of rows. Item ids are those
    that upstream's trainer sees: MovieLens' own for ml-1m and ml-20m; for amzn-books 1..n, one
    more than the ids in its ``sasrec_format.csv``. Domain ids follow the sorted names.

    Args:
        path: the file.
        all_item_ids: the items there are, as in upstream's ``RecoDataset``.
        max_item_id: the largest id the model can look up; unused ids up to it belong to no domain.

    Returns:
        The catalogue, with ``num_items = max_item_id``. One domain only, and lines about
        unused ids (they are ignored), are warned about.

    Raises:
        InputError: no such file, a missing column, an id that is no number or outside
            1..max_item_id, an empty domain or one called like a group of targets, an item in two
            domains or in none. The message names file, line (row in Parquet), value and mend.
    """
    file = Path(path)
    table = read_item_table(file, item_columns=ITEM_COLUMNS)
    items = _item_ids(table, max_item_id)
    names, numbers = table.number_domains()
    table.refuse_second_domains(items.tolist())
    item_domains = np.full(max_item_id + 1, -1, np.int64)
    item_domains[items] = numbers
    return DomainCatalog(_used_only(file, item_domains, all_item_ids), names)


def first_genre_domains(items_csv: Path | str, out: Path | str) -> None:
    """Write a table for :func:`read_item_domains` that calls a film's first genre its domain.

    A control: genres are no domains, so that nothing is expected to be gained from them.

    Args:
        items_csv: upstream's processed films, e.g. ``tmp/processed/ml-1m/movies.csv``, with columns
            ``movie_id`` and ``genres``, these with ``|`` between.
        out: the CSV to write.

    Raises:
        InputError: no such file, a missing column, or an empty field.
    """
    import polars as pl

    films = read_item_table(Path(items_csv), item_columns=("movie_id",), domain_column="genres")
    written = pl.DataFrame(
        {
            "item": films.items.str.strip_chars(),
            "domain": films.domains.str.split("|").list.first(),
        }
    )
    partial = Path(f"{out}.partial-{os.getpid()}")
    try:
        written.write_csv(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _item_ids(table: ItemTable, max_item_id: int) -> np.ndarray:
    """(R,) int64 item id of every line."""
    import polars as pl

    texts = table.items.str.strip_chars()
    ids = texts.cast(pl.Int64, strict=False)
    wrong = ids.is_null().to_numpy()
    if wrong.any():
        line = int(wrong.argmax())
        raise InputError(
            f"{table.place(line)}: item id {texts[line]!r} is not a whole number; ids are "
            "upstream's, not those of the raw data"
        )
    items = ids.to_numpy()
    outside = (items < 1) | (items > max_item_id)
    if outside.any():
        line = int(outside.argmax())
        raise InputError(
            f"{table.place(line)}: item id {items[line]} is outside 1..{max_item_id}; ids are "
            "upstream's (for Amazon data one more than in its sasrec_format.csv)"
        )
    return items


def _used_only(file: Path, item_domains: np.ndarray, all_item_ids: Sequence[int]) -> torch.Tensor:
    """Return the table with -1 at unused ids; refuse one that lacks an item's domain."""
    items = np.unique(np.asarray(all_item_ids, np.int64))
    missing = items[item_domains[items] < 0]
    if missing.size:
        raise InputError(
            f"{file}: catalogue misses {missing.size} of {items.size} items, first {missing[0]}; "
            "add them, every item needs a domain"
        )
    table = np.full_like(item_domains, -1)
    table[items] = item_domains[items]
    unused = np.flatnonzero(table != item_domains)
    if unused.size:
        _logger.warning(
            "%s: %d ids are ignored, first %d: the data set has no such items",
            file,
            unused.size,
            unused[0],
        )
    warn_of_one_domain(file, table[items])
    return torch.from_numpy(table)


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
