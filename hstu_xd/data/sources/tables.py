"""Tables with one event a row: delimited text and Parquet.

Delimited text is CSV, TSV, RecBole's ``.inter`` and headerless Amazon ratings.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hstu_xd.data.sources.base import BATCH_ROWS, Record, Source
from hstu_xd.data.sources.content import compression_of, text_blocks
from hstu_xd.data.sources.quotes import Quoting, csv_rows

if TYPE_CHECKING:
    import polars as pl

QUOTE, NEWLINE = b'"\n'


@dataclass(frozen=True, kw_only=True)
class DelimitedSource(Source):
    """A delimited text file.

    Attributes:
        separator: between fields; "::" is read as ":" with an empty field after every field.
        quoting: how double quotes are read.
        header: whether line 1 names the columns.
        width: number of fields of every line.
        positions: field number of user, item, time and, where there are such, domain and order.
    """

    separator: str
    quoting: Quoting
    header: bool
    width: int
    positions: dict[str, int]

    @property
    def only_records(self) -> bool:
        """Whether quotes are such that the fast scan would read other fields."""
        return not self.quoting.is_plain

    def frames(self) -> "Iterator[pl.LazyFrame]":
        """Yield the events as text columns; polars raises on lines with too many fields."""
        if compression_of(self.path) is None:
            yield self._frame(self.path.absolute(), header=self.header)
            return
        header = self.header
        for block in text_blocks(self.path):
            yield self._frame(io.BytesIO(block), header=header)
            header = False

    def may_have_short_lines(self) -> bool:
        """Tell whether some line may have too few fields, which polars fills with nulls.

        No line has too many, so that one with too few shows in the number of separators. Empty
        lines show, too.
        """
        marks = lines = 0
        for block in text_blocks(self.path):
            text = np.frombuffer(block, np.uint8)
            is_mark = text == ord(self.separator[0])
            if self.quoting.style == "double" and QUOTE in block:
                is_mark &= np.cumsum(text == QUOTE, dtype=np.uint32) % 2 == 0
            marks += int(np.count_nonzero(is_mark))
            lines += int(np.count_nonzero(text == NEWLINE)) + (not block.endswith(b"\n"))
        return marks != lines * (self.width - 1) * len(self.separator)

    def _frame(self, source: object, *, header: bool) -> "pl.LazyFrame":
        """Scan a file or a block of it.

        The last column comes along even when it plays no role: polars stops at the last column it
        is asked for, and a line with a field too many would pass, its fields shifted.
        """
        import polars as pl

        frame = pl.scan_csv(
            source,  # pyrefly: ignore
            has_header=header,
            separator=self.separator[0],
            quote_char=None if self.quoting.style == "none" else '"',
            infer_schema=False,
            glob=False,
        )
        step = len(self.separator)
        wanted = {"last": self.width - 1, **self.positions}
        return frame.select(pl.nth(step * at).alias(role) for role, at in wanted.items())

    def records(self) -> Iterator[Record]:
        """Every event as a record, faulty ones with their problem."""
        for lines, fields in csv_rows(self.path, self.separator, self.quoting.style):
            line = lines.start
            if isinstance(fields, csv.Error):
                problem = f"not readable as a delimited line ({fields}); mend it"
                yield Record(line, problem=problem)
            elif fields and not (self.header and line == 1):
                yield self._record(line, fields)

    def _record(self, line: int, fields: list[str]) -> Record:
        text = self.separator.join(fields)
        if not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
            return Record(line, problem="not UTF-8 text; save the file as UTF-8")
        if len(fields) != self.width:
            mend = "mend the line or quote the field"
            if self.quoting.style == "double" and any(f.endswith("\\") for f in fields):
                mend += ", or use --quote backslash if that is how quotes inside are written"
            problem = (
                f"{len(fields)} fields where {self.width} are expected ({text[:80]!r}); {mend}"
            )
            return Record(line, problem=problem)
        values = {role: fields[at] for role, at in self.positions.items()}
        return Record(line, **{"domain": self.domain, **values})


@dataclass(frozen=True, kw_only=True)
class ParquetSource(Source):
    """A Parquet file; dates and times become numbers since 1970 (UTC where no zone is given).

    Attributes:
        columns: the columns of user, item, time and, where there are such, domain and order.
        temporal: whether the time column holds dates or date-times instead of numbers or text.
    """

    columns: dict[str, str]
    temporal: bool

    def frames(self) -> "Iterator[pl.LazyFrame]":
        """Yield the events with ids as text and times as numbers or text."""
        import polars as pl

        for batch in parquet_batches(self.path, list(self.columns.values())):
            events = {
                role: _as_number(pl.col(name), batch.schema[name])
                if role in ("time", "order")
                else _as_id(pl.col(name), batch.schema[name])
                for role, name in self.columns.items()
            }
            yield batch.lazy().select(**events)

    def records(self) -> Iterator[Record]:
        """Every row as a record; rows count from 1."""
        import polars as pl

        row = 0
        for frame in self.frames():
            for values in (
                frame.with_columns(pl.all().cast(pl.String)).collect().iter_rows(named=True)
            ):
                row += 1
                yield Record(row, **{"domain": self.domain, **values})

    def at(self, line: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}: row {line}"


def parquet_schema(path: Path) -> "pl.Schema":
    """Return the names and types of a Parquet file's columns.

    Raises:
        ComputeError: the file is damaged.
    """
    import polars as pl
    import pyarrow as pa
    from pyarrow import parquet

    try:
        empty = pl.from_arrow(parquet.read_schema(path).empty_table())
    except (pa.ArrowException, OSError, ValueError, pl.exceptions.PanicException) as error:
        raise pl.exceptions.ComputeError(str(error)) from error
    assert isinstance(empty, pl.DataFrame)
    return empty.schema


def parquet_batches(path: Path, names: list[str]) -> "Iterator[pl.DataFrame]":
    """Yield some columns of a Parquet file in batches.

    They are read by pyarrow and validated: polars panics on some damaged files.

    Raises:
        ComputeError: the file is damaged.
    """
    import polars as pl
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(names))):
                batch.validate(full=True)
                frame = pl.from_arrow(batch)
                assert isinstance(frame, pl.DataFrame)
                yield frame
    except (pa.ArrowException, OSError, ValueError, pl.exceptions.PanicException) as error:
        raise pl.exceptions.ComputeError(str(error)) from error


def _as_number(column: "pl.Expr", dtype: "pl.DataType") -> "pl.Expr":
    import polars as pl

    if dtype == pl.Date:
        return column.dt.epoch("s")
    if isinstance(dtype, pl.Datetime):
        return column.dt.epoch(dtype.time_unit)
    return column


def _as_id(column: "pl.Expr", dtype: "pl.DataType") -> "pl.Expr":
    """Write ids as text; pandas makes floats of integers where one is missing."""
    import polars as pl

    if not dtype.is_float():
        return column.cast(pl.String)
    column = column.fill_nan(None)
    whole = column.cast(pl.Int64, strict=False)
    return pl.when(whole == column).then(whole.cast(pl.String)).otherwise(column.cast(pl.String))
