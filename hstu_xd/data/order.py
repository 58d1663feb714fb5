"""Order events by user and time; ties by a hash of (user, item) that leaks nothing.

The hashes are the same 64-bit numbers on every machine, version and numbering of the ids. Events
are sorted by (user, time, item) as single 64-bit numbers, several times faster than as rows.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hstu_xd.data.encode import Events
from hstu_xd.data.token_bytes import TokenBytes

WORD = 8
CHUNK = 1 << 20
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer: a bijection of 64-bit integers whose bits look independent."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_tokens(tokens: "pl.Series") -> NDArray[np.uint64]:
    """Hash of each id's UTF-8 bytes.

    h = length; for each 8-byte little-endian word w (the last one padded with zeros):
    h = mix((h ^ w) + golden).

    Args:
        tokens: text without nulls.

    Returns:
        (len(tokens),) uint64.
    """
    parts = [_hash_chunk(tokens.slice(at, CHUNK)) for at in range(0, len(tokens), CHUNK)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def _hash_chunk(tokens: "pl.Series") -> NDArray[np.uint64]:
    look = TokenBytes(tokens)
    offsets, data, lengths = look.offsets, look.data, look.lengths
    hashes = lengths.astype(np.uint64)
    within = np.arange(WORD)
    for start in range(0, int(lengths.max(initial=0)), WORD):
        active = np.flatnonzero(lengths > start)
        places = offsets[active, None] + start + within
        inside = places < offsets[active + 1, None]
        letters = np.where(inside, data[np.minimum(places, data.size - 1)], 0).astype(np.uint8)
        words = letters.view("<u8")[:, 0].astype(np.uint64)
        hashes[active] = mix((hashes[active] ^ words) + GOLDEN)
    return hashes


def hash_pairs(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash of each (left, right) pair of hashes: mix(mix(left) + golden * right), (n,) uint64."""
    return mix(mix(left) + GOLDEN * right)


KEY_BITS = 64
MOST_BUCKET_BITS = 16
THREADS = 2

Columns = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]


def sort_events(events: Events) -> Columns:
    """Sort all events by user, then time, then item.

    User, time and item are packed into one unsigned integer, sorted, and unpacked: no row is ever
    gathered. Where the three need more than 64 bits, the leading bits of the user become a bucket
    number that is sorted by first; where even that does not suffice, rows are sorted as rows.

    Args:
        events: its user, item and time arrays are released.

    Returns:
        user (n,) int32, item (n,) int32, time (n,) int64.
    """
    user, item, time = events.release()
    first = int(time.min())
    time_bits = (int(time.max()) - first).bit_length()
    user_bits = (len(events.users) - 1).bit_length()
    item_bits = (len(events.items) - 1).bit_length()
    bucket_bits = max(0, user_bits + time_bits + item_bits - KEY_BITS)
    if bucket_bits > min(user_bits, MOST_BUCKET_BITS):
        order = np.lexsort((item, time, user))
        return user[order], item[order], time[order]
    low_bits = user_bits - bucket_bits
    key = (user & np.int32((1 << low_bits) - 1)).astype(np.uint64)
    key <<= np.uint64(time_bits)
    time -= first
    key |= time.view(np.uint64)
    del time
    key <<= np.uint64(item_bits)
    key |= item.view(np.uint32)
    bucket = (user >> np.int32(low_bits)).astype(np.uint16)
    del user, item
    key, counts = _by_bucket(key, bucket, bucket_bits)
    del bucket
    _sort_slices(key, counts)
    item = (key & _ones(item_bits)).astype(np.int32)
    key >>= np.uint64(item_bits)
    user = (key >> np.uint64(time_bits)).astype(np.int32)
    if bucket_bits:
        user |= np.repeat(np.arange(len(counts), dtype=np.int32) << low_bits, counts)
    key &= _ones(time_bits)
    time = key.view(np.int64)
    time += first
    return user, item, time


def _by_bucket(
    key: NDArray[np.uint64], bucket: NDArray[np.uint16], bits: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Keys grouped by bucket, and the number of keys in each bucket."""
    if not bits:
        return key, np.array([len(key)])
    return key[np.argsort(bucket, kind="stable")], np.bincount(bucket)


def _sort_slices(key: NDArray[np.uint64], counts: NDArray[np.int64]) -> None:
    """Sort each slice of ``counts`` keys in place, on two threads (numpy releases the lock)."""
    slices = np.split(key, np.cumsum(counts)[:-1])
    if len(slices) == 1:
        key.sort()
        return
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(np.ndarray.sort, slices, chunksize=1 + len(slices) // 64))


def _ones(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


KEY_BITS = 64


@dataclass
class Histories:
    """Events sorted by user, then time, then the hash of (user, item).

    Attributes:
        user: (n,) int32, ascending.
        item: (n,) int32.
        time: (n,) int64 seconds, ascending within a user.
    """

    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[np.int64]


def in_time_order(events: Events) -> tuple[Histories, int]:
    """Sort the events of every user by time.

    Published logs have whole-day times and order ties by domain or item number, which leaks the
    next domain. Here a tie is broken by a hash of the user's and the item's own bytes, so that
    neither file order nor the names of domains nor any numbering can matter.

    Args:
        events: all events; its per-event arrays are released.

    Returns:
        The events, and how many of them share user and time with another.
    """
    histories = Histories(*sort_events(events))
    tied = _break_ties(histories, events)
    histories.time = events.moments.seconds(histories.time)
    return histories, tied


def _break_ties(histories: Histories, events: Events) -> int:
    """Reorder, in place, the items of each run of events that share user and time.

    Returns:
        The number of events in such runs.
    """
    same = _same_as_previous(histories)
    tied = same.copy()
    tied[:-1] |= same[1:]
    places = np.flatnonzero(tied)
    if not places.size:
        return 0
    item = histories.item[places]
    run = np.cumsum(~same[places]).astype(np.uint64)
    user = histories.user[places]
    tie = hash_pairs(_hashes_at(events.users, user), _hashes_at(events.items["item"], item))
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
    return int(places.size)


def _hashes_at(tokens: "pl.Series", rows: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Hash of the token of each row; tokens of no row are not hashed."""
    used = np.zeros(len(tokens), np.bool_)
    used[rows] = True
    hashes = np.empty(len(tokens), np.uint64)
    hashes[used] = hash_tokens(tokens.filter(used))
    return hashes[rows]


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
