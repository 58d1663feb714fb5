"""Item -> domain files of users, as every host reads them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hstu_xd.data.prepare import check_domain_names
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

_logger = logging.getLogger(__name__)

ITEM_COLUMNS = ("item", "item_id")
DOMAIN_COLUMN = "domain"


@dataclass(frozen=True, eq=False)
class ItemTable:
    """The lines of an item -> domain file, without empty fields.

    Attributes:
        file: where they stand.
        items: item of each line, as it is written.
        domains: domain of each line, without the blanks around it.
        rows: number of each line in the file, from 0 on, the header not counted.
    """

    file: Path
    items: "pl.Series"
    domains: "pl.Series"
    rows: np.ndarray

    def place(self, line: int) -> str:
        """Say where a line stands: its line in a text file, its row in Parquet."""
        return _place(self.file, int(self.rows[line]))

    def number_domains(self) -> tuple[list[str], np.ndarray]:
        """Return the sorted names of the domains, and the number of each line's domain.

        Raises:
            InputError: a domain that is called like a group of targets.
        """
        names = self.domains.unique().sort().to_list()
        try:
            check_domain_names(names)
        except InputError as error:
            raise InputError(f"{self.file}: {error}") from error
        numbers = {name: number for number, name in enumerate(names)}
        return names, self.domains.replace_strict(numbers).to_numpy().astype(np.int64)

    def refuse_second_domains(self, keys: "Sequence[int] | pl.Series") -> None:
        """Refuse a file that names two domains for one item.

        Args:
            keys: what tells an item from others, for every line.

        Raises:
            InputError: the message names both lines.
        """
        import polars as pl

        lines = pl.DataFrame({"key": keys, "domain": self.domains, "line": range(len(keys))})
        first = (pl.col(name).first().over("key").alias(f"{name}_first") for name in lines.columns)
        second = lines.with_columns(first).filter(pl.col("domain") != pl.col("domain_first"))
        if len(second):
            found = second.row(0, named=True)
            raise InputError(
                f"{self.place(found['line'])}: item {found['key']!r} is in domain "
                f"{found['domain']!r} but in domain {found['domain_first']!r} at "
                f"{self.place(found['line_first'])}; give it one domain"
            )


def read_item_table(
    path: Path, *, item_columns: Sequence[str] = ITEM_COLUMNS, domain_column: str = DOMAIN_COLUMN
) -> ItemTable:
    """Read a table of items and their domains.

    Args:
        path: a CSV, a TSV (``.tsv``) or Parquet (``.parquet``). Rows of Parquet without an item and
            a domain are left out: the catalogue of a prepared store has one for every unused id.
        item_columns: columns that items may stand in; the first of them that is there counts.
        domain_column: the column of the domains.

    Raises:
        InputError: no such file, a missing column or an empty field.
    """
    import polars as pl

    if not path.is_file():
        raise InputError(
            f"{path}: no such file; it must list every item's domain, with columns "
            f"{item_columns[0]} and {domain_column}"
        )
    try:
        if path.suffix == ".parquet":
            table = pl.read_parquet(path, glob=False)
        else:
            separator = "\t" if ".tsv" in path.suffixes else ","
            table = pl.read_csv(path, infer_schema=False, separator=separator, glob=False)
    except (pl.exceptions.PolarsError, UnicodeDecodeError, OSError) as error:
        raise _unreadable(path, error) from error
    item = next((name for name in item_columns if name in table.columns), None)
    if item is None or domain_column not in table.columns:
        wanted = " or ".join(item_columns) if item is None else domain_column
        raise InputError(f"{path}: no column {wanted}; found {table.columns}; rename one")
    try:
        table = table.select(
            item=pl.col(item).cast(pl.String),
            domain=pl.col(domain_column).cast(pl.String).str.strip_chars(),
        ).with_row_index("row")
    except pl.exceptions.PolarsError as error:
        raise _unreadable(path, error) from error
    if path.suffix == ".parquet":
        table = table.filter(pl.col("item").is_not_null() | pl.col("domain").is_not_null())
    for column, name in (("item", item), ("domain", domain_column)):
        empty = table.filter(pl.col(column).fill_null("").str.strip_chars() == "")
        if len(empty):
            place = _place(path, empty["row"][0])
            raise InputError(f"{place}: empty {name}; fill it in or remove the line")
    if table.is_empty():
        raise InputError(f"{path}: no lines after the header; list every item's domain")
    return ItemTable(path, table["item"], table["domain"], table["row"].to_numpy())


def warn_of_one_domain(file: Path, domains: np.ndarray) -> None:
    """Say so where all items of a data set are in one domain."""
    if np.unique(domains).size == 1:
        _logger.warning("%s: one domain only: the cross-domain parts have no effect", file)


def _unreadable(file: Path, error: Exception) -> InputError:
    reason = next(iter(str(error).splitlines()), "empty")
    return InputError(f"{file}: cannot be read as a table: {reason}")


def _place(file: Path, row: int) -> str:
    """Say where a row stands; in a text file the first line is the header."""
    return f"{file}: row {row}" if file.suffix == ".parquet" else f"{file}:{row + 2}"
