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
    """

    columns: dict[str, str]

    def scan(self) -> "pl.LazyFrame":
        """Events with ids as text and time as stored."""
        import polars as pl

        frame = pl.scan_parquet(self.path, glob=False)
        return frame.select(
            pl.col(name).alias(role) if role == "time" else pl.col(name).cast(pl.String).alias(role)
            for role, name in self.columns.items()
        )

    def records(self) -> Iterator[Record]:
        """Every row as a record; rows count from 1."""
        import polars as pl

        frame = self.scan().with_columns(pl.col("time").cast(pl.String))
        for batch in frame.collect_batches(maintain_order=True, engine="streaming"):
            for row, values in enumerate(batch.iter_rows(named=True), start=1):
                yield Record(
                    row,
                    values["user"],
                    values["item"],
                    values.get("domain", self.domain),
                    values["time"],
                )

    def at(self, line: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}: row {line}"
