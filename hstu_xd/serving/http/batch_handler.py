"""What requests ask for, and the owner of session and log, who does it in batches.

Every event is in the log before anybody is told that it was taken.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Conflict, Event, EventLog, Keyed, LogError
from hstu_xd.serving.http.arrivals import Append
from hstu_xd.serving.http.batching import Ticket
from hstu_xd.serving.http.failover import FailoverSession
from hstu_xd.serving.http.live_model import LiveModel
from hstu_xd.serving.requests import Answer, Request
from hstu_xd.serving.session import EncoderSession
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
class Found:
    """What was found for a user.

    Attributes:
        rows: of a :class:`Recommend` (item, score) pairs for each domain, best first; of a
            :class:`Score` a list of scores.
        version: of the user's events, by the log.
    """

    rows: list
    version: bytes


@dataclass(frozen=True)
class Recommend:
    """Best items of domains. Result: :class:`Found`.

    Attributes:
        user: who is asked for.
        domains: names.
        timestamp: of the request; None: that of the user's last event.
        k: items of a domain, at most.
        exclude_seen: leave out items of the history; None: as the run was evaluated.
    """

    user: str
    domains: Sequence[str]
    timestamp: int | None
    k: int
    exclude_seen: bool | None


@dataclass(frozen=True)
class Score:
    """Scores of items of a domain, both by their names. Result: :class:`Found`."""

    user: str
    domain: str
    timestamp: int | None
    items: Sequence[str]


@dataclass(frozen=True)
class ReadHistory:
    """A user's last events. Result: pairs of :class:`Event` and its domain, oldest first."""

    user: str
    limit: int


@dataclass(frozen=True)
class ReadLogged:
    """All that the log has of a user. Result: :class:`Logged`."""

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


Job = Append | Remove | Probe | Recommend | Score | ReadHistory | ReadLogged | ListUsers | Forget

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

    Jobs name users, items and domains as clients do. A batch is handled by one model from its
    beginning to its end, and its tickets say which.

    Args:
        sessions: states of users, of the model.
        log: where events are kept.
        model: that answers.
    """

    def __init__(self, sessions: FailoverSession, log: EventLog, model: LiveModel) -> None:
        self._sessions, self._log, self._model = sessions, log, model
        self._next: deque[tuple[LiveModel, EncoderSession]] = deque()

    def replace(self, model: LiveModel, session: EncoderSession) -> None:
        """Handle all batches that begin from now on by another model; called by any thread.

        Args:
            model: that is to answer.
            session: of it, over the store of this handler's sessions.
        """
        self._next.append((model, session))

    def handle(self, tickets: Tickets) -> None:
        """Finish or fail every ticket."""
        while self._next:
            model, session = self._next.popleft()
            self._sessions.adopt(model.session, session)
            self._model = model
        for ticket in tickets:
            ticket.by = self._model.name
        for ticket in tickets:
            if isinstance(ticket.job, Forget | Remove | Probe):
                _settle([ticket], self._change)
        for kinds, handle in (
            (Append, self._append),
            (Recommend | Score, self._answer),
            (ReadHistory | ReadLogged | ListUsers, self._read),
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
        model = self._model
        arrived = model.arrivals.begin(jobs)
        for ticket in tickets:
            job = ticket.job
            assert isinstance(job, Append)
            ticket.error = None
            try:
                ticket.result = outcome = model.arrivals.judge(job, arrived)
            except InputError as error:
                ticket.error = error
            else:
                new += [(job.events[index], job.keys[index]) for index in outcome.accepted]
        if not new:
            return
        users = [event.user for event, _ in new]
        item_ids = [model.items.id_of(event.item) for event, _ in new]
        times = [event.timestamp for event, _ in new]
        keys = [Keyed(event.user, key, *event[1:]) for event, key in new if key is not None]
        versions = model.histories.versions(users)
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
        asked: list[tuple[Ticket[Job], _Question]] = []
        for ticket in tickets:
            ticket.error = None
            try:
                asked.append((ticket, self._question(ticket.job)))
            except InputError as error:
                ticket.error = error
        if not asked:
            return
        requests = [question.request for _, question in asked]
        self._model.histories.look(str(request.user) for request in requests)
        answers = self._sessions.run(lambda session: session.answer(requests))
        for (ticket, question), answer in zip(asked, answers):
            last, at = answer.last_time, question.request.timestamp
            if last is not None and at is not None and at < last:
                ticket.error = InputError(
                    f"timestamp {at} is before the last event of user {question.request.user!r} at "
                    f"{last}; ask for a later time, or leave it out"
                )
                continue
            user = str(question.request.user)
            with torch.inference_mode():
                rows = self._result(ticket.job, question, answer)
            ticket.result = Found(rows, self._model.histories.versions([user])[user])

    def _question(self, job: Job) -> "_Question":
        """Translate what a client asks for into the ids of the model.

        Raises:
            InputError: a time that cannot be, or a domain or an item that the model does not have.
        """
        model = self._model
        assert isinstance(job, Recommend | Score)
        model.arrivals.check_request(job.timestamp)
        if isinstance(job, Score):
            domain = model.catalog.domain_index(job.domain)
            item_ids = [model.items.id_in(token, domain) for token in job.items]
            return _Question(Request(job.user, [domain], job.timestamp), item_ids)
        if len(job.domains) > model.catalog.num_domains:
            raise InputError(
                f"domains has {len(job.domains)} names, and there are {model.catalog.num_domains} "
                "domains; name each once"
            )
        domains = [model.catalog.domain_index(name) for name in job.domains]
        return _Question(Request(job.user, domains, job.timestamp))

    def _result(self, job: Job, question: "_Question", answer: Answer) -> list:
        index, model = self._sessions.session.index, self._model
        if isinstance(job, Score):
            return index.scores_of_one(answer.vectors[0], torch.tensor(question.item_ids)).tolist()
        assert isinstance(job, Recommend)
        leave_out = job.exclude_seen
        if leave_out is None:
            leave_out = model.served.exclude_seen
        seen = answer.seen if leave_out else None
        return [
            [
                (model.catalog.token(item), score)
                for item, score in index.best(vector, domain, job.k, seen)
            ]
            for vector, domain in zip(answer.vectors, question.request.target_domains)
        ]

    def _change(self, tickets: Tickets) -> None:
        histories = self._model.histories
        for ticket in tickets:
            job = ticket.job
            if isinstance(job, Probe):
                self._log.probe()
                self._sessions.probe()
                continue
            assert isinstance(job, Forget | Remove)
            if isinstance(job, Forget):
                user, ticket.result = job.user, histories.forget(job.user)
            else:
                user, ticket.result = job.event.user, histories.remove(job.event)
            # A state that the store keeps is of a version that is no more.
            with suppress(StoreError):
                self._sessions.forget(user)

    def _read(self, tickets: Tickets) -> None:
        model = self._model
        for ticket in tickets:
            job = ticket.job
            if isinstance(job, ReadHistory):
                events = model.histories.last_of(job.user, job.limit)
                ticket.result = [(event, model.items.domain_name(event.item)) for event in events]
            elif isinstance(job, ReadLogged):
                (ticket.result,) = self._log.read([job.user])
            elif isinstance(job, ListUsers):
                ticket.result = model.histories.users(job.prefix, job.limit)


@dataclass(frozen=True)
class _Question:
    """What is asked for in the ids of a model: of the session, and items that are to be scored."""

    request: Request
    item_ids: Sequence[int] = ()


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
