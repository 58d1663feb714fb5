"""Features of items beside their id: categories, numbers and vectors, as ``--features`` names them.

What a column is follows from its type: text and truth values are categories, numbers are numbers,
and lists of numbers are vectors. A CSV file holds text, so all of its columns are categories.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.taxonomy import Taxonomy, numbered_levels, text_of
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class StoredFeatures:
    """Features of the items of a catalogue.

    Attributes:
        categories: their values, told as nodes of a taxonomy are; None without such.
        numbers: name -> (I, W) float32, row r of item id r + 1, NaN where an item has none.
    """

    categories: Taxonomy | None
    numbers: Mapping[str, NDArray[np.float32]]

    def described(self) -> dict[str, Any]:
        """Return what the manifest says of each feature."""
        categories = {} if self.categories is None else self.categories.described()
        numbers = {
            name: {"width": values.shape[1], "items_without": int(np.isnan(values[:, 0]).sum())}
            for name, values in self.numbers.items()
        }
        return {"categories": categories, "numbers": numbers}

    def stacked(self) -> NDArray[np.float32]:
        """Return all numbers side by side: (I, W)."""
        return np.concatenate(list(self.numbers.values()), axis=1)


def features_from(
    path: Path, rows: "pl.DataFrame", warn: Callable[[str], object]
) -> StoredFeatures:
    """Take the features of a catalogue's items.

    Args:
        path: the file, for messages.
        rows: column item, and one for each feature; a row for each item of the catalogue.
        warn: is told of what items lack.

    Raises:
        InputError: vectors of several lengths, a value that is not finite, or another type.
    """
    import polars as pl

    texts: dict[str, pl.Series] = {}
    numbers: dict[str, NDArray[np.float32]] = {}
    for column in rows.drop("item").iter_columns():
        kind = column.dtype
        if kind in (pl.String, pl.Boolean, pl.Categorical, pl.Enum):
            texts[column.name] = rows.select(text_of(column.name)).to_series()
            lacking = texts[column.name].null_count()
            if lacking < len(rows) and _is_numeric(texts[column.name]):
                warn(
                    f"{column.name} in {path.name} is text and holds numbers: each of its "
                    f"{texts[column.name].n_unique() - bool(lacking):,} values is a category; give "
                    "a Parquet file with a numeric column if they are amounts"
                )
        elif kind.is_numeric() or kind in (pl.List, pl.Array):
            numbers[column.name] = _numbers(path, rows["item"], column)
            lacking = int(np.isnan(numbers[column.name][:, 0]).sum())
        else:
            raise InputError(
                f"{path}: column {column.name!r} is {kind}; a feature is text, a truth value, a "
                "number, or a list of numbers"
            )
        if lacking:
            warn(f"{lacking:,} of {len(rows):,} items have no {column.name} in {path.name}")
    return StoredFeatures(numbered_levels(pl.DataFrame(texts)) if texts else None, numbers)


def _is_numeric(texts: "pl.Series") -> bool:
    """Tell whether every text that is there is a number."""
    import polars as pl

    return texts.cast(pl.Float64, strict=False).null_count() == texts.null_count()


def _numbers(path: Path, items: "pl.Series", column: "pl.Series") -> NDArray[np.float32]:
    """Return (I, W) float32 of a column of numbers or vectors, NaN where it is empty."""
    import polars as pl

    name = column.name
    if column.dtype.is_numeric():
        column = column.cast(pl.Float32).fill_nan(None)
        values = column.fill_null(0.0).to_numpy()[:, None].copy()
    else:
        try:
            column = column.cast(pl.List(pl.Float32))
        except pl.exceptions.PolarsError as error:
            raise InputError(
                f"{path}: column {name!r} is {column.dtype}; a vector is a list of numbers"
            ) from error
        lengths = column.list.len()
        known = lengths.drop_nulls().unique(maintain_order=True)
        if len(known) != 1 or not known[0]:
            other = int((lengths != known[0]).fill_null(False).arg_max() or 0) if len(known) else 0
            found = f"{lengths[other]} numbers" if len(known) else "nothing in any row"
            raise InputError(
                f"{path}: column {name!r} has {found} for item {items[other]!r}"
                + (f" and {known[0]} for others" if len(known) > 1 else "")
                + "; give every item a vector of the same length, or none"
            )
        values = np.zeros((len(column), int(known[0])), np.float32)
        flat = column.drop_nulls().explode().fill_null(float("nan")).to_numpy()
        values[column.is_not_null().to_numpy()] = flat.reshape(-1, int(known[0]))
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise InputError(
            f"{path}: column {name!r} of item {items[row]!r} is not finite; give finite numbers, "
            "or leave it empty"
        )
    values[column.is_null().to_numpy()] = np.nan
    return values
