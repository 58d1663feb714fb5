"""The session with its state store, and the session without one while the store is gone."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.codec import REVISION
from hstu_xd.serving.http.engine import Session
from hstu_xd.serving.http.settings import StateSettings, shown
from hstu_xd.serving.stores import RedisStore, SQLiteStore, StateStore, StoreError, Write

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Seconds between attempts to reach a store that is gone.
_RETRY = 1.0
# No user has this name, so that it can be written.
_PROBE = ""
# Seconds that Redis may take to answer: requests wait for it meanwhile.
_PATIENCE = 2.0
# Wait at least this many times the duration of the last attempt before retrying.
_RESPITE = 20


class FailoverSession:
    """A session over the store of the settings.

    With ``when_store_fails = "rebuild"`` a session without store takes over when the store fails;
    it rebuilds states from the events. Once the store answers again a new session reads it, which
    refuses states that the events have overtaken.

    Args:
        make: makes a session over a store, or without one.
        settings: where the states are.

    Attributes:
        session: the one that answers now.

    Raises:
        InputError: no such kind of store.
        StoreError: the store fails from the start, and requests are to be refused then.
    """

    def __init__(
        self, make: Callable[[StateStore | None], Session], settings: StateSettings
    ) -> None:
        self._make, self._rebuilds = make, settings.when_store_fails == "rebuild"
        self._store = open_store(settings.store, settings.ttl)
        self._without, self._retry_at = False, 0.0
        self._forgotten: set[str] = set()
        self.store_state = "memory" if self._store is None else "ok"
        try:
            if self._store is not None:
                _probe(self._store)
            self.session = make(self._store)
        except StoreError as error:
            self._go_without(error)

    def run(self, call: Callable[[Session], T]) -> T:
        """Call with the session; again with the one without store where the store fails.

        Raises:
            StoreError: the store failed, and requests are to be refused then.
        """
        if self._without and self._is_back():
            self.session, self._without = self._make(self._store), False
        try:
            found = call(self.session)
        except StoreError as error:
            self._go_without(error)
            return call(self.session)
        # Without it requests are refused that need it; others are answered from memory.
        if not self._without and (self.store_state != "gone" or self._is_back()):
            self._delete_forgotten()
        return found

    def adopt(self, make: Callable[[StateStore | None], Session], session: Session) -> None:
        """Go on with sessions of another model; the store, and what is known of it, stay.

        Args:
            make: makes a session over a store, or without one.
            session: one that is made already, over :attr:`store`.
        """
        self._make = make
        self.session = make(None) if self._without else session

    @property
    def store(self) -> StateStore | None:
        """Return where states are kept beyond memory, whether or not it is gone."""
        return self._store

    def forget(self, user: str) -> None:
        """Drop a user's state; from a store that is gone it is removed once it is back.

        Raises:
            StoreError: the store failed; there is no state in memory any more.
        """
        if self._store is not None:
            self._forgotten.add(user)
        self.session.forget(user)
        if not self._without:
            self._forgotten.discard(user)

    def probe(self) -> None:
        """Find out whether the store takes writes, where requests are refused without it.

        Raises:
            StoreError: it does not.
        """
        if self._store is not None and not self._rebuilds:
            self.store_state = "gone"
            _probe(self._store)
            self.store_state = "ok"

    @property
    def refuses(self) -> bool:
        """Return whether the store is gone and requests are refused therefore."""
        return self.store_state == "gone" and not self._rebuilds

    def close(self) -> None:
        """Close the store."""
        close = getattr(self._store, "close", None)
        if close is not None:
            close()

    def _is_back(self) -> bool:
        """Return whether a store that was gone takes writes again; it is tried now and then."""
        assert self._store is not None
        start = time.monotonic()
        if start < self._retry_at:
            return False
        try:
            _probe(self._store)
        except StoreError:
            now = time.monotonic()
            self._retry_at = now + max(_RETRY, _RESPITE * (now - start))
            return False
        _log.warning("the state store is back")
        self.store_state = "ok"
        return True

    def _delete_forgotten(self) -> None:
        """Remove what the store kept of users who were forgotten while it was gone."""
        with suppress(StoreError):
            while self._store is not None and self._forgotten:
                user = next(iter(self._forgotten))
                # Who has come back has a new state, which is made again from the events.
                self._store.delete(user)
                self.session.release([user])
                self._forgotten.discard(user)

    def _go_without(self, error: StoreError) -> None:
        """Take a session without store, unless requests are to be refused: then raise."""
        self.store_state, self._retry_at = "gone", time.monotonic() + _RETRY
        if not self._rebuilds:
            raise error
        _log.warning("%s; states are rebuilt in memory until it is back", error)
        self.session, self._without = self._make(None), True


def open_store(name: str, ttl: int | None = None) -> StateStore | None:
    """Open the store of a name; None for "memory".

    Args:
        name: see :class:`hstu_xd.serving.http.settings.StateSettings`.
        ttl: seconds that Redis keeps a state.

    Raises:
        InputError: no such kind of store.
        HstuXdError: redis-py is not installed.
        StoreError: a file that cannot be opened.
    """
    if name == "memory":
        return None
    kind, _, place = name.partition(":")
    if kind == "sqlite" and place:
        return SQLiteStore(Path(place))
    if kind in ("redis", "rediss", "unix") and place:
        try:
            from redis import Redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ModuleNotFoundError as error:
            raise HstuXdError(
                'redis is not installed; pip install "hstu-xd[serving]", or another --store'
            ) from error
        try:
            client = Redis.from_url(
                name,
                socket_timeout=_PATIENCE,
                socket_connect_timeout=_PATIENCE,
                retry=Retry(NoBackoff(), 0),
            )
            client.connection_pool.make_connection()  # refuses options that there are not
        except (ValueError, TypeError):
            # Neither the name nor what it says of it: both may have the password.
            raise InputError(
                f"store {shown(name)!r}: the URL cannot be read; redis://[:PASSWORD@]HOST:PORT/DB "
                "is needed, with %23, %2F, %3A and %40 for # / : @ in a password"
            ) from None
        return RedisStore(client, ttl=ttl)
    raise InputError(
        f"store {shown(name)!r}: memory, sqlite:FILE or redis://HOST:PORT/DB is needed"
    )


def check_store(name: str) -> None:
    """Find out whether a store can be used, and leave nothing there.

    Args:
        name: as in :func:`open_store`.

    Raises:
        InputError: no such kind of store.
        HstuXdError: redis-py is not installed.
        StoreError: it cannot be written to.
    """
    store = open_store(name)
    if store is not None:
        _probe(store)


def _probe(store: StateStore) -> None:
    """Write to a store, as reading alone says nothing of one that has no room.

    Raises:
        StoreError: it failed.
    """
    store.revisions([_PROBE])
    store.put([Write(_PROBE, bytes(REVISION.stop), b"")])
    store.delete(_PROBE)
