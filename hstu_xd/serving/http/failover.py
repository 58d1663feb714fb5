"""The session with its state store, and the session without one while the store is gone."""

import logging
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.http.settings import StateSettings
from hstu_xd.serving.session import EncoderSession
from hstu_xd.serving.stores import RedisStore, SQLiteStore, StateStore, StoreError

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Seconds between attempts to reach a store that is gone.
_RETRY = 1.0
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
        self, make: Callable[[StateStore | None], EncoderSession], settings: StateSettings
    ) -> None:
        self._make, self._rebuilds = make, settings.when_store_fails == "rebuild"
        self._store = open_store(settings.store, settings.ttl)
        self._retry_at: float | None = None
        self.store_state = "memory" if self._store is None else "ok"
        try:
            if self._store is not None:
                self._store.revisions([""])
            self.session = make(self._store)
        except StoreError as error:
            self._go_without(error)

    def run(self, call: Callable[[EncoderSession], T]) -> T:
        """Call with the session; again with the one without store where the store fails.

        Raises:
            StoreError: the store failed, and requests are to be refused then.
        """
        if self._retry_at is not None and time.monotonic() >= self._retry_at:
            self._return()
        try:
            found = call(self.session)
        except StoreError as error:
            self._go_without(error)
            return call(self.session)
        if self._retry_at is None and self._store is not None:
            self.store_state = "ok"
        return found

    def forget(self, user: Hashable) -> None:
        """Drop a user's state.

        Raises:
            StoreError: the store failed; there is no state in memory any more.
        """
        self.session.forget(user)

    def close(self) -> None:
        """Close the store."""
        close = getattr(self._store, "close", None)
        if close is not None:
            close()

    def _go_without(self, error: StoreError) -> None:
        """Take a session without store, unless requests are to be refused: then raise."""
        self.store_state = "gone"
        if not self._rebuilds:
            raise error
        _log.warning("%s; states are rebuilt in memory until it is back", error)
        self.session, self._retry_at = self._make(None), time.monotonic() + _RETRY

    def _return(self) -> None:
        assert self._store is not None
        start = time.monotonic()
        try:
            self._store.revisions([""])
        except StoreError:
            now = time.monotonic()
            self._retry_at = now + max(_RETRY, _RESPITE * (now - start))
            return
        _log.warning("the state store is back")
        self.session, self._retry_at = self._make(self._store), None


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
        except ValueError as error:
            raise InputError(f"store {name!r}: {error}") from error
        return RedisStore(client, ttl=ttl)
    raise InputError(f"store {name!r}: memory, sqlite:FILE or redis://HOST:PORT/DB is needed")
