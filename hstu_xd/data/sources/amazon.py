"""The published Amazon files: headerless ratings CSV (2014 and 2018), reviews as JSON lines.

JSON lines are read with the keys of the reviews of 2014, 2018 and 2023, or any given as options.
"""

import csv
import glob
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu_xd.data.sources.base import FIELD, Record, Source
from hstu_xd.data.sources.columns import (
    ONE_PRODUCT,
    ColumnOptions,
    find_column,
    missing_column,
)
from hstu_xd.data.sources.content import (
    BYTE_ORDER_MARK,
    compression_of,
    numbered_lines,
    open_bytes,
    text_blocks,
)
from hstu_xd.data.sources.delimited import DelimitedSource, decide_quoting
from hstu_xd.data.sources.inputs import Input
from hstu_xd.data.times import KINDS, is_number
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

RATINGS_WIDTH = 4
LARGEST_RATING = 100
_REVIEWER = re.compile(r"A[0-9A-Z]+")
_PRODUCT = re.compile(r"(B[0-9A-Z]+|\d[0-9X]+)")
# A guess needs nearly all of the lines on its side and nearly none on the other.
_MARGIN = 0.99


@dataclass(frozen=True, kw_only=True)
class JsonLinesSource(Source):
    """A file with one JSON object a line.

    Attributes:
        keys: the keys of user, item, time and, where there are such, domain and order; the first
            key of a role that has a value in an object counts (``parent_asin``, else ``asin``).
    """

    keys: dict[str, tuple[str, ...]]

    @property
    def may_nest(self) -> bool:
        """Whether lists and objects may stand where an id is asked for: in JSON they may."""
        return True

    def frames(self) -> "Iterator[pl.LazyFrame]":
        """Yield the events as text columns; all other keys are skipped."""
        if compression_of(self.path) is None:
            # polars takes brackets, stars and question marks for patterns in any path.
            yield self._frame([glob.escape(str(self.path.absolute()))])
            return
        for block in text_blocks(self.path):
            yield self._frame(io.BytesIO(block))

    def _frame(self, source: object) -> "pl.LazyFrame":
        import polars as pl

        schema = {key: pl.String for keys in self.keys.values() for key in keys}
        frame = pl.scan_ndjson(source, schema=schema)  # pyrefly: ignore
        return frame.select(pl.coalesce(keys).alias(role) for role, keys in self.keys.items())

    def records(self) -> Iterator[Record]:
        """Every line as a record, faulty ones with their problem."""
        for line, raw in numbered_lines(self.path):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                yield Record(line, problem="not UTF-8 text; save the file as UTF-8")
                continue
            if text.strip():
                yield self._record(line, text)

    def _record(self, line: int, text: str) -> Record:
        try:
            event = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Record(
                line, problem=f"not valid JSON ({error}): {text.strip()[:60]!r}; mend the line"
            )
        if not isinstance(event, dict):
            return Record(line, problem=f"not a JSON object: {text.strip()[:60]!r}; mend the line")
        values = {role: self._value(event, keys) for role, keys in self.keys.items()}
        nested = next((v for role, v in values.items() if _is_unfit(v, role)), None)
        if nested is not None:
            problem = f"{json.dumps(nested)[:60]} is neither text nor a number; mend the line"
            return Record(line, problem=problem)
        texts = {role: None if v is None else _text(v) for role, v in values.items()}
        if any("\ud800" <= letter <= "\udfff" for letter in "".join(filter(None, texts.values()))):
            return Record(line, problem="half of a surrogate pair, which is no text; mend the line")
        return Record.of(line, {"domain": self.domain, **texts})

    @staticmethod
    def _value(event: dict[str, Any], keys: tuple[str, ...]) -> Any:
        return next((event[key] for key in keys if event.get(key) is not None), None)


def _is_unfit(value: Any, role: str) -> bool:
    """Tell what is neither text nor a number; a field may be true or false, an id may not."""
    if isinstance(value, bool):
        return not role.startswith(FIELD)
    return isinstance(value, dict | list)


