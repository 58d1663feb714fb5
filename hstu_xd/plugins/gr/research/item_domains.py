"""Item -> domain tables for the data sets that upstream prepares itself."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.prepare import check_domain_names
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

logger = logging.getLogger(__name__)

ITEM_COLUMNS = ("item", "item_id", "movie_id")
DOMAIN_COLUMN = "domain"


def read_item_domains(
    path: Path | str, all_item_ids: Sequence[int], max_item_id: int
) -> DomainCatalog:
    """Read which item is in which domain.

    The file is a CSV, a TSV (``.tsv``) or Parquet (``.parquet``) with a column ``item`` (or
    ``item_id``, ``movie_id``) and a column ``domain``, in any order of rows. Item ids are those
    that upstream's trainer sees: MovieLens' own for ml-1m and ml-20m; for amzn-books 1..n, one
    more than the ids in its ``sasrec_format.csv``. Domain ids follow the sorted names.

    Args:
        path: the file.
        all_item_ids: the items there are, as in upstream's ``RecoDataset``.
        max_item_id: the largest id the model can look up; ids up to it that no item bears belong
            to no domain.

    Returns:
        The catalogue, with ``num_items = max_item_id``. One domain only, and lines about ids that
        no item bears (they are ignored), are warned about.

    Raises:
        InputError: no such file, a missing column, an id that is no number or outside
            1..max_item_id, an empty domain or one called like a group of targets, an item in two
            domains or in none. The message names file, line (row in Parquet), value and mend.
    """
    file = Path(path)
    table = _read(file)
    items, domains = _item_ids(file, table, max_item_id), table["domain"]
    names = domains.unique().sort().to_list()
    try:
        check_domain_names(names)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    index = {name: number for number, name in enumerate(names)}
    ids = domains.replace_strict(index).to_numpy().astype(np.int64)
    item_domains = _fill(file, items, ids, names, max_item_id)
    return DomainCatalog(_only(file, item_domains, all_item_ids), names)


def first_genre_domains(items_csv: Path | str, out: Path | str) -> None:
    """Write a table for :func:`read_item_domains` that calls a film's first genre its domain.

    A control: genres are no domains, so that nothing is expected to be gained from them.

    Args:
        items_csv: upstream's processed films, e.g. ``tmp/processed/ml-1m/movies.csv``, with columns
            ``movie_id`` and ``genres``, these with ``|`` between.
        out: the CSV to write.

    Raises:
        InputError: no such file, a missing column, or an empty field.
    """
    import polars as pl

    film, genres = "movie_id", "genres"
    table = _read(Path(items_csv), items=(film,), domains=genres)
    written = table.select(item="item", domain=pl.col("domain").str.split("|").list.first())
    partial = Path(f"{out}.partial-{os.getpid()}")
    try:
        written.write_csv(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _read(
    file: Path, items: Sequence[str] = ITEM_COLUMNS, domains: str = DOMAIN_COLUMN
) -> "pl.DataFrame":
    """Columns item and domain as strings without empty fields."""
    import polars as pl

    if not file.is_file():
        raise InputError(
            f"{file}: no such file; it must list every item's domain, with columns {items[0]} and "
            f"{domains}"
        )
    try:
        if file.suffix == ".parquet":
            table = pl.read_parquet(file)
        else:
            separator = "\t" if ".tsv" in file.suffixes else ","
            table = pl.read_csv(file, infer_schema=False, separator=separator)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        reason = next(iter(str(error).splitlines()), "empty")
        raise InputError(f"{file}: cannot be read as a table: {reason}") from error
    item = next((name for name in items if name in table.columns), None)
    if item is None or domains not in table.columns:
        wanted = f"{' or '.join(items)}" if item is None else domains
        raise InputError(f"{file}: no column {wanted}; found {table.columns}; rename one")
    table = table.select(
        item=pl.col(item).cast(pl.String).str.strip_chars(),
        domain=pl.col(domains).cast(pl.String).str.strip_chars(),
    )
    for column, name in (("item", item), ("domain", domains)):
        empty = (table[column].fill_null("") == "").to_numpy()
        if empty.any():
            row = int(empty.argmax())
            raise InputError(f"{_at(file, row)}: empty {name}; fill it in or remove the line")
    if table.is_empty():
        raise InputError(f"{file}: no lines after the header; list every item's domain")
    return table


def _item_ids(file: Path, table: "pl.DataFrame", max_item_id: int) -> np.ndarray:
    import polars as pl

    ids = table["item"].cast(pl.Int64, strict=False)
    wrong = ids.is_null().to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"{_at(file, row)}: item id {table['item'][row]!r} is not a whole number; ids are "
            "upstream's, not those of the raw data"
        )
    items = ids.to_numpy()
    outside = (items < 1) | (items > max_item_id)
    if outside.any():
        row = int(outside.argmax())
        raise InputError(
            f"{_at(file, row)}: item id {items[row]} is outside 1..{max_item_id}; ids are "
            "upstream's (for Amazon data one more than in its sasrec_format.csv)"
        )
    return items


def _fill(
    file: Path, items: np.ndarray, ids: np.ndarray, names: Sequence[str], max_item_id: int
) -> np.ndarray:
    """(max_item_id + 1,) domain of every id, -1 where the file has none."""
    item_domains = np.full(max_item_id + 1, -1, np.int64)
    item_domains[items[::-1]] = ids[::-1]  # of repeated ids the first line stands
    second = item_domains[items] != ids
    if second.any():
        row = int(second.argmax())
        first = int((items == items[row]).argmax())
        raise InputError(
            f"{_at(file, row)}: item {items[row]} is in domain {names[ids[row]]!r} but in "
            f"domain {names[ids[first]]!r} at {_at(file, first)}; give it one domain"
        )
    return item_domains


def _only(file: Path, item_domains: np.ndarray, all_item_ids: Sequence[int]) -> torch.Tensor:
    """The table with -1 at ids that no item bears; raise where an item has no domain."""
    items = np.unique(np.asarray(all_item_ids, np.int64))
    missing = items[item_domains[items] < 0]
    if missing.size:
        raise InputError(
            f"{file}: catalogue misses {missing.size} of {items.size} items, first {missing[0]}; "
            "add them, every item needs a domain"
        )
    table = np.full_like(item_domains, -1)
    table[items] = item_domains[items]
    unborne = np.flatnonzero(table != item_domains)
    if unborne.size:
        logger.warning(
            "%s: %d ids are ignored, first %d: the data set has no such items",
            file,
            unborne.size,
            unborne[0],
        )
    if np.unique(table[items]).size == 1:
        logger.warning("%s: one domain only: the cross-domain parts have no effect", file)
    return torch.from_numpy(table)


def _at(file: Path, row: int) -> str:
    """Where a row stands: its line in a text file with a header, its number in Parquet."""
    return f"{file}: row {row}" if file.suffix == ".parquet" else f"{file}:{row + 2}"
