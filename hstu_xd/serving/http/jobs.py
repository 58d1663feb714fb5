"""What requests ask for, in the names that clients use."""

from collections.abc import Sequence
from dataclasses import dataclass

from hstu_xd.serving.events.event_log import Event
from hstu_xd.serving.http.arrivals import Append


@dataclass(frozen=True)
class Remove:
    """Remove one event of a user. Result: how often it was there."""

    event: Event


@dataclass(frozen=True)
class Probe:
    """Write to the log, which changes nothing. Result: None."""


@dataclass(frozen=True)
class Found:
    """The result of a :data:`Question`.

    Attributes:
        rows: what its class says.
        version: of the user's events, by the log.
    """

    rows: list
    version: bytes


@dataclass(frozen=True)
class Recommend:
    """Best items of domains. Rows: for each domain (item, score) pairs, best first.

    Attributes:
        user: who is asked for.
        domains: names.
        timestamp: of the request; None: that of the user's last event.
        k: items of a domain, at most.
        exclude_seen: leave out items of the history; None: as the run was evaluated.
        goal: of towers; None: the only one, or a retrieval run, which has none.
    """

    user: str
    domains: Sequence[str]
    timestamp: int | None
    k: int
    exclude_seen: bool | None
    goal: str | None = None


@dataclass(frozen=True)
class Score:
    """Scores of items of a domain, both by their names. Rows: the scores."""

    user: str
    domain: str
    timestamp: int | None
    items: Sequence[str]


@dataclass(frozen=True)
class Rank:
    """Chances that candidates are taken. Rows: a list of them for each goal.

    Attributes:
        user: who is asked for.
        candidates: names of items.
        goals: names.
        timestamp: of the request, before which the history is read; None: right after the user's
            last event.
    """

    user: str
    candidates: Sequence[str]
    goals: Sequence[str]
    timestamp: int | None


@dataclass(frozen=True)
class ReadHistory:
    """A user's last events. Result: pairs of :class:`Event` and its domain, oldest first."""

    user: str
    limit: int


@dataclass(frozen=True)
class ReadLogged:
    """All that the log has of a user. Result: a :class:`Logged`."""

    user: str


@dataclass(frozen=True)
class ListUsers:
    """Users whose names begin with a text. Result: a list of names, in order."""

    prefix: str
    limit: int


@dataclass(frozen=True)
class Forget:
    """Remove a user. Result: whether anything was known."""

    user: str


Question = Recommend | Score | Rank
Job = Append | Remove | Probe | Question | ReadHistory | ReadLogged | ListUsers | Forget

# What an event adds to the cost of a job, in users, and a candidate that is ranked for a goal.
_EVENT, _CANDIDATE = 0.1, 0.01


def cost_of(job: Job) -> float:
    """Return about how much work a job is; one is a user who is asked for one domain."""
    if isinstance(job, Append):
        return len({event.user for event in job.events}) + _EVENT * len(job.events)
    if isinstance(job, Recommend):
        return 1 + _EVENT * (len(job.domains) - 1)
    if isinstance(job, Rank):
        return len(job.goals) * (1 + _CANDIDATE * len(job.candidates))
    return 1.0
