"""Names the line of a fault the fast scan has met, by reading the file again line by line."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NoReturn

from hstu_xd.data.ids import LONGEST_ID
from hstu_xd.data.sources import Record, Source
from hstu_xd.data.sources.base import FIELD
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

CHUNK = 1 << 16


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
    except (
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
    ):  # a column that cannot be read either way
        fault = None
    raise fault or InputError(f"{source.path}: cannot be read as a log: {one_line(reason)}")


def first_fault(source: Source) -> InputError | None:
    """Return the error for the first faulty line of a file, or None when every line is sound."""
    for _, faults in checked_events(source):
        for record, problem in faults:
            return InputError(f"{source.at(record.line)}: {problem}")
    return None


def checked_events(source: Source) -> "Iterator[tuple[pl.DataFrame, list[tuple[Record, str]]]]":
    """Read a file slowly: yield its sound events as text columns, and its faults with their lines.

    Both are in the order of the file; a block of events follows the faults among them.
    """
    import polars as pl

    roles = ["user", "item", "domain", "time"] + ["order"] * (source.order is not None)
    roles += [FIELD + name for name in source.fields]
    records = source.records()
    while chunk := list(islice(records, CHUNK)):
        readable = [record for record in chunk if record.problem is None]
        columns = {role: [record.value(role) for record in readable] for role in roles}
        frame = pl.DataFrame(columns, schema=dict.fromkeys(roles, pl.String))
        sound = _are_sound(frame, source)
        problems: dict[int, str | None] = {
            record.line: problem_of(record, source)
            for record, good in zip(readable, sound.to_list(), strict=True)
            if not good
        }
        problems |= {record.line: record.problem for record in chunk if record.problem is not None}
        faults = [(record, problem) for record in chunk if (problem := problems.get(record.line))]
        yield frame.filter(sound), faults


def _are_sound(frame: "pl.DataFrame", source: Source) -> "pl.Series":
    """Tell for each event whether its ids and times can be read."""
    import polars as pl

    ids = pl.col("user", "item", "domain")
    sound = frame.select(
        pl.all_horizontal(
            (ids.str.strip_chars() != "") & (ids.str.len_bytes() <= LONGEST_ID)
        ).fill_null(False)
    ).to_series()
    sound &= source.time.read(frame["time"]).seconds.is_not_null()
    if source.order is not None:
        sound &= source.order.read(frame["order"]).seconds.is_not_null()
    return sound


def is_empty(record: Record) -> bool:
    """Tell whether a record is an empty line, which is no event."""
    return record.problem is None and not any((record.user, record.item, record.time))


def problem_of(record: Record, source: Source) -> str | None:
    """Say what is wrong with one event, with the mend; None when nothing is."""
    if record.problem is not None:
        return record.problem
    ids = {"user": record.user, "item": record.item, "domain": record.domain}
    if is_empty(record):
        return None
    for role, value in ids.items():
        if value is None or not value.strip():
            return f"empty {role} id ({value or ''!r}); fill it in or remove the line"
        if len(value.encode("utf-8", "surrogateescape")) > LONGEST_ID:
            return (
                f"the {role} id {value[:20]!r}... is longer than {LONGEST_ID} bytes; mend the line"
            )
    if record.time is None or not record.time.strip():
        return "empty timestamp (''); fill it in or remove the line"
    problem = source.time.problem_of(record.time)
    if problem is None and source.order is not None:
        text = record.order or ""
        problem = source.order.problem_of(text) if text.strip() else "empty"
        if problem is not None:
            return (
                f"the column that orders ties is {text!r}, where other lines have numbers or "
                "dates; mend the line"
            )
    return problem


def raise_item_in_two_domains(sources: Sequence[Source], item: str) -> NoReturn:
    """Raise for an item that occurs in two domains, naming the line where the second appears.

    Raises:
        InputError: always.
    """
    first: tuple[str, str] | None = None
    for source in sources:
        for record in source.records():
            if record.item is None or record.item.strip() != item or record.domain is None:
                continue
            domain = record.domain.strip()
            if first is None:
                first = (domain, source.at(record.line))
            elif domain != first[0]:
                raise InputError(
                    f"{source.at(record.line)}: item {item!r} is in domain {domain!r} but "
                    f"in domain {first[0]!r} at {first[1]}; give it one domain, or, if they are "
                    "two items, put the domain before every item's id with --prefix-items"
                )
    raise InputError(
        f"item {item!r} is in two domains; give it one, or put the domain before every item's id "
        "with --prefix-items"
    )


def one_line(text: str) -> str:
    """Return the first non-empty line of a message."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "unknown reason")
