"""Turns the command line's inputs into sources, and decides what each file is, once a question."""

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from hstu_xd.data.sources.amazon import amazon_ratings, amazon_reviews, is_ratings, user_and_item
from hstu_xd.data.sources.base import FIELD, Source
from hstu_xd.data.sources.columns import (
    ColumnOptions,
    find_column,
    looks_like_data,
    missing_column,
    place_columns,
)
from hstu_xd.data.sources.content import first_lines, is_parquet
from hstu_xd.data.sources.delimited import (
    NO_QUOTES,
    DelimitedSource,
    check_quote,
    decide_quoting,
)
from hstu_xd.data.sources.flat_sequences import is_flat, open_flat
from hstu_xd.data.sources.inputs import Input, check_domain_of_name, list_inputs
from hstu_xd.data.sources.parquet import ParquetSource, check_types, parquet_schema
from hstu_xd.data.times import KINDS, ORDER_KINDS, TimeKind, check_time_unit, decide_kind, is_number
from hstu_xd.errors import InputError

FORMATS = ("auto", "csv", "amazon-ratings", "amazon-reviews", "recbole")
JSON = {".json", ".jsonl", ".ndjson"}
PROBE_LINES = 1000
_SEPARATOR_NAMES = {",": "comma", "\t": "tab", " ": "space", "::": "double colon", "\x01": "Hive"}


@dataclass(frozen=True)
class ReadOptions:
    """How logs are read where what is decided by their content shall not count.

    Attributes:
        columns: names given for the columns.
        time_unit: one of :data:`hstu_xd.data.times.TIME_UNITS`.
        quote: one of :data:`hstu_xd.data.sources.delimited.QUOTES`.
    """

    columns: ColumnOptions = field(default_factory=ColumnOptions)
    time_unit: str = "auto"
    quote: str = "auto"


def open_sources(
    inputs: Sequence[str],
    *,
    file_format: str = "auto",
    options: ReadOptions | None = None,
    tell: Callable[[str], object] = lambda note: None,
) -> list[Source]:
    """Read the heads of all inputs and settle their formats, columns, domains and times.

    Args:
        inputs: ``PATH`` or ``NAME=PATH``; the latter gives all events of the file one domain.
        file_format: one of :data:`FORMATS`.
        options: what the user decided.
        tell: takes notes on what was left out.

    Raises:
        InputError: an unreadable file, an unknown format, a missing column, or a file about which
            two answers are possible.
    """
    if file_format not in FORMATS:
        raise InputError(f"--format {file_format!r} is unknown; use one of {', '.join(FORMATS)}")
    if not inputs:
        raise InputError("no input file given; name at least one log")
    options = options or ReadOptions()
    check_time_unit(options.time_unit)
    check_quote(options.quote)
    asked, notes = list_inputs(inputs, options.columns.domain)
    for note in notes:
        tell(note)
    opened = []
    for one in asked:
        source = _open(one, file_format, options, alone=len(inputs) == 1)
        if source is None and len(asked) == 1:
            raise InputError(f"{one.path}: the file is empty; give a log with at least one event")
        if source is None:
            tell(f"left out {one.path}: empty")
        else:
            opened.append((one, source))
    if not opened:
        raise InputError(f"{asked[0].path}: is empty, like all others; give a log with events")
    _check_names(opened, alone=len(inputs) == 1)
    return [_with_times(source, options) for _, source in opened]


def _check_names(opened: Sequence[tuple[Input, Source]], *, alone: bool) -> None:
    """Refuse names of files that are no domains, or two files that would be one.

    Raises:
        InputError: the mend is to give each its domain.
    """
    by_name = [
        one for one, s in opened if s.domain and not one.domain and s.domain != one.partition
    ]
    places = {(one.stem, one.folder or one.path) for one in by_name}
    stems = Counter(stem for stem, _ in places)
    clash = next((name for name, count in stems.items() if count > 1), None)
    if clash is not None:
        raise InputError(
            f"{stems[clash]} files without a domain column would both be domain {clash!r}; "
            "give each its domain as NAME=PATH"
        )
    for one in by_name:
        if not alone:
            check_domain_of_name(one, list(stems))


def _open(one: Input, file_format: str, options: ReadOptions, *, alone: bool) -> Source | None:
    """Open one file; None when there is nothing in it."""
    if is_parquet(one.path):
        return _parquet(one, options.columns, alone=alone)
    lines = first_lines(one.path, PROBE_LINES)
    if not any(line.strip() for line in lines):
        return None
    if file_format == "auto":
        file_format = _guess_format(one, lines, options)
    if file_format == "amazon-ratings":
        domain = one.domain or one.partition or one.stem
        return amazon_ratings(one, domain, lines, options.columns, options.quote)
    if file_format == "amazon-reviews":
        source = amazon_reviews(one, lines, options.columns, _roles(one, options.columns))
        return replace(source, domain=_constant_domain(one, source.keys))
    return _delimited(one, lines[0], options, recbole=file_format == "recbole", alone=alone)


def _guess_format(one: Input, lines: Sequence[str], options: ReadOptions) -> str:
    if one.kind == ".inter":
        return "recbole"
    if one.kind in JSON or lines[0].lstrip().startswith("{"):
        return "amazon-reviews"
    fields = _fields(one.path, lines[0], ",")
    if options.columns.names is not None or len(fields) != 4 or not looks_like_data(fields):
        return "csv"
    rows = [row for row in csv.reader(lines) if row]
    numbered = options.columns.user is not None and options.columns.item is not None
    told = numbered or user_and_item(rows) is not None
    return "amazon-ratings" if is_ratings(rows) and told else "csv"


