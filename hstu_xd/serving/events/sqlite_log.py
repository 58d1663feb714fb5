"""A log of events in one SQLite file, which one process owns."""

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Conflict, Event, Keyed, LogError, Logged, new_version
from hstu_xd.serving.stores import keep_private

_FORMAT = 1
_TABLES = (
    "CREATE TABLE events (number INTEGER PRIMARY KEY, user TEXT NOT NULL, item TEXT NOT NULL, "
    "timestamp INTEGER NOT NULL)",
    "CREATE INDEX events_of_users ON events (user, number)",
    "CREATE TABLE users (user TEXT PRIMARY KEY, version BLOB NOT NULL, "
    "restarted INTEGER NOT NULL) WITHOUT ROWID",
)
# Logs of earlier versions lack them: keys by which clients repeat a write, and events of the
# prepared store that were removed.
_LATER_TABLES = (
    "CREATE TABLE IF NOT EXISTS keys (user TEXT NOT NULL, key TEXT NOT NULL, item TEXT NOT NULL, "
    "timestamp INTEGER NOT NULL, PRIMARY KEY (user, key)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS hidden (user TEXT NOT NULL, item TEXT NOT NULL, "
    "timestamp INTEGER NOT NULL, PRIMARY KEY (user, item, timestamp)) WITHOUT ROWID",
)
_RENEW = (
    "INSERT INTO users VALUES (?, ?, 0) ON CONFLICT (user) DO UPDATE SET version = excluded.version"
)


