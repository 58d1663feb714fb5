"""Add events to a prepared store, to the same bytes as if all had been read at once.

Only what is new is read. The store's tokens, items and times take new ones in where they belong;
its order, counts and warnings follow from what it holds. What a store does not hold, such as the
events that filters dropped, cannot be made up: such stores are refused.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data import store_files
from hstu_xd.data.encode import EventReader, Events, IdOptions, doubts_of_ids, read_log
from hstu_xd.data.filters import Filters
from hstu_xd.data.ids import respellable
from hstu_xd.data.mapped_files import map_array
from hstu_xd.data.merging import EventMerger
from hstu_xd.data.order import Histories, in_time_order
from hstu_xd.data.prepare import EXACT_IDS, PREFIXED, facts_of, tell_of_files, write_prepared
from hstu_xd.data.repeats import count_repeats
from hstu_xd.data.sources import ReadOptions, open_sources
from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.data.store import InteractionStore, is_store
from hstu_xd.data.store_files import Log
from hstu_xd.errors import InputError
from hstu_xd.files import check_output, replaced_folder

if TYPE_CHECKING:
    import polars as pl

logger = logging.getLogger(__name__)

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
    merged = _merge(old, events, reader)
    with replaced_folder(out, force=force) as folder:
        log, facts, hashes = merged.write_events(folder)
        if columns.order is not None:
            facts["ties"]["order"] = old.manifest["ties"]["order"]
        facts |= {name: True for name in (EXACT_IDS, PREFIXED) if name in old.manifest}
        manifest = write_prepared(
            folder, log, facts, reader, write_upstream=write_upstream, hashes=hashes
        )
        del log  # Its arrays are the files of a folder that is renamed now.
    return manifest


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


@dataclass
class _Merged:
    """A store and new events, merged but for the events themselves.

    Attributes:
        users: ids of all users.
        items: all items.
        events: puts the new events between the old ones.
        tied: events that share user and time with another.
        repeats: events that equal the one before.
    """

    users: "pl.Series"
    items: "pl.DataFrame"
    events: EventMerger
    tied: int
    repeats: int

    def write_events(self, folder: Path) -> tuple[Log, dict[str, Any], dict[str, str]]:
        """Write the arrays of events.

        Returns:
            The log, which maps them; what the manifest says of how it came about; their hashes.
        """

        def mapped(name: str, kind: str) -> NDArray:
            return np.asarray(map_array(folder / name, len(self.events), np.dtype(kind)))

        with ThreadPoolExecutor(1) as pool:
            times = pool.submit(self.events.write_times, folder)
            hashes = {store_files.ITEM_IDS: self.events.write_item_ids(folder)}
            item_ids = mapped(store_files.ITEM_IDS, "<i4")
            log = Log(self.users, self.items, self.events.offsets, item_ids, np.empty(0, np.int64))
            facts = self._facts(log)  # Which asks for no times.
            hashes[store_files.TIMESTAMPS] = times.result()
        log.time = mapped(store_files.TIMESTAMPS, "<i8")
        return log, facts, hashes

    def _facts(self, log: Log) -> dict[str, Any]:
        facts = facts_of(
            log,
            read=len(log.item_ids),
            tied=self.tied,
            repeats=self.repeats,
            found=self.repeats,
            filters=self.events.store.manifest["filters"],
        )
        facts["warnings"] += doubts_of_ids(
            log.users,
            log.items,
            lambda: np.diff(log.offsets),
            lambda: np.bincount(log.item_ids, minlength=len(log.items) + 1)[1:],
        )
        return facts


def _merge(store: InteractionStore, events: Events, reader: EventReader) -> _Merged:
    """Merge the ids of a store and of events, and place the events.

    Raises:
        InputError: ids that contradict each other or may be written otherwise, or events whose
            order is unknown.
    """
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
        domains = pl.Series(store.domain_names), raw["domain"].unique()
        _check_spellings(store, [*both, names, raw["item"], *domains])
    users = MergedTokens.of(old_users, events.users)
    items = MergedTokens.of_items(old_items, events.items)
    _check_domains(store, old_items, events.items.filter(items.fresh))
    all_users = users.merge(old_users.to_frame("user"), events.users.to_frame("user"))["user"]
    all_items = items.merge(old_items, events.items)
    by_hash = store.manifest["ties"]["order"] == "hash" and not events.moments.finer
    added, tied = in_time_order(events)
    added = Histories(users.new[added.user], items.new[added.item], added.time)
    merger = EventMerger.of(
        store, users.old, items.old, added, num_users=len(all_users), by_hash=by_hash
    )
    change = merger.order_ties(all_users, all_items)
    tied += store.manifest["ties"]["events"] + change.tied
    repeats = store.manifest["duplicates"] + count_repeats(added) + change.repeats
    return _Merged(all_users, all_items, merger, tied, repeats)


def _check_domains(store: InteractionStore, old: "pl.DataFrame", fresh: "pl.DataFrame") -> None:
    """Refuse new items that are old ones of another domain.

    Raises:
        InputError: names one.
    """
    if fresh.is_empty():
        return
    shared = old.filter(old["item"].is_in(fresh["item"].implode())).sort("item")
    if len(shared):
        item, domain = shared.row(0)
        other = fresh.filter(fresh["item"] == item)["domain"][0]
        raise InputError(
            f"item {item!r} is in domains {' and '.join(map(repr, sorted((domain, other))))}, of "
            f"{store.path} and the new logs; give it one, or put the domain before every item's id "
            "in all of them with --prefix-items"
        )


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
        return cls._at(*_found(old, new), len(old))

    @classmethod
    def of_items(cls, old: "pl.DataFrame", new: "pl.DataFrame") -> "MergedTokens":
        """Place items: columns item and domain, both sorted by domain and item, each item once."""
        names, ends = _runs(old["domain"])
        starts = [0, *ends]
        places, fresh, first = [], [], 0
        for name, end in zip(*_runs(new["domain"]), strict=True):
            at = bisect_left(names, name)
            size = ends[at] - starts[at] if name in names[at : at + 1] else 0
            place, is_fresh = _found(
                old["item"].slice(starts[at], size), new["item"].slice(first, end - first)
            )
            places.append(place + starts[at])
            fresh.append(is_fresh)
            first = end
        return cls._at(np.concatenate(places), np.concatenate(fresh), len(old))

    @classmethod
    def _at(
        cls, place: NDArray[np.int64], fresh: NDArray[np.bool_], num_old: int
    ) -> "MergedTokens":
        """Number tokens of which so many old ones are smaller."""
        # A fresh token goes before the old one at its place.
        before = np.bincount(place[fresh], minlength=num_old + 1)[:num_old]
        old_places = np.arange(num_old, dtype=np.int32) + np.cumsum(before, dtype=np.int32)
        new_places = old_places.take(place, mode="clip")
        new_places[fresh] = place[fresh] + np.arange(int(fresh.sum()))
        return cls(old_places, new_places, fresh)

    def merge(self, old: "pl.DataFrame", new: "pl.DataFrame") -> "pl.DataFrame":
        """Return the rows of both in their places, rows of a token that is in both once."""
        import polars as pl

        if not self.fresh.any():
            return old
        rows = np.empty(len(self.old) + int(self.fresh.sum()), np.int64)
        rows[self.old] = np.arange(len(self.old))
        rows[self.new[self.fresh]] = np.arange(len(self.old), len(rows))
        return pl.concat([old, new.filter(pl.Series(self.fresh))])[rows]


def _found(old: "pl.Series", new: "pl.Series") -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return how many old tokens are below each new one, and whether it is none of them."""
    place = old.search_sorted(new, side="left").to_numpy().astype(np.int64)
    if old.is_empty():
        return place, np.ones(len(new), np.bool_)
    same = (old.gather(np.minimum(place, len(old) - 1)) == new).to_numpy()
    return place, (place == len(old)) | ~same


def _runs(column: "pl.Series") -> tuple[list[str], list[int]]:
    """Return the values of a sorted column, and the row after the last one of each."""
    runs = column.rle().struct
    return runs.field("value").to_list(), runs.field("len").cum_sum().to_list()
