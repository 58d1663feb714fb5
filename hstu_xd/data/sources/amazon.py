"""The published Amazon files: headerless ratings CSV (2014 and 2018), reviews as JSON lines.

JSON lines are read with the keys of the reviews of 2014, 2018 and 2023, or any given as options.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hstu_xd.data.sources.base import Record, Source, numbered_lines

if TYPE_CHECKING:
    import polars as pl
import csv
import logging
from collections.abc import Sequence
from pathlib import Path

from hstu_xd.data.sources.base import BYTE_ORDER_MARK, open_bytes
from hstu_xd.data.sources.columns import ColumnOptions, find_column, missing_column
from hstu_xd.data.sources.tables import DelimitedSource
from hstu_xd.errors import InputError


@dataclass(frozen=True)
class JsonLinesSource(Source):
    """A file with one JSON object a line.

    Attributes:
        keys: the keys of user, item, time and, unless constant, domain; the first key of a role
            that has a value in an object counts (``parent_asin``, else ``asin``).
    """

    keys: dict[str, tuple[str, ...]]

    def scan(self) -> "pl.LazyFrame":
        """Events as text columns; all other keys are skipped."""
        import polars as pl

        schema = {key: pl.String for keys in self.keys.values() for key in keys}
        frame = pl.scan_ndjson([self.path], schema=schema)
        return frame.select(pl.coalesce(keys).alias(role) for role, keys in self.keys.items())

    def records(self) -> Iterator[Record]:
        """Every line as a record, faulty ones with their problem."""
        for line, text in numbered_lines(self.path):
            if text is None:
                yield Record(line, problem="not UTF-8 text; save the file as UTF-8")
            elif text.strip():
                yield self._record(line, text)

    def _record(self, line: int, text: str) -> Record:
        try:
            event = json.loads(text)
        except ValueError as error:
            return Record(
                line, problem=f"not valid JSON ({error}): {text.strip()[:60]!r}; mend the line"
            )
        if not isinstance(event, dict):
            return Record(line, problem=f"not a JSON object: {text.strip()[:60]!r}; mend the line")
        values = {role: self._text(event, keys) for role, keys in self.keys.items()}
        return Record(
            line, values["user"], values["item"], values.get("domain", self.domain), values["time"]
        )

    @staticmethod
    def _text(event: dict[str, Any], keys: tuple[str, ...]) -> str | None:
        value = next((event[key] for key in keys if event.get(key) is not None), None)
        return None if value is None else str(value)


logger = logging.getLogger(__name__)

RATINGS_WIDTH = 4


def amazon_ratings(
    path: Path, domain: str, lines: Sequence[str], options: ColumnOptions
) -> DelimitedSource:
    """Open a headerless ratings file: ``user,item,rating,timestamp``, in 2018 ``item,user,...``.

    Which comes first is read off the ids: reviewers start with "A", products with "B" or a digit.
    ``--user-col 1 --item-col 2`` (numbers from 1) overrules this.

    Raises:
        InputError: lines without four fields, or an option that is no column number.
    """
    rows = [fields for fields in csv.reader(lines) if fields]
    for line, fields in enumerate(rows, start=1):
        if len(fields) != RATINGS_WIDTH:
            raise InputError(
                f"{path}:{line}: {len(fields)} fields where an Amazon ratings file has "
                f"{RATINGS_WIDTH} (user, item, rating, timestamp); choose another --format"
            )
    given = {role: _column_number(role, options) for role in ("user", "item", "time")}
    user, item = _user_item_order(path, rows)
    if given["user"] is not None and given["item"] is not None:
        user, item = given["user"], given["item"]
    elif given["user"] is not None or given["item"] is not None:
        raise InputError("give both --user-col and --item-col, as column numbers from 1")
    time = given["time"] if given["time"] is not None else 3
    return DelimitedSource(
        path=path,
        domain=domain,
        time_divisor=1,
        separator=",",
        quoted=True,
        header=False,
        width=RATINGS_WIDTH,
        positions={"user": user, "item": item, "time": time},
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


def _user_item_order(path: Path, rows: Sequence[Sequence[str]]) -> tuple[int, int]:
    first, second = (sum(fields[at].startswith("A") for fields in rows) for at in (0, 1))
    if first == second:
        logger.warning(
            "%s: reviewers and products cannot be told apart; taking user,item,rating,timestamp "
            "(set --user-col and --item-col to column numbers to choose)",
            path,
        )
    return (1, 0) if second > first else (0, 1)


def amazon_reviews(
    path: Path, domain: str | None, stem: str, lines: Sequence[str], options: ColumnOptions
) -> JsonLinesSource:
    """Open a JSON lines file; the keys of its first object tell which year's names it has.

    In 2023 times are milliseconds and the product is ``parent_asin``, else ``asin``.

    Raises:
        InputError: a byte order mark, a first line that is no JSON object, or a role without a
            key.
    """
    with open_bytes(path) as file:
        if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            raise InputError(
                f"{path}:1: begins with a byte order mark, which JSON has none of; save the file "
                "as UTF-8 without it"
            )
    number, text = next((n, line) for n, line in enumerate(lines, start=1) if line.strip())
    try:
        event = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path}:{number}: not valid JSON ({error}): {text.strip()[:60]!r}; "
            "one JSON object a line is needed"
        ) from error
    if not isinstance(event, dict):
        raise InputError(f"{path}:{number}: not a JSON object: {text.strip()[:60]!r}; mend it")
    names = list(event)
    keys: dict[str, tuple[str, ...]] = {}
    for role in ("user", "item", "time") if domain else ("user", "item", "domain", "time"):
        at = find_column(path, names, role, options, line=number)
        if at is not None:
            keys[role] = (names[at],)
        elif role != "domain":
            raise missing_column(path, names, role, options, line=number)
    amazon = options.item is None and keys["item"][0] in ("parent_asin", "asin")
    if amazon:
        keys["item"] = ("parent_asin", "asin")
    return JsonLinesSource(
        path=path,
        domain=None if "domain" in keys else domain or stem,
        time_divisor=1000 if amazon and keys["time"] == ("timestamp",) else 1,
        keys=keys,
    )
