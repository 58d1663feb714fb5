"""From interaction logs to a prepared store: read, order, filter, write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hstu_xd.data import store_files
from hstu_xd.data.encode import Events, read_events
from hstu_xd.data.filters import Filters, apply_filters, offsets_of
from hstu_xd.data.order import Histories, count_duplicates, in_time_order
from hstu_xd.data.sources import open_sources
from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.data.store import is_store
from hstu_xd.data.store_files import Log, domains_of, write_store
from hstu_xd.data.times import LARGEST_PLAUSIBLE_SECONDS
from hstu_xd.data.upstream_csv import MIN_EVENTS, SEQUENCES, write_upstream_csv
from hstu_xd.errors import InputError
from hstu_xd.files import check_output, replaced_folder

# Metrics carry the domain's name in brackets, beside these groups of targets.
_METRIC_GROUPS = ("switch", "stay")


def prepare_logs(
    inputs: Sequence[str],
    out: Path,
    *,
    file_format: str = "auto",
    columns: ColumnOptions | None = None,
    filters: Filters | None = None,
    write_upstream: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Read interaction logs and write one prepared store.

    The store depends on the set of events alone: not on the order of rows, of files, or on how
    the events are spread over files.

    Args:
        inputs: files, or ``NAME=PATH`` to give a file one domain.
        out: the folder to write; appears whole or not at all.
        file_format: ``auto`` or one of :data:`hstu_xd.data.sources.FORMATS`.
        columns: names of the columns where they are unusual.
        filters: least numbers of events; nothing is dropped by default.
        write_upstream: also write the CSV files of
            :func:`hstu_xd.data.upstream_csv.write_upstream_csv`.
        force: replace an existing prepared store.

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
    sources = open_sources(inputs, file_format=file_format, columns=columns)
    events = read_events(sources)
    log, facts = build_log(events, filters)
    with replaced_folder(out) as partial:
        if write_upstream:
            written = write_upstream_csv(partial, log)
            # Beside the hashes of the store proper, which runs compare: the data are the same.
            facts["upstream_csv"] = written
            if written["left_out"]:
                facts["warnings"].append(
                    f"{SEQUENCES} leaves out {written['left_out']} of {len(log.users)} users: "
                    f"upstream cannot train on fewer than {MIN_EVENTS} events"
                )
        return write_store(partial, log, facts)


def build_log(events: Events, filters: Filters) -> tuple[Log, dict[str, Any]]:
    """Order and filter the events; return the log and what the manifest says about it.

    Raises:
        InputError: a domain called like a group of targets, or filters that leave nothing.
    """
    read = len(events.user)
    histories = in_time_order(events)
    names, item_domain = domains_of(events.items)
    check_domain_names(names)
    num_users = len(events.users)
    histories, rounds = apply_filters(histories, filters, item_domain, num_users, len(names))
    log = _compact(events, histories)
    facts = {
        "synthetic": False,
        "duplicates": count_duplicates(histories),
        "filters": {
            **vars(filters),
            "rounds": rounds,
            "dropped": {
                "users": num_users - len(log.users),
                "items": len(events.items) - len(log.items),
                "interactions": read - len(log.item),
            },
        },
        "warnings": _warnings(log),
    }
    return log, facts


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
    found = []
    if log.items["domain"].n_unique() == 1:
        name = log.items["domain"][0]
        found.append(f"one domain only ({name!r}): the cross-domain parts have no effect")
    if (latest := int(log.time.max())) > LARGEST_PLAUSIBLE_SECONDS:
        found.append(
            f"timestamps up to {latest} look like milliseconds and are kept as they are; "
            "divide them by 1000 if differences in time shall be seconds"
        )
    return found


def _compact(events: Events, histories: Histories) -> Log:
    """Renumber users and items so that only those with events are left."""
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
    return Log(users=users, items=items, offsets=offsets, item=item, time=histories.time)
