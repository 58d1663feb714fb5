"""The ids of a store that a log goes on, and their places among all once new ones are known."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.ids import respellable
from hstu_xd.data.token_bytes import TokenBytes
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl


class MergedIds(NamedTuple):
    """All ids of a store and new logs, in their order.

    Attributes:
        users: all of them.
        items: columns item and domain.
        old_users: (U of the store,) int32, the row of each old user among all.
        old_items: likewise.
        new_users: the row of each of the users that the store does not know.
        new_items: likewise.
    """

    users: "pl.Series"
    items: "pl.DataFrame"
    old_users: NDArray[np.int32]
    old_items: NDArray[np.int32]
    new_users: NDArray[np.int32]
    new_items: NDArray[np.int32]


@dataclass(frozen=True)
class KnownIds:
    """Ids of a store: who reads new logs codes these first, and sorts only what is not among them.

    Attributes:
        store: its folder, for messages.
        users: sorted.
        items: columns item and domain, sorted by domain, then item.
        prefixed: whether the domain was put before the items' ids.
    """

    store: Path
    users: "pl.Series"
    items: "pl.DataFrame"
    prefixed: bool

    @cached_property
    def as_read(self) -> "pl.DataFrame":
        """The items as logs write them."""
        import polars as pl

        if not self.prefixed:
            return self.items
        after = pl.col("domain").str.len_chars() + 1
        return self.items.with_columns(pl.col("item").str.slice(after))

    @cached_property
    def looks(self) -> list[TokenBytes]:
        """The bytes of users, of items as logs write them, and of the names of domains."""
        import polars as pl

        names, _ = _runs(self.items["domain"])
        return [*map(TokenBytes, (self.users, self.as_read["item"], pl.Series("domain", names)))]

    def check_spellings(self, users: "pl.Series", items: "pl.DataFrame") -> None:
        """Refuse ids that are written as others are: whether 12.0 is 12 follows from all of a log.

        Args:
            users: those of new logs that the store does not know, as they were read.
            items: likewise, columns item and domain.

        Raises:
            InputError: names one.
        """
        new = users, items["item"], items["domain"].unique()
        for look in (*self.looks, *map(TokenBytes, new)):
            odd = respellable(look)
            if len(odd):
                raise InputError(
                    f"{self.store} cannot be appended to: how ids such as {odd.min()!r} are "
                    "written (decimals, accents, unseen characters) follows from all ids of a log; "
                    "prepare all logs together, or the store with --exact-ids first"
                )

    def merge(self, users: "pl.DataFrame", items: "pl.DataFrame") -> MergedIds:
        """Put further ids among those of the store.

        Args:
            users: column user, sorted; some may be known after all, once tidied.
            items: columns item and domain, sorted by domain, then item; likewise.

        Raises:
            InputError: an item of another domain has the id of one of them.
        """
        old_users = self.users.to_frame("user")
        user = _Merged.of(*_found(self.users, users["user"]), len(old_users))
        item = _Merged.of(*_items_found(self.items, items), len(self.items))
        self._check_domains(items.filter(item.fresh))
        return MergedIds(
            user.rows(old_users, users)["user"],
            item.rows(self.items, items),
            *(user.old, item.old, user.new, item.new),
        )

    def _check_domains(self, fresh: "pl.DataFrame") -> None:
        """Refuse new items that are old ones of another domain.

        Raises:
            InputError: names one.
        """
        if fresh.is_empty():
            return
        shared = self.items.filter(self.items["item"].is_in(fresh["item"].implode()))
        if len(shared):
            item, domain = shared.sort("item").row(0)
            other = fresh.filter(fresh["item"] == item)["domain"][0]
            raise InputError(
                f"item {item!r} is in domains {' and '.join(map(repr, sorted((domain, other))))}, "
                f"of {self.store} and the new logs; give it one, or put the domain before every "
                "item's id in all of them with --prefix-items"
            )


@dataclass(frozen=True)
class _Merged:
    """Two sorted sets of ids in one.

    Attributes:
        old: (n,) int32, the place of each old id in the whole.
        new: (m,) int32, that of each new one.
        fresh: (m,) bool, the new ones that are no old ones.
    """

    old: NDArray[np.int32]
    new: NDArray[np.int32]
    fresh: NDArray[np.bool_]

    @classmethod
    def of(cls, place: NDArray[np.int64], fresh: NDArray[np.bool_], num_old: int) -> "_Merged":
        """Merge new ids, given how many old ones are below each and which are no old ones."""
        # A fresh id goes before the old one at its place.
        before = np.bincount(place[fresh], minlength=num_old + 1)[:num_old]
        old = np.arange(num_old, dtype=np.int32) + np.cumsum(before, dtype=np.int32)
        new = old.take(place, mode="clip")
        new[fresh] = place[fresh] + np.arange(int(fresh.sum()))
        return cls(old, new, fresh)

    def rows(self, old: "pl.DataFrame", new: "pl.DataFrame") -> "pl.DataFrame":
        """Return the rows of both in their places, rows of an id that is in both once."""
        import polars as pl

        if not self.fresh.any():
            return old
        rows = np.empty(len(self.old) + int(self.fresh.sum()), np.int64)
        rows[self.old] = np.arange(len(self.old))
        rows[self.new[self.fresh]] = np.arange(len(self.old), len(rows))
        return pl.concat([old, new.select(old.columns).filter(pl.Series(self.fresh))])[rows]


def _found(old: "pl.Series", new: "pl.Series") -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return how many old ids are below each new one, and whether it is none of them."""
    place = old.search_sorted(new, side="left").to_numpy().astype(np.int64)
    if old.is_empty():
        return place, np.ones(len(new), np.bool_)
    same = (old.gather(np.minimum(place, len(old) - 1)) == new).to_numpy()
    return place, (place == len(old)) | ~same


def _items_found(
    old: "pl.DataFrame", new: "pl.DataFrame"
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Do likewise for items, domain by domain."""
    names, ends = _runs(old["domain"])
    starts = [0, *ends]
    places, fresh, first = [np.empty(0, np.int64)], [np.empty(0, np.bool_)], 0
    for name, end in zip(*_runs(new["domain"]), strict=True):
        at = bisect_left(names, name)
        size = ends[at] - starts[at] if name in names[at : at + 1] else 0
        place, is_fresh = _found(
            old["item"].slice(starts[at], size), new["item"].slice(first, end - first)
        )
        places.append(place + starts[at])
        fresh.append(is_fresh)
        first = end
    return np.concatenate(places), np.concatenate(fresh)


def _runs(column: "pl.Series") -> tuple[list[str], list[int]]:
    """Return the values of a sorted column, and the row after the last one of each."""
    runs = column.rle().struct
    return runs.field("value").to_list(), runs.field("len").cum_sum().to_list()
