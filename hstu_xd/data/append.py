"""Add events to a prepared store, to the same bytes as if all had been read at once.

Only what is new is read. The store's tokens, items and times take new ones in where they belong;
its order, counts and warnings follow from what it holds. What a store does not hold, such as the
events that filters dropped, cannot be made up: such stores are refused.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data import store_files
from hstu_xd.data.encode import EventReader, Events, IdOptions, doubts_of_ids, read_log
from hstu_xd.data.filters import Filters
from hstu_xd.data.ids import respellable
from hstu_xd.data.order import Histories, in_time_order
from hstu_xd.data.prepare import EXACT_IDS, PREFIXED, facts_of, tell_of_files, write_prepared
from hstu_xd.data.repeats import count_repeats, first_after
from hstu_xd.data.sources import ReadOptions, open_sources
from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.data.store import InteractionStore, is_store
from hstu_xd.data.store_files import Log
from hstu_xd.data.times import date_of
from hstu_xd.errors import InputError
from hstu_xd.files import check_output, replaced_folder

if TYPE_CHECKING:
    import polars as pl

logger = logging.getLogger(__name__)

# Below every character that a domain's name may hold: so pairs sort as their texts do.
_SEPARATOR = "\x00"
# Rows of a store that are merged at once.
_BLOCK_ROWS = 1 << 18


def append_logs(
    inputs: Sequence[str],
    store: Path,
    out: Path,
    *,
    file_format: str = "auto",
    columns: ColumnOptions | None = None,
    time_unit: str = "auto",
    quote: str = "auto",
    write_upstream: bool = False,
    force: bool = False,
    tell: Callable[[str], object] = logger.info,
    warn: Callable[[str], object] = logger.warning,
) -> dict[str, Any]:
    """Read new logs and write the store of an older one and them.

    Every file of it equals what :func:`hstu_xd.data.prepare.prepare_logs` writes that reads the
    old logs and the new ones with the options of the old store.

    Args:
        inputs: the new files, or ``NAME=PATH`` to give a file one domain.
        store: the older store, which stays as it is unless ``out`` is the same folder.
        out: the folder to write; appears whole or not at all.
        file_format: of the new files, as in ``prepare_logs``.
        columns: likewise.
        time_unit: likewise.
        quote: likewise.
        write_upstream: likewise, for the whole store.
        force: replace an existing prepared store.
        tell: takes lines on what each file was taken to be.
        warn: takes warnings about single files.

    Returns:
        The manifest.

    Raises:
        InputError: bad input; a store that does not hold all that the result depends on; new
            events whose order among old ones of the same second is unknown.
        HstuXdError: the store cannot be written.
    """
    columns = columns or ColumnOptions()
    check_output(
        out, force=force, ours=is_store, kind="prepared store", parts=store_files.ALL_FILES
    )
    old = InteractionStore.open(store)
    _check_appendable(old, columns)
    ids = IdOptions(exact=EXACT_IDS in old.manifest, prefix_items=PREFIXED in old.manifest)
    options = ReadOptions(columns, time_unit, quote)
    sources = open_sources(inputs, file_format=file_format, options=options, tell=tell)
    events, reader = read_log(sources, ids, tell=tell)
    tell_of_files(reader, out / store_files.FAULTY_LINES, tell, warn)
    log, facts = _appended(old, events, reader)
    if columns.order is not None:
        facts["ties"]["order"] = old.manifest["ties"]["order"]
    facts |= {name: True for name in (EXACT_IDS, PREFIXED) if name in old.manifest}
    with replaced_folder(out, force=force) as folder:
        return write_prepared(folder, log, facts, reader, write_upstream=write_upstream)


def _check_appendable(store: InteractionStore, columns: ColumnOptions) -> None:
    """Refuse stores that lack something the result depends on.

    Raises:
        InputError: says what it is.
    """
    manifest = store.manifest
    filters = {k: v for k, v in manifest["filters"].items() if k.startswith("min_")}
    by_column = manifest["ties"]["order"] != "hash"
    lacking = {
        "it is synthetic": manifest["synthetic"],
        f"it was filtered ({Filters(**filters)}), and what left it may come back": any(
            least > 1 for least in filters.values()
        ),
        "repeats were dropped from it (--drop-repeats)": (
            manifest["repeats"]["window_seconds"] is not None
        ),
        "faulty lines were left out of it (--skip-faulty)": "skipped_lines" in manifest,
        "its events have fields (--event-cols)": "event_fields" in manifest,
        "its items have levels (--item-features)": "levels" in manifest,
        "its items have features (--item-features)": "item_features" in manifest,
        "a column orders its ties: name it with --order-col": by_column and columns.order is None,
        "no column orders its ties, but --order-col names one": (
            not by_column and columns.order is not None
        ),
    }
    for reason, holds in lacking.items():
        if holds:
            raise InputError(
                f"{store.path} cannot be appended to: {reason}; prepare all logs together"
            )


def _appended(
    store: InteractionStore, events: Events, reader: EventReader
) -> tuple[Log, dict[str, Any]]:
    """Merge a store with events; return the log and what its manifest says of it."""
    import polars as pl

    old_users = pl.read_parquet(store.path / store_files.USERS)["user"]
    old_items = pl.read_parquet(store.path / store_files.CATALOG).select("item", "domain")
    if EXACT_IDS not in store.manifest:
        raw = reader.items.tokens()
        names = old_items["item"]
        if PREFIXED in store.manifest:
            # Spellings were judged before the domain was put in front.
            after = pl.col("domain").str.len_chars() + 1
            names = old_items.select(pl.col("item").str.slice(after)).to_series()
        both = (old_users, reader.users.tokens()["user"])
        _check_spellings(
            store, [*both, names, raw["item"], *(x["domain"].unique() for x in (old_items, raw))]
        )
    users = MergedTokens.of(old_users, events.users)
    items = MergedTokens.of(_pairs(old_items), _pairs(events.items))
    all_users = users.merge(old_users.to_frame("user"), events.users.to_frame("user"))["user"]
    all_items = items.merge(old_items, events.items)
    shared = all_items.filter(all_items["item"].is_duplicated())
    if len(shared):
        raise InputError(
            f"item {shared['item'].min()!r} is in domains "
            f"{' and '.join(map(repr, sorted(shared['domain'].head(2))))}, of {store.path} and the "
            "new logs; give it one, or put the domain before every item's id in all of them with "
            "--prefix-items"
        )
    by_hash = store.manifest["ties"]["order"] == "hash" and not events.moments.finer
    added, tied = in_time_order(events)
    added = Histories(users.new[added.user], items.new[added.item], added.time)
    merged = _Merger(store, users, items).merge(added, by_hash=by_hash)
    change = merged.reorder(all_users, all_items)
    log = Log(all_users, all_items, merged.offsets, merged.item, merged.time)
    repeats = store.manifest["duplicates"] + count_repeats(added) + change.repeats
    facts = facts_of(
        log,
        read=len(log.item),
        tied=store.manifest["ties"]["events"] + tied + change.tied,
        repeats=repeats,
        found=repeats,
        filters=store.manifest["filters"],
    )
    facts["warnings"] += doubts_of_ids(
        all_users,
        all_items,
        lambda: np.diff(log.offsets),
        lambda: np.bincount(log.item, minlength=len(all_items)),
    )
    return log, facts


def _pairs(items: "pl.DataFrame") -> "pl.Series":
    import polars as pl

    return items.select(pl.concat_str("domain", "item", separator=_SEPARATOR)).to_series()


def _check_spellings(store: InteractionStore, tokens: "Sequence[pl.Series]") -> None:
    """Refuse ids that are written as others are: whether 12.0 is 12 follows from all of a log.

    Raises:
        InputError: names one.
    """
    for column in tokens:
        odd = respellable(column)
        if len(odd):
            raise InputError(
                f"{store.path} cannot be appended to: how ids such as {odd.min()!r} are written "
                "(decimals, accents, unseen characters) follows from all ids of a log; prepare all "
                "logs together, or the store with --exact-ids first"
            )


@dataclass(frozen=True)
class MergedTokens:
    """Two sorted sets of tokens in one.

    Attributes:
        old: (n,) int32, the place of each old token in the whole.
        new: (m,) int32, that of each new one.
        fresh: (m,) bool, the new ones that are no old ones.
    """

    old: NDArray[np.int32]
    new: NDArray[np.int32]
    fresh: NDArray[np.bool_]

    @classmethod
    def of(cls, old: "pl.Series", new: "pl.Series") -> "MergedTokens":
        """Place tokens: both ascending, each token once."""
        place = old.search_sorted(new, side="left").to_numpy().astype(np.int64)
        inside = np.minimum(place, len(old) - 1)
        fresh = (place == len(old)) | (old.gather(inside) != new).to_numpy()
        # A fresh token goes before the old one at its place.
        before = np.bincount(place[fresh], minlength=len(old) + 1)[: len(old)]
        old_places = np.arange(len(old), dtype=np.int32) + np.cumsum(before, dtype=np.int32)
        new_places = old_places[inside]
        new_places[fresh] = place[fresh] + np.arange(int(fresh.sum()))
        return cls(old_places, new_places, fresh)

    def merge(self, old: "pl.DataFrame", new: "pl.DataFrame") -> "pl.DataFrame":
        """Return the rows of both in their places, rows of a token that is in both once."""
        import polars as pl

        rows = np.empty(len(self.old) + int(self.fresh.sum()), np.int64)
        rows[self.old] = np.arange(len(self.old))
        rows[self.new[self.fresh]] = np.arange(len(self.old), len(rows))
        return pl.concat([old, new.filter(pl.Series(self.fresh))])[rows]


@dataclass(frozen=True)
class _Change:
    """What numbers of events change where new ones meet old ones in a second.

    Attributes:
        tied: events that share user and time with another, beyond those of old and new alone.
        repeats: events equal to the one before, likewise.
    """

    tied: int
    repeats: int


@dataclass
class _Merged:
    """Events of both in the order of user and time, and the runs that hold both of one second.

    Attributes:
        offsets: (U + 1,) int64.
        item: (n,) int32.
        time: (n,) int64.
        is_new: (n,) bool.
        starts: where each run begins that holds both.
        sizes: its number of events.
        owners: its user.
    """

    offsets: NDArray[np.int64]
    item: NDArray[np.int32]
    time: NDArray[np.int64]
    is_new: NDArray[np.bool_]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    owners: NDArray[np.int32]

    def reorder(self, users: "pl.Series", items: "pl.DataFrame") -> _Change:
        """Order each of the runs as reading all would, by the hash of user and item."""
        if not self.starts.size:
            return _Change(0, 0)
        rows = np.repeat(self.starts - np.cumsum(self.sizes) + self.sizes, self.sizes)
        rows += np.arange(rows.size)
        run = np.repeat(np.arange(self.starts.size), self.sizes)
        owner, own_users = _renumbered(np.repeat(self.owners, self.sizes))
        item, own_items = _renumbered(self.item[rows])
        is_new = self.is_new[rows]
        time = self.time[rows]
        parts = [Histories(owner[part], item[part], time[part]) for part in (is_new, ~is_new)]
        alone = sum(map(count_repeats, parts))
        both = Events(users.gather(own_users), items[own_items], owner, item, time.copy())
        ordered, tied = in_time_order(both)
        self.item[rows] = own_items[ordered.item]
        counts = [np.bincount(run[part], minlength=self.starts.size) for part in (is_new, ~is_new)]
        tied -= sum(int(count[count > 1].sum()) for count in counts)
        return _Change(tied, count_repeats(ordered) - alone)


def _renumbered(codes: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    known, places = np.unique(codes, return_inverse=True)
    return places.astype(np.int32), known


@dataclass(frozen=True)
class _Merger:
    """Puts sorted new events between those of a store."""

    store: InteractionStore
    users: MergedTokens
    items: MergedTokens

    def merge(self, added: Histories, *, by_hash: bool) -> _Merged:
        """Merge by user and time; where times are equal, new events come last.

        Args:
            added: in the numbering of the whole.
            by_hash: whether new events of one second are ordered by the hash alone.

        Raises:
            InputError: they or the old ones are not, and a new event shares user and second with an
                old one.
        """
        old_time = np.asarray(self.store.timestamps)
        num_users = len(self.users.old) + int(self.users.fresh.sum())
        lengths = np.zeros(num_users, np.int64)
        lengths[self.users.old] = np.diff(self.store.offsets)
        begins = np.concatenate([[0], np.cumsum(lengths)])
        starts, stops = begins[added.user], begins[added.user + 1]
        place = first_after(old_time, starts, stops, added.time)
        before = first_after(old_time, starts, stops, added.time - 1)
        at = place + np.arange(len(place))
        is_new = np.zeros(len(old_time) + len(place), np.bool_)
        is_new[at] = True
        item = np.empty(len(is_new), np.int32)
        time = np.empty(len(is_new), np.int64)
        item[at], time[at] = added.item, added.time
        for rows, old_rows in _blocks(place, len(old_time)):
            left = ~is_new[rows]
            item[rows][left] = self._old_items(old_rows)
            time[rows][left] = old_time[old_rows]
        offsets = begins.copy()
        offsets[1:] += np.cumsum(np.bincount(added.user, minlength=num_users))
        # New events of one user and second, beside old ones of that second.
        first = np.ones(len(place), np.bool_)
        first[1:] = (added.user[1:] != added.user[:-1]) | (added.time[1:] != added.time[:-1])
        counts = np.diff(np.append(np.flatnonzero(first), len(place)))
        meets = place[first] > before[first]
        if meets.any() and not (by_hash and self._is_tied_by_hash(old_time)):
            self._refuse(added, int(np.flatnonzero(first)[meets][0]))
        heads = np.flatnonzero(first)[meets]
        sizes = place[heads] - before[heads] + counts[meets]
        runs = (before[heads] + heads, sizes, added.user[heads])
        return _Merged(offsets, item, time, is_new, *runs)

    def _old_items(self, rows: slice) -> NDArray[np.int32]:
        # Ids begin with 1; mode="clip" skips a check of bounds that costs as much as the look-up.
        return self.items.old.take(self.store.item_ids[rows] - np.int32(1), mode="clip")

    def _is_tied_by_hash(self, old_time: NDArray[np.int64]) -> bool:
        """Whether all old events of one user and second were of one time for who read them.

        Where they were not, times were finer. An old log with times that fine and nobody who has
        two events in a second cannot be told from one of whole seconds, and is taken as such.
        """
        same = np.zeros(len(old_time) + 1, np.bool_)
        np.equal(old_time[1:], old_time[:-1], out=same[1:-1])
        same[self.store.offsets] = False
        return int((same[1:] | same[:-1]).sum()) == self.store.manifest["ties"]["events"]

    def _refuse(self, added: Histories, event: int) -> None:
        user = int(np.flatnonzero(self.users.old == added.user[event])[0])
        raise InputError(
            f"{self.store.path} cannot be appended to: user {self.store.user_token(user)!r} has "
            f"old and new events at {date_of(int(added.time[event]))}, which fractions of a second "
            "or a column put in order, and the store holds neither; prepare all logs together"
        )


def _blocks(place: NDArray[np.int64], num_old: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of old rows that fit the cache, and where they and the new ones among them go.

    Args:
        place: of each new row among the old ones, ascending.
        num_old: number of the old ones.
    """
    for first in range(0, num_old, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, num_old)
        before, until = np.searchsorted(place, [first, last])
        yield slice(first + before, last + until), slice(first, last)
