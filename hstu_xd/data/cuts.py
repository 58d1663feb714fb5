"""Cut a log in time, for all users alike: events that train, events that validate, that test."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.times import EARLIEST, KINDS, date_of, is_date
from hstu_xd.errors import InputError

# A date, a time in the unit of the log, or the share of the events that come before.
Cut = str | int | float

VALID_SHARE, TEST_SHARE = 0.8, 0.9


@dataclass(frozen=True)
class TimeCuts:
    """Where a log is cut.

    Attributes:
        valid_from: first time that validates, in the unit of the log; what is earlier trains.
        test_from: first time that tests.
    """

    valid_from: int
    test_from: int


def cut_in_time(
    times: NDArray[np.int64], valid_from: Cut, test_from: Cut, *, told: tuple[str, str]
) -> TimeCuts:
    """Find where a log is cut.

    Args:
        times: (E,) of all events, in any order.
        valid_from: when validation begins.
        test_from: when test begins.
        told: how messages name the two, ``--valid-from 2020-01-30``.

    Raises:
        InputError: what is no date, time or share, or leaves one of the three parts without events.

    Example:
        >>> cut_in_time(np.arange(100), 0.8, 95, told=("the first", "the second"))
        TimeCuts(valid_from=80, test_from=95)
    """
    # Only a share needs the order; times are checked by the first and the last event.
    is_shared = any(isinstance(cut, float) for cut in (valid_from, test_from))
    ordered = np.sort(times) if is_shared else np.array([np.min(times), np.max(times)])
    valid, test = (
        _time_of(cut, ordered, name)
        for cut, name in zip((valid_from, test_from), told, strict=True)
    )
    if not ordered[0] < valid < test <= ordered[-1]:
        first, last = (described_time(int(ordered[place])) for place in (0, -1))
        raise InputError(
            f"{told[0]} and {told[1]} do not cut the log, which has events from {first} to {last}; "
            "give two times of it, the earlier first"
        )
    return TimeCuts(valid, test)


def _time_of(cut: Cut, ordered: NDArray[np.int64], told: str) -> int:
    """Return the time that a cut stands for."""
    import polars as pl

    if isinstance(cut, int):
        return cut
    if isinstance(cut, float):
        if 0 < cut < 1:
            return int(ordered[int(len(ordered) * cut)])
        raise InputError(
            f"{told}: a share of the events lies between 0 and 1; a time is a whole number"
        )
    second = KINDS["iso"].read(pl.Series([cut])).seconds.item() if is_date(cut) else None
    if second is None:
        raise InputError(
            f"{told}: write {KINDS['iso'].meaning}, a time of the log as a whole number, or the "
            "share of the events before it, such as 0.8"
        )
    return second


def described_time(time: int) -> str:
    """Write a time of a log for people: with its date, unless it only counts."""
    return f"{time} ({date_of(time)})" if time >= EARLIEST else str(time)


def events_before(
    times: NDArray[np.int64], offsets: NDArray[np.int64], cut: int
) -> NDArray[np.int64]:
    """Count each user's events before a time.

    Args:
        times: (E,) of all events, user after user, ascending within a user.
        offsets: (U + 1,).
        cut: the time.

    Returns:
        (U,) int64.

    Example:
        >>> events_before(np.array([1, 5, 9, 2]), np.array([0, 3, 3, 4]), 6)
        array([2, 0, 1])
    """
    first = np.asarray(offsets[:-1]).astype(np.int64)
    low, high = first.copy(), np.asarray(offsets[1:]).astype(np.int64)
    # All users' bisections take their steps together.
    while (open_ := np.flatnonzero(low < high)).size:
        middle = (low[open_] + high[open_]) // 2
        earlier = np.asarray(times[middle]) < cut
        low[open_[earlier]] = middle[earlier] + 1
        high[open_[~earlier]] = middle[~earlier]
    return low - first
