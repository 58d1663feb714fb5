"""A log of events in PostgreSQL, which any number of processes on any machines may share.

Whoever writes to a user first takes the row that has the user's version: so writers of a user come
one after the other, and the numbers of events are in the order of the log. A process has one
connection, as one thread uses the log; where it breaks, the next call opens another one.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psycopg

from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Conflict, Event, Keyed, LogError, Logged, new_version
from hstu_xd.serving.events.postgres_connection import PostgresConnection

_log = logging.getLogger(__name__)

# Each is applied once, in a transaction of its own; the number of those that are is in the schema.
MIGRATIONS = (
    """
    CREATE TABLE hstu_xd.users (
        name text COLLATE "C" PRIMARY KEY,
        version bytea NOT NULL,
        previous bytea NOT NULL,
        restarted boolean NOT NULL DEFAULT false
    );
    CREATE TABLE hstu_xd.events (
        name text COLLATE "C" NOT NULL,
        number bigint GENERATED ALWAYS AS IDENTITY,
        item text NOT NULL,
        timestamp bigint NOT NULL,
        PRIMARY KEY (name, number)
    );
    CREATE TABLE hstu_xd.keys (
        name text COLLATE "C" NOT NULL,
        key text COLLATE "C" NOT NULL,
        item text NOT NULL,
        timestamp bigint NOT NULL,
        PRIMARY KEY (name, key)
    );
    CREATE TABLE hstu_xd.hidden (
        name text COLLATE "C" NOT NULL,
        item text NOT NULL,
        timestamp bigint NOT NULL,
        PRIMARY KEY (name, item, timestamp)
    );
    """,
)
# Who migrates takes this number of an advisory lock alone; who writes shares it with other writers.
_LOCK = 0x68737475
# Seconds that a migration may take, and that others wait for it.
_MIGRATES = 600.0

# Takes the users' rows, in order, so that no two writers wait for each other. Of a user who is
# known, the row stays as it is unless the version is the expected one, which comes as `previous`.
_CLAIM = """
    INSERT INTO hstu_xd.users (name, version, previous)
    SELECT name, %s, previous FROM unnest(%s::text[], %s::bytea[]) AS given (name, previous)
    ORDER BY name COLLATE "C"
    ON CONFLICT (name) DO UPDATE SET version = excluded.version, previous = excluded.previous
"""
_AS_EXPECTED = " WHERE users.version = excluded.previous"
# Whether users' rows are, or were before the last writer, as a claim has made them.
_CLAIMED = """
    SELECT EXISTS (
        SELECT FROM hstu_xd.users WHERE %s IN (version, previous) AND name = ANY(%s::text[])
    )
"""
# What writes first says which schema it has found: a statement of its own would cost every write.
_SCHEMA = " RETURNING (SELECT version FROM hstu_xd.schema)"
_ADD = """
    INSERT INTO hstu_xd.events (name, item, timestamp)
    SELECT name, item, timestamp FROM unnest(%s::text[], %s::text[], %s::bigint[])
    WITH ORDINALITY AS given (name, item, timestamp, place) ORDER BY place
"""
_ADD_KEYS = """
    INSERT INTO hstu_xd.keys
    SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::bigint[])
"""
# One statement sees one state of the log, whoever writes meanwhile.
_READ = """
    SELECT users.version, users.restarted, hidden.items, hidden.times, latest.items, latest.times
    FROM unnest(%s::text[]) WITH ORDINALITY AS asked (name, place)
    LEFT JOIN hstu_xd.users ON users.name = asked.name
    LEFT JOIN LATERAL (
        SELECT array_agg(item) AS items, array_agg(timestamp) AS times
        FROM hstu_xd.hidden WHERE hidden.name = asked.name
    ) AS hidden ON true
    LEFT JOIN LATERAL (
        SELECT array_agg(item ORDER BY number) AS items,
            array_agg(timestamp ORDER BY number) AS times
        FROM (
            SELECT number, item, timestamp FROM hstu_xd.events
            WHERE events.name = asked.name ORDER BY number DESC LIMIT %s
        ) AS newest
    ) AS latest ON true
    ORDER BY place
