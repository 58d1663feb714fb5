"""Orders events by user and time, ties by a hash of (user, item) that leaks nothing."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.encode import Events
from hstu_xd.data.hashing import hash_pairs, hash_tokens

KEY_BITS = 64


@dataclass
class Histories:
    """Events sorted by user, then time, then the hash of (user, item).

    Attributes:
        user: (n,) int32, ascending.
        item: (n,) int32.
        time: (n,) int64, ascending within a user.
    """

    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[np.int64]


def in_time_order(events: Events) -> Histories:
    """Sort the events of every user by time.

    Published logs have whole-day times and order ties by domain or item number, which leaks the
    next domain. Here a tie is broken by a hash of the user's and the item's own bytes, so that
    neither file order nor the names of domains nor any numbering can matter.

    Args:
        events: consumed; its arrays are released as they are no longer needed.
    """
    user, time = events.user, events.time
    first, last = int(time.min()), int(time.max())
    time_bits = (last - first).bit_length()
    if len(events.users).bit_length() + time_bits > KEY_BITS:
        order = np.lexsort((time, user))
        same = _same_as_previous(user[order]) & _same_as_previous(time[order])
    else:
        # One integer key: radix sorting it is several times faster than sorting by two columns.
        key = user.astype(np.uint64) << np.uint64(time_bits)
        key |= (time - first).astype(np.uint64)
        order = _argsort(key)
        same = _same_as_previous(key[order])
        del key
    _break_ties(order, same, events)
    return Histories(user=user[order], item=events.item[order], time=time[order])


def count_duplicates(histories: Histories) -> int:
    """Events equal to the one before in user, item and time; equal events are neighbours."""
    same = _same_as_previous(histories.user) & _same_as_previous(histories.time)
    return int((same & _same_as_previous(histories.item)).sum())


def _break_ties(order: NDArray, same: NDArray[np.bool_], events: Events) -> None:
    """Reorder, in place, each run of events that share user and time."""
    tied = same.copy()
    tied[:-1] |= same[1:]
    places = np.flatnonzero(tied)
    if not places.size:
        return
    rows = order[places]
    run = np.cumsum(~same[places]).astype(np.uint64)
    user_hash, item_hash = hash_tokens(events.users), hash_tokens(events.items["item"])
    tie = hash_pairs(user_hash[events.user[rows]], item_hash[events.item[rows]])
    # Sort by the run and as many leading bits of the hash as fit beside it; the few that remain
    # equal are sorted by all of it, and by item should two items ever share a hash.
    run_bits = np.uint64(int(run[-1]).bit_length())
    key = (run << (np.uint64(KEY_BITS) - run_bits)) | (tie >> run_bits)
    by_key = _argsort(key)
    rows, tie, key = rows[by_key], tie[by_key], key[by_key]
    close = _same_as_previous(key)
    close[:-1] |= close[1:]
    left = np.flatnonzero(close)
    rows[left] = rows[left][np.lexsort((events.item[rows[left]], tie[left], key[left]))]
    order[places] = rows


def _argsort(key: NDArray[np.uint64]) -> NDArray:
    """Order that sorts the keys, equal keys in any order; on all of polars' threads."""
    import polars as pl

    return pl.Series(key).arg_sort().to_numpy(writable=True)


def _same_as_previous(values: NDArray) -> NDArray[np.bool_]:
    """(n,) bool: whether a value equals the one before; the first never does."""
    same = np.zeros(len(values), np.bool_)
    np.equal(values[1:], values[:-1], out=same[1:])
    return same