def _text(value: Any) -> str:
    """Write a value as polars does: a whole float without its fraction, truth in small letters."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def amazon_ratings(
    one: Input, domain: str, lines: Sequence[str], options: ColumnOptions, quote: str
) -> DelimitedSource:
    """Open a headerless ratings file: ``user,item,rating,timestamp``, in 2018 ``item,user,...``.

    Which comes first is read off the ids: reviewers are an "A" and products a "B" or a digit,
    followed by capitals and digits. ``--user-col 1 --item-col 2`` (numbers from 1) overrules this.

    Raises:
        InputError: lines without four fields, an option that is no column number, or ids that do
            not tell reviewers from products.
    """
    path = one.path
    if options.fields:
        raise InputError(
            f"{path}: an Amazon ratings file has no fields of events; leave out --event-cols "
            f"{','.join(options.fields)}, or name the columns with --columns and --format csv"
        )
    rows = [fields for fields in csv.reader(lines) if fields]
    for line, fields in enumerate(rows, start=1):
        if len(fields) != RATINGS_WIDTH:
            raise InputError(
                f"{path}:{line}: {len(fields)} fields where an Amazon ratings file has "
                f"{RATINGS_WIDTH} (user, item, rating, timestamp); choose another --format"
            )
    given = {role: _column_number(role, options) for role in ("user", "item", "time", "order")}
    time = given["time"] if given["time"] is not None else 3
    if not is_number(rows[0][time]) and KINDS["iso"].problem_of(rows[0][time]):
        raise InputError(f"{path}:1: {KINDS['s'].problem_of(rows[0][time])}")
    if given["user"] is not None and given["item"] is not None:
        user, item = given["user"], given["item"]
    elif given["user"] is not None or given["item"] is not None:
        raise InputError("give both --user-col and --item-col, as column numbers from 1")
    else:
        order = user_and_item(rows)
        if order is None:
            raise InputError(
                f"{path}:1: which column is the user and which the item cannot be told from "
                f"{', '.join(rows[0])[:80]!r}; say --columns user,item,rating,time or --columns "
                "item,user,rating,time (or --user-col 1 --item-col 2)"
            )
        user, item = order
    positions = {"user": user, "item": item, "time": time}
    if given["order"] is not None:
        positions["order"] = given["order"]
    numbers = ", ".join(f"{role} in column {at + 1}" for role, at in positions.items())
    quoting = decide_quoting(path, ",", RATINGS_WIDTH, positions, style=quote, header=False)
    return DelimitedSource(
        path=path,
        domain=domain,
        form="Amazon ratings without a header",
        roles=numbers,
        separator=",",
        quoting=quoting,
        header=False,
        width=RATINGS_WIDTH,
        positions=positions,
    )


def is_ratings(rows: Sequence[Sequence[str]]) -> bool:
    """Tell whether headerless lines look like ratings: two ids, a small number, a time."""
    return all(
        len(fields) == RATINGS_WIDTH
        and is_number(fields[2])
        and abs(float(fields[2])) <= LARGEST_RATING
        and is_number(fields[3])
        for fields in rows
    )


def _column_number(role: str, options: ColumnOptions) -> int | None:
    text = options.named(role)
    if text is None:
        return None
    if text not in {str(n + 1) for n in range(RATINGS_WIDTH)}:
        raise InputError(
            f"--{role}-col {text!r}: an Amazon ratings file has no header; give a column number "
            f"from 1 to {RATINGS_WIDTH}"
        )
    return int(text) - 1


def user_and_item(rows: Sequence[Sequence[str]]) -> tuple[int, int] | None:
    """Tell the columns of reviewers and products by their ids; None where there is no margin."""
    first, second = (
        sum(bool(_REVIEWER.fullmatch(row[u]) and _PRODUCT.fullmatch(row[i])) for row in rows)
        for u, i in ((0, 1), (1, 0))
    )
    if max(first, second) < _MARGIN * len(rows) or min(first, second) > (1 - _MARGIN) * len(rows):
        return None
    return (0, 1) if first > second else (1, 0)


def amazon_reviews(
    one: Input, lines: Sequence[str], options: ColumnOptions, roles: Sequence[str]
) -> JsonLinesSource:
    """Open a JSON lines file; the keys of its first objects tell which year's names it has.

    In 2023 the product is ``parent_asin``, else ``asin``.

    Raises:
        InputError: a byte order mark, a first line that is no JSON object, or a role without a
            key.
    """
    path = one.path
    with open_bytes(path) as file:
        if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            raise InputError(
                f"{path}:1: begins with a byte order mark, which JSON has none of; save the file "
                "as UTF-8 without it"
            )
    number, names = _names_of(path, lines)
    keys: dict[str, tuple[str, ...]] = {}
    for role in roles:
        at = find_column(path, names, role, options, line=number)
        if at is not None:
            keys[role] = (names[at],)
        elif role != "domain":
            raise missing_column(path, names, role, options, line=number)
    if keys["item"][0] in ONE_PRODUCT and not (options.item == "asin" and "parent_asin" in names):
        keys["item"] = ONE_PRODUCT
    told = ", ".join(f"{role}={' else '.join(names)}" for role, names in keys.items())
    return JsonLinesSource(
        path=path,
        domain=None,
        form="JSON lines",
        roles=told,
        fields=options.fields,
        keys=keys,
    )


def _names_of(path: Path, lines: Sequence[str]) -> tuple[int, list[str]]:
    """Return the line of the first object and the keys of the first objects."""
    start, names = 0, {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            event = json.loads(text)
        except (ValueError, RecursionError) as error:
            if start:  # named with its line when the file is read
                continue
            raise InputError(
                f"{path}:{number}: not valid JSON ({error}): {text.strip()[:60]!r}; "
                "one JSON object a line is needed"
            ) from error
        if isinstance(event, list) and not start:
            raise InputError(
                f"{path}:{number}: not a JSON object: {text.strip()[:60]!r}; one JSON object a "
                "line is needed, not one array of them"
            )
        if not isinstance(event, dict):
            if not start:
                raise InputError(
                    f"{path}:{number}: not a JSON object: {text.strip()[:60]!r}; mend it"
                )
            continue
        start = start or number
        names |= dict.fromkeys(event)
    return start, list(names)
