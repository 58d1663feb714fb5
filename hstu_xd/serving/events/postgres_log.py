"""A log of events in PostgreSQL, which any number of processes on any machines may share.

Whoever writes to a user first takes the row that has the user's version: so writers of a user come
one after the other, and the numbers of events are in the order of the log. A process has one
connection, as one thread uses the log; where it breaks, the next call opens another one.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Conflict, Event, Keyed, LogError, Logged, new_version

_log = logging.getLogger(__name__)
# Seconds that a statement may take, and that a connection may take to open: requests wait for it.
_PATIENCE = 2.0
# Seconds that a server gone in the middle of a commit gets to say what became of it.
_RECOVERY = 5.0
# Seconds after a failure until a connection is tried again; meanwhile everything is refused.
_RESPITE = 0.5

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
# Writers who migrate at once wait for each other under this number of an advisory lock.
_LOCK = 0x68737475

# Takes the users' rows, in order, so that no two writers wait for each other. Of a user who is
# known, the row stays as it is unless the version is the expected one, which comes as `previous`.
_CLAIM = """
    INSERT INTO hstu_xd.users (name, version, previous)
    SELECT name, %s, previous FROM unnest(%s::text[], %s::bytea[]) AS given (name, previous)
    ORDER BY name COLLATE "C"
    ON CONFLICT (name) DO UPDATE SET version = excluded.version, previous = excluded.previous