"""
_READ_KEYS = """
    SELECT keys.name, keys.key, item, timestamp
    FROM unnest(%s::text[], %s::text[]) AS asked (name, key) JOIN hstu_xd.keys USING (name, key)
"""
# Goes from name to name, however many events each has.
_NAMES = """
    WITH RECURSIVE found (name, place) AS (
        (SELECT name, 1 FROM hstu_xd.events WHERE name >= %s ORDER BY name LIMIT 1)
        UNION ALL
        SELECT (
            SELECT name FROM hstu_xd.events WHERE name > found.name ORDER BY name LIMIT 1
        ), place + 1
        FROM found WHERE found.name IS NOT NULL AND place < %s
    )
    SELECT name FROM found WHERE name IS NOT NULL ORDER BY place
"""
_SAME = "WHERE name = %s AND item = %s AND timestamp = %s"
_SIZE = """
    SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'hstu_xd'::regnamespace
"""


class PostgresLog:
    """An :class:`EventLog` in the schema ``hstu_xd`` of a database; made where it is not there.

    Args:
        url: ``postgresql://[USER[:PASSWORD]@]HOST[:PORT]/DATABASE``, with the options of libpq.

    Raises:
        InputError: the URL cannot be read, or a later version of hstu-xd made the log.
        LogError: the database cannot be reached, or the schema cannot be made.
    """

    is_shared = True

    def __init__(self, url: str) -> None:
        self._connection = PostgresConnection(url)
        self.upcoming = new_version()
        self._bytes = 0
        self._migrate()
        self._warn_where_not_durable()

    def add(
        self,
        events: Sequence[Event],
        keys: Sequence[Keyed] = (),
        versions: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write events and the new versions of their users: all of them, or none."""
        version, self.upcoming = self.upcoming, new_version()
        users = sorted({event.user for event in events})
        expected = [b"" if versions is None else versions[user] for user in users]
        claim = _CLAIM if versions is None else _CLAIM + _AS_EXPECTED

        def write(connection: psycopg.Connection) -> None:
            connection.execute(_ADD, _columns(events))
            if keys:
                connection.execute(_ADD_KEYS, _columns(keys))

        self._write(claim, (version, users, expected), write, rows=len(users))

    def forget(self, user: str) -> None:
        """Remove a user's events; PostgreSQL overwrites their bytes when it vacuums.

        The name stays, with the note that histories from elsewhere are hidden.
        """

        def write(connection: psycopg.Connection) -> None:
            connection.execute("UPDATE hstu_xd.users SET restarted = true WHERE name = %s", (user,))
            for table in ("events", "keys", "hidden"):
                connection.execute(f"DELETE FROM hstu_xd.{table} WHERE name = %s", (user,))

        self._write(_CLAIM, (new_version(), [user], [b""]), write)

    def remove(self, event: Event, *, hide: bool) -> int:
        """Remove one event, as often as it is there, and return how often it was."""

        def write(connection: psycopg.Connection) -> Callable[[], int]:
            removed = connection.execute(f"DELETE FROM hstu_xd.events {_SAME}", event)
            connection.execute(f"UPDATE hstu_xd.keys SET item = '', timestamp = 0 {_SAME}", event)
            if hide:
                row = "INSERT INTO hstu_xd.hidden VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"
                connection.execute(row, event)
            return lambda: removed.rowcount

        return self._write(_CLAIM, (new_version(), [event.user], [b""]), write)

    def probe(self) -> None:
        """Write something, which changes nothing."""
        self._write("UPDATE hstu_xd.schema SET version = version", (), lambda connection: None)
        ((size,),) = self._connection.read(_SIZE)
        self._bytes = int(size)

    def read(self, users: Sequence[str], last: int | None = None) -> list[Logged]:
        """Return what is known of users, with all of their events or the last ones."""
        rows = self._connection.read(_READ, list(users), last)
        return [_logged(user, *row) for user, row in zip(users, rows)]

    def events_of_keys(self, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Event]:
        """Return the events that came with keys of users; keys that are new are left out."""
        rows = self._connection.read(_READ_KEYS, *_columns(keys)) if keys else []
        return {(user, key): Event(user, item, time) for user, key, item, time in rows}

    def count(self, event: Event) -> int:
        """Return how often the log has an event."""
        ((found,),) = self._connection.read(f"SELECT count(*) FROM hstu_xd.events {_SAME}", *event)
        return found

    def users_from(self, user: str, limit: int) -> list[str]:
        """Return the names of at most ``limit`` users with events, in order, from a text on."""
        return [name for (name,) in self._connection.read(_NAMES, user, limit)]

    def num_bytes(self) -> int:
        """Return the bytes of tables and indices at the last probe: whoever asks does not wait."""
        return self._bytes

    @property
    def fails(self) -> bool:
        """Return whether the last write failed."""
        return self._connection.fails

    @property
    def written_at(self) -> float | None:
        """Return when the last write was, by ``time.monotonic``; None before the first one."""
        return self._connection.written_at

    def now(self) -> float:
        """Return the seconds since 1970 by the server's clock, one for all who share the log."""
        return self._connection.now()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _write(
        self,
        first: str,
        values: Sequence[Any],
        write: Callable[[psycopg.Connection], Any],
        rows: int = 1,
    ) -> Any:
        """Write to a log of the present schema, see :meth:`PostgresConnection.write`.

        Args:
            first: statement that writes rows, by which nothing or something of all is written.
            values: of it: those of a claim, or none.
            write: sends what comes after it; returns None or what returns the result once all ran.
            rows: that it writes, unless other writers have been there.
        """

        def write_as_known(connection: psycopg.Connection) -> Callable[[], Any]:
            schemas = connection.execute(first + _SCHEMA, values)
            finish = write(connection)

            def check() -> Any:
                if schemas.rowcount < rows:
                    raise Conflict("another process has written to the same users; repeat it")
                found, *_ = (version for (version,) in schemas.fetchall())
                if found != len(MIGRATIONS):
                    raise LogError(f"the event log is of {_another(found)}; serve with that one")
                return finish() if callable(finish) else None

            return check

        # Without users nothing that is new is written.
        version, users = values[:2] or (b"", [])
        return self._connection.write(write_as_known, _LOCK, (_CLAIMED, (version, users)))

    def _migrate(self) -> None:
        """Bring the schema up to date; several who start at once wait for each other."""
        ((there,),) = self._connection.read("SELECT to_regclass('hstu_xd.schema') IS NOT NULL")
        if not there:
            with self._connection.lend_for(_MIGRATES) as connection:
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                connection.execute("CREATE SCHEMA IF NOT EXISTS hstu_xd")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS hstu_xd.schema (version integer NOT NULL)"
                )
                connection.execute(
                    "INSERT INTO hstu_xd.schema SELECT 0 "
                    "WHERE NOT EXISTS (SELECT FROM hstu_xd.schema)"
                )
        ((found,),) = self._connection.read("SELECT version FROM hstu_xd.schema")
        if found > len(MIGRATIONS):
            raise InputError(
                f"the event log is of {_another(found)}; serve with that one, or give another "
                "--events"
            )
        while found < len(MIGRATIONS):
            with self._connection.lend_for(_MIGRATES) as connection:
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                ((found,),) = connection.execute("SELECT version FROM hstu_xd.schema").fetchall()
                for migration in MIGRATIONS[found : found + 1]:
                    connection.execute(migration)
                    connection.execute("UPDATE hstu_xd.schema SET version = version + 1")
            ((found,),) = self._connection.read("SELECT version FROM hstu_xd.schema")

    def _warn_where_not_durable(self) -> None:
        ((fsync,),) = self._connection.read("SHOW fsync")
        if fsync == "off":
            _log.warning(
                "fsync is off in PostgreSQL: what was accepted is lost where its machine stops"
            )


def _another(found: int) -> str:
    return f"a later hstu-xd (schema {found}, this one knows {len(MIGRATIONS)})"


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows)]


def _logged(
    user: str,
    version: bytes | None,
    restarted: bool | None,
    hidden_items: list[str] | None,
    hidden_times: list[int] | None,
    items: list[str] | None,
    times: list[int] | None,
) -> Logged:
    hidden = frozenset(zip(hidden_items or (), hidden_times or ()))
    events = [Event(user, item, time) for item, time in zip(items or (), times or ())]
    return Logged(version or b"", bool(restarted), hidden, events)
