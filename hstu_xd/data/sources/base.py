"""What every kind of input file offers: a fast scan, and slow records that know their line."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hstu_xd.data.times import KINDS, TimeKind

if TYPE_CHECKING:
    import polars as pl

BATCH_ROWS = 1 << 19
# Roles of optional fields of events: this and the name of the column.
FIELD = "field:"


class Record(NamedTuple):
    """One event of a file as text, with the line it starts on (the header is line 1)."""

    line: int
    user: str | None = None
    item: str | None = None
    domain: str | None = None
    time: str | None = None
    order: str | None = None
    problem: str | None = None
    fields: Mapping[str, str | None] = {}

    @classmethod
    def of(cls, line: int, values: Mapping[str, str | None]) -> "Record":
        """Make a record of values by role."""
        fields = {role: value for role, value in values.items() if role.startswith(FIELD)}
        rest = {role: value for role, value in values.items() if role not in fields}
        return cls(line, fields=fields, **rest)

    def value(self, role: str) -> str | None:
        """Return the value of a role, one of a field's too."""
        return self.fields.get(role) if role.startswith(FIELD) else getattr(self, role)


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """One input file whose columns are known.

    Attributes:
        path: the file, as the user named it.
        domain: the domain of all its events, or None when a column tells.
        form: what the file was taken to be, in words.
        roles: which column plays which role, in words.
        time: what its times are.
        order: what the column is that breaks ties in time; None without one.
        fields: names of the columns that are fields of its events.
    """

    path: Path
    domain: str | None
    form: str = ""
    roles: str = ""
    time: TimeKind = KINDS["s"]
    order: TimeKind | None = None
    fields: tuple[str, ...] = ()

    @abstractmethod
    def frames(self) -> "Iterator[pl.LazyFrame]":
        """Yield the events as text columns user, item, domain (if not constant), time, order.

        A field's column is called after its role. Time and order may be of any type. Together the
        frames are the file, in any cut.
        """

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Yield the events one by one; a line that cannot be read becomes a record with a problem.

        Slow on purpose: it names the line of an error that the fast scan has met, and reads the
        files that the fast scan cannot.
        """

    @property
    def may_nest(self) -> bool:
        """Whether lists and objects may stand where an id is asked for."""
        return False

    @property
    def only_records(self) -> bool:
        """Whether the fast scan would read this file otherwise than :meth:`records`."""
        return False

    def may_have_short_lines(self) -> bool:
        """Tell whether an empty last field may be one that is missing."""
        return False

    def batches(self, *derived: "pl.Expr") -> "Iterator[pl.DataFrame]":
        """Yield the events in batches, with their domain and the derived columns."""
        import polars as pl

        for frame in self.frames():
            if self.domain is not None:
                frame = frame.with_columns(domain=pl.lit(self.domain, pl.String))
            yield from frame.with_columns(*derived).collect_batches(
                chunk_size=BATCH_ROWS, maintain_order=False, engine="streaming"
            )

    def at(self, line: int) -> str:
        """Where a line is, for messages."""
        return f"{self.path}:{line}"
