"""Orders events by user and time, ties by a hash of (user, item) that leaks nothing."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.encode import Events
from hstu_xd.data.hashing import hash_pairs, hash_tokens
from hstu_xd.data.sorting import sort_events

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
        events: all events; its per-event arrays are released.
    """
    histories = Histories(*sort_events(events))
    _break_ties(histories, events)
    return histories


def count_duplicates(histories: Histories) -> int:
    """Events equal to the one before in user, item and time; equal events are neighbours."""
    tied = _same_as_previous(histories)
    return int((histories.item[1:] == histories.item[:-1])[tied[1:]].sum())


def _break_ties(histories: Histories, events: Events) -> None:
    """Reorder, in place, the items of each run of events that share user and time."""
    same = _same_as_previous(histories)
    tied = same.copy()
    tied[:-1] |= same[1:]
    places = np.flatnonzero(tied)
    if not places.size:
        return
    item = histories.item[places]
    run = np.cumsum(~same[places]).astype(np.uint64)
    user_hash, item_hash = hash_tokens(events.users), hash_tokens(events.items["item"])
    tie = hash_pairs(user_hash[histories.user[places]], item_hash[item])
    # Sort by the run and as many leading bits of the hash as fit beside it; the few that remain
    # equal are sorted by all of it, and by item should two items ever share a hash.
    run_bits = np.uint64(int(run[-1]).bit_length())
    key, row = _sort(
        (run << (np.uint64(KEY_BITS) - run_bits)) | (tie >> run_bits), np.arange(len(run))
    )
    item, tie = item[row], tie[row]
    close = np.zeros(len(key), np.bool_)
    np.equal(key[1:], key[:-1], out=close[1:])
    close[:-1] |= close[1:]
    left = np.flatnonzero(close)
    item[left] = item[left][np.lexsort((item[left], tie[left], key[left]))]
    histories.item[places] = item


def _sort(key: NDArray[np.uint64], value: NDArray) -> tuple[NDArray[np.uint64], NDArray]:
    """Keys in ascending order with their values, equal keys in any order; on polars' threads."""
    import polars as pl

    frame = pl.LazyFrame({"key": key, "value": value}).sort("key").collect(engine="streaming")
    frame = frame.rechunk()
    return frame["key"].to_numpy(writable=True), frame["value"].to_numpy(writable=True)


def _same_as_previous(histories: Histories) -> NDArray[np.bool_]:
    """(n,) bool: whether an event has the user and time of the one before; the first never has."""
    user, time = histories.user, histories.time
    same = np.zeros(len(user), np.bool_)
    np.equal(time[1:], time[:-1], out=same[1:])
    same[1:] &= user[1:] == user[:-1]
    return same
