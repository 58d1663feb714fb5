"""States in a SQLite file: the embedded store on disk."""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hstu_xd.serving.codec import revision
from hstu_xd.serving.store.base import StoreError, Write

_TABLE = """
CREATE TABLE IF NOT EXISTS states (user TEXT PRIMARY KEY, revision BLOB, value BLOB) WITHOUT ROWID
"""
# Seconds that one process waits for another to finish writing.
_PATIENCE = 30.0


class SQLiteStore:
    """A :class:`StateStore` in one file, which several processes of one machine may share.

    Writes go through a write-ahead log: a process that is killed loses nothing that was stored and
    leaves no half value; a machine that loses power may lose the latest ones.

    Args:
        path: the file; made where it is not there. Its folder must be on a local disk.

    Raises:
        StoreError: the file cannot be opened, or is not a database.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._explained():
            self._connection = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
            self._prepare()

    def revisions(self, users: Sequence[str]) -> list[bytes]:
        """Revision of each user's value, empty where there is none."""
        return [found or b"" for found in self._column("revision", users)]

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        """Each user's value, None where there is none."""
        return self._column("value", users)

    def put(self, writes: Sequence[Write]) -> list[bool]:
        """Store each value where the present one is still the expected one, in one transaction."""
        with self._explained(), self._transaction():
            return [self._put(*write) for write in writes]

    def delete(self, user: str) -> bool:
        """Remove a user's value; returns whether there was one."""
        with self._explained():
            done = self._connection.execute("DELETE FROM states WHERE user = ?", (user,))
        return done.rowcount > 0

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _prepare(self) -> None:
        # Of several that switch a new file to the log at once, SQLite lets none wait for another.
        patient_until = time.monotonic() + _PATIENCE
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > patient_until:
                    raise
                time.sleep(0.01)
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute(_TABLE)

    def _column(self, name: str, users: Sequence[str]) -> list[bytes | None]:
        query = f"SELECT {name} FROM states WHERE user = ?"
        with self._explained():
            rows = [self._connection.execute(query, (user,)).fetchone() for user in users]
        return [None if row is None else row[0] for row in rows]

    def _put(self, user: str, value: bytes, expected: bytes) -> bool:
        new = revision(value)
        if expected:
            command = "UPDATE states SET revision = ?, value = ? WHERE user = ? AND revision = ?"
            done = self._connection.execute(command, (new, value, user, expected))
        else:
            command = "INSERT OR IGNORE INTO states (revision, value, user) VALUES (?, ?, ?)"
            done = self._connection.execute(command, (new, value, user))
        return done.rowcount > 0

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error
