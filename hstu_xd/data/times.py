"""Read the many spellings of a time, and order events by all that is known of their times.

What a file's times are is decided once, from its first values, by plausibility: interactions lie
between 1990 and 2100. Every later value of the file has to fit the decision. Times are read as
whole seconds and the nanoseconds within them. One number an event orders a user's events: it is
made of the second, its fraction, and a column for ties, as far as the log has them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl


EARLIEST = 631_152_000  # 1990-01-01
LATEST = 4_102_444_800  # 2100-01-01
LARGEST = 2**63 - 1
NANO = 10**9
MICRO = 10**6

_ISO = (
    r"^\s*(\d{4})[-/]?(\d\d)[-/]?(\d\d)(?:[T ]\s*(\d\d):?(\d\d)(?::?(\d\d)(?:[.,](\d{1,9})\d*)?)?"
    r"\s*([Zz]|UTC|GMT|[+-]\d\d(?::?\d\d)?)?)?\s*$"
)
_ISO_PATTERN = re.compile(_ISO)
_ZONE = ("Z", "UTC", "GMT")


class Times(NamedTuple):
    """Times as they are read.

    Attributes:
        seconds: (n,) Int64, null where a value is no time of its kind.
        nanoseconds: (n,) int32 within the second, or None when all are zero.
    """

    seconds: "pl.Series"
    nanoseconds: NDArray[np.int32] | None


@dataclass(frozen=True)
class TimeKind:
    """What the times of a file are.

    Attributes:
        name: as ``--time-unit`` takes it.
        meaning: in words, for the summary and for messages.
        low: the first second that is accepted.
        high: the first second after those that are accepted.
    """

    name: str
    meaning: str
    low: int = 0
    high: int = LARGEST

    @property
    def is_dated(self) -> bool:
        """Whether these are dates, not numbers whose unit nobody knows."""
        return self.high != EARLIEST

    def within(self, low: int, high: int) -> "TimeKind":
        """Return the same kind for another range of seconds."""
        return TimeKind(self.name, self.meaning, low, high)

    def read(self, times: "pl.Series") -> Times:
        """Read a column of text, integers or floats."""
        seconds, nanoseconds = _READERS[self.name](times)
        lowest, highest = seconds.min(), seconds.max()
        if isinstance(lowest, int) and isinstance(highest, int):
            if lowest < self.low:
                seconds = seconds.set(seconds < self.low, None)
            if highest >= self.high:
                seconds = seconds.set(seconds >= self.high, None)
        if nanoseconds is not None and not nanoseconds.any():
            nanoseconds = None
        return Times(seconds, nanoseconds)

    def problem_of(self, text: str) -> str | None:
        """Say what is wrong with one time, with the mend; None when nothing is."""
        import polars as pl

        seconds, _ = self.within(-LARGEST, LARGEST).read(pl.Series([text]))
        second = seconds.item()
        if second is None:
            like = f"write {self.meaning}, or remove the line"
            return f"unreadable timestamp {text!r}; {like}"
        if second < 0:
            return f"negative timestamp {text!r}; write {self.meaning}, or remove the line"
        if self.low <= second < self.high:
            return None
        first = "are" if self.is_dated else "are not"
        return (
            f"timestamp {text!r} is {date_of(second)} when read as {self.meaning}; the file's "
            f"first times {first} between 1990 and 2100. Mend the line, leave it out with "
            "--skip-faulty, or say with --time-unit what the times are"
        )


def _numbers(times: "pl.Series") -> tuple["pl.Series", "pl.Series | None"]:
    """Return a column as integers, and as floats where some values are no integers."""
    import polars as pl

    whole = times.cast(pl.Int64, strict=False) if not times.dtype.is_float() else None
    if whole is not None and whole.null_count() == times.null_count():
        return whole, None
    if times.dtype == pl.String:  # a separator and a space between fields
        times = times.str.strip_chars()
        whole = times.cast(pl.Int64, strict=False)
        if whole.null_count() == times.null_count():
            return whole, None
    decimal = times.cast(pl.Float64, strict=False)
    decimal = decimal.set(~decimal.is_finite().fill_null(True), None)
    if whole is None:
        whole = pl.Series(times.name, [None], dtype=pl.Int64).new_from_index(0, len(times))
    return whole, decimal


def _unit(per_second: int = 1, seconds_each: int = 1) -> Callable[["pl.Series"], Times]:
    """Build the reader of numbers in one unit: a part of a second, or some seconds each."""

    def read(times: "pl.Series") -> Times:
        import polars as pl

        whole, decimal = _numbers(times)
        nanoseconds = None
        seconds = whole // per_second if per_second > 1 else whole
        if seconds_each > 1:
            seconds = (seconds * seconds_each).set((seconds.abs() > LATEST), None)
        if per_second > 1:
            rest = (whole % per_second).fill_null(0).to_numpy()
            nanoseconds = (rest * (NANO // per_second)).astype(np.int32)
        if decimal is not None:
            exact = decimal * seconds_each / per_second
            floor = exact.floor()
            rounded = floor.cast(pl.Int64, strict=False)
            fraction = ((exact - floor) * MICRO).round().clip(0, MICRO - 1).fill_null(0)
            fraction = fraction.fill_nan(0).to_numpy().astype(np.int32) * (NANO // MICRO)
            is_whole = whole.is_not_null()
            seconds = seconds.zip_with(is_whole, rounded)
            old = 0 if nanoseconds is None else nanoseconds
            nanoseconds = np.where(is_whole.to_numpy(), old, fraction).astype(np.int32)
        return Times(seconds, nanoseconds)

    return read


def _calendar(form: str, digits: int) -> Callable[["pl.Series"], Times]:
    """Build the reader of numbers that spell a date, such as 20200130."""

    def read(times: "pl.Series") -> Times:
        import polars as pl

        whole, decimal = _numbers(times)
        if decimal is not None:
            spelled = decimal.cast(pl.Int64, strict=False).set(decimal != decimal.floor(), None)
            whole = whole.zip_with(whole.is_not_null(), spelled)
        text = whole.cast(pl.String)
        text = text.set(text.str.len_bytes() != digits, None)
        if digits == 10:  # an hour alone is no format that polars reads
            text = text + "00"
        moments = text.str.to_datetime(form, strict=False, time_unit="us")
        return Times(moments.dt.epoch("s").cast(pl.Int64), None)

    return read


def _iso(zoned: bool | None = None) -> Callable[["pl.Series"], Times]:
    """Build the reader of ISO 8601, all with a zone or all without one; without one it is UTC."""
    return lambda times: _read_iso(times, zoned)


def _read_iso(times: "pl.Series", zoned: bool | None) -> Times:
    import polars as pl

    parts = times.cast(pl.String).str.extract_groups(_ISO).struct.unnest()
    year, month, day, hour, minute, second, fraction, zone = parts.get_columns()
    date = (year + month + day).str.to_date("%Y%m%d", strict=False)
    clock = [part.cast(pl.Int64).fill_null(0) for part in (hour, minute, second)]
    sound = (clock[0] < 24) & (clock[1] < 60) & (clock[2] <= 60)
    if zoned is not None:
        sound &= zone.is_not_null() == zoned
    seconds = date.cast(pl.Int64) * 86_400 + clock[0] * 3600 + clock[1] * 60 + clock[2]
    if zone.null_count() < len(zone):
        numeric = zone.str.replace(":", "").set(zone.str.to_uppercase().is_in(_ZONE), "+0000")
        hours = numeric.str.slice(1, 2).cast(pl.Int64).fill_null(0)
        minutes = numeric.str.slice(3, 2).cast(pl.Int64, strict=False).fill_null(0)
        sign = numeric.str.starts_with("-").fill_null(False).cast(pl.Int64) * -2 + 1
        seconds = seconds - sign * (hours * 3600 + minutes * 60)
    nanoseconds = None
    if fraction.null_count() < len(fraction):
        padded = fraction.fill_null("0").str.pad_end(9, "0")
        nanoseconds = padded.cast(pl.Int32).to_numpy()
    return Times(seconds.set(~sound.fill_null(False), None), nanoseconds)


_PER_SECOND = {"s": 1, "ms": 1000, "us": MICRO, "ns": NANO}
_CALENDARS = {
    "YYYYMMDD": "%Y%m%d",
    "YYYYMMDDhh": "%Y%m%d%H%M",
    "YYYYMMDDhhmm": "%Y%m%d%H%M",
    "YYYYMMDDhhmmss": "%Y%m%d%H%M%S",
}
_READERS: dict[str, Callable[["pl.Series"], Times]] = {
    **{name: _unit(per_second=n) for name, n in _PER_SECOND.items()},
    "min": _unit(seconds_each=60),
    "h": _unit(seconds_each=3600),
    "d": _unit(seconds_each=86_400),
    **{name: _calendar(form, len(name)) for name, form in _CALENDARS.items()},
    "iso": _iso(),
    "iso with zone": _iso(zoned=True),
    "iso without zone": _iso(zoned=False),
}
_LONG_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_LONG_NAMES |= {"min": "minutes", "h": "hours", "d": "days"}
KINDS = {
    name: TimeKind(name, f"{_LONG_NAMES[name]} since 1970 as a number")
    if name in _LONG_NAMES
    else TimeKind(name, f"dates as numbers {name}")
    for name in _READERS
    if not name.startswith("iso")
}
KINDS["iso"] = TimeKind("iso", "dates such as 2020-01-30 or 2020-01-30T09:00:00Z")
_ISO_KINDS = {
    True: TimeKind("iso with zone", "dates with a time zone, such as 2020-01-30T09:00:00Z"),
    False: TimeKind("iso without zone", "dates without a time zone (UTC), such as 2020-01-30"),
}
TIME_UNITS = ("auto", *KINDS)
_READABLE = "dates such as 2020-01-30 or 2020-01-30T09:00:00Z, or seconds since 1970 as a number"
# Those that are tried on numbers; minutes, hours and days are never guessed.
# They stand with the numbers that can be dates between 1990 and 2100.
_GUESSED = {
    **{name: (EARLIEST * n, LATEST * n) for name, n in _PER_SECOND.items()},
    **{name: (1990 * 10 ** (len(name) - 4), 2100 * 10 ** (len(name) - 4)) for name in _CALENDARS},
}
COUNTERS = KINDS["s"].within(0, EARLIEST)
# Numbers or dates that only say which of two events comes first.
ORDER_KINDS = (KINDS["s"].within(-LARGEST, LARGEST), KINDS["iso"].within(-LARGEST, LARGEST))


def check_time_unit(name: str) -> None:
    """Refuse a name that ``--time-unit`` does not know."""
    if name not in TIME_UNITS:
        raise InputError(f"--time-unit {name!r} is unknown; use one of {', '.join(TIME_UNITS)}")


def decide_kind(values: Sequence[str], unit: str = "auto") -> TimeKind:
    """Decide what the times of a file are.

    Args:
        values: the first of them, as text; those that are no times at all are overlooked here and
            found when the file is read.
        unit: a name of :data:`TIME_UNITS`.

    Raises:
        InputError: no unit fits, or two do; the message names values and what to pass.
    """
    import polars as pl

    if unit != "auto":
        return KINDS[unit]
    given = pl.Series("time", values, dtype=pl.String).str.strip_chars()
    numbers = given.filter(given.cast(pl.Float64, strict=False).is_finite().fill_null(False))
    dates = [text for text in values if not is_number(text) and is_date(text)]
    if dates:
        zoned = has_zone(dates[0])
        other = next((text for text in dates if has_zone(text) != zoned), None)
        if len(numbers) or other is not None:
            raise InputError(
                f"times such as {dates[0]!r} and {numbers[0] if len(numbers) else other!r} are "
                "written in two ways, and differ in zone or unit; write all in one way, or leave "
                "the others out with --skip-faulty and --time-unit"
            )
        return _ISO_KINDS[zoned]
    if not len(numbers):
        return TimeKind("s", _READABLE) if values else KINDS["s"]
    fits = dict.fromkeys(_GUESSED, 0)
    amounts = numbers.cast(pl.Float64).to_numpy()
    for name, (low, high) in _GUESSED.items():
        if not ((amounts >= low) & (amounts < high)).any():
            continue  # quicker than to read them
        seconds = KINDS[name].within(EARLIEST, LATEST).read(numbers).seconds
        fits[name] = len(seconds) - seconds.null_count()
    best = max(fits, key=lambda name: fits[name])
    rivals = [name for name, count in fits.items() if count == fits[best]]
    if not fits[best]:
        return _counters(numbers)
    if len(rivals) > 1 and fits[best] == len(numbers):
        raise InputError(
            f"times such as {numbers[0]!r} may be " + " or ".join(rivals) + "; say which with "
            f"--time-unit {rivals[0]} or --time-unit {rivals[1]}"
        )
    if 2 * fits[best] <= len(numbers):
        kind = KINDS[best].within(EARLIEST, LATEST)
        odd = next(text for text in numbers if kind.problem_of(text))
        raise InputError(
            f"only {fits[best]} of the first {len(numbers)} times lie between 1990 and 2100 as "
            f"{KINDS[best].meaning}; {odd!r} does not. Say with --time-unit what they are"
        )
    return KINDS[best].within(EARLIEST, LATEST)


def _counters(numbers: "pl.Series") -> TimeKind:
    """Take numbers that are dates in no unit as seconds, unless they are too large for that."""
    import polars as pl

    amounts = numbers.cast(pl.Float64)
    largest = numbers[int(amounts.arg_max() or 0)]
    if 2 * (amounts >= EARLIEST).sum() > len(amounts):
        raise InputError(
            f"times such as {largest!r} are no dates between 1990 and 2100 in any unit; say with "
            f"--time-unit what they are ({', '.join(KINDS)})"
        )
    return COUNTERS


def is_number(text: str) -> bool:
    """Tell whether a text is a finite number."""
    try:
        return abs(float(text)) < float("inf") and "_" not in text
    except ValueError:
        return False


def is_date(text: str) -> bool:
    """Tell whether a text is written as a date."""
    return _ISO_PATTERN.match(text) is not None


def has_zone(text: str) -> bool:
    """Tell whether a text is a date with a time zone."""
    match = _ISO_PATTERN.match(text)
    return match is not None and match.group(8) is not None


def date_of(second: int) -> str:
    """Return a second since 1970 as a date and time of day, UTC, for people."""
    try:
        return datetime.fromtimestamp(second, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"second {second}"


Order = tuple[NDArray[np.int64], NDArray[np.int32] | None]


@dataclass(frozen=True)
class Moments:
    """How the seconds follow from the numbers that order events.

    Attributes:
        first: the second of number 0, where numbers are parts of a second.
        per_second: numbers in a second.
        table: the second of each number instead, where numbers are ranks.
    """

    first: int = 0
    per_second: int = 1
    table: NDArray[np.int64] | None = None

    @property
    def finer(self) -> bool:
        """Whether the numbers tell more than seconds do."""
        return self.table is not None or self.per_second != 1

    def seconds(self, moments: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the second of each number."""
        if self.table is not None:
            return self.table[moments]
        if self.per_second == 1:
            return moments
        return moments // self.per_second + self.first


