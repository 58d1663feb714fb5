"""What requests ask for, and the owner of session and log, who does it in batches.

Every event is in the log before anybody is told that it was taken.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Conflict, Event, EventLog, Keyed, LogError
from hstu_xd.serving.http.arrivals import Append, Arrivals
from hstu_xd.serving.http.batching import Ticket
from hstu_xd.serving.http.failover import FailoverSession
from hstu_xd.serving.http.histories import Histories, Items
from hstu_xd.serving.requests import Answer, Request
from hstu_xd.serving.stores import StoreError

_log = logging.getLogger(__name__)


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


Tickets = Sequence[Ticket[Job]]

# How often events are judged where other processes write to the same users meanwhile.
_TRIES = 8


class BatchHandler:
    """Handles batches; of one batch first what is forgotten, then all events, then all reads.

    Jobs of a batch are under way at the same time, so that any order between them is right; events
    keep the order in which they came. Events go to the session, which checks them, then to the log,
    and only then is anybody told: whatever happens in between, they rebuild from the log as if they
    had never come.

    Args:
        sessions: states of users.
        histories: what they are rebuilt from.
        log: where events are kept.
        items: of the catalogue.
        arrivals: which events are taken.
    """

    def __init__(
        self,
        sessions: FailoverSession,
        histories: Histories,
        log: EventLog,
        items: Items,
        arrivals: Arrivals,
    ) -> None:
        self._sessions, self._histories, self._log = sessions, histories, log
        self._items, self._arrivals = items, arrivals

    def handle(self, tickets: Tickets) -> None:
        """Finish or fail every ticket."""
        for ticket in tickets:
            if isinstance(ticket.job, Forget | Remove | Probe):
                _settle([ticket], self._change)
        for kinds, handle in (
            (Append, self._append),
            (Recommend | Score, self._answer),
            (ReadHistory | ListUsers, self._read),
        ):
            _settle([ticket for ticket in tickets if isinstance(ticket.job, kinds)], handle)

    def close(self) -> None:
        """Close log and store."""
        self._sessions.close()
        self._log.close()

    def _append(self, tickets: Tickets) -> None:
        for left in reversed(range(_TRIES)):
            try:
                self._append_once(tickets)
                return
            except Conflict:
                if not left:
                    raise

    def _append_once(self, tickets: Tickets) -> None:
        new: list[tuple[Event, str | None]] = []
        jobs = [ticket.job for ticket in tickets if isinstance(ticket.job, Append)]
        arrived = self._arrivals.begin(jobs)
        for ticket in tickets:
            job = ticket.job
            assert isinstance(job, Append)
            ticket.error = None
            try:
                ticket.result = outcome = self._arrivals.judge(job, arrived)
            except InputError as error:
                ticket.error = error
            else:
                new += [(job.events[index], job.keys[index]) for index in outcome.accepted]
        if not new:
            return
        users = [event.user for event, _ in new]
        item_ids = [self._items.id_of(event.item) for event, _ in new]
        times = [event.timestamp for event, _ in new]
        keys = [Keyed(event.user, key, *event[1:]) for event, key in new if key is not None]
        versions = self._histories.versions(users)
        try:
            self._sessions.run(lambda session: session.append(users, item_ids, times))
            self._log.add([event for event, _ in new], keys, versions)
        except InputError:
            raise  # No state has changed.
        except Exception:
            # States may have the events: they are made anew from the log. What the store has of
            # them is of a version that the log never had; one that hangs would hang every user.
            self._sessions.session.release(users)
            raise

    def _answer(self, tickets: Tickets) -> None:
        for ticket in tickets:
            assert isinstance(ticket.job, Recommend | Score)
            self._arrivals.check_request(ticket.job.timestamp)
        requests = [_request(ticket.job) for ticket in tickets]
        self._histories.look(str(request.user) for request in requests)
        answers = self._sessions.run(lambda session: session.answer(requests))
        for ticket, request, answer in zip(tickets, requests, answers):
            last, asked = answer.last_time, request.timestamp
            if last is not None and asked is not None and asked < last:
                ticket.error = InputError(
                    f"timestamp {asked} is before the last event of user {request.user!r} at "
                    f"{last}; ask for a later time, or leave it out"
                )
                continue
            with torch.inference_mode():
                ticket.result = self._result(ticket.job, answer)

    def _result(self, job: Job, answer: Answer) -> list:
        session = self._sessions.session
        if isinstance(job, Score):
            items = torch.tensor(job.item_ids)
            return session.index.scores_of_one(answer.vectors[0], items).tolist()
        assert isinstance(job, Recommend)
        seen = answer.seen if job.exclude_seen else None
        return [
            session.index.best(vector, domain, job.k, seen)
            for vector, domain in zip(answer.vectors, job.domains)
        ]

    def _change(self, tickets: Tickets) -> None:
        for ticket in tickets:
            job = ticket.job
            if isinstance(job, Probe):
                self._log.probe()
                self._sessions.probe()
                continue
            assert isinstance(job, Forget | Remove)
            if isinstance(job, Forget):
                user, ticket.result = job.user, self._histories.forget(job.user)
            else:
                user, ticket.result = job.event.user, self._histories.remove(job.event)
            # A state that the store keeps is of a version that is no more.
            with suppress(StoreError):
                self._sessions.forget(user)

    def _read(self, tickets: Tickets) -> None:
        for ticket in tickets:
            job = ticket.job
            if isinstance(job, ReadHistory):
                ticket.result = self._histories.last_of(job.user, job.limit)
            elif isinstance(job, ListUsers):
                ticket.result = self._histories.users(job.prefix, job.limit)


def _request(job: Job) -> Request:
    if isinstance(job, Score):
        return Request(job.user, [job.domain], job.timestamp)
    assert isinstance(job, Recommend)
    return Request(job.user, job.domains, job.timestamp)


def _settle(tickets: Tickets, handle: Callable[[Tickets], None]) -> None:
    """Give every ticket an outcome; where one of several is at fault the others do not suffer."""
    if not tickets:
        return
    try:
        handle(tickets)
    except (StoreError, LogError) as error:
        for ticket in tickets:
            ticket.error = error
    except Exception as error:
        if len(tickets) > 1:
            middle = len(tickets) // 2
            _settle(tickets[:middle], handle)
            _settle(tickets[middle:], handle)
            return
        if not isinstance(error, InputError):
            _log.exception("a request failed: %s", type(tickets[0].job).__name__)
        tickets[0].error = error
