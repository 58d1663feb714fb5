"""States of users in memory, the least recently used ones dropped beyond a bound in bytes."""

from collections import OrderedDict
from collections.abc import Hashable

from hstu_xd.serving.state import UserState


class ResidentStates:
    """States by user, with the bytes they take.

    Args:
        max_bytes: bound on all states; None: no bound.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._states: OrderedDict[Hashable, tuple[UserState, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, user: Hashable) -> bool:
        return user in self._states

    def get(self, user: Hashable) -> UserState | None:
        """A user's state, now the most recently used."""
        if user not in self._states:
            return None
        self._states.move_to_end(user)
        return self._states[user][0]

    def keep(self, user: Hashable, state: UserState) -> None:
        """Keep a state, or count anew the bytes of one that was kept and has changed."""
        self.drop(user)
        size = state.num_bytes
        self._states[user] = state, size
        self.num_bytes += size

    def drop(self, user: Hashable) -> bool:
        """Drop a user; returns whether there was a state."""
        if user not in self._states:
            return False
        self.num_bytes -= self._states.pop(user)[1]
        return True

    def shrink(self) -> None:
        """Drop the least recently used users until the rest keeps to the bound."""
        while self._max_bytes is not None and self.num_bytes > self._max_bytes:
            self.drop(next(iter(self._states)))
