"""A process's connection to PostgreSQL: opened again where it broke, and never waited for long.

What fails is said as :class:`LogError`, whoever asks; what other writers bring about, as
:class:`Conflict`.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Conflict, LogError

_log = logging.getLogger(__name__)

# Seconds that a statement may take, and that a connection may take to open: requests wait for it.
_PATIENCE = 2.0
# Seconds that a server gone in the middle of a commit gets to say what became of it.
_RECOVERY = 5.0
# Seconds after a failure until a connection is tried again; meanwhile everything is refused.
_RESPITE = 0.5
# Seconds that the clocks of server and machine may differ before it is said.
_SKEW = 60.0
_NOW = "extract(epoch FROM clock_timestamp())::float8"
_ABOUT = f"SELECT pg_advisory_xact_lock_shared(%s), pg_current_xact_id()::text, {_NOW}"

# What another writer may bring about, where the rows of users could not keep them apart.
_RACES = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
)


class PostgresConnection:
    """The one connection of a process, as one thread uses the log.

    Args:
        url: ``postgresql://[USER[:PASSWORD]@]HOST[:PORT]/DATABASE``, with the options of libpq.

    Attributes:
        fails: whether the last write failed, or anything since.
        written_at: when the last write was, by ``time.monotonic``; None before the first one.

    Raises:
        InputError: the URL cannot be read.
        LogError: the database cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._options = _options(url)
        self._connection: psycopg.Connection | None = None
        self._refused_until, self._reason = 0.0, ""
        self.fails = False
        self.written_at: float | None = None
        # Seconds that the server's clock is ahead of this machine's.
        self._skew = 0.0
        self.read("SELECT 1")

    def now(self) -> float:
        """Return the seconds since 1970 by the server's clock, which is one for all machines."""
        return time.time() + self._skew

    def close(self) -> None:
        """Close it."""
        if self._connection is not None:
            self._connection.close()

    def read(self, query: str, *values: Any) -> list[tuple]:
        """Return the rows of a query; asked again where the server was started again since.

        Raises:
            LogError: it failed.
        """
        was_open = self._connection is not None and not self._connection.closed
        try:
            return self._fetch(query, values)
        except LogError:
            # The server may have been started again since the last call.
            if not was_open or self._connection is None or not self._connection.closed:
                raise
        return self._fetch(query, values)

    def write(
        self, write: Callable[[psycopg.Connection], Any], lock: int, mark: tuple[str, Sequence[Any]]
    ) -> Any:
        """Write all of it or nothing, and remember whether it could be written.

        Args:
            write: sends statements, and returns None or what returns the result once they ran.
            lock: number of an advisory lock, which it shares with other writers; each statement
                sees what was there before that who had it alone.
            mark: query, with its values, whose one value is true only where all of it is there.

        Raises:
            Conflict: others have written meanwhile.
            InputError: PostgreSQL cannot keep what is written.
            LogError: it failed; nothing was written, or nobody says.
        """
        self.written_at, self.fails = time.monotonic(), True
        try:
            with self.lend() as connection:
                try:
                    # What is sent together takes one way there and back.
                    with connection.pipeline():
                        connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
                        about = connection.execute(_ABOUT, (lock,))
                        finish = write(connection)
                    found = finish() if callable(finish) else None
                    ((_, transaction, now),) = about.fetchall()
                    self._set_clock(now)
                except BaseException:
                    with suppress(psycopg.Error):
                        connection.execute("ROLLBACK")
                    raise
                self._commit(connection, transaction, mark)
        except (Conflict, InputError):
            self.fails = False
            raise
        self.fails = False
        return found

    @contextmanager
    def lend(self) -> Iterator[psycopg.Connection]:
        """Lend the connection, opened where it is not, and say what fails.

        Raises:
            Conflict: others have written meanwhile.
            InputError: PostgreSQL cannot keep what is written.
            LogError: anything else that PostgreSQL says.
        """
        if time.monotonic() < self._refused_until:
            raise LogError(self._reason)
        present = self._connection
        if present is not None and present.info.transaction_status != TransactionStatus.IDLE:
            # A transaction that could not be ended shows what nobody else will ever see.
            present.close()
        opened = present is not None and not present.closed
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
            elif isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
                # Another server may be the one that takes writes by now, and a connection keeps
                # the settings that it was opened with.
                self.close()
            raise LogError(self._reason) from error

    @contextmanager
    def lend_for(self, seconds: float) -> Iterator[psycopg.Connection]:
        """Lend the connection for a transaction that may take so long; else as :meth:`lend`."""
        with self.lend() as connection, connection.transaction():
            connection.execute(f"SET LOCAL statement_timeout = {round(1000 * seconds)}")
            assert isinstance(connection, _Impatient)
            connection.patience = seconds
            try:
                yield connection
            finally:
                connection.patience = _PATIENCE

    def _fetch(self, query: str, values: tuple) -> list[tuple]:
        with self.lend() as connection:
            return connection.execute(query, values).fetchall()

    def _open(self) -> psycopg.Connection:
        connection = _Impatient.connect(**self._options, autocommit=True)
        # Whatever the server's default is; what is stronger stays.
        connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false) "
            "WHERE current_setting('synchronous_commit') IN ('off', 'local')"
        )
        connection.execute(f"SET statement_timeout = {round(1000 * _PATIENCE)}")
        ((now,),) = connection.execute(f"SELECT {_NOW}").fetchall()
        self._set_clock(now)
        return connection

    def _set_clock(self, now: float) -> None:
        """Go by the server's clock, and say where this machine's is far from it."""
        before, self._skew = self._skew, now - time.time()
        if abs(self._skew) > _SKEW >= abs(before):
            _log.warning(
                "this machine's clock is %.0f s %s that of PostgreSQL, which counts; mend it",
                *(abs(self._skew), "behind" if self._skew > 0 else "ahead of"),
            )

    def _commit(
        self, connection: psycopg.Connection, transaction: str, mark: tuple[str, Sequence[Any]]
    ) -> None:
        """Commit; where the connection breaks meanwhile, find out what became of it.

        Raises:
            LogError: nothing was written, or nobody says.
        """
        try:
            said = connection.execute("COMMIT").statusmessage
        except psycopg.OperationalError as error:
            connection.close()
            was_written = self._was_written(transaction, mark)
            if was_written:
                return
            if was_written is not None:
                raise
            raise LogError(
                f"the event log: {_first_line(error)}; whether the events were taken is not known: "
                "send them again with the same id or Idempotency-Key"
            ) from error
        if said != "COMMIT":
            # That is how PostgreSQL ends a transaction in which something failed: without an error.
            raise LogError(f"the event log: PostgreSQL answers COMMIT by {said}; nothing was taken")

    def _was_written(self, transaction: str, mark: tuple[str, Sequence[Any]]) -> bool | None:
        """Return whether a transaction was committed; None where the server does not say in time.

        A server that crashes gives the numbers of transactions that are lost to others: that a
        number was committed proves nothing, what was written does.
        """
        patient_until = time.monotonic() + _RECOVERY
        while time.monotonic() < patient_until:
            with suppress(psycopg.Error), self._open() as connection:
                state = _state_of(transaction, connection)
                ((is_there,),) = connection.execute(*mark).fetchall()
                if is_there:
                    return True
                if state != "in progress":
                    return False if state == "aborted" else None
            time.sleep(0.1)
        return None


def _state_of(transaction: str, connection: psycopg.Connection) -> str | None:
    """Return what a server knows of a number: "committed", "aborted", "in progress"; None: nothing.

    One that it has not given was lost, unless it only follows another server.
    """
    query = "SELECT pg_xact_status(%s::text::xid8)"
    try:
        ((state,),) = connection.execute(query, (transaction,)).fetchall()
        return state
    except psycopg.errors.InvalidParameterValue:
        ((follows,),) = connection.execute("SELECT pg_is_in_recovery()").fetchall()
        return "in progress" if follows else "aborted"


class _Impatient(psycopg.Connection):
    """A connection that is closed where the server does not answer in time, as one that hangs."""

    patience = _PATIENCE

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Wait for what the server sends.

        Raises:
            psycopg.OperationalError: it sent nothing in time.
        """
        try:
            # Longer than the server's own limit, which leaves the connection usable.
            return super().wait(gen, interval, timeout or 1.5 * self.patience)
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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
