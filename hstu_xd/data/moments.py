"""One number an event that orders a user's events: the second, its fraction, a column for ties.

Logs in whole seconds keep their seconds. Only where more is known are they replaced by finer
numbers, from which the seconds follow.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.times import LARGEST, NANO

Order = tuple[NDArray[np.int64], NDArray[np.int32] | None]


@dataclass(frozen=True)
class Moments:
    """How the seconds follow from the numbers that order events.

    Attributes:
        first: the second of number 0, where numbers are parts of a second.
        per_second: numbers in a second.
        table: the second of each number instead, where numbers are ranks.
    """

    first: int = 0
    per_second: int = 1
    table: NDArray[np.int64] | None = None

    def seconds(self, moments: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the second of each number."""
        if self.table is not None:
            return self.table[moments]
        if self.per_second == 1:
            return moments
        return moments // self.per_second + self.first


def order_events(
    seconds: list[NDArray[np.int64]],
    nanoseconds: list[NDArray[np.int32] | None],
    order: list[Order],
) -> tuple[NDArray[np.int64], Moments]:
    """Rank events by time, then by the column that orders ties.

    Args:
        seconds: of each batch; emptied to release memory.
        nanoseconds: within the second; None where a batch has whole seconds.
        order: seconds and nanoseconds (numbers and fractions) of the column that orders ties;
            empty without one.

    Returns:
        The numbers, and how seconds follow from them.
    """
    sizes = [len(part) for part in seconds]
    second = np.concatenate(seconds)
    seconds.clear()
    fraction = _fractions(nanoseconds, sizes)
    if order:
        keys = [np.concatenate([part for part, _ in order])]
        finer = _fractions([part for _, part in order], sizes)
        return _ranks([*([] if finer is None else [finer]), *keys], fraction, second)
    if fraction is None:
        return second, Moments()
    per_second = next(n for n in (1000, 10**6, NANO) if not (fraction % (NANO // n)).any())
    first = int(second.min())
    if (int(second.max()) - first + 1) > LARGEST // per_second:
        return _ranks([], fraction, second)
    second -= first
    second *= per_second
    second += fraction // (NANO // per_second)
    return second, Moments(first, per_second)


def _fractions(parts: list[NDArray[np.int32] | None], sizes: list[int]) -> NDArray[np.int32] | None:
    if all(part is None for part in parts):
        return None
    return np.concatenate(
        [np.zeros(n, np.int32) if part is None else part for part, n in zip(parts, sizes)]
    )


def _ranks(
    last_keys: list[NDArray], fraction: NDArray[np.int32] | None, second: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Moments]:
    """Rank events densely by second, fraction and the keys, the last of which counts most."""
    keys = [*last_keys, *([] if fraction is None else [fraction]), second]
    rows = np.lexsort(keys)
    fresh = np.zeros(len(rows), np.bool_)
    fresh[:1] = True
    for key in keys:
        ordered = key[rows]
        fresh[1:] |= ordered[1:] != ordered[:-1]
    ranks = np.empty(len(rows), np.int64)
    ranks[rows] = np.cumsum(fresh) - 1
    return ranks, Moments(table=second[rows[fresh]])
