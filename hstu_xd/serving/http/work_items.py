"""What requests ask of the thread that owns the session."""

from collections.abc import Sequence
from dataclasses import dataclass

from hstu_xd.serving.http.event_log import Event


@dataclass(frozen=True)
class Append:
    """Take events. Result: an :class:`Outcome`.

    Attributes:
        events: in order.
        keys: by which each is known when it comes again; None: it has none.
        partial: take the others where some are refused; else none are taken then.
    """

    events: Sequence[Event]
    keys: Sequence[str | None]
    partial: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of the events of a request.

    Attributes:
        accepted: indices of those that are new.
        repeated: how many were known already.
        refused: index of each of the others, and why.
    """

    accepted: Sequence[int]
    repeated: int
    refused: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Remove:
    """Remove one event of a user. Result: how often it was there."""

    event: Event


@dataclass(frozen=True)
class Probe:
    """Write to the log, which changes nothing. Result: None."""


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


Job = Append | Remove | Probe | Recommend | Score | ReadHistory | ListUsers | Forget

# What an event adds to the cost of a job, in users.
_EVENT = 0.1


def cost_of(job: Job) -> float:
    """Return about how much work a job is; one is a user who is asked for one domain."""
    if isinstance(job, Append):
        return len({event.user for event in job.events}) + _EVENT * len(job.events)
    if isinstance(job, Recommend):
        return 1 + _EVENT * (len(job.domains) - 1)
    return 1.0
