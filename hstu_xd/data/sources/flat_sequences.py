"""Logs in the flat layout of TAAC 2026 (KDD Cup 2026, Tencent Ads): a row with its user's past.

A row is an interaction of a user with an item, and holds what the user did before it: of each
domain of behaviour x some columns ``domain_x_seq_N``, lists of equal length with an entry for each
event. So a row gives many events. Those of a behaviour have domain x, and their items are called
``x:ID``, as each domain numbers its items for itself; the row's own has domain ``target`` and the
item ``item_id``. Numbers up to 0 stand for nothing. Events of a user who has several rows are in
all of them: ``--drop-repeats exact`` keeps each once.

The columns of the times are those that the public baseline's schema.json names. Which column is a
domain's item is published nowhere, so a user says it.

Source: README.md of the data set TAAC2026/data_sample_1000 of 2026-04-10 (columns and their types),
schema.json of the public baseline (columns of times; what numbers up to 0 are).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu_xd.data.sources.base import FIELD, Record, Source
from hstu_xd.data.sources.columns import ColumnOptions, find_column, missing_column
from hstu_xd.data.sources.inputs import Input
from hstu_xd.data.sources.parquet import check_types, parquet_batches
from hstu_xd.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import polars as pl

TARGET = "target"
_SEQUENCE = re.compile(r"domain_([a-z]+)_seq_\d+")
_TIMES = {
    "a": "domain_a_seq_39",
    "b": "domain_b_seq_67",
    "c": "domain_c_seq_27",
    "d": "domain_d_seq_26",
}
# A row holds some thousand events.
_ROWS = 1 << 10


def is_flat(names: Sequence[str], options: ColumnOptions) -> bool:
    """Tell whether a file's columns hold sequences, and are not to be read as its rows alone."""
    wanted = (options.item or "").split(",")
    by_rows = options.item is not None and not any(map(_domain_of, wanted))
    return not by_rows and any(map(_domain_of, names))


def _domain_of(name: str) -> str:
    """Return the domain of behaviour that a column is of; empty: of none."""
    found = _SEQUENCE.fullmatch(name.strip())
    return found.group(1) if found else ""


@dataclass(frozen=True, kw_only=True)
class FlatSource(Source):
    """A Parquet file of the flat layout.

    Attributes:
        own: columns of user, item and time of the rows themselves, by role.
        behaviours: of each domain that is read, the columns of its lists, by role: item, time, and
            those of fields.
    """

    own: Mapping[str, str]
    behaviours: Mapping[str, Mapping[str, str]]

    def frames(self) -> "Iterator[pl.LazyFrame]":
        """Yield events with ids as text; what stands for no event has nothing but a domain.

        Raises:
            ShapeError: columns of a domain with lists of different lengths.
        """
        for batch in self._batches():
            for events in self._events_of(batch):
                yield events.lazy()

    def records(self) -> Iterator[Record]:
        """Every event as a record with its row; rows count from 1."""
        import polars as pl

        number = 0
        for batch in self._batches():
            for row in batch.iter_slices(1):
                number += 1
                problem = self._problem_of(row.row(0, named=True))
                if problem is not None:
                    yield Record(number, problem=problem)
                    continue
                for events in self._events_of(row):
                    texts = events.select(pl.all().cast(pl.String))
                    yield from (Record.of(number, one) for one in texts.iter_rows(named=True))

    def at(self, line: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}: row {line}"

    def _batches(self) -> "Iterator[pl.DataFrame]":
        lists = [name for columns in self.behaviours.values() for name in columns.values()]
        return parquet_batches(self.path, [*self.own.values(), *lists], rows=_ROWS)

    def _events_of(self, batch: "pl.DataFrame") -> "Iterator[pl.DataFrame]":
        import polars as pl

        yield self._as_events(batch.select(**{r: pl.col(n) for r, n in self.own.items()}), TARGET)
        user = pl.col(self.own["user"]).alias("user")
        for domain, columns in self.behaviours.items():
            rows = batch.select(user, **{role: pl.col(name) for role, name in columns.items()})
            lengths = rows.select(pl.col(*columns).list.len().fill_null(0))
            if any((lengths[role] != lengths["time"]).any() for role in columns):
                raise pl.exceptions.ShapeError(f"lists of different lengths in domain {domain}")
            rows = rows.filter(lengths["time"] > 0).explode(*columns)
            yield self._as_events(rows, domain)

    def _as_events(self, rows: "pl.DataFrame", domain: str) -> "pl.DataFrame":
        import polars as pl

        texts = {role: pl.col(role).cast(pl.String) for role in ("user", "item")}
        time = pl.col("time")
        if domain != TARGET:
            is_event = (pl.col("item") > 0) & (time > 0)
            texts["item"] = pl.concat_str(pl.lit(f"{domain}:"), texts["item"])
            texts = {role: pl.when(is_event).then(text) for role, text in texts.items()}
            time = pl.when(is_event).then(time)
        fields = {}
        for role in (FIELD + name for name in self.fields):
            known = pl.when(pl.col(role) > 0).then(pl.col(role).cast(pl.String))
            fields[role] = known if role in rows.columns else pl.lit(None, pl.String)
        return rows.select(**texts, domain=pl.lit(domain), time=time, **fields)

    def _problem_of(self, row: Mapping[str, Any]) -> str | None:
        for domain, columns in self.behaviours.items():
            lengths = {name: len(row[name] or ()) for name in columns.values()}
            if len(set(lengths.values())) > 1:
                told = ", ".join(f"{name} {length}" for name, length in lengths.items())
                return (
                    f"lists of different lengths in domain {domain} ({told}); an event needs an "
                    "entry in each"
                )
        return None


