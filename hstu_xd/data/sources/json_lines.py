"""JSON lines: Amazon reviews of 2014, 2018 and 2023, or any keys given as options."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hstu_xd.data.sources.base import Record, Source, numbered_lines

if TYPE_CHECKING:
    import polars as pl


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
