"""Runs, ascending slices of one array, many at a time: bounds, last values, membership."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# So few slices are searched one by one: NumPy's own search takes less than the passes over arrays.
FEW = 48


@dataclass(frozen=True)
class Runs:
    """Ascending slices of one array: the rows of a log in each of them.

    Attributes:
        values: (N,) integers that ascend within every slice; None: value i is i.
        first: (...) int64, start of each slice in ``values``.
        end: (...) int64, end of each slice.
        added: (...) int64, broadcast to the shape of ``first``: what makes a row of a value.
    """

    values: NDArray | None
    first: Ints
    end: Ints
    added: Ints

    @property
    def lengths(self) -> Ints:
        """Return how many rows each slice has: (...) int64."""
        return self.end - self.first

    def latest(self, depth: int) -> Ints:
        """Return the last rows of each slice, latest first: (..., depth) int64, -1 pads."""
        places = self.end[..., None] - 1 - np.arange(depth)
        there = places >= self.first[..., None]
        if self.values is None:
            values = places
        elif self.values.size:
            values = self.values.take(np.maximum(places, 0, out=places)).astype(np.int64)
        else:
            return np.full(places.shape, -1)
        return np.where(there, values + self.added[..., None], -1)

    def contain(self, rows: Ints) -> NDArray[np.bool_]:
        """Return whether each row is in the slice that it is asked of: (...) bool.

        Args:
            rows: (...) int64, broadcast against the shape of the slices.
        """
        first, end, bounds = np.broadcast_arrays(self.first, self.end, rows - self.added)
        if self.values is None:
            return (bounds >= first) & (bounds < end)
        places = lower_bound(self.values, first, end, bounds)
        if not self.values.size:
            return np.zeros(places.shape, bool)
        found = self.values.take(np.minimum(places, self.values.size - 1))
        return (places < end) & (found == bounds)

    def __getitem__(self, index: Any) -> "Runs":
        first, end, added = np.broadcast_arrays(self.first, self.end, self.added)
        return replace(self, first=first[index], end=end[index], added=added[index])


def lower_bound(values: NDArray, first: Ints, end: Ints, bounds: Ints) -> Ints:
    """Find the first value of each slice that is at least its bound; its end where none is.

    Args:
        values: (N,) integers that ascend within every slice; below the largest of their dtype.
        first, end: (...) int64, the slices ``values[first:end]``.
        bounds: (...) int64.

    Returns:
        (...) int64, a place in ``values`` between ``first`` and ``end``.
    """
    shape = first.shape
    first, end, bounds = first.ravel(), end.ravel(), bounds.ravel()
    found = end.copy()
    # Where nothing is cut off, as at the latest time of a history, the last value says so.
    if values.size:
        ends_beyond = values.take(np.maximum(end - 1, 0)) >= bounds
        open_ = np.flatnonzero(ends_beyond & (first < end))
        search = _one_by_one if open_.size <= FEW else _together
        if open_.size:
            found[open_] = search(values, first[open_], end[open_], bounds[open_])
    return found.reshape(shape)


def _one_by_one(values: NDArray, first: Ints, end: Ints, bounds: Ints) -> Ints:
    # A bound of another dtype would have NumPy convert the whole slice.
    kind = np.iinfo(values.dtype)
    needles = bounds.clip(kind.min, kind.max).astype(values.dtype)
    slices = zip(first.tolist(), end.tolist(), needles)
    return np.array([a + values[a:b].searchsorted(needle) for a, b, needle in slices])


def _together(values: NDArray, first: Ints, end: Ints, bounds: Ints) -> Ints:
    """Halve the steps of all searches at once; ``place`` stays before the first value sought."""
    place = first - 1
    for bit in reversed(range(int((end - first).max()).bit_length())):
        probe = place + (1 << bit)
        below = values.take(np.minimum(probe, end - 1)) < bounds
        np.copyto(place, probe, where=below & (probe < end))
    return place + 1
