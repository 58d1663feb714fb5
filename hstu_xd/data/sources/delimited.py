"""Delimited text with one event a line.

It is CSV, TSV, RecBole's ``.inter`` and headerless Amazon ratings. A double quote at
the start of a field may protect it (``"Smith, John"``, doubled quotes inside), or it may be part of
the text (``12" vinyl``, a title that begins with one). Taken for what it is not it joins lines, and
events disappear; so how a file uses it is decided by what reads every line as one event.
"""

import csv
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hstu_xd.data.sources.base import Record, Source
from hstu_xd.data.sources.content import compression_of, holds_byte, numbered_lines, text_blocks
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl


QUOTES = ("auto", "double", "none", "backslash")
QUOTE, NEWLINE, RETURN = b'"\n\r'


@dataclass(frozen=True)
class Quoting:
    """How quotes are read.

    Attributes:
        style: ``double``, ``none`` or ``backslash``, as ``--quote`` takes them.
        is_plain: whether every quoted field is quoted whole and within its line, so that every
            reader agrees.
        meaning: in words, for the summary.
    """

    style: str
    is_plain: bool
    meaning: str


NO_QUOTES = Quoting("none", True, "no quotes")
_LITERAL = Quoting("none", True, "quotes are part of the text")
_QUOTED = Quoting("double", True, "quoted fields")
_QUOTED_SLOWLY = Quoting("double", False, "quoted fields, read line by line")
_ESCAPED = Quoting("backslash", False, "quoted fields with backslash escapes, read line by line")


def check_quote(style: str) -> None:
    """Refuse a style that ``--quote`` does not know."""
    if style not in QUOTES:
        raise InputError(f"--quote {style!r} is unknown; use one of {', '.join(QUOTES)}")


def csv_rows(
    path: Path, separator: str, style: str
) -> Iterator[tuple[range, list[str] | csv.Error]]:
    """Yield the lines and the fields of every event.

    Lines that cannot be read yield their error. Bytes that are not UTF-8 become surrogates.
    """
    csv.field_size_limit(sys.maxsize)
    lines = (raw.decode("utf-8", "surrogateescape") for _, raw in numbered_lines(path))
    if len(separator) > 1:
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip("\r\n").split(separator) if line.strip() else []
            yield range(number, number + 1), fields
        return
    reader = csv.reader(
        lines,
        delimiter=separator,
        quoting=csv.QUOTE_NONE if style == "none" else csv.QUOTE_MINIMAL,
        escapechar="\\" if style == "backslash" else None,
        strict=True,
    )
    first = 1
    while True:
        try:
            read: list[str] | csv.Error = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            read = error
        yield range(first, reader.line_num + 1), read
        first = reader.line_num + 1


def decide_quoting(
    path: Path, separator: str, width: int, asked: Mapping[str, int], *, style: str, header: bool
) -> Quoting:
    """Decide how a file's quotes are read.

    Args:
        path: the file.
        separator: between fields.
        width: fields of a line.
        asked: the columns that are read, by role.
        style: one of :data:`QUOTES`.
        header: whether line 1 names the columns.

    Raises:
        InputError: two readings are possible, or none; the message names the line and both ways.
    """
    if style == "none" or len(separator) > 1:
        return _LITERAL if style == "none" else NO_QUOTES
    if style == "backslash":
        return _ESCAPED
    if not holds_byte(path, QUOTE):
        return NO_QUOTES
    if _encloses_fields(path, separator):
        return _QUOTED
    if style == "double":
        return _QUOTED_SLOWLY
    broken, spans = 0, []
    for lines, fields in csv_rows(path, separator, "double"):
        if isinstance(fields, csv.Error) or (len(lines) > 1 and len(fields) != width):
            broken = broken or lines.start
        elif len(lines) > 1:
            spans.append(lines)
    literal = _read_literally(path, separator, width, asked, spans)
    if not broken and not literal.event_in_span:
        return _QUOTED_SLOWLY
    if broken and literal.fits and not literal.asked_line:
        return _LITERAL
    line = literal.asked_line or broken or literal.event_in_span
    raise InputError(
        f"{path}:{line}: the quotes of this line can be read in two ways, and events would be "
        "joined or changed; if quotes are part of the text use --quote none, if quoted events span "
        "lines --quote double, if a quote inside is written with a backslash --quote backslash; "
        "else mend the line or quote the field"
    )


@dataclass(frozen=True)
class _Literal:
    """What the file is when quotes are part of the text.

    Attributes:
        fits: whether every line has the right number of fields.
        asked_line: the first line with a quote at an end of a column that is read; 0 for none.
        event_in_span: the first line of an event of several lines, each of which could be an
            event; 0 for none.
    """

    fits: bool
    asked_line: int
    event_in_span: int


def _read_literally(
    path: Path, separator: str, width: int, asked: Mapping[str, int], spans: list[range]
) -> _Literal:
    fits, asked_line = True, 0
    mark = separator.encode()
    inside = {line: span.start for span in spans for line in span}
    whole = {span.start: True for span in spans}
    for number, raw in numbered_lines(path):
        if not raw.strip():
            continue
        if raw.count(mark) != width - 1:
            fits = False
            if number in inside:
                whole[inside[number]] = False
        elif QUOTE in raw and not asked_line:
            fields = raw.rstrip(b"\r\n").split(mark)
            values = (fields[at] for at in asked.values())
            if any(value.startswith(b'"') or value.endswith(b'"') for value in values):
                asked_line = number
    return _Literal(fits, asked_line, next((line for line, fit in whole.items() if fit), 0))


