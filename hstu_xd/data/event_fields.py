"""Optional fields of events: read beside the ids, carried through sorting, kept in the store.

A field is a column of the log such as the shop or whether the price was reduced. Its values are
categories: the texts that occur, numbered from 1 in their sorted order; 0 is a missing value.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import polars as pl

MISSING = 0
_KEY = ("user", "item", "second")


@dataclass(frozen=True)
class EventFields:
    """Fields of a log's events.

    Attributes:
        names: of the fields, in the order they were asked for.
        codes: (F, L) int32; 0 where a value is missing.
        values: of each field, its values in sorted order; code c is ``values[f][c - 1]``.
    """

    names: tuple[str, ...]
    codes: NDArray[np.int32]
    values: tuple[list[str], ...]

    def of(self, name: str, option: str) -> tuple[NDArray[np.int32], list[str]]:
        """Return codes (L,) and values of one field.

        Args:
            name: of the field.
            option: where the user named it, for the message.

        Raises:
            InputError: there is no such field.
        """
        if name not in self.names:
            raise InputError(
                f"{option} {name!r}: the store has no such field of events"
                + did_you_mean(name, self.names)
                + f" (there: {', '.join(self.names) or 'none'}); prepare the log again with "
                "--event-cols"
            )
        place = self.names.index(name)
        return self.codes[place], self.values[place]

    def described(self) -> dict[str, Any]:
        """Return what the manifest says of each field: its values and how many events lack one."""
        missing = (self.codes == MISSING).sum(1).tolist()
        return {
            name: {"values": len(values), "missing": lacking}
            for name, values, lacking in zip(self.names, self.values, missing, strict=True)
        }


NO_FIELDS = EventFields((), np.empty((0, 0), np.int32), ())


def numbered(texts: "pl.DataFrame") -> EventFields:
    """Give the values of each column their numbers.

    Args:
        texts: a column of text for each field, a row for each event; empty texts are missing.
    """
    import polars as pl

    codes, values = [], []
    for column in texts.iter_columns():
        column = column.set(column == "", None)
        known = column.drop_nulls().unique().sort()
        ranks = column.cast(pl.Enum(known)).to_physical().cast(pl.Int32) + 1
        codes.append(ranks.fill_null(MISSING).to_numpy())
        values.append(known.to_list())
    return EventFields(tuple(texts.columns), np.stack(codes), tuple(values))


class FieldRows:
    """Fields of all events that were read, to be found again when these are sorted and filtered.

    Events are told apart by user, item and second, and by their order where these are equal: that
    of their times, then of the fields' own codes, so that the order of rows in a file counts for
    nothing.

    Args:
        fields: of the events as they were read.
        user: (n,) of each event.
        item: (n,).
        second: (n,).
        time: (n,) numbers that order the events of a second.
    """

    def __init__(
        self, fields: EventFields, user: NDArray, item: NDArray, second: NDArray, time: NDArray
    ) -> None:
        import polars as pl

        self._fields = fields
        names = [str(place) for place in range(len(self._fields.names))]
        table = pl.DataFrame(
            {
                "user": user,
                "item": item,
                "second": second,
                "time": time,
                **dict(zip(names, self._fields.codes, strict=True)),
            }
        )
        self._rows = _with_occurrence(table.sort(*_KEY, "time", *names).drop("time"))
        self._names = names

    def of(self, user: NDArray, item: NDArray, second: NDArray) -> EventFields:
        """Return the fields of the events that are left, in their order."""
        import polars as pl

        wanted = _with_occurrence(pl.DataFrame({"user": user, "item": item, "second": second}))
        found = wanted.join(
            self._rows, on=[*_KEY, "occurrence"], how="left", maintain_order="left"
        ).select(self._names)
        assert not any(column.null_count() for column in found.iter_columns())
        codes = np.stack([column.to_numpy() for column in found.iter_columns()])
        return EventFields(self._fields.names, codes, self._fields.values)


def _with_occurrence(table: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl

    return table.with_columns(occurrence=pl.int_range(pl.len()).over(*_KEY))
