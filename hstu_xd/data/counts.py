"""Counts of events by user and domain, in blocks of users so that memory stays bounded."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CELLS = 1 << 22


class DomainCounts(NamedTuple):
    """How often each user of a block visits each domain.

    Attributes:
        users: the block's users.
        rows: the block's events.
        cell: (events of the block,) int32, place of each event in ``counts`` flattened.
        counts: (users of the block, D) int64.
    """

    users: slice
    rows: slice
    cell: NDArray[np.int32]
    counts: NDArray[np.int64]


def domain_counts(
    offsets: NDArray[np.int64],
    item: NDArray[np.int32],
    item_domain: NDArray[np.int32],
    num_domains: int,
) -> Iterator[DomainCounts]:
    """Count events by (user, domain), block by block.

    Args:
        offsets: (U + 1,) int64, start of each user's events.
        item: (n,) row of each event's item in ``item_domain``.
        item_domain: (I,) domain of each item.
        num_domains: D.
    """
    num_users = len(offsets) - 1
    step = max(1, CELLS // num_domains)
    for first in range(0, num_users, step):
        users = slice(first, min(first + step, num_users))
        rows = slice(int(offsets[users.start]), int(offsets[users.stop]))
        size = users.stop - users.start
        lengths = np.diff(offsets[users.start : users.stop + 1])
        cell = np.repeat(np.arange(size, dtype=np.int32) * np.int32(num_domains), lengths)
        cell += item_domain.take(item[rows], mode="clip")
        counts = np.bincount(cell, minlength=size * num_domains).reshape(size, num_domains)
        yield DomainCounts(users, rows, cell, counts)


def offsets_of(user: NDArray[np.int32], num_users: int) -> NDArray[np.int64]:
    """Start of each user's events, given each event's user in ascending order: (U + 1,) int64."""
    offsets = np.zeros(num_users + 1, np.int64)
    np.cumsum(np.bincount(user, minlength=num_users), out=offsets[1:])
    return offsets
