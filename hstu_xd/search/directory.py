"""The sorted part of a hard index: where a user's events of a node are, at every level."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hstu_xd.errors import InputError
from hstu_xd.search.found import MOST_LEVELS
from hstu_xd.search.runs import Ints

# Users are sorted so many events at a time, which bounds the memory; a longer history goes alone.
EVENTS_AT_ONCE = 1 << 20
_INT64_BITS = 63


class Paths(Protocol):
    """Nodes of events: an (L, H + 1) array, or what gives one for every slice of the events."""

    def __getitem__(self, events: slice, /) -> NDArray: ...


@dataclass(frozen=True)
class RunDirectory:
    """For every level, user and node, the user's events of the node, oldest first.

    Attributes:
        keys: (R,) integers, ascending: ``(level * users + user) * nodes + node`` of each run.
        starts: (R + 1,) integers; run r is ``events[starts[r]:starts[r + 1]]``.
        events: (E,) unsigned integers, number of each event in its user's history.
        users, nodes: how many of them a key counts with.
    """

    keys: NDArray
    starts: NDArray
    events: NDArray
    users: int
    nodes: int

    def find(self, users: Ints, nodes: Ints, levels: Ints) -> tuple[Ints, Ints]:
        """Find the runs of users' nodes.

        Args:
            users: (Q,) int64.
            nodes: (Q, J) int64, a node of each level; one that nobody has met is allowed.
            levels: (J,) int64, level of each column.

        Returns:
            (Q, J) int64 first place and end in ``events``; both 0 where there is no such run.
        """
        user = users[:, None]
        known = (nodes >= 0) & (nodes < self.nodes) & (user < self.users) & (len(self.keys) > 0)
        if not known.any():
            return np.zeros_like(nodes), np.zeros_like(nodes)
        keys = np.where(known, (levels * self.users + user) * self.nodes + nodes, 0)
        runs = np.searchsorted(self.keys, keys.astype(self.keys.dtype))
        np.minimum(runs, len(self.keys) - 1, out=runs)
        known &= self.keys.take(runs) == keys
        return (
            np.where(known, self.starts.take(runs), 0).astype(np.int64),
            np.where(known, self.starts.take(runs + 1), 0).astype(np.int64),
        )


def build_directory(paths: Paths, offsets: Ints, levels: int) -> RunDirectory:
    """Sort the events of every user by node and time, level by level.

    Args:
        paths: node of every event at every level, -1 where the level is missing.
        offsets: (B + 1,) int64, user ``b`` owns events ``offsets[b]:offsets[b + 1]``.
        levels: number of levels.

    Raises:
        InputError: a block of ``paths`` of another shape, no integers, or a node below -1; or more
            users, levels and nodes than 63 bits can number.
    """
    users, longest = len(offsets) - 1, int(np.diff(offsets).max(initial=0))
    nodes = _count_nodes(paths, offsets, levels)
    if levels * users * nodes >= 1 << _INT64_BITS:
        raise InputError(
            f"{users} users x {levels} levels x nodes up to {nodes - 1} are more than 63 bits can "
            "number; number the nodes from 0 without gaps"
        )
    key_type = np.min_scalar_type(max(levels * users * nodes - 1, 0))
    key_type = key_type if key_type.itemsize < np.dtype(np.int64).itemsize else np.dtype(np.int64)
    keys: list[list[NDArray]] = [[] for _ in range(levels)]
    counts: list[list[NDArray]] = [[] for _ in range(levels)]
    events: list[list[NDArray]] = [[] for _ in range(levels)]
    for first, last in _blocks(offsets):
        base, number = _numbered(offsets, first, last)
        base *= nodes
        block = paths[int(offsets[first]) : int(offsets[last])]
        for level in range(levels):
            key, order = _sorted_events(block[:, level], base, number, (last - first) * nodes)
            borders = np.flatnonzero(key[1:] != key[:-1]) + 1 if len(key) else np.zeros(0, np.int64)
            starts = np.concatenate([np.zeros(min(len(key), 1), np.int64), borders])
            offset = (level * users + first) * nodes
            keys[level].append((key[starts] + offset).astype(key_type))
            counts[level].append(np.diff(starts, append=len(key)).astype(np.uint32))
            events[level].append(order.astype(np.min_scalar_type(longest)))
    total = sum(len(part) for parts in events for part in parts)
    starts_type = np.uint32 if total < 1 << 32 else np.int64
    runs = sum(len(part) for parts in keys for part in parts)
    starts = np.zeros(runs + 1, starts_type)
    np.cumsum(_joined(counts, np.dtype(np.uint32)), out=starts[1:], dtype=starts_type)
    number_type = np.min_scalar_type(longest)
    return RunDirectory(_joined(keys, key_type), starts, _joined(events, number_type), users, nodes)


def _joined(parts: list[list[NDArray]], dtype: np.dtype) -> NDArray:
    """Lay the blocks of all levels end to end, and let go of them."""
    flat = [np.zeros(0, dtype), *(block for blocks in parts for block in blocks)]
    parts.clear()
    return np.concatenate(flat)


def _count_nodes(paths: Paths, offsets: Ints, levels: int) -> int:
    """Return one more than the largest node, having looked at all of them."""
    largest = -1
    for first, last in _blocks(offsets):
        block = paths[int(offsets[first]) : int(offsets[last])]
        expected = int(offsets[last] - offsets[first]), levels
        if block.shape != expected or block.dtype.kind not in "iu":
            raise InputError(
                f"paths are {block.dtype} of shape {block.shape} for events {offsets[first]}.."
                f"{offsets[last] - 1}; integers of shape {expected} are needed"
            )
        if block.size and block.min() < -1:
            raise InputError(
                f"paths hold node {block.min()}; nodes count from 0, -1 stands for a missing level"
            )
        largest = max(largest, int(block.max(initial=-1)))
    return largest + 1


def _blocks(offsets: Ints) -> Iterator[tuple[int, int]]:
    """Cut the users into blocks of at most :data:`EVENTS_AT_ONCE` events, or of one user."""
    first, users = 0, len(offsets) - 1
    while first < users:
        fitting = int(np.searchsorted(offsets, offsets[first] + EVENTS_AT_ONCE, side="right")) - 1
        last = min(max(fitting, first + 1), first + EVENTS_AT_ONCE, users)
        yield first, last
        first = last


def _numbered(offsets: Ints, first: int, last: int) -> tuple[Ints, Ints]:
    """Return the user, counted in the block, and the number in its history, of every event."""
    bounds = np.asarray(offsets[first : last + 1], np.int64) - int(offsets[first])
    lengths = np.diff(bounds)
    user = np.repeat(np.arange(len(lengths)), lengths)
    return user, np.arange(int(bounds[-1])) - np.repeat(bounds[:-1], lengths)


def _sorted_events(
    column: NDArray, base: Ints, number: Ints, keys: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort a block's events of one level by user, node and number in the history.

    Key and number go into one integer, whose sort is several times faster than that of two columns,
    and all is done in place: fresh memory would cost more than the sort.

    Args:
        column: node of every event, -1 where the level is missing.
        base: key of node 0 of every event's user.
        number: of every event in its history.
        keys: one more than the largest key.

    Returns:
        The key, user and node, of every event that has a node, and its number.
    """
    key = column.astype(np.int64)
    if key.min(initial=0) < 0:
        there = key >= 0
        key, base, number = key[there], base[there], number[there]
    key += base
    bits = int(number.max(initial=0)).bit_length()
    if (keys - 1).bit_length() + bits <= _INT64_BITS:
        key <<= bits
        key |= number
        key.sort()
        order = key & ((1 << bits) - 1)
        key >>= bits
        return key, order
    order = np.argsort(key, kind="stable")
    return key[order], number[order]


