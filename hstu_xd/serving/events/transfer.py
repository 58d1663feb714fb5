"""A log of events as a folder of Parquet files, and back into SQLite or PostgreSQL: all or nothing.

The folder has a file for each table of a log (users with their versions, events in the order of the
log, keys by which clients repeat a write, prepared events that were removed), and a list of the
files with their hashes. Versions come along, so that states in a store stay those of the events.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import parquet

from hstu_xd.errors import InputError
from hstu_xd.files import check_output, replaced_folder, sha256_of
from hstu_xd.serving.events.event_log import LogError
from hstu_xd.serving.events.open_log import is_postgres, open_log, shown_log

_FORMAT = 1
_LIST = "log.json"
# Rows that are in memory at a time.
_ROWS = 50_000

# Tables by the names of files, with the columns of each; the first ones order its rows.
_TEXT, _TIME = pa.string(), pa.int64()
TABLES = {
    "users": pa.schema([("user", _TEXT), ("version", pa.binary()), ("restarted", pa.bool_())]),
    "events": pa.schema([("user", _TEXT), ("item", _TEXT), ("timestamp", _TIME)]),
    "keys": pa.schema([("user", _TEXT), ("key", _TEXT), ("item", _TEXT), ("timestamp", _TIME)]),
    "hidden": pa.schema([("user", _TEXT), ("item", _TEXT), ("timestamp", _TIME)]),
}
_ORDERS = {
    "users": ("user",),
    "events": ("user", "number"),
    "keys": ("user", "key"),
    "hidden": ("user", "item", "timestamp"),
}


def export_log(name: str, out: Path, *, force: bool = False) -> dict[str, int]:
    """Write a log as a folder; the log may be in use where it is in PostgreSQL.

    Args:
        name: of the log, see :func:`hstu_xd.serving.events.open_log.open_log`.
        out: folder to write; whole or not at all.
        force: whether an earlier export may be replaced.

    Returns:
        The number of rows of each table.

    Raises:
        InputError: there is no such log, a service owns its file, or ``out`` may not be written.
        LogError: the database fails.
    """
    if not is_postgres(name) and not Path(name).is_file():
        raise InputError(f"{name}: no event log here; name the --events of the service")
    files = [_LIST, *map(_file, TABLES)]
    check_output(
        out,
        force=force,
        ours=lambda folder: (folder / _LIST).is_file(),
        kind="exported log",
        parts=files,
    )
    with _opened(name) as log, replaced_folder(out, force=force) as folder:
        # What users did is for nobody else, as in the log.
        folder.chmod(0o700)
        counts = {}
        for table, schema in TABLES.items():
            with parquet.ParquetWriter(folder / _file(table), schema) as writer:
                counts[table] = 0
                for rows in log.read(table):
                    columns = zip(*rows)
                    arrays = [_array(column, field) for column, field in zip(columns, schema)]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
                    counts[table] += len(rows)
        hashes = {_file(table): sha256_of(folder / _file(table)) for table in TABLES}
        facts = {"format": _FORMAT, "rows": counts, "hashes": hashes}
        (folder / _LIST).write_text(json.dumps(facts, indent=1) + "\n")
    return counts


def import_log(folder: Path, name: str) -> dict[str, int]:
    """Write an exported log into an empty one, in one transaction.

    Args:
        folder: of :func:`export_log`.
        name: of the log, which is made where it is not there.

    Returns:
        The number of rows of each table.

    Raises:
        InputError: not such a folder, a damaged one, a log that has something already, or text that
            PostgreSQL cannot keep.
        LogError: the database fails; the log is as it was.
    """
    counts = _checked_counts(folder)
    with _opened(name) as log:
        log.begin()
        if log.has_users():
            raise InputError(
                f"the log {shown_log(name)} has users already; import into an empty one, or a "
                "database of its own"
            )
        for table in TABLES:
            file = parquet.ParquetFile(folder / _file(table))
            batches = file.iter_batches(_ROWS)
            log.write(table, (row for batch in batches for row in _rows(batch)))
        log.commit()
    return counts


def _checked_counts(folder: Path) -> dict[str, int]:
    """Return the rows of each table that a folder says it has.

    Raises:
        InputError: it is no exported log, or not as it was written.
    """
    try:
        facts = json.loads((folder / _LIST).read_text())
        if facts["format"] != _FORMAT:
            raise InputError(
                f"{folder}: format {facts['format']}, {_FORMAT} is needed; export the log with "
                "this hstu-xd"
            )
        hashes = {name: sha256_of(folder / name) for name in map(_file, TABLES)}
        changed = [name for name, found in hashes.items() if facts["hashes"][name] != found]
        counts = dict(facts["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{folder}: not an exported log ({type(error).__name__}: {error}); give what hstu-xd "
            "events export wrote"
        ) from error
    if changed:
        raise InputError(f"{folder / changed[0]}: has changed since it was exported; export again")
    return counts


class _OpenLog(Protocol):
    """The tables of a log, for a whole transfer."""

    def read(self, table: str) -> Iterator[list[tuple]]:
        """Yield rows in order; all tables are seen as they were at the same time."""
        ...

    def begin(self) -> None:
        """Keep everybody else from writing until :meth:`commit`."""
        ...

    def has_users(self) -> bool:
        """Return whether anything was ever written."""
        ...

    def write(self, table: str, rows: Iterable[tuple]) -> None:
        """Write rows in order."""
        ...

    def commit(self) -> None:
        """Keep what was written."""
        ...


class _SQLite:
    """See :class:`_OpenLog`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA synchronous = FULL")

    def read(self, table: str) -> Iterator[list[tuple]]:
        order = ", ".join(_ORDERS[table])
        found = self._connection.execute(
            f"SELECT {', '.join(TABLES[table].names)} FROM {table} ORDER BY {order}"
        )
        while rows := found.fetchmany(_ROWS):
            yield rows

    def begin(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def has_users(self) -> bool:
        return bool(self._connection.execute("SELECT 1 FROM users LIMIT 1").fetchall())

    def write(self, table: str, rows: Iterable[tuple]) -> None:
        names = TABLES[table].names
        places = ", ".join("?" for _ in names)
        query = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({places})"
        self._connection.executemany(query, rows)

    def commit(self) -> None:
        self._connection.execute("COMMIT")


class _Postgres:
    """See :class:`_OpenLog`; there the column of users is called ``name``."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def read(self, table: str) -> Iterator[list[tuple]]:
        columns = ["name", *TABLES[table].names[1:]]
        order = ", ".join(["name", *_ORDERS[table][1:]])
        with self._connection.cursor(f"export_{table}") as cursor:
            cursor.execute(f"SELECT {', '.join(columns)} FROM hstu_xd.{table} ORDER BY {order}")
            while rows := cursor.fetchmany(_ROWS):
                yield rows

    def begin(self) -> None:
        self._connection.execute("LOCK TABLE hstu_xd.users IN EXCLUSIVE MODE")

    def has_users(self) -> bool:
        return bool(self._connection.execute("SELECT 1 FROM hstu_xd.users LIMIT 1").fetchall())

    def write(self, table: str, rows: Iterable[tuple]) -> None:
        columns = ["name", *TABLES[table].names[1:]]
        if table == "users":
            columns, rows = [*columns, "previous"], ((*row, b"") for row in rows)
        with (
            self._connection.cursor() as cursor,
            cursor.copy(f"COPY hstu_xd.{table} ({', '.join(columns)}) FROM STDIN") as copy,
        ):
            for row in rows:
                copy.write_row(row)

    def commit(self) -> None:
        self._connection.commit()


@contextmanager
def _opened(name: str) -> Iterator[_OpenLog]:
    """Open the tables of a log, whose schema is brought up to date first."""
    open_log(name).close()
    if not is_postgres(name):
        try:
            connection = sqlite3.connect(name, isolation_level=None, timeout=1.0)
            try:
                yield _SQLite(connection)
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise LogError(f"the event log {name}: {error}") from error
        return
    import psycopg

    try:
        with psycopg.connect(name, application_name="hstu-xd transfer") as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            yield _Postgres(connection)
    except psycopg.DataError as error:
        raise InputError(f"PostgreSQL cannot keep it: {_first_line(error)}") from error
    except psycopg.Error as error:
        raise LogError(f"the event log: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _file(table: str) -> str:
    return f"{table}.parquet"


def _array(column: Iterable[Any], field: pa.Field) -> pa.Array:
    """Return a column; SQLite has numbers for truths."""
    if field.type == pa.bool_():
        column = map(bool, column)
    return pa.array(list(column), field.type)


def _rows(batch: pa.RecordBatch) -> Iterator[tuple]:
    columns: Mapping[str, list] = batch.to_pydict()
    return zip(*columns.values())
