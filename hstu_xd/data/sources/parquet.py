"""Parquet files with named columns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hstu_xd.data.sources.base import Record, Source

if TYPE_CHECKING:
    import polars as pl


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
