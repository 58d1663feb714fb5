"""Add events to a prepared store, to the same bytes as if all had been read at once.

Only what is new is read. The store's tokens, items and times take new ones in where they belong;
its order, counts and warnings follow from what it holds. What a store does not hold, such as the
events that filters dropped, cannot be made up: such stores are refused.
"""

import logging
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
from hstu_xd.data.known_ids import KnownIds
from hstu_xd.data.mapped_files import map_array
from hstu_xd.data.merging import EventMerger
from hstu_xd.data.order import in_time_order
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
    events, reader = read_log(sources, ids, tell=tell, known=_known_ids(old))
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
    """Place the events among those of a store.

    Raises:
        InputError: events whose order is unknown.
    """
    assert reader.merged is not None
    users, items, old_users, old_items, _, _ = reader.merged
    by_hash = store.manifest["ties"]["order"] == "hash" and not events.moments.finer
    added, tied = in_time_order(events)
    merger = EventMerger.of(
        store, old_users, old_items, added, num_users=len(users), by_hash=by_hash
    )
    change = merger.order_ties(users, items)
    tied += store.manifest["ties"]["events"] + change.tied
    repeats = store.manifest["duplicates"] + count_repeats(added) + change.repeats
    return _Merged(users, items, merger, tied, repeats)


def _known_ids(store: InteractionStore) -> KnownIds:
    import polars as pl

    users = pl.read_parquet(store.path / store_files.USERS)["user"]
    items = pl.read_parquet(store.path / store_files.CATALOG).select("item", "domain")
    return KnownIds(store.path, users, items, PREFIXED in store.manifest)
