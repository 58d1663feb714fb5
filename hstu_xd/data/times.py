"""Reads the many spellings of a timestamp as whole, non-negative seconds."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

# Above this a time in seconds lies after the year 5000: it is almost surely in milliseconds.
LARGEST_PLAUSIBLE_SECONDS = 10**11


def to_seconds(times: "pl.Series", *, divisor: int = 1) -> "pl.Series":
    """Whole seconds of a column of times; null where the value is no time.

    Text is an integer or a decimal number ("1400000000", "1.4e9", "1400000000.0"); fractions are
    cut off. NaN, infinite, negative, empty and all other values become null.

    Args:
        times: text, integers or floats.
        divisor: 1000 when the times are milliseconds.

    Returns:
        Int64 series of the same length.
    """
    import polars as pl

    whole = times.cast(pl.Int64, strict=False) if not times.dtype.is_float() else None
    if whole is None or whole.null_count() > times.null_count():
        decimal = times.cast(pl.Float64, strict=False)
        decimal = decimal.set(~decimal.is_finite().fill_null(True), None)
        floored = decimal.floor().cast(pl.Int64, strict=False)
        whole = floored if whole is None else whole.zip_with(whole.is_not_null(), floored)
    if divisor != 1:
        whole = whole // divisor
    lowest = whole.min()
    if isinstance(lowest, int) and lowest < 0:
        whole = whole.set(whole < 0, None)
    return whole
