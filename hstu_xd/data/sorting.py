"""Sorts events by (user, time, item) as single 64-bit numbers, several times faster than rows."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.encode import Events

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
