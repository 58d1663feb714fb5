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
from typing import Any, Generic, Protocol, TypeVar

from hstu_xd.errors import HstuXdError
from hstu_xd.serving.http.settings import QueueSettings

J = TypeVar("J")

_log = logging.getLogger(__name__)

# Batches whose median says how long a job takes: a single slow one turns nobody away.
_REMEMBERED = 31


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


@dataclass(eq=False)
class Ticket(Generic[J]):
    """A job and what became of it.

    Attributes:
        job: what to do.
        result: of the job, once it is done.
        error: why it was not done; None where it was.
    """

    job: J
    result: Any = None
    error: Exception | None = None
    done: "asyncio.Future[Any]" = field(kw_only=True)

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
    pace of late, those before it take longer. So under any load the accepted ones wait alike.

    Args:
        make: makes the handler, in the thread.
        settings: bounds of queue and batches.
        on_batch: told the size of every batch.

    Raises:
        Exception: whatever ``make`` raises.
    """

    def __init__(
        self,
        make: Callable[[], Handler[J]],
        settings: QueueSettings,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._settings, self._on_batch = settings, on_batch
        self._waiting: deque[Ticket[J]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._paces: deque[float] = deque(maxlen=_REMEMBERED)
        self._seconds_per_job = 0.0
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
        waiting = len(self._waiting)
        delay = waiting * self._seconds_per_job
        return waiting >= self._settings.max_queue or delay > self._settings.max_delay

    def submit(self, job: J) -> "asyncio.Future[Any]":
        """Queue a job; called in an event loop.

        Returns:
            What becomes the result, or an exception.

        Raises:
            Busy: the queue is full, or stopped.
        """
        loop = asyncio.get_running_loop()
        ticket = Ticket(job, done=loop.create_future())
        with self._changed:
            if self._stopping or self.full:
                raise Busy("the service is busy; repeat the request later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket.done

    def stop(self) -> None:
        """Finish what waits, then end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

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
                start = time.perf_counter()
                _handle(handler, batch)
                self._on_batch(len(batch))
                self._paces.append((time.perf_counter() - start) / len(batch))
                self._seconds_per_job = median(self._paces)
                _reply(batch)
        finally:
            handler.close()

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
            size = min(len(self._waiting), settings.max_batch)
            return [self._waiting.popleft() for _ in range(size)]


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
