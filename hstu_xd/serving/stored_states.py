"""States in a store: read again when another process has written, written only when none has."""

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import torch

from hstu_xd.data.window import Window
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving.codec import RefusedState, decode_state, encode_state, fingerprint, revision
from hstu_xd.serving.state import UserState
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


@dataclass(frozen=True)
class Found:
    """What a store has of some users.

    Attributes:
        revisions: of each user's value; empty where there is none.
        states: of those values that were read, by user, whatever version of a history they are of.
        refused: users whose value cannot be used.
    """

    revisions: dict[Hashable, bytes] = field(default_factory=dict)
    states: dict[Hashable, UserState] = field(default_factory=dict)
    refused: set[Hashable] = field(default_factory=set)

    def usable(self, user: Hashable, held: UserState | None, *, versioned: bool) -> list[UserState]:
        """Return states of a user to go on from, the store's before the one in memory.

        Args:
            user: whose.
            held: the state in memory, if any.
            versioned: whether the histories have versions. Without them the store alone knows what
                another session has added, and a state in memory of another revision is not used.
        """
        if held is not None and not versioned and held.revision != self.revisions.get(user, b""):
            held = None
        return [state for state in (self.states.get(user), held) if state is not None]


class StoredStates:
    """A store, as a session of one checkpoint reads and writes it.

    Args:
        store: where the states are.
        model: whose states; those of another are refused.
        window: of the session, likewise.
        dtype: of keys and values, likewise.
        every: a state of a history that has versions is written once it has so many events more
            than what the store has: the history knows them. Any other state is always written.
    """

    def __init__(
        self,
        store: StateStore,
        model: CrossDomainHSTU,
        window: Window | int,
        dtype: torch.dtype,
        every: int,
    ) -> None:
        self._store, self._settings, self._dtype = store, model.settings, dtype
        self._checkpoint, self._every = fingerprint(model, window, dtype), every
        self._said: set[str] = set()

    def read(self, held: Mapping[Hashable, UserState | None]) -> Found:
        """Read what the store has of users, but for values that their states in memory came from.

        Args:
            held: users, and their states in memory, if any.

        Raises:
            InputError: a user that is not a string.
            StoreError: the store failed.
        """
        names = [_checked(user) for user in held]
        found = Found(dict(zip(names, self._store.revisions(names))))
        changed = [
            user
            for user, state in zip(names, held.values())
            if found.revisions[user] and (state is None or state.revision != found.revisions[user])
        ]
        for user, value in zip(changed, self._store.get(changed)):
            if value is None:
                continue
            try:
                state = decode_state(value, self._checkpoint, self._settings, self._dtype)
            except RefusedState as reason:
                self._say(str(reason))
                found.refused.add(user)
            else:
                found.revisions[user], found.states[user] = state.revision, state
        return found

    def save(self, states: Mapping[Hashable, UserState]) -> list[Hashable]:
        """Store states that it is time for, on top of those they were read from.

        Returns:
            Users that another writer has written to in between, where only the store knows what;
            their states are not stored. Where histories have versions a state that was not stored
            is right all the same, and is stored some other time.

        Raises:
            StoreError: the store failed.
        """
        writes = [
            Write(user, encode_state(state, self._checkpoint), state.revision)
            for user, state in zip(map(_checked, states), states.values())
            if not state.version or state.unsaved >= self._every
        ]
        if not writes:
            return []
        overtaken: list[str] = []
        for write, stored in zip(writes, self._store.put(writes)):
            if stored:
                states[write.user].revision, states[write.user].unsaved = revision(write.value), 0
            else:
                overtaken.append(write.user)
        versioned = [user for user in overtaken if states[user].version]
        for user, present in zip(versioned, self._store.revisions(versioned)):
            states[user].revision = present
        return [user for user in overtaken if not states[user].version]

    def delete(self, user: Hashable) -> bool:
        """Remove a user from the store; returns whether there was one."""
        return self._store.delete(_checked(user))

    def _say(self, reason: str) -> None:
        """Say why a state is not used: once, as after a new model it is so for every user."""
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("a stored state %s; it and others like it are made anew", reason)


def short_version(version: bytes) -> bytes:
    """Return a version of a history as states carry it: 16 bytes."""
    return blake2b(version, digest_size=16).digest()


def _checked(user: Hashable) -> str:
    if not isinstance(user, str):
        raise InputError(
            f"user {user!r} is not a string; a store knows users by strings: str(user)"
        )
    return user
