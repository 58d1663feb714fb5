"""Map the files of a store, and name the one that is damaged."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_xd.errors import InputError


def damaged(file: Path, what: str) -> InputError:
    """Describe a file that does not hold what it should."""
    return InputError(f"{file}: {what}, the store is damaged; prepare the log again")


@contextmanager
def damage_named(file: Path) -> Iterator[None]:
    """Turn what a library raises for a damaged file into an error that names it.

    Raises:
        InputError: the file cannot be read.
    """
    import polars as pl
    import pyarrow as pa

    try:
        yield
    except InputError:
        raise
    except PermissionError as error:
        raise unreadable(file, error) from error
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise damaged(file, f"cannot be read ({reason})") from error


def unreadable(file: Path, error: OSError) -> InputError:
    """Describe a file that may not or cannot be read."""
    reason = os.strerror(error.errno) if error.errno else error
    return InputError(f"{file}: cannot be read ({reason}); check the store")


def read_values(file: Path, names: list[str], counts: list[int]) -> tuple[list[str], ...]:
    """Read the values of fields or levels.

    Raises:
        InputError: they are not those that the manifest counts.
    """
    from pyarrow import parquet

    with damage_named(file):
        table = parquet.read_table(file.absolute()).to_pydict()
        rows: dict[str, list[str]] = {name: [] for name in names}
        for name, value in zip(table["name"], table["value"], strict=True):
            rows[name].append(value)
    if [len(values) for values in rows.values()] != counts:
        raise damaged(file, "does not hold the values that the manifest counts")
    return tuple(rows.values())


def map_array(file: Path, shape: int | tuple[int, ...], dtype: np.dtype) -> NDArray:
    """Map an array that the manifest describes.

    Raises:
        InputError: a file that cannot be read, or of another shape or type.
    """
    try:
        array = np.load(file, mmap_mode="r")
    except PermissionError as error:
        raise unreadable(file, error) from error
    except Exception as error:  # a damaged header makes numpy raise nearly anything
        raise InputError(f"{file}: damaged ({error}); prepare the log again") from error
    shape = shape if isinstance(shape, tuple) else (shape,)
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        raise InputError(
            f"{file}: holds {getattr(array, 'dtype', 'no array')} {getattr(array, 'shape', '')} "
            f"where the manifest says {dtype} {shape}; prepare the log again"
        )
    return array
