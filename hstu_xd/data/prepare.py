"""From interaction logs to a prepared store: read, order, filter, write."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data import store_files
from hstu_xd.data.encode import EventReader, Events, IdOptions, doubts_of_ids, read_log
from hstu_xd.data.event_fields import FieldRows
from hstu_xd.data.filters import Filters, apply_filters, offsets_of
from hstu_xd.data.ids import alike_without_case, strangers
from hstu_xd.data.item_table import FeatureOptions, ItemTable
from hstu_xd.data.order import Histories, in_time_order
from hstu_xd.data.reading import check_agreement, describe_readings
from hstu_xd.data.repeats import count_repeats, parse_rule, repeat_warnings, targets_met
from hstu_xd.data.repeats import drop_repeats as drop_repeats_within
from hstu_xd.data.sources import ReadOptions, open_sources
from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.data.statistics import DIGITS
from hstu_xd.data.store import is_store
from hstu_xd.data.store_files import Log, domains_of, write_store
from hstu_xd.data.upstream_csv import MIN_EVENTS, SEQUENCES, write_upstream_csv
from hstu_xd.errors import InputError
from hstu_xd.files import check_output, replaced_folder

logger = logging.getLogger(__name__)

SOME_USERS = 1000
# Metrics carry the domain's name in brackets, beside these groups of targets.
_METRIC_GROUPS = ("switch", "stay")
# Entries of the manifest where ids were kept as they are written, or their domain put before them.
EXACT_IDS, PREFIXED = "exact_ids", "prefixed_items"


def prepare_logs(
    inputs: Sequence[str],
    out: Path,
    *,
    file_format: str = "auto",
    columns: ColumnOptions | None = None,
    time_unit: str = "auto",
    quote: str = "auto",
    ids: IdOptions | None = None,
    drop_repeats: str | None = None,
    filters: Filters | None = None,
    features: FeatureOptions | None = None,
    write_upstream: bool = False,
    force: bool = False,
    tell: Callable[[str], object] = logger.info,
    warn: Callable[[str], object] = logger.warning,
) -> dict[str, Any]:
    """Read interaction logs and write one prepared store.

    The store depends on the set of events alone: not on the order of rows, of files, or on how
    the events are spread over files.

    Args:
        inputs: files, or ``NAME=PATH`` to give a file one domain.
        out: the folder to write; appears whole or not at all.
        file_format: ``auto`` or one of :data:`hstu_xd.data.sources.FORMATS`.
        columns: names of the columns where they are unusual.
        time_unit: ``auto`` or what the times are, of :data:`hstu_xd.data.times.TIME_UNITS`.
        quote: ``auto`` or how quotes are read, of :data:`hstu_xd.data.sources.delimited.QUOTES`.
        ids: what is done with ids and with lines that cannot be read.
        drop_repeats: ``exact`` or a number of seconds within which the same item of a user counts
            once; by default repeats are kept and counted.
        filters: least numbers of events; nothing is dropped by default.
        features: where the items' taxonomy and features are; None: the store has none.
        write_upstream: also write the CSV files of
            :func:`hstu_xd.data.upstream_csv.write_upstream_csv`.
        force: replace an existing prepared store.
        tell: takes lines on what each file was taken to be.
        warn: takes warnings about single files; those about the events are in the manifest, which
            is the same however they are spread over files.

    Returns:
        The manifest.

    Raises:
        InputError: bad input; the message names file, line, value and mend.
        HstuXdError: the store cannot be written.
    """
    filters = filters or Filters()
    filters.check()
    check_output(
        out, force=force, ours=is_store, kind="prepared store", parts=store_files.ALL_FILES
    )
    window = parse_rule(drop_repeats)
    table = ItemTable(features) if features is not None else None
    options = ReadOptions(columns or ColumnOptions(), time_unit, quote)
    sources = open_sources(inputs, file_format=file_format, options=options, tell=tell)
    events, reader = read_log(sources, ids or IdOptions(), tell=tell)
    tell_of_files(reader, out / store_files.FAULTY_LINES, tell, warn)
    log, facts = build_log(events, filters, window=window)
    if table is not None:
        added = table.describe_items(log, facts["warnings"].append)
        facts |= {"cold_items": added} if added else {}
    if options.columns.order is not None:
        facts["ties"]["order"] = "column, then hash"
    facts |= _facts_of_ids(ids or IdOptions())
    if reader.skipped:
        facts["skipped_lines"] = reader.skipped
    with replaced_folder(out, force=force) as folder:
        return write_prepared(folder, log, facts, reader, write_upstream=write_upstream)


def _facts_of_ids(ids: IdOptions) -> dict[str, bool]:
    """Say what was done otherwise than usual with ids: what is appended has to be read alike."""
    return {name: True for name, on in ((EXACT_IDS, ids.exact), (PREFIXED, ids.prefix_items)) if on}


def tell_of_files(
    reader: EventReader,
    listing: Path,
    tell: Callable[[str], object],
    warn: Callable[[str], object],
) -> None:
    """Say what each file was taken to be, and what is odd about it or left out of it.

    Raises:
        InputError: files whose times cannot be compared.
    """
    for line in describe_readings(reader.facts):
        tell(line)
    check_agreement(reader.facts, warn)
    for file in reader.facts:
        if file.skipped:
            warn(
                f"{file.source.path}: {file.skipped:,} faulty lines left out, {file.events:,} "
                f"events read; they are listed in {listing}"
            )


def write_prepared(
    folder: Path,
    log: Log,
    facts: dict[str, Any],
    reader: EventReader,
    *,
    write_upstream: bool,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the store and what was asked for beside it; return the manifest.

    Args:
        folder: where to write.
        log: the events.
        facts: further entries of the manifest.
        reader: which knows what was left out.
        write_upstream: whether upstream's files are written, too.
        hashes: of the log's arrays that are in the folder already.
    """
    if reader.skipped:
        listing = folder / store_files.FAULTY_LINES
        text = "file,line,problem\n" + reader.faulty_lines.getvalue()
        listing.write_text(text, encoding="utf-8", errors="backslashreplace")
    if write_upstream:
        written = write_upstream_csv(folder, log)
        # Beside the hashes of the store proper, which runs compare: the data are the same.
        facts["upstream_csv"] = written
        if written["left_out"]:
            facts["warnings"].append(
                f"{SEQUENCES} leaves out {written['left_out']} of {len(log.users)} users: "
                f"upstream cannot train on fewer than {MIN_EVENTS} events"
            )
    return write_store(folder, log, facts, hashes=hashes)