def _encloses_fields(path: Path, separator: str) -> bool:
    """Tell whether all quotes of a file enclose whole fields of one line.

    Then quotes open and close in turn: one that opens (or is the second of a doubled one) follows
    a separator, a line's start or a quote, one that closes (or is the first of a doubled one)
    precedes a separator, a line's end or a quote, and no line ends in between.
    """
    mark = ord(separator)
    for block in text_blocks(path):
        if QUOTE not in block:
            continue
        text = np.frombuffer(b"\n" + block + b"\n", np.uint8)
        places = np.flatnonzero(text == QUOTE)
        if places.size % 2:
            return False
        opening, closing = places[::2], places[1::2]
        before, after = text[opening - 1], text[closing + 1]
        apart = np.ones(len(opening) + 1, np.bool_)
        apart[1:-1] = opening[1:] - closing[:-1] > 1
        sound = ~apart[:-1] | (before == mark) | (before == NEWLINE)
        sound &= ~apart[1:] | (after == mark) | (after == NEWLINE) | (after == RETURN)
        lines = np.cumsum(text == NEWLINE, dtype=np.int32)
        if not sound.all() or (lines[opening] != lines[closing]).any():
            return False
    return True


QUOTE, NEWLINE = b'"\n'


@dataclass(frozen=True, kw_only=True)
class DelimitedSource(Source):
    """A delimited text file.

    Attributes:
        separator: between fields; "::" is read as ":" with an empty field after every field.
        quoting: how double quotes are read.
        header: whether line 1 names the columns.
        width: number of fields of every line.
        positions: field number of user, item, time and, where there are such, domain and order.
    """

    separator: str
    quoting: Quoting
    header: bool
    width: int
    positions: dict[str, int]

    @property
    def only_records(self) -> bool:
        """Whether quotes are such that the fast scan would read other fields."""
        return not self.quoting.is_plain

    def frames(self) -> "Iterator[pl.LazyFrame]":
        """Yield the events as text columns; polars raises on lines with too many fields."""
        if compression_of(self.path) is None:
            yield self._frame(self.path.absolute(), header=self.header)
            return
        header = self.header
        for block in text_blocks(self.path):
            yield self._frame(io.BytesIO(block), header=header)
            header = False

    def may_have_short_lines(self) -> bool:
        """Tell whether some line may have too few fields, which polars fills with nulls.

        No line has too many, so that one with too few shows in the number of separators. Empty
        lines show, too.
        """
        marks = lines = 0
        for block in text_blocks(self.path):
            text = np.frombuffer(block, np.uint8)
            is_mark = text == ord(self.separator[0])
            if self.quoting.style == "double" and QUOTE in block:
                is_mark &= np.cumsum(text == QUOTE, dtype=np.uint32) % 2 == 0
            marks += int(np.count_nonzero(is_mark))
            lines += int(np.count_nonzero(text == NEWLINE)) + (not block.endswith(b"\n"))
        return marks != lines * (self.width - 1) * len(self.separator)

    def _frame(self, source: object, *, header: bool) -> "pl.LazyFrame":
        """Scan a file or a block of it.

        The last column comes along even when it plays no role: polars stops at the last column it
        is asked for, and a line with a field too many would pass, its fields shifted.
        """
        import polars as pl

        frame = pl.scan_csv(
            source,  # pyrefly: ignore
            has_header=header,
            separator=self.separator[0],
            quote_char=None if self.quoting.style == "none" else '"',
            infer_schema=False,
            glob=False,
        )
        step = len(self.separator)
        wanted = {"last": self.width - 1, **self.positions}
        return frame.select(pl.nth(step * at).alias(role) for role, at in wanted.items())

    def records(self) -> Iterator[Record]:
        """Every event as a record, faulty ones with their problem."""
        for lines, fields in csv_rows(self.path, self.separator, self.quoting.style):
            line = lines.start
            if isinstance(fields, csv.Error):
                problem = f"not readable as a delimited line ({fields}); mend it"
                yield Record(line, problem=problem)
            elif fields and not (self.header and line == 1):
                yield self._record(line, fields)

    def _record(self, line: int, fields: list[str]) -> Record:
        text = self.separator.join(fields)
        if not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
            return Record(line, problem="not UTF-8 text; save the file as UTF-8")
        if len(fields) != self.width:
            mend = "mend the line or quote the field"
            if self.quoting.style == "double" and any(f.endswith("\\") for f in fields):
                mend += ", or use --quote backslash if that is how quotes inside are written"
            problem = (
                f"{len(fields)} fields where {self.width} are expected ({text[:80]!r}); {mend}"
            )
            return Record(line, problem=problem)
        values = {role: fields[at] for role, at in self.positions.items()}
        return Record.of(line, {"domain": self.domain, **values})