def _roles(one: Input, columns: ColumnOptions) -> list[str]:
    """Return the roles to look for columns of."""
    roles = ["user", "item", "time"]
    by_partition = one.partition is not None and columns.domain is not None
    if not one.domain and not by_partition:
        roles.insert(2, "domain")
    roles += ["order"] * (columns.order is not None)
    return roles + [FIELD + name for name in columns.fields]


def _constant_domain(one: Input, found: object) -> str | None:
    """Return the domain of all events of a file; None when a column tells."""
    assert isinstance(found, dict)
    return None if "domain" in found else one.domain or one.partition or one.stem


def _fields(path: Path, first_line: str, separator: str, *, quoted: bool = True) -> list[str]:
    if len(separator) > 1:
        return first_line.split(separator)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    try:
        return next(csv.reader([first_line], delimiter=separator, quoting=quoting))
    except csv.Error as error:
        raise InputError(
            f"{path}:1: not readable as a delimited line ({error}): {first_line[:60]!r}; end lines "
            "with a newline and mend the first one"
        ) from error


def _delimited(
    one: Input, header_line: str, options: ReadOptions, *, recbole: bool, alone: bool
) -> Source:
    if not header_line.strip():
        raise InputError(
            f"{one.path}:1: is empty; the first line names the columns, or is an event"
        )
    separator = "\t" if recbole else _separator(header_line, one.kind)
    quoted = not recbole and options.quote != "none"
    first = _fields(one.path, header_line, separator, quoted=quoted)
    names = [name.partition(":")[0] for name in first] if recbole else first
    header, positions = place_columns(
        one.path, names, options.columns, _roles(one, options.columns)
    )
    called = names if header else options.columns.names or [str(n + 1) for n in range(len(first))]
    for role in ("user", "item", "time"):
        if role not in positions:
            raise missing_column(one.path, called, role, options.columns, line=1)
    domain = _constant_domain(one, positions)
    told = one.domain or one.partition or recbole or not header
    if domain is not None and alone and not told:
        raise missing_column(one.path, names, "domain", options.columns, line=1)
    quoting = NO_QUOTES
    if not recbole:
        quoting = decide_quoting(
            one.path, separator, len(first), positions, style=options.quote, header=header
        )
    form = f"{_SEPARATOR_NAMES.get(separator, separator)}-separated text"
    return DelimitedSource(
        path=one.path,
        domain=domain,
        form=f"{'RecBole ' if recbole else ''}{form}, "
        f"{'a' if header else 'no'} header, {quoting.meaning}",
        roles=", ".join(f"{role}={called[at].strip()}" for role, at in positions.items()),
        fields=options.columns.fields,
        separator=separator,
        quoting=quoting,
        header=header,
        width=len(first),
        positions=positions,
    )


def _separator(header_line: str, kind: str) -> str:
    """Return the most frequent of the usual separators in the first line; tab for ``.tsv``.

    Hive separates by the character 1.
    """
    if kind == ".tsv":
        return "\t"
    if header_line.count("::") > 1 and not {*",\t;|"} & {*header_line}:
        return "::"
    best = max(",\t;|\x01", key=header_line.count)
    return best if best in header_line or " " not in header_line.strip() else " "


def _parquet(one: Input, options: ColumnOptions, *, alone: bool) -> Source:
    import polars as pl

    try:
        schema = parquet_schema(one.path)
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{one.path}: not a readable Parquet file ({reason})") from error
    names = schema.names()
    if is_flat(names, options):
        return open_flat(one, schema, options)
    columns: dict[str, str] = {}
    for role in _roles(one, options):
        at = find_column(one.path, names, role, options, line=None)
        if at is not None:
            columns[role] = names[at]
        elif role != "domain" or (alone and not one.partition):
            raise missing_column(one.path, names, role, options, line=None)
    check_types(one.path, schema, columns)
    time, order = (schema[columns[role]] if role in columns else None for role in ("time", "order"))
    return ParquetSource(
        path=one.path,
        domain=_constant_domain(one, columns),
        form="Parquet",
        roles=", ".join(f"{role}={name}" for role, name in columns.items()),
        fields=options.fields,
        time=_kind_of_dates(time) or KINDS["s"],
        order=_kind_of_dates(order),
        columns=columns,
        temporal=_kind_of_dates(time) is not None,
    )


def _kind_of_dates(dtype: object) -> TimeKind | None:
    """Return how a column of dates is read; None for any other."""
    import polars as pl

    if isinstance(dtype, pl.Datetime):
        return replace(KINDS[dtype.time_unit], meaning="dates and times of day")
    return replace(KINDS["s"], meaning="dates") if dtype == pl.Date else None


def _with_times(source: Source, options: ReadOptions) -> Source:
    """Decide what a file's times are by its first events.

    Raises:
        InputError: no unit fits, or two do.
    """
    import polars as pl

    try:
        probe = list(islice(source.records(), PROBE_LINES))
    except pl.exceptions.PolarsError:  # named when the file is read
        return source
    if isinstance(source, ParquetSource) and source.temporal:
        kind = source.time
    else:
        times = [record.time for record in probe if record.time]
        try:
            kind = decide_kind(times, options.time_unit)
        except InputError as error:
            raise InputError(f"{source.path}: {error}") from error
    order = source.order
    if options.columns.order is not None and order is None:
        given = [record.order for record in probe if record.order]
        order = ORDER_KINDS[0 if not given or is_number(given[0]) else 1]
    return replace(source, time=kind, order=order)