"""
_AS_EXPECTED = "WHERE users.version = excluded.previous"
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
        self._options = _options(url)
        self.upcoming = new_version()
        self.fails = False
        self.written_at: float | None = None
        self._connection: psycopg.Connection | None = None
        self._bytes = 0
        self._refused_until, self._reason = 0.0, ""
        self._read("SELECT 1")
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

        def write(connection: psycopg.Connection) -> Callable[[], None]:
            claimed = connection.execute(claim, (version, users, expected))
            connection.execute(_ADD, _columns(events))
            if keys:
                connection.execute(_ADD_KEYS, _columns(keys))

            def check() -> None:
                if claimed.rowcount < len(users):
                    raise Conflict("another process has written to the same users; repeat it")

            return check

        self._write(write)

    def forget(self, user: str) -> None:
        """Remove a user's events; PostgreSQL overwrites their bytes when it vacuums.

        The name stays, with the note that histories from elsewhere are hidden.
        """

        def write(connection: psycopg.Connection) -> None:
            connection.execute(_CLAIM, (new_version(), [user], [b""]))
            connection.execute("UPDATE hstu_xd.users SET restarted = true WHERE name = %s", (user,))
            for table in ("events", "keys", "hidden"):
                connection.execute(f"DELETE FROM hstu_xd.{table} WHERE name = %s", (user,))

        self._write(write)

    def remove(self, event: Event, *, hide: bool) -> int:
        """Remove one event, as often as it is there, and return how often it was."""

        def write(connection: psycopg.Connection) -> Callable[[], int]:
            connection.execute(_CLAIM, (new_version(), [event.user], [b""]))
            removed = connection.execute(f"DELETE FROM hstu_xd.events {_SAME}", event)
            connection.execute(f"UPDATE hstu_xd.keys SET item = '', timestamp = 0 {_SAME}", event)
            if hide:
                row = "INSERT INTO hstu_xd.hidden VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"
                connection.execute(row, event)
            return lambda: removed.rowcount

        return self._write(write)

    def probe(self) -> None:
        """Write something, which changes nothing."""
        self._write(
            lambda connection: connection.execute("UPDATE hstu_xd.schema SET version = version")
        )
        ((size,),) = self._read(_SIZE)
        self._bytes = int(size)

    def read(self, users: Sequence[str], last: int | None = None) -> list[Logged]:
        """Return what is known of users, with all of their events or the last ones."""
        rows = self._read(_READ, list(users), last)
        return [_logged(user, *row) for user, row in zip(users, rows)]

    def events_of_keys(self, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Event]:
        """Return the events that came with keys of users; keys that are new are left out."""
        rows = self._read(_READ_KEYS, *_columns(keys)) if keys else []
        return {(user, key): Event(user, item, time) for user, key, item, time in rows}

    def count(self, event: Event) -> int:
        """Return how often the log has an event."""
        ((found,),) = self._read(f"SELECT count(*) FROM hstu_xd.events {_SAME}", *event)
        return found

    def users_from(self, user: str, limit: int) -> list[str]:
        """Return the names of at most ``limit`` users with events, in order, from a text on."""
        return [name for (name,) in self._read(_NAMES, user, limit)]

    def num_bytes(self) -> int:
        """Return the bytes of tables and indices at the last probe: whoever asks does not wait."""
        return self._bytes

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def _read(self, query: str, *values: Any) -> list[tuple]:
        was_open = self._connection is not None and not self._connection.closed
        try:
            return self._fetch(query, values)
        except LogError:
            # The server may have been started again since the last call.
            if not was_open or self._connection is None or not self._connection.closed:
                raise
        return self._fetch(query, values)

    def _fetch(self, query: str, values: tuple) -> list[tuple]:
        with self._explained() as connection:
            return connection.execute(query, values).fetchall()

    def _write(self, write: Callable[[psycopg.Connection], Any]) -> Any:
        """Write all of it or nothing, and remember whether it could be written.

        Args:
            write: sends statements, and returns None or what returns the result once they ran.
        """
        self.written_at, self.fails = time.monotonic(), True
        try:
            with self._explained() as connection:
                try:
                    # What is sent together takes one way there and back.
                    with connection.pipeline():
                        connection.execute("BEGIN")
                        number = connection.execute("SELECT pg_current_xact_id()::text")
                        finish = write(connection)
                    found = finish() if callable(finish) else None
                    ((transaction,),) = number.fetchall()
                except BaseException:
                    with suppress(psycopg.Error):
                        connection.execute("ROLLBACK")
                    raise
                self._commit(connection, transaction)
        except (Conflict, InputError):
            self.fails = False
            raise
        self.fails = False
        return found

    def _commit(self, connection: psycopg.Connection, transaction: str) -> None:
        """Commit; where the connection breaks meanwhile, find out what became of it.

        Raises:
            LogError: nothing was written, or nobody says.
        """
        try:
            connection.execute("COMMIT")
        except psycopg.OperationalError as error:
            connection.close()
            state = self._state_of(transaction)
            if state == "committed":
                return
            if state == "aborted":
                raise
            raise LogError(
                f"the event log: {_first_line(error)}; whether the events were taken is not known: "
                "send them again with the same id or Idempotency-Key"
            ) from error

    def _state_of(self, transaction: str) -> str | None:
        """Return "committed" or "aborted"; None where the server does not say in time."""
        patient_until = time.monotonic() + _RECOVERY
        while time.monotonic() < patient_until:
            with suppress(psycopg.Error), self._open() as connection:
                query = "SELECT pg_xact_status(%s::text::xid8)"
                ((state,),) = connection.execute(query, (transaction,)).fetchall()
                if state != "in progress":
                    return state
            time.sleep(0.1)
        return None

    def _migrate(self) -> None:
        """Bring the schema up to date; several who start at once wait for each other."""
        ((there,),) = self._read("SELECT to_regclass('hstu_xd.schema') IS NOT NULL")
        if not there:
            with self._explained() as connection, connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                connection.execute("CREATE SCHEMA IF NOT EXISTS hstu_xd")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS hstu_xd.schema (version integer NOT NULL)"
                )
                connection.execute(
                    "INSERT INTO hstu_xd.schema SELECT 0 "
                    "WHERE NOT EXISTS (SELECT FROM hstu_xd.schema)"
                )
        ((found,),) = self._read("SELECT version FROM hstu_xd.schema")
        if found > len(MIGRATIONS):
            raise InputError(
                f"the event log is of a later hstu-xd (schema {found}, this one knows "
                f"{len(MIGRATIONS)}); serve with that one, or give another --events"
            )
        while found < len(MIGRATIONS):
            with self._explained() as connection, connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                ((found,),) = connection.execute("SELECT version FROM hstu_xd.schema").fetchall()
                for migration in MIGRATIONS[found : found + 1]:
                    connection.execute(migration)
                    connection.execute("UPDATE hstu_xd.schema SET version = version + 1")
            ((found,),) = self._read("SELECT version FROM hstu_xd.schema")

    def _warn_where_not_durable(self) -> None:
        ((fsync,),) = self._read("SHOW fsync")
        if fsync == "off":
            _log.warning(
                "fsync is off in PostgreSQL: what was accepted is lost where its machine stops"
            )

    def _open(self) -> psycopg.Connection:
        connection = _Impatient.connect(**self._options, autocommit=True)
        # Whatever the server's default is; what is stronger stays.
        connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false) "
            "WHERE current_setting('synchronous_commit') IN ('off', 'local')"
        )
        connection.execute(f"SET statement_timeout = {round(1000 * _PATIENCE)}")
        return connection

    @contextmanager
    def _explained(self) -> Iterator[psycopg.Connection]:
        """Lend the connection, opened where it is not, and say what fails."""
        if time.monotonic() < self._refused_until:
            raise LogError(self._reason)
        opened = self._connection is not None and not self._connection.closed
        try:
            if not opened:
                self._connection = self._open()
                opened = True
            assert self._connection is not None
            yield self._connection
        except psycopg.DataError as error:
            raise InputError(f"PostgreSQL cannot keep it: {_first_line(error)}") from error
        except _RACES as error:
            raise Conflict(f"the event log: {_first_line(error)}; repeat it") from error
        except psycopg.Error as error:
            self.fails, self._reason = True, f"the event log: {_first_line(error)}"
            if not opened:
                self._refused_until = time.monotonic() + _RESPITE
            raise LogError(self._reason) from error


# What another writer may bring about, where the rows of users could not keep them apart.
_RACES = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
)


class _Impatient(psycopg.Connection):
    """A connection that is closed where the server does not answer in time, as one that hangs."""

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Wait for what the server sends.

        Raises:
            psycopg.OperationalError: it sent nothing in time.
        """
        try:
            # Longer than the server's own limit, which leaves the connection usable.
            return super().wait(gen, interval, timeout or 1.5 * _PATIENCE)
        except psycopg.OperationalError:
            if self.info.transaction_status == TransactionStatus.ACTIVE:
                self.close()
            raise


def _options(url: str) -> dict[str, Any]:
    """Return the options of a connection.

    Raises:
        InputError: the URL cannot be read, which is said without what it says: the password may be
            anywhere in it.
    """
    options: dict[str, Any] = {}
    try:
        options = conninfo_to_dict(url, application_name="hstu-xd")
        port, name = str(options.get("port", "")), str(options.get("dbname", ""))
        is_sound = urlsplit(url).netloc.count("@") < 2 and "@" not in name
        is_sound = is_sound and not port.strip("0123456789,")
    except (psycopg.Error, ValueError):
        is_sound = False
    if not is_sound:
        raise InputError(
            "the --events URL cannot be read; postgresql://[USER[:PASSWORD]@]HOST[:PORT]/DATABASE "
            "is needed, with %23, %2F, %3A and %40 for # / : @ in a password"
        ) from None
    return {"connect_timeout": round(_PATIENCE)} | options


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows)]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


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