def open_flat(one: Input, schema: "pl.Schema", options: ColumnOptions) -> FlatSource:
    """Settle which columns of a file of the flat layout are read.

    Args:
        one: the file.
        schema: names and types of its columns.
        options: ``item`` names one column of each domain of behaviour to read, with commas between
            them; ``time`` likewise where times are not where the public baseline has them;
            ``fields`` are columns of these domains.

    Raises:
        InputError: options that name no such columns, or do not say which is the item.
    """
    path, names = one.path, schema.names()
    told = {"NAME=": one.domain, "--domain-col": options.domain, "--order-col": options.order}
    if idle := next((name for name, value in told.items() if value), None):
        raise InputError(
            f"{path}: {idle} is not for the flat layout, whose sequences are its domains; leave it "
            "out"
        )
    if options.item is None:
        domains = sorted({*map(_domain_of, names)} - {""})
        raise InputError(
            f"{path}: has sequences of the domains {', '.join(domains)}, and which column of a "
            "domain is its item is published nowhere; name one of each domain that is to be read: "
            f"--item-col {','.join(f'domain_{domain}_seq_N' for domain in domains)}, or --item-col "
            "item_id to read the rows without them"
        )
    items = _by_domain(path, names, options.item, "--item-col")
    times = _TIMES | _by_domain(path, names, options.time or "", "--time-col")
    behaviours: dict[str, dict[str, str]] = {}
    for domain, item in items.items():
        time = times.get(domain)
        if time not in names:
            raise InputError(
                f"{path}: no column {time or 'of the times'} in domain {domain}; name it with "
                f"--time-col domain_{domain}_seq_N"
            )
        behaviours[domain] = {"item": item, "time": time}
    for name in options.fields:
        domain = _domain_of(name)
        if name not in names or domain not in behaviours:
            raise InputError(
                f"{path}: --event-cols {name!r}: give columns of the domains that are read "
                f"({', '.join(behaviours)}){did_you_mean(name, names)}"
            )
        behaviours[domain][FIELD + name] = name
    _check_lists(path, schema, behaviours)
    own = {}
    for role in ("user", "item", "time"):
        usual = ColumnOptions(user=options.user)
        at = find_column(path, names, role, usual, line=None)
        if at is None:
            raise missing_column(path, names, role, usual, line=None)
        own[role] = names[at]
    check_types(path, schema, own)
    return FlatSource(
        path=path,
        domain=None,
        form="flat layout of TAAC 2026, Parquet",
        roles=_told(own, behaviours, names),
        fields=options.fields,
        own=own,
        behaviours=behaviours,
    )


def _by_domain(path: Path, names: Sequence[str], text: str, option: str) -> dict[str, str]:
    """Read names of columns with commas between them, one a domain."""
    found: dict[str, str] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        domain = _domain_of(name)
        if name not in names or not domain:
            raise InputError(
                f"{path}: {option} {name!r}: give columns of domains of behaviour, called like "
                f"domain_a_seq_38{did_you_mean(name, names)}"
            )
        if domain in found:
            raise InputError(
                f"{path}: {option} names {found[domain]} and {name}, both of domain {domain}; name "
                "one"
            )
        found[domain] = name
    return found


def _check_lists(
    path: Path, schema: "pl.Schema", behaviours: Mapping[str, Mapping[str, str]]
) -> None:
    import polars as pl

    for name in (name for columns in behaviours.values() for name in columns.values()):
        kind = schema[name]
        if not isinstance(kind, pl.List) or not kind.inner.is_integer():
            raise InputError(
                f"{path}: column {name!r} is {kind}; the flat layout has lists of integers there"
            )


def _told(
    own: Mapping[str, str], behaviours: Mapping[str, Mapping[str, str]], names: Sequence[str]
) -> str:
    """Say which columns are read, and which domains are not."""
    parts = [f"user={own['user']}, {TARGET}: {own['item']} at {own['time']}"]
    parts += [f"{domain}: {x['item']} at {x['time']}" for domain, x in behaviours.items()]
    left = sorted({*map(_domain_of, names)} - {"", *behaviours})
    parts += [f"left out for want of an --item-col: {', '.join(left)}"] * bool(left)
    return "; ".join(parts)