class SQLiteLog:
    """An :class:`EventLog` in a file.

    One process at a time owns the file, and one thread at a time uses it.

    Args:
        path: the file, on a local disk; made where it is not there.

    Raises:
        InputError: another process owns the file, or it is no such log.
        LogError: the file cannot be opened.
    """

    is_shared = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.upcoming = new_version()
        self.fails = False
        self.written_at: float | None = None
        with self._explained():
            keep_private(path)
            self._connection = sqlite3.connect(
                path, timeout=1.0, isolation_level=None, check_same_thread=False
            )
            self._prepare()

    def add(
        self,
        events: Sequence[Event],
        keys: Sequence[Keyed] = (),
        versions: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write events and the new versions of their users: all of them, or none."""
        version, self.upcoming = self.upcoming, new_version()
        users = {event.user for event in events}
        with self._written():
            run = self._connection.executemany
            run("INSERT INTO events (user, item, timestamp) VALUES (?, ?, ?)", events)
            run("INSERT INTO keys VALUES (?, ?, ?, ?)", keys)
            rows = [(user, version) for user in users]
            if versions is None:
                run(_RENEW, rows)
                return
            expected = [(*row, versions[row[0]]) for row in rows]
            if run(f"{_RENEW} WHERE version = ?", expected).rowcount < len(users):
                raise Conflict(f"the event log {self.path}: a user's events have changed")

    def forget(self, user: str) -> None:
        """Remove a user's events; their bytes are overwritten, on disk too.

        The name stays, with the note that histories from elsewhere are hidden.
        """
        with self._written():
            for table in ("events", "keys", "hidden"):
                self._connection.execute(f"DELETE FROM {table} WHERE user = ?", (user,))
            row = user, new_version()
            self._connection.execute("INSERT OR REPLACE INTO users VALUES (?, ?, 1)", row)
        self._merge()

    def remove(self, event: Event, *, hide: bool) -> int:
        """Remove one event, as often as it is there, and return how often it was."""
        same = "WHERE user = ? AND item = ? AND timestamp = ?"
        with self._written():
            found = self._connection.execute(f"DELETE FROM events {same}", event).rowcount
            self._connection.execute(f"UPDATE keys SET item = '', timestamp = 0 {same}", event)
            if hide:
                self._connection.execute("INSERT OR IGNORE INTO hidden VALUES (?, ?, ?)", event)
            self._connection.execute(_RENEW, (event.user, new_version()))
        self._merge()
        return found

    def probe(self) -> None:
        """Write something, which changes nothing."""
        with self._written():
            self._connection.execute(f"PRAGMA user_version = {_FORMAT}")

    def read(self, users: Sequence[str], last: int | None = None) -> list[Logged]:
        """Return what is known of users, with all of their events or the last ones."""
        # Nobody else writes, so that these queries see the same.
        return [self._logged(user, -1 if last is None else last) for user in users]

    def events_of_keys(self, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Event]:
        """Return the events that came with keys of users; keys that are new are left out."""
        query = "SELECT user, item, timestamp FROM keys WHERE user = ? AND key = ?"
        found = {key: self._rows(query, *key) for key in keys}
        return {key: Event(*rows[0]) for key, rows in found.items() if rows}

    def count(self, event: Event) -> int:
        """Return how often the log has an event."""
        ((found,),) = self._rows(
            "SELECT count(*) FROM events WHERE user = ? AND item = ? AND timestamp = ?", *event
        )
        return found

    def users_from(self, user: str, limit: int) -> list[str]:
        """Return the names of at most ``limit`` users with events, in order, from a text on."""
        found: list[str] = []
        query = "SELECT min(user) FROM events WHERE user {} ?"
        ((name,),) = self._rows(query.format(">="), user)
        while name is not None and len(found) < limit:
            found.append(name)
            ((name,),) = self._rows(query.format(">"), name)
        return found

    def now(self) -> float:
        """Return the seconds since 1970 by this machine's clock."""
        return time.time()

    def num_bytes(self) -> int:
        """Count the bytes on disk, including what is not merged into the file yet."""
        files = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def close(self) -> None:
        """Merge everything into the one file and close it."""
        with self._explained():
            self._connection.close()

    def _prepare(self) -> None:
        run = self._connection.execute
        # Exclusive: what another process wrote would be missing from the states here.
        run("PRAGMA locking_mode = EXCLUSIVE")
        try:
            run("PRAGMA journal_mode = WAL")
            run("PRAGMA synchronous = FULL")
            run("PRAGMA secure_delete = ON")
            ((found,),) = run("PRAGMA user_version")
            ((tables,),) = run("SELECT count(*) FROM sqlite_master")
            if found == 0 and not tables:
                # All or nothing: who is killed in between must be able to start again.
                with self._transaction():
                    for table in _TABLES:
                        run(table)
                    run(f"PRAGMA user_version = {_FORMAT}")
            elif found != _FORMAT:
                raise InputError(
                    f"{self.path}: not an event log of this hstu-xd (format {found}, {_FORMAT} is "
                    "needed); give another --events"
                )
            with self._transaction():
                for table in _LATER_TABLES:
                    run(table)
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise InputError(
                    f"{self.path}: another process serves from this log; stop it, or give another "
                    "--events"
                ) from error
            raise

    def _merge(self) -> None:
        """Merge the write-ahead log, which holds deleted events as well, and overwrite it."""
        # If there is no room to merge it now, the next merge removes them.
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _logged(self, user: str, last: int) -> Logged:
        known = self._rows("SELECT version, restarted FROM users WHERE user = ?", user)
        if not known:
            return Logged(b"", False, frozenset(), ())
        ((version, restarted),) = known
        hidden = self._rows("SELECT item, timestamp FROM hidden WHERE user = ?", user)
        rows = self._rows(
            "SELECT user, item, timestamp FROM events WHERE user = ? ORDER BY number DESC LIMIT ?",
            user,
            last,
        )
        events = [Event(*row) for row in reversed(rows)]
        return Logged(version, bool(restarted), frozenset(hidden), events)

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Write all of it or nothing, and remember whether it could be written."""
        self.written_at, self.fails = time.monotonic(), True
        try:
            with self._explained(), self._transaction():
                yield
        except Conflict:
            self.fails = False
            raise
        self.fails = False

    def _rows(self, query: str, *values: str | int) -> list[tuple]:
        with self._explained():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # Some failures have ended the transaction already.
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise Conflict(f"the event log {self.path}: {error}") from error
        except (sqlite3.Error, OSError) as error:
            raise LogError(f"the event log {self.path}: {error}") from error
