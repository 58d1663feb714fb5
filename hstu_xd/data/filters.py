"""Filters of a log: rare items, thin (user, domain) histories and short users leave it.

The filters are repeated until nothing leaves any more (k-core). Events are counted by user and
domain in blocks of users, so that memory stays bounded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.order import Histories
from hstu_xd.errors import InputError

# Counts of a block, whose events fit the cache.
CELLS = 1 << 13


class DomainCounts(NamedTuple):
    """How often each user of a block visits each domain.

    Attributes:
        users: the block's users.
        rows: the block's events.
        domain: (events of the block,) domain of each event, of the type of the items' domains.
        cell: (events of the block,) int64, place of each event in ``counts`` flattened.
        counts: (users of the block, D) int64.
    """

    users: slice
    rows: slice
    domain: NDArray[np.integer]
    cell: NDArray[np.int64]
    counts: NDArray[np.int64]


def domain_counts(
    offsets: NDArray[np.int64],
    item: NDArray[np.int32],
    item_domain: NDArray[np.integer],
    num_domains: int,
) -> Iterator[DomainCounts]:
    """Count events by (user, domain), block by block.

    Args:
        offsets: (U + 1,) int64, start of each user's events.
        item: (n,) row of each event's item in ``item_domain``.
        item_domain: (I,) domain of each item; the smaller its type, the faster.
        num_domains: D.
    """
    num_users = len(offsets) - 1
    step = max(1, CELLS // num_domains)
    for first in range(0, num_users, step):
        users = slice(first, min(first + step, num_users))
        rows = slice(int(offsets[users.start]), int(offsets[users.stop]))
        size = users.stop - users.start
        lengths = np.diff(offsets[users.start : users.stop + 1])
        # Of the type that bincount works on, which else makes a copy of that.
        cell = np.repeat(np.arange(size) * num_domains, lengths)
        domain = item_domain.take(item[rows], mode="clip")
        cell += domain
        counts = np.bincount(cell, minlength=size * num_domains).reshape(size, num_domains)
        yield DomainCounts(users, rows, domain, cell, counts)


def offsets_of(user: NDArray[np.int32], num_users: int) -> NDArray[np.int64]:
    """Start of each user's events, given each event's user in ascending order: (U + 1,) int64."""
    offsets = np.zeros(num_users + 1, np.int64)
    np.cumsum(np.bincount(user, minlength=num_users), out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class Filters:
    """Least numbers of events; 0 and 1 keep everything.

    Attributes:
        min_user: of a user in a domain, else that user's events in that domain leave.
        min_item: of an item.
        min_user_total: of a user over all domains.
    """

    min_user: int = 0
    min_item: int = 0
    min_user_total: int = 0

    def check(self) -> None:
        """Raise InputError for a negative number."""
        for name, value in vars(self).items():
            if value < 0:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} {value}: is negative; give 0 or more")

    def __str__(self) -> str:
        """Write the filters as options, for messages."""
        return " ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(self).items() if v)


def apply_filters(
    histories: Histories,
    filters: Filters,
    item_domain: NDArray[np.int32],
    num_users: int,
    num_domains: int,
) -> tuple[Histories, int]:
    """Drop events until every filter holds for all that are left.

    The result is the largest set of events that satisfies all filters; it does not depend on the
    order in which they are applied.

    Args:
        histories: sorted events.
        filters: least numbers.
        item_domain: (I,) domain of each item.
        num_users: U.
        num_domains: D.

    Returns:
        The events left, in the same order and numbering, and how many rounds dropped something.

    Raises:
        InputError: nothing is left.
    """
    before = len(histories.user)
    rounds = 0
    while True:
        size = len(histories.user)
        histories = _keep(histories, _frequent(histories.item, filters.min_item))
        if filters.min_user > 1:
            offsets = offsets_of(histories.user, num_users)
            keep = np.ones(len(histories.user), np.bool_)
            for block in domain_counts(offsets, histories.item, item_domain, num_domains):
                enough = block.counts.ravel() >= filters.min_user
                keep[block.rows] = enough[block.cell]
            histories = _keep(histories, keep)
        histories = _keep(histories, _frequent(histories.user, filters.min_user_total))
        if len(histories.user) == size:
            break
        rounds += 1
        if not len(histories.user):
            raise InputError(f"{filters}: leaves none of the {before} events; lower the filters")
    return histories, rounds


def _frequent(codes: NDArray[np.int32], least: int) -> NDArray[np.bool_] | None:
    if least <= 1:
        return None
    return (np.bincount(codes) >= least)[codes] if len(codes) else np.ones(0, np.bool_)


def _keep(histories: Histories, mask: NDArray[np.bool_] | None) -> Histories:
    if mask is None or mask.all():
        return histories
    return Histories(histories.user[mask], histories.item[mask], histories.time[mask])
