"""Stores of user states beyond a session: in memory, in a SQLite file, in Redis.

A store holds one value a user. It replaces a value only for a writer that names the present one, so
that no process overwrites what it has not read.
"""

import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.codec import REVISION, revision

if TYPE_CHECKING:
    from redis import Redis


class StoreError(HstuXdError):
    """A store cannot be reached, has no room, or holds what cannot be used; nothing was written."""


class Write(NamedTuple):
    """A value to take the place of another.

    Attributes:
        user: whose.
        value: one of :func:`hstu_xd.serving.codec.encode_state`.
        expected: revision of the value that it replaces; empty where there must be none.
    """

    user: str
    value: bytes
    expected: bytes


class StateStore(Protocol):
    """One value a user. Every method raises :class:`StoreError` where the store fails."""

    def revisions(self, users: Sequence[str]) -> list[bytes]:
        """Return the revision of each user's value, see :func:`hstu_xd.serving.codec.revision`.

        Empty where there is no value.
        """
        ...

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        """Return each user's value, None where there is none."""
        ...

    def put(self, writes: Sequence[Write]) -> list[bool]:
        """Store values of different users, each where the present one is still the expected one.

        Returns:
            For each whether it was stored; each value is stored whole or not at all.
        """
        ...

    def delete(self, user: str) -> bool:
        """Remove a user's value; returns whether there was one."""
        ...


class MemoryStore:
    """A :class:`StateStore` that lasts as long as the process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = Lock()

    def revisions(self, users: Sequence[str]) -> list[bytes]:
        """Return the revision of each user's value, empty where there is none."""
        return [revision(value) for value in self.get(users)]

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        """Return each user's value, None where there is none."""
        return [self._values.get(user) for user in users]

    def put(self, writes: Sequence[Write]) -> list[bool]:
        """Store each value where the present one is still the expected one."""
        return [self._put(*write) for write in writes]

    def delete(self, user: str) -> bool:
        """Remove a user's value; returns whether there was one."""
        return self._values.pop(user, None) is not None

    def _put(self, user: str, value: bytes, expected: bytes) -> bool:
        with self._lock:
            as_expected = revision(self._values.get(user)) == expected
            if as_expected:
                self._values[user] = value
        return as_expected


def keep_private(file: Path) -> None:
    """Make a file that only its owner reads, or keep an existing one from everybody else.

    What a group may read of an existing file it goes on reading. SQLite's other files have the mode
    of the first one. Where the file cannot be made, whoever opens it says so.
    """
    with suppress(OSError):
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & ~0o640:
            file.chmod(mode & 0o640)


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
            keep_private(path)
            self._connection = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
            self._prepare()

    def revisions(self, users: Sequence[str]) -> list[bytes]:
        """Return the revision of each user's value, empty where there is none."""
        return [found or b"" for found in self._column("revision", users)]

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        """Return each user's value, None where there is none."""
        return self._column("value", users)

    def put(self, writes: Sequence[Write]) -> list[bool]:
        """Store each value where the present one is still the expected one, in one transaction."""
        with self._explained(), self._transaction():
            return [self._put(*write) for write in writes]

    def delete(self, user: str) -> bool:
        """Remove a user's value, whose bytes are overwritten; returns whether there was one."""
        with self._explained():
            done = self._connection.execute("DELETE FROM states WHERE user = ?", (user,))
            # What is not merged yet holds the value as well. Where another process reads at this
            # moment, it is merged the next time.
            with suppress(sqlite3.Error):
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
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
        self._connection.execute("PRAGMA secure_delete=ON")
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


# Replaces a value whose revision is the expected one. What is not there or too short has none.
_COMPARE_AND_SET = f"""
local present = redis.call('GETRANGE', KEYS[1], {REVISION.start}, {REVISION.stop - 1})
if #present < {REVISION.stop - REVISION.start} then present = '' end
if present ~= ARGV[1] then return 0 end
if ARGV[3] == '0' then
  redis.call('SET', KEYS[1], ARGV[2])
else
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
end
return 1
"""


class RedisStore:
    """A :class:`StateStore` in Redis; the requests of one call travel together.

    How much survives a crash of Redis itself is Redis's own setting (its append-only file).

    Args:
        client: of redis-py (``pip install hstu-xd[serving]``), with ``decode_responses`` off.
        prefix: of all keys.
        ttl: seconds after its last write that a value is kept; None: for good.

    Raises:
        InputError: a time below a second.
    """

    def __init__(
        self, client: "Redis", *, prefix: str = "hstu-xd:", ttl: int | None = None
    ) -> None:
        if ttl is not None and ttl < 1:
            raise InputError(f"ttl is {ttl}; at least 1 second, or None to keep values for good")
        self._client, self._prefix, self._ttl = client, prefix, ttl or 0
        self._compare_and_set = client.register_script(_COMPARE_AND_SET)

    def revisions(self, users: Sequence[str]) -> list[bytes]:
        """Return the revision of each user's value, empty where there is none."""
        with self._explained():
            pipeline = self._client.pipeline(transaction=False)
            for user in users:
                pipeline.getrange(self._prefix + user, REVISION.start, REVISION.stop - 1)
            found = _results(pipeline)
        whole = REVISION.stop - REVISION.start
        return [present if len(present) == whole else b"" for present in found]

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        """Return each user's value, None where there is none."""
        with self._explained():
            pipeline = self._client.pipeline(transaction=False)
            for user in users:
                pipeline.get(self._prefix + user)
            return _results(pipeline)

    def put(self, writes: Sequence[Write]) -> list[bool]:
        """Store each value where the present one is still the expected one."""
        with self._explained():
            pipeline = self._client.pipeline(transaction=False)
            for user, value, expected in writes:
                arguments = [expected, value, self._ttl]
                self._compare_and_set([self._prefix + user], arguments, client=pipeline)
            return [stored == 1 for stored in _results(pipeline)]

    def delete(self, user: str) -> bool:
        """Remove a user's value; returns whether there was one."""
        with self._explained():
            return bool(self._client.delete(self._prefix + user))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from redis import RedisError

        try:
            yield
        except RedisError as error:
            raise StoreError(f"Redis: {error}; is it up, and is there room?") from error


def _results(pipeline: Any) -> list[Any]:
    """Return what the commands of a pipeline gave.

    Raises:
        RedisError: the first error as Redis says it. By itself redis-py adds the whole command, and
            with it the bytes of a state.
    """
    found = pipeline.execute(raise_on_error=False)
    for each in found:
        if isinstance(each, Exception):
            raise each
    return found