def build_log(
    events: Events, filters: Filters, *, window: int | None = None
) -> tuple[Log, dict[str, Any]]:
    """Order and filter the events; return the log and what the manifest says about it.

    Args:
        events: as read; its per-event arrays are released.
        filters: least numbers of events.
        window: seconds within which the same item of a user counts once; None keeps all.

    Raises:
        InputError: a domain called like a group of targets, or filters that leave nothing.
    """
    read = len(events.user)
    rows = None
    if events.fields is not None:
        second = events.moments.seconds(events.time)
        rows = FieldRows(events.fields, events.user, events.item, second, events.time)
    doubts = doubts_of_ids(
        events.users,
        events.items,
        lambda: np.bincount(events.user, minlength=len(events.users)),
        lambda: np.bincount(events.item, minlength=len(events.items)),
    )
    histories, tied = in_time_order(events)
    repeats = found = count_repeats(histories)
    if window is not None:
        histories = drop_repeats_within(histories, window)
    kept = len(histories.user)
    names, item_domain = domains_of(events.items)
    check_domain_names(names)
    num_users = len(events.users)
    histories, rounds = apply_filters(histories, filters, item_domain, num_users, len(names))
    fields = None
    if rows is not None:
        fields = rows.of(histories.user, histories.item, histories.time)
    log = _compact(events, histories)
    log.fields = fields
    if len(histories.user) != read:
        repeats = count_repeats(histories)
    facts = facts_of(
        log,
        read=read,
        tied=tied,
        repeats=repeats,
        found=found,
        window=window,
        dropped=read - kept,
        filters={
            **vars(filters),
            "rounds": rounds,
            "dropped": {
                "users": num_users - len(log.users),
                "items": len(events.items) - len(log.items),
                "interactions": kept - len(log.item_ids),
            },
        },
    )
    facts["warnings"] += doubts
    return log, facts