def order_events(
    seconds: list[NDArray[np.int64]],
    nanoseconds: list[NDArray[np.int32] | None],
    order: list[Order],
) -> tuple[NDArray[np.int64], Moments]:
    """Rank events by time, then by the column that orders ties.

    Args:
        seconds: of each batch; emptied to release memory.
        nanoseconds: within the second; None where a batch has whole seconds.
        order: seconds and nanoseconds (numbers and fractions) of the column that orders ties;
            empty without one.

    Returns:
        The numbers, and how seconds follow from them.
    """
    sizes = [len(part) for part in seconds]
    second = np.concatenate(seconds)
    seconds.clear()
    fraction = _fractions(nanoseconds, sizes)
    if order:
        keys = [np.concatenate([part for part, _ in order])]
        finer = _fractions([part for _, part in order], sizes)
        return _ranks([*([] if finer is None else [finer]), *keys], fraction, second)
    if fraction is None:
        return second, Moments()
    per_second = next(n for n in (1000, 10**6, NANO) if not (fraction % (NANO // n)).any())
    first = int(second.min())
    if (int(second.max()) - first + 1) > LARGEST // per_second:
        return _ranks([], fraction, second)
    second -= first
    second *= per_second
    second += fraction // (NANO // per_second)
    return second, Moments(first, per_second)


def _fractions(parts: list[NDArray[np.int32] | None], sizes: list[int]) -> NDArray[np.int32] | None:
    if all(part is None for part in parts):
        return None
    return np.concatenate(
        [np.zeros(n, np.int32) if part is None else part for part, n in zip(parts, sizes)]
    )


def _ranks(
    last_keys: list[NDArray], fraction: NDArray[np.int32] | None, second: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Moments]:
    """Rank events densely by second, fraction and the keys, the last of which counts most."""
    keys = [*last_keys, *([] if fraction is None else [fraction]), second]
    rows = np.lexsort(keys)
    fresh = np.zeros(len(rows), np.bool_)
    fresh[:1] = True
    for key in keys:
        ordered = key[rows]
        fresh[1:] |= ordered[1:] != ordered[:-1]
    ranks = np.empty(len(rows), np.int64)
    ranks[rows] = np.cumsum(fresh) - 1
    return ranks, Moments(table=second[rows[fresh]])
