"""A bounded queue and the one thread that empties it, many jobs at a time."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from hstu_xd.errors import HstuXdError
from hstu_xd.serving.http.settings import QueueSettings

J = TypeVar("J")

_BUSY = "the service is busy; repeat the request later"
_STOPPING = "the service is stopping; repeat the request later"

_log = logging.getLogger(__name__)

# Batches whose median says how long a unit of cost takes: a single slow one turns nobody away.
_REMEMBERED = 31
# Share of the longest delay that a batch of several jobs may be expected to take.
_BATCH_SHARE = 0.5
# A job that was accepted and has waited so many times the longest delay is refused after all.
_OVERDUE = 1.5


class Busy(HstuXdError):
    """More is waiting than can be answered soon: come back later."""


class Handler(Protocol[J]):
    """What the thread runs; made, used and closed there."""

    def handle(self, tickets: Sequence["Ticket[J]"]) -> None:
        """Finish or fail every ticket."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class Step(NamedTuple):
    """What a job waited for.

    Attributes:
        name: of it: "queue", "log.read", "log.write" or "states".
        began: when, by ``time.perf_counter``.
        ended: when.
    """

    name: str
    began: float
    ended: float


@dataclass(eq=False)
class Ticket(Generic[J]):
    """A job and what became of it.

    Attributes:
        job: what to do.
        result: of the job, once it is done.
        error: why it was not done; None where it was.
        by: name of what handled it; empty until then.
        steps: what it waited for, one after the other.
        done: whom it is told.
        cost: of the job.
        since: when it was queued.
    """

    job: J
    result: Any = None
    error: Exception | None = None
    by: str = ""
    steps: list[Step] = field(default_factory=list)
    done: "asyncio.Future[Any]" = field(kw_only=True)
    cost: float = field(kw_only=True)
    since: float = field(kw_only=True)

    def reply(self) -> None:
        """Hand the outcome to whom waits for it, if anybody still does."""
        if self.done.done():
            return
        if self.error is not None:
            self.done.set_exception(self.error)
        else:
            self.done.set_result(self.result)


