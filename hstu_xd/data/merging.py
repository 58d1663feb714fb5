"""Put new events between those of a store, block by block, into the files of another one.

An event takes 12 bytes, and nothing of old events is held in memory beyond a block: what merging
costs is little more than copying the files and taking their hashes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data import store_files
from hstu_xd.data.encode import Events
from hstu_xd.data.order import Histories, in_time_order
from hstu_xd.data.repeats import count_repeats, first_after
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.times import date_of
from hstu_xd.errors import InputError
from hstu_xd.files import HashedFile

if TYPE_CHECKING:
    import polars as pl

# Rows of a store that are merged at once: they fit the cache.
_BLOCK_ROWS = 1 << 17


class TieChange(NamedTuple):
    """What numbers of events change where new ones meet old ones in a second.

    Attributes:
        tied: events that share user and time with another, beyond those of old and new alone.
        repeats: events equal to the one before, likewise.
    """

    tied: int
    repeats: int


@dataclass(frozen=True)
class _Runs:
    """Runs of events of one user and second that hold old ones and new ones, the old ones first.

    Attributes:
        old: the first old event of each run.
        num_old: number of the old ones.
        new: the first new event of each run.
        num_new: number of the new ones.
    """

    old: NDArray[np.int64]
    num_old: NDArray[np.int64]
    new: NDArray[np.int64]
    num_new: NDArray[np.int64]


@dataclass
class EventMerger:
    """Sorted new events and the place of each among those of a store.

    Attributes:
        store: of the old events.
        old_items: (I of the store,) int32, row of each old item among all.
        added: the new events, in the numbering of the whole.
        offsets: (U + 1,) int64, start of each user's events in the whole.
        place: (m,) int64, how many old events come before each new one.
        runs: of old and new events in one second.
        moved: (r,) int64, rows of the whole that :meth:`order_ties` gave another item.
        moved_items: (r,) int32, row of that item.
    """

    store: InteractionStore
    old_items: NDArray[np.int32]
    added: Histories
    offsets: NDArray[np.int64]
    place: NDArray[np.int64]
    runs: _Runs
    moved: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    moved_items: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @classmethod
    def of(
        cls,
        store: InteractionStore,
        old_users: NDArray[np.int32],
        old_items: NDArray[np.int32],
        added: Histories,
        *,
        num_users: int,
        by_hash: bool,
    ) -> "EventMerger":
        """Place new events by user and time; where times are equal, they come last.

        Args:
            store: of the old events.
            old_users: row of each old user among all.
            old_items: row of each old item among all.
            added: the new events, in the numbering of the whole.
            num_users: of all users.
            by_hash: whether new events of one second are ordered by the hash alone.

        Raises:
            InputError: they or the old ones are not, and a new event shares user and second with an
                old one.
        """
        lengths = np.zeros(num_users, np.int64)
        lengths[old_users] = np.diff(store.offsets)
        begins = np.concatenate([[0], np.cumsum(lengths)])
        starts, stops = begins[added.user], begins[added.user + 1]
        place = _place(np.asarray(store.timestamps), starts, stops, added.time)
        offsets = begins
        offsets[1:] += np.cumsum(np.bincount(added.user, minlength=num_users))
        # New events of one user and second, beside old ones of that second.
        first = np.ones(len(place), np.bool_)
        first[1:] = (added.user[1:] != added.user[:-1]) | (added.time[1:] != added.time[:-1])
        heads = np.flatnonzero(first)
        counts = np.diff(heads, append=len(place))
        last = store.timestamps.take(place[heads] - 1, mode="clip")
        meets = (place[heads] > starts[heads]) & (last == added.time[heads])
        heads, counts = heads[meets], counts[meets]
        if heads.size and not (by_hash and _is_tied_by_hash(store)):
            user = int(np.flatnonzero(old_users == added.user[heads[0]])[0])
            raise _unordered(store, user, int(added.time[heads[0]]))
        old = first_after(store.timestamps, starts[heads], place[heads], added.time[heads] - 1)
        runs = _Runs(old, place[heads] - old, heads, counts)
        return cls(store, old_items, added, offsets, place, runs)

    def order_ties(self, users: "pl.Series", items: "pl.DataFrame") -> TieChange:
        """Order each of the runs as reading all would, by the hash of user and item.

        Args:
            users: ids of all users.
            items: all items.
        """
        runs, added = self.runs, self.added
        if not runs.new.size:
            return TieChange(0, 0)
        sizes = runs.num_old + runs.num_new
        run = np.repeat(np.arange(sizes.size), sizes)
        self.moved = _ranges(runs.old + runs.new, sizes)
        is_new = self.moved >= (runs.old + runs.new + runs.num_old)[run]
        item = np.empty(run.size, np.int32)
        old_rows = self.store.item_ids[_ranges(runs.old, runs.num_old)] - np.int32(1)
        item[~is_new] = self.old_items[old_rows]
        item[is_new] = added.item[_ranges(runs.new, runs.num_new)]
        time = added.time[runs.new][run]
        owner, own_users = _renumbered(added.user[runs.new][run])
        item, own_items = _renumbered(item)
        parts = [Histories(owner[part], item[part], time[part]) for part in (is_new, ~is_new)]
        alone = sum(map(count_repeats, parts))
        both = Events(users.gather(own_users), items[own_items], owner, item, time.copy())
        ordered, tied = in_time_order(both)
        self.moved_items = own_items[ordered.item]
        tied -= sum(int(count[count > 1].sum()) for count in (runs.num_old, runs.num_new))
        return TieChange(tied, count_repeats(ordered) - alone)

    def write_item_ids(self, folder: Path) -> str:
        """Write the items of all events; return the file's hash."""
        return _write_column(folder / store_files.ITEM_IDS, self._item_ids(), "<i4", len(self))

    def write_times(self, folder: Path) -> str:
        """Write the times of all events; return the file's hash."""
        times = inserted(self.store.timestamps, self.place, self.added.time)
        return _write_column(folder / store_files.TIMESTAMPS, times, "<i8", len(self))

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def _old_ids(self) -> NDArray[np.int32] | None:
        """Return the id in the whole of each old id, of which 0 is none; None where all stay."""
        if self.old_items[-1] == len(self.old_items) - 1:
            return None
        return np.concatenate([np.zeros(1, np.int32), self.old_items + np.int32(1)])

    def _item_ids(self) -> Iterator[NDArray[np.int32]]:
        added = self.added.item + np.int32(1)
        first = 0
        for block in inserted(self.store.item_ids, self.place, added, self._old_ids()):
            begin, end = np.searchsorted(self.moved, [first, first + len(block)])
            block[self.moved[begin:end] - first] = self.moved_items[begin:end] + np.int32(1)
            yield block
            first += len(block)


