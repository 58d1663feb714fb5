"""What every log of events does, whichever database keeps it.

A log knows a version of every user's events, which changes whenever they do. A writer names the
versions that it has judged its events by; where another process has written to one of the users
since, nothing is written. So any number of processes may share a log that allows for it.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from hstu_xd.errors import HstuXdError

# Bytes of a version: two writes never get the same.
_VERSION = 16


class LogError(HstuXdError):
    """The log cannot be read or written; nothing was taken."""


class Conflict(LogError):
    """Another process has written to the same users in between; nothing was taken."""


class Event(NamedTuple):
    """An event as it is logged: the item is the catalogue's raw token."""

    user: str
    item: str
    timestamp: int


class Keyed(NamedTuple):
    """An event that a client gave a key, by which it is known when it comes again."""

    user: str
    key: str
    item: str
    timestamp: int


class Logged(NamedTuple):
    """What a log has of a user, all of it at the same time.

    Attributes:
        version: of the user's events; empty where there never were any.
        restarted: whether the user was ever forgotten, so that histories from elsewhere are hidden.
        hidden: items and times of events of the prepared store that were removed.
        events: oldest first; all of them, or the last ones.
    """

    version: bytes
    restarted: bool
    hidden: frozenset[tuple[str, int]]
    events: Sequence[Event]


class EventLog(Protocol):
    """Append-only but for what is removed; safe on disk before a method that writes returns.

    One thread of a process at a time uses it. Every method raises :class:`LogError` where the
    database fails.

    Attributes:
        upcoming: the version that users of the next :meth:`add` will have.
        is_shared: whether other processes may write to it.
    """

    upcoming: bytes
    is_shared: bool

    @property
    def fails(self) -> bool:
        """Return whether the last write failed."""
        ...

    @property
    def written_at(self) -> float | None:
        """Return when the last write was, by ``time.monotonic``; None before the first one."""
        ...

    def now(self) -> float:
        """Return the seconds since 1970 by the clock that all who write to the log go by."""
        ...

    def add(
        self,
        events: Sequence[Event],
        keys: Sequence[Keyed] = (),
        versions: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write events and the new versions of their users: all of them, or none.

        Args:
            events: in order.
            keys: those of the events that have a key.
            versions: what each of the users must have now; None: whatever they have.

        Raises:
            Conflict: a user has another version, or a key is known.
            LogError: there is no room, or the database fails.
        """
        ...

    def forget(self, user: str) -> None:
        """Remove a user's events.

        The name stays, with the note that histories from elsewhere are hidden.
        """
        ...

    def remove(self, event: Event, *, hide: bool) -> int:
        """Remove one event, as often as it is there; its keys stay known, without what they were.

        Args:
            event: what to remove.
            hide: note that the prepared store has it too.

        Returns:
            How often it was there.
        """
        ...

    def probe(self) -> None:
        """Write something, which changes nothing."""
        ...

    def read(self, users: Sequence[str], last: int | None = None) -> list[Logged]:
        """Return what is known of users, with all of their events or the last ones."""
        ...

    def events_of_keys(self, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Event]:
        """Return the events that came with keys of users; keys that are new are left out.

        The item is empty where the event was removed.
        """
        ...

    def count(self, event: Event) -> int:
        """Return how often the log has an event."""
        ...

    def users_from(self, user: str, limit: int) -> list[str]:
        """Return the names of at most ``limit`` users with events, in order, from a text on."""
        ...

    def num_bytes(self) -> int:
        """Count the bytes on disk, as far as they are known."""
        ...

    def close(self) -> None:
        """Let go of file or connection."""
        ...


def new_version() -> bytes:
    """Draw a version that no user has had."""
    return secrets.token_bytes(_VERSION)
