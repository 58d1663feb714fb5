"""States in a store: read again when another process has written, written only when none has."""

import logging
from collections.abc import Hashable, Mapping
from hashlib import blake2b
from typing import Protocol

import torch

from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving.codec import RefusedState, decode_state, encode_state, fingerprint, revision
from hstu_xd.serving.state import StateCache, UserState
from hstu_xd.serving.stores import StateStore, Write

_log = logging.getLogger(__name__)


class Versions(Protocol):
    """Names for what users' histories are now, kept beside the histories themselves.

    By them a session tells a state that is ahead of its history, or behind it: after a crash of
    one of the two, or because another process has written to the history.
    """

    def present(self, user: str) -> bytes:
        """Return the name of a user's history as it is."""
        ...

    def following(self, user: str) -> bytes:
        """Return its name once it has the events that are being appended."""
        ...


class StoredStates:
    """A store, as a session of one checkpoint reads and writes it.

    Args:
        store: where the states are.
        model: whose states; those of another are refused.
        window: of the session, likewise.
        dtype: of keys and values, likewise.
    """

    def __init__(
        self,
        store: StateStore,
        model: CrossDomainHSTU,
        window: int,
        dtype: torch.dtype,
    ) -> None:
        self._store, self._settings, self._dtype = store, model.settings, dtype
        self._checkpoint = fingerprint(model, window, dtype)
        self._said: set[str] = set()

    def refresh(
        self, versions: Mapping[Hashable, bytes], residents: StateCache
    ) -> dict[Hashable, bytes]:
        """Make what is in memory of some users what the store has of them.

        Args:
            versions: of the users' histories now; a stored state of another one cannot be used.
            residents: what is in memory.

        Returns:
            Revisions of values that cannot be used, by user; these users are not in memory.

        Raises:
            InputError: a user that is not a string.
            StoreError: the store failed.
        """
        names = [_checked(user) for user in versions]
        refused: dict[Hashable, bytes] = {}
        stale: dict[str, bytes] = {}
        for user, present in zip(names, self._store.revisions(names)):
            state = residents.get(user)
            if state is None or state.revision != present:
                residents.drop(user)
                stale[user] = present
        fetched = [user for user, present in stale.items() if present]
        for user, value in zip(fetched, self._store.get(fetched)):
            if value is None:
                continue
            try:
                made_of = self._joined(versions[user])
                state = decode_state(value, made_of, self._settings, self._dtype)
            except RefusedState as reason:
                self._say(str(reason))
                refused[user] = stale[user]
            else:
                state.version = versions[user]
                residents.keep(user, state)
        return refused

    def save(self, states: Mapping[Hashable, UserState]) -> list[Hashable]:
        """Store states on top of those they were read from.

        Returns:
            Users that another writer has written to in between; their states are not stored.

        Raises:
            StoreError: the store failed.
        """
        writes = [
            Write(user, encode_state(state, self._joined(state.version)), state.revision)
            for user, state in zip(map(_checked, states), states.values())
        ]
        lost: list[Hashable] = []
        for write, stored in zip(writes, self._store.put(writes)):
            if stored:
                states[write.user].revision = revision(write.value)
            else:
                lost.append(write.user)
        return lost

    def delete(self, user: Hashable) -> bool:
        """Remove a user from the store; returns whether there was one."""
        return self._store.delete(_checked(user))

    def _say(self, reason: str) -> None:
        """Say why a state is not used: once, as after a new model it is so for every user."""
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("a stored state %s; it and others like it are made anew", reason)

    def _joined(self, version: bytes) -> bytes:
        """Join the checkpoint's fingerprint and a history's version, if it has one, in one name."""
        if not version:
            return self._checkpoint
        return blake2b(version, key=self._checkpoint, digest_size=len(self._checkpoint)).digest()


def _checked(user: Hashable) -> str:
    if not isinstance(user, str):
        raise InputError(
            f"user {user!r} is not a string; a store knows users by strings: str(user)"
        )
    return user