def check_log(offsets: NDArray, times: NDArray) -> None:
    """Refuse offsets and times that are no log."""
    if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(times):
        raise InputError(
            f"offsets of shape {offsets.shape} do not lead from 0 to the {len(times)} events; give "
            "(B + 1,) of them"
        )
    if (np.diff(offsets) < 0).any():
        user = int(np.flatnonzero(np.diff(offsets) < 0)[0])
        raise InputError(f"offsets descend at user {user}; each user's events follow the last's")
    if times.ndim != 1 or times.dtype.kind not in "iu":
        raise InputError(
            f"times are {times.dtype} of shape {times.shape}; integers (L,) are needed"
        )
    falls = np.flatnonzero(times[1:] < times[:-1]) + 1
    inside = falls[~np.isin(falls, offsets)]
    if len(inside):
        row = int(inside[0])
        user = int(np.searchsorted(offsets, row, side="right")) - 1
        raise InputError(
            f"event {row} of user {user} at {times[row]} follows one at {times[row - 1]}; sort "
            "each user's events by time"
        )


def count_levels(paths: Paths) -> int:
    """Return the number of levels of (L, H + 1) paths, or refuse their shape."""
    shape = paths[0:0].shape
    if len(shape) != 2 or not 1 <= shape[1] < MOST_LEVELS:
        raise InputError(
            f"paths have shape {shape} after the events; (L, H + 1) is needed, 1 to "
            f"{MOST_LEVELS - 1} levels"
        )
    return shape[1]
