"""Streams sources into integer arrays: one code a user, one a catalogue item, seconds."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.dictionary import TokenDictionary
from hstu_xd.data.error_location import first_fault, raise_first_fault, raise_item_in_two_domains
from hstu_xd.data.sources import Source
from hstu_xd.data.times import to_seconds
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

BATCH_ROWS = 1 << 19
# Seeds of polars' hash, which only tells tokens apart while a log is read: nothing of it is stored.
USER_SEED, ITEM_SEED, DOMAIN_SEED = 1, 2, 3


@dataclass
class Events:
    """All events of a log in no particular order, numbered so that input order leaves no trace.

    Attributes:
        users: (U,) user tokens, sorted.
        items: columns item and domain, sorted by (domain, item); I rows.
        user: (n,) int32, row of ``users``.
        item: (n,) int32, row of ``items``.
        time: (n,) int64, seconds.
    """

    users: "pl.Series"
    items: "pl.DataFrame"
    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[np.int64]

    def release(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """Hand over user, item and time and keep none of them, so that memory can be reused."""
        user, item, time = self.user, self.item, self.time
        self.user, self.item, self.time = user[:0].copy(), item[:0].copy(), time[:0].copy()
        return user, item, time


def read_events(sources: Sequence[Source]) -> Events:
    """Read every source once.

    Raises:
        InputError: a faulty line, an item in two domains, or no event at all.
    """
    reader = _EventReader(sources)
    for source in sources:
        reader.read(source)
    return reader.finish()


class _EventReader:
    """Codes in order of first sight; :meth:`finish` renumbers them by token."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.users, self.items = TokenDictionary(), TokenDictionary()
        self.user: list[NDArray[np.int32]] = []
        self.item: list[NDArray[np.int32]] = []
        self.time: list[NDArray[np.int64]] = []

    def read(self, source: Source) -> None:
        """Encode one source.

        Raises:
            InputError: a faulty line.
        """
        import polars as pl

        frame = source.scan()
        if source.domain is not None:
            frame = frame.with_columns(domain=pl.lit(source.domain, pl.String))
        # An item is told apart by its domain too, so that one in two domains shows as two items.
        frame = frame.with_columns(
            user_hash=pl.col("user").hash(USER_SEED),
            item_hash=pl.col("item").hash(ITEM_SEED) ^ pl.col("domain").hash(DOMAIN_SEED),
        )
        batches = frame.collect_batches(
            chunk_size=BATCH_ROWS, maintain_order=False, engine="streaming"
        )
        try:
            with ThreadPoolExecutor(1) as pool:
                for batch in batches:
                    self._add(source, batch, pool)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise_first_fault(source, reason=str(error))

    def _add(self, source: Source, batch: "pl.DataFrame", pool: ThreadPoolExecutor) -> None:
        import polars as pl

        if _has_nulls(batch):
            # An empty line is no event; a line that is empty in part is a fault.
            batch = batch.filter(~pl.all_horizontal(pl.col("user", "item", "time").is_null()))
            if _has_nulls(batch):
                raise_first_fault(source, reason="an id or a timestamp is empty")
        time = to_seconds(batch["time"], divisor=source.time_divisor)
        if time.null_count():
            raise_first_fault(source, reason="a timestamp is unreadable")
        user = pool.submit(self.users.encode, batch["user_hash"], batch.select("user"))
        self.item.append(self.items.encode(batch["item_hash"], batch.select("item", "domain")))
        self.user.append(user.result())
        self.time.append(time.to_numpy())

    def finish(self) -> Events:
        """Renumber users by token and items by (domain, token).

        Raises:
            InputError: no event, an id of white space only, or an item in two domains.
        """
        if not len(self.users):
            files = ", ".join(str(source.path) for source in self.sources)
            raise InputError(f"{files}: no events, only a header; give a log with events")
        users, items = self.users.tokens(), self.items.tokens()
        for tokens in (users["user"], items["item"], items["domain"]):
            if (tokens.str.strip_chars() == "").any():
                faults = (first_fault(source) for source in self.sources)
                reason = f"a {tokens.name} id is empty; fill it in"
                raise next(filter(None, faults), InputError(reason))
        shared = items.filter(items["item"].is_duplicated())
        if len(shared):
            raise_item_in_two_domains(self.sources, str(shared["item"].min()))
        users = users.with_row_index("code").sort("user")
        items = items.with_row_index("code").sort("domain", "item")
        with ThreadPoolExecutor(1) as pool:
            user = pool.submit(renumber, self.user, users["code"])
            item = renumber(self.item, items["code"])
            time = _join(self.time)
            return Events(
                users=users["user"],
                items=items.select("item", "domain"),
                user=user.result(),
                item=item,
                time=time,
            )


def _has_nulls(batch: "pl.DataFrame") -> bool:
    return any(batch[role].null_count() for role in ("user", "item", "domain", "time"))


def renumber(parts: list[NDArray[np.int32]], codes: "pl.Series") -> NDArray[np.int32]:
    """Replace each code by its place in ``codes``; empties ``parts`` to release memory."""
    ranks = np.empty(len(codes), np.int32)
    ranks[codes.to_numpy()] = np.arange(len(codes), dtype=np.int32)
    # mode="clip" skips a check of bounds that costs as much as the look-up itself.
    return _join([ranks.take(parts.pop(0), mode="clip") for _ in range(len(parts))])


def _join(parts: list[NDArray]) -> NDArray:
    joined = np.concatenate(parts)
    parts.clear()
    return joined
