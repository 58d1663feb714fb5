"""Tables that stand beside a log: of items, of pairs of users and items."""

from pathlib import Path
from typing import TYPE_CHECKING

from hstu_xd.data.sources.columns import ColumnOptions, find_column, missing_column
from hstu_xd.errors import InputError
from hstu_xd.files import check_readable

if TYPE_CHECKING:
    import polars as pl


def read_table(path: Path, option: str) -> "pl.DataFrame":
    """Read a Parquet file with its types, or a CSV file as text.

    Args:
        path: the file.
        option: what named it.

    Raises:
        InputError: no such file, or another kind of file.
    """
    import polars as pl

    check_readable(path)
    if not path.is_file():
        raise InputError(f"{option} {path}: no such file; give a Parquet or CSV file")
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path, glob=False)
        return pl.read_csv(path, infer_schema=False, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"{option} {path}: not a readable Parquet or CSV file ({reason})"
        ) from error


def id_column(
    path: Path, table: "pl.DataFrame", role: str, columns: ColumnOptions | None = None
) -> "pl.Expr":
    """Take the column of an id as text, without spaces at its ends.

    Args:
        path: the file, for messages.
        table: what was read from it.
        role: user, item or domain.
        columns: the column's name, where its usual ones are not meant.

    Raises:
        InputError: no such column, or two that may be meant.
    """
    column = find_id_column(path, table, role, columns)
    if column is None:
        columns = columns or ColumnOptions()
        raise missing_column(path, table.columns, role, columns, line=None)
    return column


def find_id_column(
    path: Path, table: "pl.DataFrame", role: str, columns: ColumnOptions | None = None
) -> "pl.Expr | None":
    """Take the column of an id where there is one, see :func:`id_column`."""
    import polars as pl

    place = find_column(path, table.columns, role, columns or ColumnOptions(), line=None)
    if place is None:
        return None
    return pl.nth(place).cast(pl.String).str.strip_chars().alias(role)