def facts_of(
    log: Log,
    *,
    read: int,
    tied: int,
    repeats: int,
    found: int,
    filters: dict[str, Any],
    window: int | None = None,
    dropped: int = 0,
) -> dict[str, Any]:
    """Return what the manifest says of how a log came about.

    Args:
        log: as it is stored.
        read: number of events that were read.
        tied: events of them that share user and time with another.
        repeats: events of ``log`` that equal the one before.
        found: likewise, of what was read.
        filters: least numbers, rounds, and what was dropped.
        window: seconds within which the same item of a user counts once; None keeps all.
        dropped: events that were dropped by it.
    """
    targets = targets_met(log)
    return {
        "synthetic": False,
        "duplicates": repeats,
        "repeats": {"found": found, "window_seconds": window, "dropped": dropped},
        "targets": targets,
        "ties": {"events": tied, "share": round(tied / read, DIGITS), "order": "hash"},
        "filters": filters,
        "warnings": _warnings(log) + repeat_warnings(repeats, len(log.item_ids), targets),
    }


def check_domain_names(names: Sequence[str]) -> None:
    """Refuse names that tables of metrics could not tell from their own.

    Raises:
        InputError: a domain called like a group of targets.
    """
    taken = [name for name in names if name in _METRIC_GROUPS]
    if taken:
        raise InputError(
            f"domain {taken[0]!r} is also the name of a group of targets in every table of metrics "
            f"(hr@100[{taken[0]}]); call the domain otherwise"
        )


def _warnings(log: Log) -> list[str]:
    """Say what a user should know about a log that is allowed but odd."""
    import polars as pl

    found = []
    names, item_domain = domains_of(log.items)
    if len(names) == 1:
        found.append(f"one domain only ({names[0]!r}): the cross-domain parts have no effect")
    else:
        found += _strangers(log, names, item_domain)
    if (alike := alike_without_case(pl.Series(names))) is not None:
        found.append(alike)
    return found


def _strangers(log: Log, names: list[str], item_domain: NDArray[np.int32]) -> list[str]:
    """Warn where no user has events in two domains."""
    if len(log.users) < 2:
        return []
    # In most logs some of the first users are enough to tell.
    for start, stop in ((0, SOME_USERS), (SOME_USERS, len(log.users))):
        offsets = log.offsets[start : stop + 1]
        if len(offsets) < 2:
            break
        domain = item_domain[log.item_ids[offsets[0] : offsets[-1]] - 1]
        firsts = domain[offsets[:-1] - offsets[0]]
        if (domain != np.repeat(firsts, np.diff(offsets))).any():
            return []
    firsts = item_domain[log.item_ids[log.offsets[:-1]] - 1]
    examples = {
        names[d]: log.users[int(np.argmax(firsts == d))] for d in np.unique(firsts)[:2].tolist()
    }
    return [strangers(log.users, examples)]


def _compact(events: Events, histories: Histories) -> Log:
    """Renumber users and items so that only those with events are left; takes the items' array."""
    num_users, num_items = len(events.users), len(events.items)
    users_left = np.bincount(histories.user, minlength=num_users) > 0
    items_left = np.bincount(histories.item, minlength=num_items) > 0
    users, items = events.users, events.items
    offsets = offsets_of(histories.user, num_users)
    item = histories.item
    if not users_left.all():
        users = users.filter(users_left)
        offsets = offsets[np.concatenate([[True], users_left])]
    if not items_left.all():
        items = items.filter(items_left)
        item = (np.cumsum(items_left, dtype=np.int32) - 1)[item]
    item += np.int32(1)
    return Log(users=users, items=items, offsets=offsets, item_ids=item, time=histories.time)
