"""The owner of session and log, who does what requests ask for in batches.

Every event is in the log before anybody is told that it was taken.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Conflict, Event, EventLog, Keyed, LogError
from hstu_xd.serving.http.arrivals import Append
from hstu_xd.serving.http.batching import Step, Ticket
from hstu_xd.serving.http.engine import Session
from hstu_xd.serving.http.failover import FailoverSession
from hstu_xd.serving.http.jobs import (
    Forget,
    Found,
    Job,
    ListUsers,
    Probe,
    Question,
    ReadHistory,
    ReadLogged,
    Remove,
)
from hstu_xd.serving.http.live_model import LiveModel
from hstu_xd.serving.stores import StoreError

_log = logging.getLogger(__name__)

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
    beginning to its end, and its tickets say which. They also say what the batch waited for, as
    nobody is told before all of it is handled.

    Args:
        sessions: states of users, of the model.
        log: where events are kept.
        model: that answers.
    """

    def __init__(self, sessions: FailoverSession, log: EventLog, model: LiveModel) -> None:
        self._sessions, self._log, self._model = sessions, log, model
        self._next: deque[tuple[LiveModel, Session]] = deque()
        self._steps: list[Step] = []

    def replace(self, model: LiveModel, session: Session) -> None:
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
        self._steps = []
        for ticket in tickets:
            ticket.by = self._model.name
        for ticket in tickets:
            if isinstance(ticket.job, Forget | Remove | Probe):
                _settle([ticket], self._change)
        for kinds, handle in (
            (Append, self._append),
            (Question, self._answer),
            (ReadHistory | ReadLogged | ListUsers, self._read),
        ):
            _settle([ticket for ticket in tickets if isinstance(ticket.job, kinds)], handle)
        for ticket in tickets:
            ticket.steps += self._steps

    def close(self) -> None:
        """Close log and store."""
        self._sessions.close()
        self._log.close()

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        """Note how long the batch waits for something."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._steps.append(Step(name, began, time.perf_counter()))

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
        with self._noted("log.read"):
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
        events = [event for event, _ in new]
        users = [event.user for event in events]
        keys = [Keyed(event.user, key, *event[1:]) for event, key in new if key is not None]
        versions = model.histories.versions(users)
        try:
            with self._noted("states"):
                self._sessions.run(lambda session: session.append(events))
            with self._noted("log.write"):
                self._log.add(events, keys, versions)
        except InputError:
            raise  # No state has changed.
        except Exception:
            # States may have the events: they are made anew from the log. What the store has of
            # them is of a version that the log never had; one that hangs would hang every user.
            self._sessions.session.release(users)
            raise

    def _answer(self, tickets: Tickets) -> None:
        model = self._model
        asked: list[tuple[Ticket[Job], Question]] = []
        for ticket in tickets:
            ticket.error = None
            assert isinstance(ticket.job, Question)
            try:
                model.arrivals.check_request(ticket.job.timestamp)
            except InputError as error:
                ticket.error = error
            else:
                asked.append((ticket, ticket.job))
        if not asked:
            return
        questions = [question for _, question in asked]
        with self._noted("log.read"):
            model.histories.look(question.user for question in questions)
        with self._noted("states"):
            results = self._sessions.run(lambda session: session.answer(questions))
        versions = model.histories.versions(question.user for question in questions)
        for (ticket, question), result in zip(asked, results, strict=True):
            if isinstance(result, InputError):
                ticket.error = result
            else:
                ticket.result = Found(result, versions[question.user])

    def _change(self, tickets: Tickets) -> None:
        histories = self._model.histories
        for ticket in tickets:
            job = ticket.job
            if isinstance(job, Probe):
                self._log.probe()
                self._sessions.probe()
                continue
            assert isinstance(job, Forget | Remove)
            with self._noted("log.write"):
                if isinstance(job, Forget):
                    user, ticket.result = job.user, histories.forget(job.user)
                else:
                    user, ticket.result = job.event.user, histories.remove(job.event)
            # A state that the store keeps is of a version that is no more.
            with self._noted("states"), suppress(StoreError):
                self._sessions.forget(user)

    def _read(self, tickets: Tickets) -> None:
        with self._noted("log.read"):
            for ticket in tickets:
                ticket.result = self._read_one(ticket.job)

    def _read_one(self, job: Job) -> Any:
        model = self._model
        if isinstance(job, ReadHistory):
            events = model.histories.last_of(job.user, job.limit)
            return [(event, model.items.domain_name(event.item)) for event in events]
        if isinstance(job, ReadLogged):
            return self._log.read([job.user])[0]
        assert isinstance(job, ListUsers)
        return model.histories.users(job.prefix, job.limit)


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
