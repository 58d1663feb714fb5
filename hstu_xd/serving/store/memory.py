"""States in the memory of this process, shared by its sessions."""

from collections.abc import Sequence
from threading import Lock

from hstu_xd.serving.codec import revision
from hstu_xd.serving.store.base import Write


class MemoryStore:
    """A :class:`StateStore` that lasts as long as the process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = Lock()

    def revisions(self, users: Sequence[str]) -> list[bytes]:
        """Revision of each user's value, empty where there is none."""
        return [revision(value) for value in self.get(users)]

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        """Each user's value, None where there is none."""
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