class Batcher(Generic[J]):
    """Jobs of all connections, handled in batches by one thread.

    A job waits at most about ``settings.max_delay`` seconds: it is refused at once where, at the
    pace of late, what is under way and those before it take longer. So under any load the accepted
    ones wait alike. Where those before it take longer than was to be expected, it is refused once
    it has waited half as long again, whatever the thread is busy with.

    Args:
        make: makes the handler, in the thread.
        settings: bounds of queue and batches.
        on_batch: told the size of every batch.
        cost: of a job, in any unit; one that takes twice as long costs about twice as much.

    Raises:
        Exception: whatever ``make`` raises.
    """

    def __init__(
        self,
        make: Callable[[], Handler[J]],
        settings: QueueSettings,
        on_batch: Callable[[int], None] = lambda size: None,
        cost: Callable[[J], float] = lambda job: 1.0,
    ) -> None:
        self._settings, self._on_batch, self._cost = settings, on_batch, cost
        self._waiting: deque[Ticket[J]] = deque()
        self._waiting_cost = 0.0
        self._running: list[Ticket[J]] = []
        self._started = 0.0
        self._changed = threading.Condition()
        self._stopping = False
        self._paces: deque[float] = deque(maxlen=_REMEMBERED)
        self._seconds_per_cost = 0.0
        made: deque[Exception | None] = deque()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(make, made, ready), name="hstu-xd session", daemon=True
        )
        self._thread.start()
        ready.wait()
        if (error := made.pop()) is not None:
            raise error

    def __len__(self) -> int:
        """Return the number of jobs that wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Return whether jobs are handled."""
        return self._thread.is_alive()

    @property
    def full(self) -> bool:
        """Return whether a job would be refused now."""
        settings = self._settings
        return len(self._waiting) >= settings.max_queue or self.delay > settings.max_delay

    @property
    def delay(self) -> float:
        """Return the seconds that a job may be expected to wait before it is handled."""
        left, running = 0.0, self._running
        if running:
            expected = sum(ticket.cost for ticket in running) * self._seconds_per_cost
            # What has overrun may go on for as long as it already did.
            left = abs(expected - (time.perf_counter() - self._started))
        return left + self._waiting_cost * self._seconds_per_cost

    def submit(self, job: J) -> Ticket[J]:
        """Queue a job; called in an event loop.

        Returns:
            The job's ticket, whose ``done`` becomes the result, or an exception.

        Raises:
            Busy: the queue is full, or stopped.
        """
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        ticket = Ticket(job, done=loop.create_future(), cost=self._cost(job), since=now)
        with self._changed:
            if self._stopping or self.full:
                raise Busy(_BUSY)
            self._waiting.append(ticket)
            self._waiting_cost += ticket.cost
            self._changed.notify()
        due = loop.call_later(self._longest, self._expire, ticket)
        ticket.done.add_done_callback(lambda done: due.cancel())
        return ticket

    @property
    def _longest(self) -> float:
        """Return the seconds after which a job that still waits is refused."""
        return _OVERDUE * self._settings.max_delay + self._settings.max_wait

    def _expire(self, ticket: Ticket[J]) -> None:
        """Refuse a job that has waited too long, unless it is handled by now."""
        with self._changed:
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
            self._waiting_cost -= ticket.cost
        self._refuse(ticket)
        ticket.reply()

    def _refuse(self, ticket: Ticket[J]) -> None:
        ticket.steps.append(Step("queue", ticket.since, time.perf_counter()))
        ticket.error = Busy(_BUSY)

    def stop(self, within: float | None = None) -> bool:
        """Finish what waits, then end the thread.

        Args:
            within: seconds that it may take; None: as long as it takes.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(within)
        return not self.alive

    def abandon(self) -> None:
        """Take nothing more, refuse what waits, and tell those whose job is under way the same."""
        with self._changed:
            self._stopping = True
            waiting, self._waiting = [*self._waiting], deque()
            self._waiting_cost = 0.0
            self._changed.notify()
        for ticket in [*waiting, *self._running]:
            if not ticket.done.done():
                ticket.done.set_exception(Busy(_STOPPING))

    def _run(
        self,
        make: Callable[[], Handler[J]],
        made: deque[Exception | None],
        ready: threading.Event,
    ) -> None:
        try:
            handler = make()
        except Exception as error:
            made.append(error)
            return
        else:
            made.append(None)
        finally:
            ready.set()
        try:
            while batch := self._next():
                start = self._started
                late = start - self._longest
                due = [ticket for ticket in batch if ticket.since >= late]
                for ticket in batch:
                    ticket.steps.append(Step("queue", ticket.since, start))
                    if ticket.since < late:
                        ticket.error = Busy(_BUSY)
                if due:
                    _handle(handler, due)
                    self._tell(len(due))
                    cost = sum(ticket.cost for ticket in due)
                    self._paces.append((time.perf_counter() - start) / cost)
                    self._seconds_per_cost = median(self._paces)
                self._running = []
                _reply(batch)
        finally:
            self._refuse_all()
            handler.close()

    def _tell(self, size: int) -> None:
        """Tell of a batch; whatever goes wrong there, those whose jobs it had are answered."""
        try:
            self._on_batch(size)
        except Exception:
            _log.exception("a batch of %d requests could not be counted", size)

    def _refuse_all(self) -> None:
        """Refuse what is left when the thread ends, so that nobody waits for it in vain."""
        with self._changed:
            self._stopping = True
            left, self._running = [*self._running, *self._waiting], []
            self._waiting.clear()
        for ticket in left:
            ticket.error = ticket.error or Busy(_STOPPING)
        _reply(left)

    def _next(self) -> list[Ticket[J]]:
        """Take the next batch; empty once all is done and the queue stopped."""
        settings = self._settings
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if settings.max_wait and len(self._waiting) < settings.max_batch:
                self._changed.wait_for(
                    lambda: len(self._waiting) >= settings.max_batch or self._stopping,
                    timeout=settings.max_wait,
                )
            batch: list[Ticket[J]] = []
            seconds = 0.0
            while self._waiting and len(batch) < settings.max_batch:
                # Who came first does not wait for what is much larger and came later.
                seconds += self._waiting[0].cost * self._seconds_per_cost
                if batch and seconds > _BATCH_SHARE * settings.max_delay:
                    break
                batch.append(self._waiting.popleft())
                self._waiting_cost -= batch[-1].cost
            if not self._waiting:
                self._waiting_cost = 0.0
            self._started, self._running = time.perf_counter(), batch
            return batch


def _handle(handler: Handler[J], tickets: Sequence[Ticket[J]]) -> None:
    """Handle tickets so that, whatever happens, each has an outcome and the thread goes on."""
    try:
        handler.handle(tickets)
    except Exception as error:
        _log.exception("a batch of %d requests failed", len(tickets))
        for ticket in tickets:
            ticket.error = error


def _reply(tickets: Sequence[Ticket[Any]]) -> None:
    """Hand the outcomes over, in the event loops that wait for them."""
    for loop in {ticket.done.get_loop() for ticket in tickets}:
        replies = [ticket.reply for ticket in tickets if ticket.done.get_loop() is loop]
        # A loop that is closed has nobody left who waits.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_call_all, replies)


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
