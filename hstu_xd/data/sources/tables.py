"""Tables with one event a row: delimited text and Parquet.

Delimited text is CSV, TSV, RecBole's ``.inter`` and headerless Amazon ratings.
"""

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hstu_xd.data.sources.base import Record, Source, numbered_lines

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class DelimitedSource(Source):
    """A delimited text file.

    Attributes:
        separator: one character between fields.
        quoted: whether double quotes protect fields (not in RecBole files).
        header: whether line 1 names the columns.
        width: number of fields of every line.
        positions: field number of user, item, time and, unless constant, domain.
    """

    separator: str
    quoted: bool
    header: bool
    width: int
    positions: dict[str, int]

    def scan(self) -> "pl.LazyFrame":
        """Events as text columns; polars raises on lines with too many fields.

        The last column comes along even when it plays no role: polars stops at the last column it
        is asked for, and a line with a field too many would pass, its fields shifted.
        """
        import polars as pl

        frame = pl.scan_csv(
            self.path,
            has_header=self.header,
            separator=self.separator,
            quote_char='"' if self.quoted else None,
            infer_schema=False,
            glob=False,
        )
        wanted = {"last": self.width - 1, **self.positions}
        return frame.select(pl.nth(at).alias(role) for role, at in wanted.items())

    def records(self) -> Iterator[Record]:
        """Every line as a record, the first faulty one with its problem."""
        csv.field_size_limit(sys.maxsize)
        undecodable: list[int] = []

        def lines() -> Iterator[str]:
            for number, line in numbered_lines(self.path):
                if line is None:
                    undecodable.append(number)
                    return
                yield line

        quoting = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        reader = csv.reader(lines(), delimiter=self.separator, quoting=quoting)
        start = 1
        try:
            for fields in reader:
                line, start = start, reader.line_num + 1
                if fields and not (self.header and line == 1):
                    yield self._record(line, fields)
        except csv.Error as error:
            yield Record(start, problem=f"not readable as a delimited line ({error}); mend it")
        if undecodable:
            yield Record(undecodable[0], problem="not UTF-8 text; save the file as UTF-8")

    def _record(self, line: int, fields: list[str]) -> Record:
        if len(fields) != self.width:
            return Record(
                line,
                problem=f"{len(fields)} fields where {self.width} are expected "
                f"({self.separator.join(fields)[:80]!r}); mend the line or quote the field",
            )
        at = self.positions
        domain = self.domain if "domain" not in at else fields[at["domain"]]
        return Record(line, fields[at["user"]], fields[at["item"]], domain, fields[at["time"]])


@dataclass(frozen=True)
class ParquetSource(Source):
    """A Parquet file; dates and times become seconds since 1970 (UTC where no zone is given).

    Attributes:
        columns: the columns of user, item, time and, unless constant, domain.
        temporal: whether the time column holds dates or date-times instead of numbers or text.
    """

    columns: dict[str, str]
    temporal: bool

    def scan(self) -> "pl.LazyFrame":
        """Events with ids as text and time as a number or text."""
        import polars as pl

        events = {role: pl.col(name).cast(pl.String) for role, name in self.columns.items()}
        time = pl.col(self.columns["time"])
        events["time"] = time.dt.epoch("s") if self.temporal else time
        return pl.scan_parquet(self.path, glob=False).select(**events)

    def records(self) -> Iterator[Record]:
        """Every row as a record; rows count from 1."""
        import polars as pl

        frame = self.scan().with_columns(pl.col("time").cast(pl.String))
        batches = frame.collect_batches(maintain_order=True, engine="streaming")
        rows = (values for batch in batches for values in batch.iter_rows(named=True))
        for row, values in enumerate(rows, start=1):
            domain = values.get("domain", self.domain)
            yield Record(row, values["user"], values["item"], domain, values["time"])

    def at(self, line: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}: row {line}"
