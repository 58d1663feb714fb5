"""What requests ask of the thread that owns the session."""

from collections.abc import Sequence
from dataclasses import dataclass

from hstu_xd.serving.http.event_log import Event


@dataclass(frozen=True)
class Append:
    """Take events, all or none. Result: None.

    Attributes:
        events: in order.
        item_ids: the items' ids, one an event.
    """

    events: Sequence[Event]
    item_ids: Sequence[int]


@dataclass(frozen=True)
class Recommend:
    """Best items of domains. Result: for each domain (item id, score) pairs, best first."""

    user: str
    domains: Sequence[int]
    timestamp: int | None
    k: int
    exclude_seen: bool


@dataclass(frozen=True)
class Score:
    """Scores of items of a domain. Result: a list of them."""

    user: str
    domain: int
    timestamp: int | None
    item_ids: Sequence[int]


@dataclass(frozen=True)
class ReadHistory:
    """A user's last events. Result: list of :class:`Event`, oldest first."""

    user: str
    limit: int


@dataclass(frozen=True)
class ListUsers:
    """Users whose names begin with a text. Result: a list of names, in order."""

    prefix: str
    limit: int


@dataclass(frozen=True)
class Forget:
    """Remove a user. Result: whether anything was known."""

    user: str


Job = Append | Recommend | Score | ReadHistory | ListUsers | Forget

# What an event adds to the cost of a job, in users.
_EVENT = 0.1


def cost_of(job: Job) -> float:
    """Return about how much work a job is; one is a user who is asked for one domain."""
    if isinstance(job, Append):
        return len({event.user for event in job.events}) + _EVENT * len(job.events)
    if isinstance(job, Recommend):
        return 1 + _EVENT * (len(job.domains) - 1)
    return 1.0
