"""What a session asks of a store: values by user, replaced only by whom knows the present one."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from hstu_xd.errors import HstuXdError


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
        """Revision of each user's value, see :func:`hstu_xd.serving.codec.revision`.

        Empty where there is no value.
        """
        ...

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        """Each user's value, None where there is none."""
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
