"""Logs in Parquet, read by pyarrow: polars panics on some damaged files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hstu_xd.data.sources.base import BATCH_ROWS, FIELD, Record, Source
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from pyarrow import parquet

# Floats hold every whole number below this, by the name of their type.
EXACT_BELOW = {"Float16": 2**11, "Float32": 2**24, "Float64": 2**53}
_IDS, _TIMES = ("user", "item"), ("time", "order")
# Types of values that cannot play a role.
_UNFIT = dict.fromkeys(_IDS, (bool,)) | dict.fromkeys(_TIMES, (bool, time, timedelta))


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
                if role in _TIMES
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
                yield Record.of(row, {"domain": self.domain, **values})

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
        # A relative path could be taken for a URI.
        empty = pl.from_arrow(_in_utc(parquet.read_schema(path.absolute()).empty_table()))
    except (pa.ArrowException, OSError, ValueError, pl.exceptions.PanicException) as error:
        raise pl.exceptions.ComputeError(str(error)) from error
    assert isinstance(empty, pl.DataFrame)
    return empty.schema


def parquet_batches(
    path: Path, names: list[str], *, rows: int = BATCH_ROWS
) -> "Iterator[pl.DataFrame]":
    """Yield some columns of a Parquet file in batches of at most so many rows.

    They are validated. Neither pyarrow nor polars notices that a damaged count hides rows, so rows
    are counted here.

    Raises:
        ComputeError: the file is damaged.
    """
    import polars as pl
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path.absolute()) as file:
            left = _stated_rows(file)
            for batch in file.iter_batches(rows, columns=list(dict.fromkeys(names))):
                batch.validate(full=True)
                frame = pl.from_arrow(_in_utc(pa.Table.from_batches([batch])))
                assert isinstance(frame, pl.DataFrame)
                left -= len(frame)
                yield frame
            if left:
                raise ValueError(
                    f"it states {abs(left)} rows {'more' if left > 0 else 'fewer'} than can be read"
                )
    except (pa.ArrowException, OSError, ValueError, pl.exceptions.PanicException) as error:
        raise pl.exceptions.ComputeError(str(error)) from error


def _in_utc(table: "pa.Table") -> "pa.Table":
    """Give moments with a time zone the zone UTC: polars knows no offsets such as +05:30.

    The numbers stay as they are; a zone is only how they are shown.
    """
    import pyarrow as pa

    fields = [
        field.with_type(pa.timestamp(field.type.unit, "UTC"))
        if pa.types.is_timestamp(field.type) and field.type.tz
        else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def check_types(path: Path, schema: "pl.Schema", columns: Mapping[str, str]) -> None:
    """Refuse columns whose type cannot play their role, and floats that have lost digits.

    Args:
        path: the file.
        schema: names and types of its columns.
        columns: the column of each role.

    Raises:
        InputError: names the column and its type.
    """
    import polars as pl

    for role, name in columns.items():
        kind = schema[name]
        if kind.is_nested() or kind.to_python() in _UNFIT.get(role, ()):
            is_field = role.startswith(FIELD)
            mend = "--event-cols" if is_field else f"--{role}-col"
            raise InputError(
                f"{path}: column {name!r} is {kind}, which is no {'field' if is_field else role}; "
                f"use {mend} with another one, or write it as text or numbers"
            )
        # Times as floats of 64 bits have lost less than a microsecond.
        if role in _UNFIT and kind.is_float() and (role in _IDS or kind != pl.Float64):
            _check_floats(path, name, str(kind))


def _check_floats(path: Path, name: str, kind: str) -> None:
    """Refuse floats too large to hold every digit of the integers they stood for.

    Raises:
        InputError: names the column.
    """
    import polars as pl

    try:
        parts = [batch[name].fill_nan(None).abs().max() for batch in parquet_batches(path, [name])]
    except pl.exceptions.PolarsError:  # named when the file is read
        return
    largest = max((part for part in parts if isinstance(part, float)), default=0.0)
    if largest >= EXACT_BELOW[kind]:
        raise InputError(
            f"{path}: column {name!r} is {kind} and holds numbers up to {largest:.17g}, which have "
            "lost digits; write them as integers or text"
        )


def _stated_rows(file: "parquet.ParquetFile") -> int:
    """Return the rows that a Parquet file states, where all of its counts agree.

    Raises:
        ValueError: they do not.
    """
    metadata = file.metadata
    flat = [file.schema.column(c).max_repetition_level == 0 for c in range(metadata.num_columns)]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    for group in groups:
        for column in range(metadata.num_columns):
            values = group.column(column).num_values
            if flat[column] and values != group.num_rows:
                raise ValueError(f"a group of {group.num_rows} rows has a column of {values}")
    if sum(group.num_rows for group in groups) != metadata.num_rows:
        raise ValueError(f"its groups do not have the {metadata.num_rows} rows that it states")
    return metadata.num_rows


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
