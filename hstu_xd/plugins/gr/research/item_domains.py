"""Item -> domain tables for the data sets that upstream prepares itself."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.plugins.item_tables import ItemTable, read_item_table, warn_of_one_domain

_logger = logging.getLogger(__name__)

ITEM_COLUMNS = ("item", "item_id", "movie_id")


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
        max_item_id: the largest id the model can look up; unused ids up to it belong to no domain.

    Returns:
        The catalogue, with ``num_items = max_item_id``. One domain only, and lines about
        unused ids (they are ignored), are warned about.

    Raises:
        InputError: no such file, a missing column, an id that is no number or outside
            1..max_item_id, an empty domain or one called like a group of targets, an item in two
            domains or in none. The message names file, line (row in Parquet), value and mend.
    """
    file = Path(path)
    table = read_item_table(file, item_columns=ITEM_COLUMNS)
    items = _item_ids(table, max_item_id)
    names, numbers = table.number_domains()
    table.refuse_second_domains(items.tolist())
    item_domains = np.full(max_item_id + 1, -1, np.int64)
    item_domains[items] = numbers
    return DomainCatalog(_used_only(file, item_domains, all_item_ids), names)


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

    films = read_item_table(Path(items_csv), item_columns=("movie_id",), domain_column="genres")
    written = pl.DataFrame(
        {
            "item": films.items.str.strip_chars(),
            "domain": films.domains.str.split("|").list.first(),
        }
    )
    partial = Path(f"{out}.partial-{os.getpid()}")
    try:
        written.write_csv(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _item_ids(table: ItemTable, max_item_id: int) -> np.ndarray:
    """(R,) int64 item id of every line."""
    import polars as pl

    texts = table.items.str.strip_chars()
    ids = texts.cast(pl.Int64, strict=False)
    wrong = ids.is_null().to_numpy()
    if wrong.any():
        line = int(wrong.argmax())
        raise InputError(
            f"{table.place(line)}: item id {texts[line]!r} is not a whole number; ids are "
            "upstream's, not those of the raw data"
        )
    items = ids.to_numpy()
    outside = (items < 1) | (items > max_item_id)
    if outside.any():
        line = int(outside.argmax())
        raise InputError(
            f"{table.place(line)}: item id {items[line]} is outside 1..{max_item_id}; ids are "
            "upstream's (for Amazon data one more than in its sasrec_format.csv)"
        )
    return items


def _used_only(file: Path, item_domains: np.ndarray, all_item_ids: Sequence[int]) -> torch.Tensor:
    """Return the table with -1 at unused ids; refuse one that lacks an item's domain."""
    items = np.unique(np.asarray(all_item_ids, np.int64))
    missing = items[item_domains[items] < 0]
    if missing.size:
        raise InputError(
            f"{file}: catalogue misses {missing.size} of {items.size} items, first {missing[0]}; "
            "add them, every item needs a domain"
        )
    table = np.full_like(item_domains, -1)
    table[items] = item_domains[items]
    unused = np.flatnonzero(table != item_domains)
    if unused.size:
        _logger.warning(
            "%s: %d ids are ignored, first %d: the data set has no such items",
            file,
            unused.size,
            unused[0],
        )
    warn_of_one_domain(file, table[items])
    return torch.from_numpy(table)
