"""Item -> domain tables keyed by the raw item tokens of REC's interaction files."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hstu_xd.catalog import CATALOG_FILE, DomainCatalog
from hstu_xd.data.prepare import check_domain_names
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

_logger = logging.getLogger(__name__)

ITEM_COLUMNS = ("item", "item_id")
DOMAIN_COLUMN = "domain"


class ItemDomains:
    """The domain of every item token of a file.

    Args:
        path: a CSV, TSV (``.tsv``) or Parquet (``.parquet``) with a column ``item`` (or
            ``item_id``) and a column ``domain``; or a prepared store, whose catalogue is such a
            file. Domain ids follow the sorted names.

    Raises:
        InputError: no such file, a missing column, an empty field, an item in two domains.
    """

    def __init__(self, path: Path | str) -> None:
        file = Path(path)
        self.path = file / CATALOG_FILE if file.is_dir() else file
        table = _read(self.path)
        self.domain_names: list[str] = table["domain"].unique().sort().to_list()
        try:
            check_domain_names(self.domain_names)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        index = {name: number for number, name in enumerate(self.domain_names)}
        self._domains: dict[str, int] = {}
        for row, (item, domain) in enumerate(table.iter_rows()):
            if self._domains.setdefault(item, index[domain]) != index[domain]:
                first = self.domain_names[self._domains[item]]
                raise InputError(
                    f"{_at(self.path, row)}: item {item!r} is in domain {domain!r} but above in "
                    f"domain {first!r}; give it one domain"
                )

    def catalog(self, tokens: Sequence[Any], occurring: Collection[int] | None) -> DomainCatalog:
        """The table for a data set's item numbers.

        Args:
            tokens: REC's ``id2token["item_id"]``: the token of every item number, padding at 0.
            occurring: numbers that the log holds; others may lack a domain (PerSRec lists one item
                more than there are for Parquet logs). None: all must have one.

        Raises:
            InputError: an item without a domain; the message says how many and names the first.
        """
        names = [str(tokens[number]) for number in range(1, len(tokens))]
        domains = np.array([-1, *(self._domains.get(name, -1) for name in names)], np.int64)
        missing = np.flatnonzero(domains[1:] < 0) + 1
        if missing.size:
            asked = missing if occurring is None else [n for n in missing if n in occurring]
            if len(asked):
                own = next(iter(self._domains))
                raise InputError(
                    f"{self.path}: {len(asked)} of the log's {len(names)} items are missing, first "
                    f"{names[asked[0] - 1]!r} (of this file the first is {own!r}); add a line for "
                    "each, every item needs a domain"
                )
            _logger.warning("%d items without events have no domain", missing.size)
        if np.unique(domains[1:]).size == 1:
            _logger.warning("%s: one domain only: the cross-domain parts have no effect", self.path)
        return DomainCatalog(torch.from_numpy(domains), self.domain_names, names)


def _read(file: Path) -> "pl.DataFrame":
    """Columns item and domain as strings without empty fields."""
    import polars as pl

    if not file.is_file():
        raise InputError(
            f"{file}: no such file; it must list every item's domain, with columns item and domain"
        )
    try:
        if file.suffix == ".parquet":
            table = pl.read_parquet(file)
        else:
            separator = "\t" if file.suffix == ".tsv" else ","
            table = pl.read_csv(file, infer_schema=False, separator=separator)
    except (pl.exceptions.PolarsError, UnicodeDecodeError, OSError) as error:
        raise _unreadable(file, error) from error
    item = next((name for name in ITEM_COLUMNS if name in table.columns), None)
    if item is None or DOMAIN_COLUMN not in table.columns:
        wanted = " or ".join(ITEM_COLUMNS) if item is None else DOMAIN_COLUMN
        raise InputError(f"{file}: no column {wanted}; found {table.columns}; rename one")
    try:
        table = table.select(
            item=pl.col(item).cast(pl.String),
            domain=pl.col(DOMAIN_COLUMN).cast(pl.String).str.strip_chars(),
        )
    except pl.exceptions.PolarsError as error:
        raise _unreadable(file, error) from error
    if file.suffix == ".parquet":  # numbers that no item bears, in a catalogue
        table = table.filter(pl.col("item").is_not_null() | pl.col("domain").is_not_null())
    for column in table.columns:
        empty = (table[column].fill_null("").str.strip_chars() == "").to_numpy()
        if empty.any():
            row = int(empty.argmax())
            raise InputError(f"{_at(file, row)}: empty {column}; fill it in or remove the line")
    if table.is_empty():
        raise InputError(f"{file}: no lines after the header; list every item's domain")
    return table


def _unreadable(file: Path, error: Exception) -> InputError:
    reason = next(iter(str(error).splitlines()), "empty")
    return InputError(f"{file}: cannot be read as a table: {reason}")


def _at(file: Path, row: int) -> str:
    """Where a row stands: its line in a text file with a header, its number in Parquet."""
    return f"{file}: row {row}" if file.suffix == ".parquet" else f"{file}:{row + 2}"