def _place(
    old: NDArray[np.int64],
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    time: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the first place in each [start, stop) whose time lies after a new one, else stop."""
    place = stops.copy()
    # Most new events come after all of their users' old ones.
    between = np.flatnonzero((starts < stops) & (old.take(stops - 1, mode="clip") > time))
    place[between] = first_after(old, starts[between], stops[between], time[between])
    return place


def inserted(
    old: NDArray, place: NDArray[np.int64], new: NDArray, table: NDArray | None = None
) -> Iterator[NDArray]:
    """Yield an array with others inserted, in blocks that fit the cache.

    Args:
        old: the array.
        place: how many of its numbers come before each new one, ascending.
        new: what is inserted.
        table: what stands for each number of ``old``; None: it stands for itself.
    """
    for first in range(0, len(old), _BLOCK_ROWS):
        part = old[first : first + _BLOCK_ROWS]
        last = first + len(part)
        begin, end = np.searchsorted(place, [first, last])
        end = end if last < len(old) else len(place)
        at = place[begin:end] - first + np.arange(end - begin)
        block = np.empty(len(part) + end - begin, new.dtype)
        is_old = np.ones(len(block), np.bool_)
        is_old[at] = False
        # mode="clip" skips a check of bounds that costs as much as the look-up.
        block[is_old] = part if table is None else table.take(part, mode="clip")
        block[at] = new[begin:end]
        yield block


def _write_column(file: Path, blocks: Iterator[NDArray], kind: str, length: int) -> str:
    """Write blocks as one array, as numpy.save writes it; return the file's hash."""
    with HashedFile(file) as hashed:
        header = {"descr": kind, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(hashed, header)
        for block in blocks:
            hashed.write(block.astype(kind, copy=False).data)
    return hashed.digest


def _is_tied_by_hash(store: InteractionStore) -> bool:
    """Whether all old events of one user and second were of one time for who read them.

    Where they were not, times were finer. An old log with times that fine and nobody who has two
    events in a second cannot be told from one of whole seconds, and is taken as such.
    """
    time = store.timestamps
    same = np.zeros(len(time) + 1, np.bool_)
    np.equal(time[1:], time[:-1], out=same[1:-1])
    same[store.offsets] = False
    return int((same[1:] | same[:-1]).sum()) == store.manifest["ties"]["events"]


def _unordered(store: InteractionStore, user: int, second: int) -> InputError:
    return InputError(
        f"{store.path} cannot be appended to: user {store.user_token(user)!r} has old and new "
        f"events at {date_of(second)}, which fractions of a second or a column put in order, and "
        "the store holds neither; prepare all logs together"
    )


def _ranges(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of all ranges of so many numbers, one range after the other."""
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))


def _renumbered(codes: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    known, places = np.unique(codes, return_inverse=True)
    return places.astype(np.int32), known
