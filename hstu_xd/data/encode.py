"""Streams sources into integer arrays: one code a user, one a catalogue item, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.faults import first_fault, raise_first_fault, raise_item_in_two_domains
from hstu_xd.data.sources import Source
from hstu_xd.data.times import to_seconds
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

BATCH_ROWS = 1 << 20


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


def read_events(sources: Sequence[Source]) -> Events:
    """Read every source once.

    Raises:
        InputError: a faulty line, an item in two domains, or no event at all.
    """
    encoder = _Encoder(sources)
    for source in sources:
        encoder.add(source)
    return encoder.finish()


class _Encoder:
    """Dictionary codes in order of first sight; :meth:`finish` renumbers them by token."""

    def __init__(self, sources: Sequence[Source]) -> None:
        import polars as pl

        self.sources = sources
        self.categories = {role: pl.Categories.random() for role in ("user", "item", "domain")}
        # polars forgets a dictionary when no column of its type is left: hold one each.
        self.anchors = [pl.Series([], dtype=pl.Categorical(c)) for c in self.categories.values()]
        self.columns: dict[str, list[NDArray]] = {"user": [], "item": [], "time": []}
        self.item_domain = np.full(1 << 16, -1, np.int32)

    def add(self, source: Source) -> None:
        """Encode one source.

        Raises:
            InputError: a faulty line.
        """
        import polars as pl

        frame = source.scan()
        if source.domain is not None:
            frame = frame.with_columns(domain=pl.lit(source.domain, pl.String))
        codes = {
            role: pl.col(role).cast(pl.Categorical(known)).to_physical()
            for role, known in self.categories.items()
        }
        batches = frame.with_columns(**codes).collect_batches(
            chunk_size=BATCH_ROWS, maintain_order=False, engine="streaming"
        )
        try:
            for batch in batches:
                self._add_batch(source, batch)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise_first_fault(source, reason=str(error))

    def _add_batch(self, source: Source, batch: "pl.DataFrame") -> None:
        import polars as pl

        ids = batch.select("user", "item", "domain")
        if any(count for row in ids.null_count().rows() for count in row):
            blank = pl.all_horizontal(pl.col("user", "item", "time").is_null())
            batch = batch.filter(~blank)
            if any(count for row in batch.null_count().rows() for count in row):
                raise_first_fault(source, reason="an id is empty")
        time = to_seconds(batch["time"], divisor=source.time_divisor)
        if time.null_count():
            raise_first_fault(source, reason="a timestamp is unreadable")
        item = batch["item"].to_numpy().astype(np.int32)
        self.columns["user"].append(batch["user"].to_numpy().astype(np.int32))
        self.columns["item"].append(item)
        self.columns["time"].append(time.to_numpy())
        self._check_domains(item, batch["domain"].to_numpy().astype(np.int32))

    def _check_domains(self, item: NDArray[np.int32], domain: NDArray[np.int32]) -> None:
        top = int(item.max(initial=-1)) + 1
        if top > len(self.item_domain):
            room = np.full(2 * top - len(self.item_domain), -1, np.int32)
            self.item_domain = np.concatenate([self.item_domain, room])
        new = self.item_domain[item] < 0
        self.item_domain[item[new]] = domain[new]
        clash = np.flatnonzero(self.item_domain[item] != domain)
        if clash.size:
            token = self.categories["item"].to_series()[int(item[clash[0]])]
            raise_item_in_two_domains(self.sources, token)

    def finish(self) -> Events:
        """Renumber users by token and items by (domain, token).

        Raises:
            InputError: no event, or an id of white space only.
        """
        import polars as pl

        if not sum(map(len, self.columns["user"])):
            files = ", ".join(str(source.path) for source in self.sources)
            raise InputError(f"{files}: no events, only a header; give a log with events")
        tokens = {role: known.to_series() for role, known in self.categories.items()}
        for role in tokens:
            if (tokens[role].str.strip_chars() == "").any():
                faults = (first_fault(source) for source in self.sources)
                raise next(filter(None, faults), InputError(f"a {role} id is empty; fill it in"))
        users = tokens["user"].alias("user").to_frame().with_row_index("code").sort("user")
        domains = tokens["domain"].gather(self.item_domain[: len(tokens["item"])])
        items = pl.DataFrame({"item": tokens["item"], "domain": domains})
        items = items.with_row_index("code").sort("domain", "item")
        return Events(
            users=users["user"],
            items=items.select("item", "domain"),
            user=_ranks(users["code"])[self._joined("user")],
            item=_ranks(items["code"])[self._joined("item")],
            time=self._joined("time"),
        )

    def _joined(self, name: str) -> NDArray:
        return np.concatenate(self.columns.pop(name))


def _ranks(codes: "pl.Series") -> NDArray[np.int32]:
    """Position of each code in ``codes``: (len(codes),) int32."""
    ranks = np.empty(len(codes), np.int32)
    ranks[codes.to_numpy()] = np.arange(len(codes), dtype=np.int32)
    return ranks
