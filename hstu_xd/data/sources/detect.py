"""Turns the command line's inputs into sources: NAME=PATH, file format, columns, domain names."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu_xd.data.sources.amazon import amazon_ratings, amazon_reviews
from hstu_xd.data.sources.base import Source, first_lines
from hstu_xd.data.sources.columns import ColumnOptions, find_column, missing_column
from hstu_xd.data.sources.tables import DelimitedSource, ParquetSource
from hstu_xd.errors import InputError

FORMATS = ("auto", "csv", "amazon-ratings", "amazon-reviews", "recbole")
COMPRESSED = {".gz", ".gzip"}
PARQUET = {".parquet", ".pq"}
JSON = {".json", ".jsonl", ".ndjson"}
PROBE_LINES = 1000


@dataclass(frozen=True)
class Input:
    """One input as asked for: the file, and its domain when given as NAME=PATH."""

    path: Path
    domain: str | None

    @property
    def stem(self) -> str:
        """File name without its endings: the domain of a file that has no domain column."""
        name = self.path.with_suffix("") if self.path.suffix in COMPRESSED else self.path
        return name.stem

    @property
    def kind(self) -> str:
        """The ending that tells the file type, compression left out."""
        name = self.path.with_suffix("") if self.path.suffix in COMPRESSED else self.path
        return name.suffix.lower()


def open_sources(
    inputs: Sequence[str], *, file_format: str = "auto", columns: ColumnOptions | None = None
) -> list[Source]:
    """Read the heads of all inputs and settle their formats, columns and domains.

    Args:
        inputs: ``PATH`` or ``NAME=PATH``; the latter gives all events of the file one domain.
        file_format: one of :data:`FORMATS`.
        columns: names given for the columns.

    Raises:
        InputError: an unreadable file, an unknown format, a missing column, two files without
            a domain column whose names would give the same domain.
    """
    if file_format not in FORMATS:
        raise InputError(f"--format {file_format!r} is unknown; use one of {', '.join(FORMATS)}")
    if not inputs:
        raise InputError("no input file given; name at least one log")
    options = columns or ColumnOptions()
    asked = [parse_input(text) for text in inputs]
    repeated = [str(path) for path, n in Counter(i.path.resolve() for i in asked).items() if n > 1]
    if repeated:
        raise InputError(f"{repeated[0]}: given twice; name every file once")
    sources = [_open(one, file_format, options, alone=len(asked) == 1) for one in asked]
    by_stem = Counter(s.domain for s, one in zip(sources, asked) if s.domain and not one.domain)
    clash = next((name for name, count in by_stem.items() if count > 1), None)
    if clash is not None:
        raise InputError(
            f"{by_stem[clash]} files without a domain column would both be domain {clash!r}; "
            "give each its domain as NAME=PATH"
        )
    return sources


def parse_input(text: str) -> Input:
    """Split ``NAME=PATH``; an existing file whose name holds "=" is taken as it is.

    Raises:
        InputError: no such file, a folder, no permission, or an empty domain name.
    """
    name, equals, rest = text.partition("=")
    split = bool(equals) and not Path(text).exists()
    path = Path(rest if split else text)
    if split and not name.strip():
        raise InputError(f"{text!r}: the domain before '=' is empty; write NAME=PATH")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the log files in it")
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    return Input(path, name.strip() if split else None)


def _open(one: Input, file_format: str, options: ColumnOptions, *, alone: bool) -> Source:
    if one.kind in PARQUET:
        return _parquet(one, options, alone=alone)
    lines = first_lines(one.path, PROBE_LINES)
    if not lines or not any(line.strip() for line in lines):
        raise InputError(f"{one.path}: the file is empty; give a log with at least one event")
    if file_format == "auto":
        file_format = _guess_format(one, lines)
    if file_format == "amazon-ratings":
        return amazon_ratings(one.path, one.domain or one.stem, lines, options)
    if file_format == "amazon-reviews":
        return amazon_reviews(one.path, one.domain, one.stem, lines, options)
    return _delimited(one, lines[0], options, recbole=file_format == "recbole", alone=alone)


def _guess_format(one: Input, lines: Sequence[str]) -> str:
    if one.kind == ".inter":
        return "recbole"
    if one.kind in JSON or lines[0].lstrip().startswith("{"):
        return "amazon-reviews"
    fields = _fields(one.path, lines[0])
    headerless = len(fields) == 4 and all(_is_number(text) for text in fields[2:])
    return "amazon-ratings" if headerless else "csv"


def _fields(path: Path, first_line: str, *, delimiter: str = ",", quoted: bool = True) -> list[str]:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    try:
        return next(csv.reader([first_line], delimiter=delimiter, quoting=quoting))
    except csv.Error as error:
        raise InputError(
            f"{path}:1: not readable as a delimited line ({error}): {first_line[:60]!r}; end lines "
            "with a newline and mend the first one"
        ) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _delimited(
    one: Input, header_line: str, options: ColumnOptions, *, recbole: bool, alone: bool
) -> Source:
    separator = "\t" if recbole else _separator(header_line, one.kind)
    header = _fields(one.path, header_line, delimiter=separator, quoted=not recbole)
    names = [name.partition(":")[0] for name in header] if recbole else header
    roles = ("user", "item", "time") if one.domain else ("user", "item", "domain", "time")
    positions: dict[str, int] = {}
    for role in roles:
        at = find_column(one.path, names, role, options, line=1)
        if at is not None:
            positions[role] = at
        elif role != "domain" or (alone and not recbole):
            raise missing_column(one.path, names, role, options, line=1)
    return DelimitedSource(
        path=one.path,
        domain=None if "domain" in positions else one.domain or one.stem,
        time_divisor=1,
        separator=separator,
        quoted=not recbole,
        header=True,
        width=len(header),
        positions=positions,
    )


def _separator(header_line: str, kind: str) -> str:
    """Return the most frequent of the usual separators in the header; tab for ``.tsv``."""
    if kind == ".tsv":
        return "\t"
    return max(",\t;|", key=header_line.count)


def _parquet(one: Input, options: ColumnOptions, *, alone: bool) -> Source:
    import polars as pl

    try:
        schema = pl.scan_parquet(one.path, glob=False).collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{one.path}: not a readable Parquet file ({reason})") from error
    names = schema.names()
    roles = ("user", "item", "time") if one.domain else ("user", "item", "domain", "time")
    columns: dict[str, str] = {}
    for role in roles:
        at = find_column(one.path, names, role, options, line=None)
        if at is not None:
            columns[role] = names[at]
        elif role != "domain" or alone:
            raise missing_column(one.path, names, role, options, line=None)
    for role, name in columns.items():
        unfit = (pl.Time, pl.Duration) if role == "time" else ()
        if schema[name].is_nested() or schema[name] in unfit:
            raise InputError(
                f"{one.path}: column {name!r} is {schema[name]}, which is no {role}; use "
                f"--{role}-col with another one, or write it as text or numbers"
            )
    return ParquetSource(
        path=one.path,
        domain=None if "domain" in columns else one.domain or one.stem,
        time_divisor=1,
        columns=columns,
        temporal=schema[columns["time"]].is_temporal(),
    )
