"""What a session is asked for one user, and what it answers."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Request:
    """What a user is asked for.

    Attributes:
        user: who.
        target_domains: (V,) domain ids, at least one.
        timestamp: time of the request; None: that of the last event.
    """

    user: Hashable
    target_domains: Sequence[int]
    timestamp: int | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a request is answered with.

    Attributes:
        vectors: (V, K) float, the user's unit vector for each domain.
        seen: (n,) int64, items that the user has met, those that left the window too.
        last_time: time of the user's last event; None without events.
    """

    vectors: Tensor
    seen: Tensor
    last_time: int | None
