"""The control of every search: the latest events before the request."""

import numpy as np
from numpy.typing import NDArray

from hstu_xd.errors import InputError
from hstu_xd.search.found import Found, check_count
from hstu_xd.search.runs import Runs, lower_bound


def search_recent(
    offsets: NDArray[np.int64],
    times: NDArray[np.int64],
    users: NDArray[np.int64],
    at: NDArray[np.int64],
    k: int,
) -> Found:
    """Find the latest K events of each user strictly before a time.

    Args:
        offsets: (B + 1,) int64, user ``b`` owns events ``offsets[b]:offsets[b + 1]``.
        times: (L,) int64, time of every event, ascending within a user.
        users: (Q,) int64, whose history is searched.
        at: (Q,) int64, time of the request, in the unit of ``times``.
        k: how many events to find.

    Returns:
        Latest first; all of level 0, since no taxonomy is asked.

    Raises:
        InputError: ``k`` below 1, shapes that differ, or a user who is not there.

    Example:
        >>> offsets, times = np.array([0, 4]), np.array([10, 20, 20, 30])
        >>> search_recent(offsets, times, np.array([0, 0]), np.array([30, 10]), 2).events
        array([[ 2,  1],
               [-1, -1]])
    """
    check_count(k)
    users, at = np.asarray(users, np.int64), np.asarray(at, np.int64)
    check_users(users, at, len(offsets) - 1)
    offsets = np.asarray(offsets)
    first = offsets[users]
    end = lower_bound(np.asarray(times), first, offsets[users + 1], at)
    events = Runs(None, first, end, np.zeros_like(first)).latest(k)
    return Found(events, np.where(events < 0, -1, 0).astype(np.int8))


def check_users(users: NDArray[np.int64], at: NDArray[np.int64], num_users: int) -> None:
    """Refuse queries whose users or times do not fit a log.

    Raises:
        InputError: shapes that differ, or a user who is not there.
    """
    if users.ndim != 1 or users.shape != at.shape:
        raise InputError(
            f"users have shape {users.shape} and times {at.shape}; one of each is needed a "
            "candidate, both of shape (Q,)"
        )
    if users.size and not 0 <= users.min() <= users.max() < num_users:
        raise InputError(
            f"users are {users.min()}..{users.max()}; the log has users 0..{num_users - 1}"
        )
