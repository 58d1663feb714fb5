"""What a search returns, and the choice of the best K among rows that were collected."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_xd.errors import InputError

_LAST = np.iinfo(np.int64).max
_LEVEL_BITS, _ROW_BITS = 7, 56
# Levels are packed beside rows into 63 bits; the highest one stands for nothing at all.
MOST_LEVELS = (1 << _LEVEL_BITS) - 2


@dataclass(frozen=True)
class Found:
    """The events that a search found, best first.

    Attributes:
        events: (Q, K) int64, row of each event in the log that was searched; -1 pads.
        levels: (Q, K) int8, the level at which the event matched; -1 pads.
    """

    events: NDArray[np.int64]
    levels: NDArray[np.int8]

    @classmethod
    def nothing(cls, queries: int, k: int) -> "Found":
        """Return the result of a search that has not begun: padding everywhere."""
        shape = queries, k
        return cls(np.full(shape, -1, np.int64), np.full(shape, -1, np.int8))


def choose_first(rows: NDArray[np.int64], levels: NDArray[np.int64], k: int) -> Found:
    """Keep the first K events of each query by level, then latest first; each event once.

    Args:
        rows: (Q, M) int64 below 2**56, the events that were collected; -1 where there is none. An
            event that comes several times counts with its lowest level.
        levels: (M,) int64, the level of each column.
        k: how many to keep.
    """
    found = Found.nothing(len(rows), k)
    packed = np.where(rows < 0, _LAST, (rows << _LEVEL_BITS) | levels)
    packed.sort(axis=1)  # the copies of an event stand together, that of the lowest level first
    events, levels_of = packed >> _LEVEL_BITS, packed & ((1 << _LEVEL_BITS) - 1)
    order = (levels_of << _ROW_BITS) | ((1 << _ROW_BITS) - 1 - events)
    order[packed == _LAST] = _LAST
    order[:, 1:][events[:, 1:] == events[:, :-1]] = _LAST
    order.sort(axis=1)
    order = order[:, :k]
    there = order != _LAST
    events = (1 << _ROW_BITS) - 1 - (order & ((1 << _ROW_BITS) - 1))
    np.copyto(found.events[:, : order.shape[1]], events, where=there)
    np.copyto(found.levels[:, : order.shape[1]], (order >> _ROW_BITS).astype(np.int8), where=there)
    return found


def check_count(k: int) -> None:
    """Refuse a number of events that cannot be asked for.

    Raises:
        InputError: ``k`` is below 1.
    """
    if k < 1:
        raise InputError(f"k is {k}; ask for at least one event a candidate")
