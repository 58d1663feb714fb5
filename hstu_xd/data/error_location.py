"""Names the line of a fault the fast scan has met, by reading the file again line by line."""

import re
from collections.abc import Sequence
from typing import NoReturn

from hstu_xd.data.sources import Record, Source
from hstu_xd.data.times import to_seconds
from hstu_xd.errors import InputError

PLAIN_TIME = re.compile(r"\+?\d{1,18}(\.0*)?")


def raise_first_fault(source: Source, *, reason: str) -> NoReturn:
    """Raise for the first faulty line of a file.

    Args:
        source: the file.
        reason: what the fast scan said; used when no single line can be blamed.

    Raises:
        InputError: always; names file, line, value and mend.
    """
    import polars as pl

    try:
        fault = first_fault(source)
    except pl.exceptions.PolarsError:  # a column that cannot be read either way
        fault = None
    raise fault or InputError(f"{source.path}: cannot be read as a log: {one_line(reason)}")


def first_fault(source: Source) -> InputError | None:
    """Return the error for the first faulty line of a file, or None when every line is sound."""
    for record in source.records():
        problem = problem_of(record)
        if problem is not None:
            return InputError(f"{source.at(record.line)}: {problem}")
    return None


def problem_of(record: Record) -> str | None:
    """Say what is wrong with one event, with the mend; None when nothing is."""
    if record.problem is not None:
        return record.problem
    ids = {"user": record.user, "item": record.item, "domain": record.domain}
    if not any((record.user, record.item, record.time)):
        return None  # an empty line
    for role, value in ids.items():
        if value is None or not value.strip():
            return f"empty {role} id ({value or ''!r}); fill it in or remove the line"
    if record.time is None or not record.time.strip():
        return "empty timestamp (''); fill it in or remove the line"
    if PLAIN_TIME.fullmatch(record.time):
        return None
    return _problem_of_time(record.time)


def _problem_of_time(text: str) -> str | None:
    import polars as pl

    if to_seconds(pl.Series([text])).item() is not None:
        return None
    mend = "write seconds since 1970 as a number, or remove the line"
    try:
        negative = float(text) < 0
    except ValueError:
        negative = False
    return f"{'negative' if negative else 'unreadable'} timestamp {text!r}; {mend}"


def raise_item_in_two_domains(sources: Sequence[Source], item: str) -> NoReturn:
    """Raise for an item that occurs in two domains, naming the line where the second appears.

    Raises:
        InputError: always.
    """
    first: tuple[str, str] | None = None
    for source in sources:
        for record in source.records():
            if record.item != item or record.domain is None:
                continue
            if first is None:
                first = (record.domain, source.at(record.line))
            elif record.domain != first[0]:
                raise InputError(
                    f"{source.at(record.line)}: item {item!r} is in domain {record.domain!r} but "
                    f"in domain {first[0]!r} at {first[1]}; give it one domain, or make the two "
                    "items' ids differ (e.g. put the domain before the id)"
                )
    raise InputError(f"item {item!r} is in two domains; give it one")


def one_line(text: str) -> str:
    """Return the first non-empty line of a message."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "unknown reason")
