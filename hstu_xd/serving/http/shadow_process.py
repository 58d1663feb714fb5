"""The process of a shadow: it answers what the service has answered, and compares the two."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.events.event_log import Logged
from hstu_xd.serving.http import access_log
from hstu_xd.serving.http.batch_handler import BatchHandler
from hstu_xd.serving.http.batching import Ticket
from hstu_xd.serving.http.failover import FailoverSession
from hstu_xd.serving.http.jobs import Found, Rank, Score
from hstu_xd.serving.http.live_model import LiveModel, load_engine
from hstu_xd.serving.http.shadow import Asked, Compared, Start

_log = logging.getLogger(__name__)

_NOBODY = Logged(b"", False, frozenset(), ())


def run(descriptor: int) -> None:
    """Be the process: load the run that the service names, then compare until the line ends.

    Args:
        descriptor: of the line to the service.
    """
    # The service ends it.
    for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(which, signal.SIG_IGN)
    os.nice(19)
    torch.set_num_threads(1)
    line = Connection(descriptor)
    with suppress(EOFError, OSError):
        start = line.recv()
        access_log.set_up(start.log)
        try:
            answerer = Answerer(start)
        except HstuXdError as error:
            line.send(error)
            return
        except Exception as error:
            _log.warning("%s cannot be loaded", start.run, exc_info=True)
            why = f"cannot be loaded ({type(error).__name__}: {error})"
            line.send(
                InputError(f"the shadow {start.run.name} {why}; restore it, or name another run")
            )
            return
        line.send(answerer.changes)
        while True:
            line.send(answerer.compare(line.recv()))


class Answerer:
    """A run that answers from what it is sent of a user's events.

    Args:
        start: what it serves.

    Attributes:
        changes: what it would bring with it in the place of the model that answers.

    Raises:
        InputError: the run cannot be loaded, or does not fit.
    """

    def __init__(self, start: Start) -> None:
        engine = load_engine(start.run, start.settings, allow_imports=start.allow_imports)
        if engine.kind != start.kind:
            raise InputError(
                f"the shadow {engine.name} is a {engine.kind} run, and a {start.kind} run is "
                "served; give one of the same kind"
            )
        if start.needs_data and engine.prepared is None:
            raise InputError(
                f"the shadow {engine.name} has no earlier histories, and the service has some; "
                "restore the run's store, or serve with --no-data"
            )
        self._log = _SentLog()
        log: Any = self._log
        model = LiveModel(engine, log, start.settings)
        try:
            self.changes = model.changes_to(start.model, start.domains, start.items)
        except InputError as error:
            raise InputError(f"the shadow {error}") from None
        engine.warm_up()
        self._sessions = FailoverSession(model.session, start.settings.states)
        self._handler = BatchHandler(self._sessions, log, model)
        self._failed = False
        self._loop = asyncio.new_event_loop()

    def compare(self, asked: Asked) -> Compared | None:
        """Answer a request, and compare; None where it could not be answered."""
        self._log.logged = asked.logged
        done = self._loop.create_future()
        ticket: Ticket[Any] = Ticket(asked.job, done=done, cost=1.0, since=0.0)
        # At first it makes the state, then it answers as a service does that has it.
        self._handler.handle([ticket])
        began = time.perf_counter()
        self._handler.handle([ticket])
        seconds = time.perf_counter() - began
        # Nothing is kept of users: who is forgotten by the service is by its shadow.
        self._sessions.forget(asked.job.user)
        self._log.logged = _NOBODY
        if ticket.error is not None:
            if not self._failed:
                _log.warning("the shadow has no answer: %s; more are only counted", ticket.error)
            self._failed = True
            return None
        found: Found = ticket.result
        if isinstance(asked.job, Score):
            return Compared([], ranks_of_scores([asked.rows], [found.rows]), seconds)
        if isinstance(asked.job, Rank):
            return Compared([], ranks_of_scores(asked.rows, found.rows), seconds)
        names = [
            [[item for item, _ in pairs] for pairs in rows] for rows in (asked.rows, found.rows)
        ]
        pairs = [(given, other) for given, other in zip(*names) if given]
        overlaps = [overlap(given, other) for given, other in pairs]
        return Compared(overlaps, [rank(given[0], other) for given, other in pairs], seconds)


def overlap(given: Sequence[str], other: Sequence[str]) -> float:
    """Return the share of items that are in both lists, of the longer one."""
    return len({*given} & {*other}) / max(len(given), len(other))


def rank(item: str, items: Sequence[str]) -> int:
    """Return the place of an item from 1 on; one more than there are where it is not there."""
    return items.index(item) + 1 if item in items else len(items) + 1


def ranks_of_scores(
    given: Sequence[Sequence[float]], other: Sequence[Sequence[float]]
) -> list[int]:
    """Return, row by row, the rank that other scores give the item with the best given one.

    Ties count for it. Of one item alone there is nothing to compare.
    """
    ranks = []
    for scores, others in zip(given, other, strict=True):
        if len(scores) > 1:
            best = max(range(len(scores)), key=scores.__getitem__)
            ranks.append(1 + sum(score > others[best] for score in others))
    return ranks


class _SentLog:
    """What an :class:`EventLog` would say of the one user that is asked for."""

    logged = _NOBODY

    def read(self, users: Sequence[str], last: int | None = None) -> list[Logged]:
        """Return what was sent of the user."""
        events = self.logged.events
        kept = events if last is None else events[len(events) - min(last, len(events)) :]
        return [self.logged._replace(events=kept) for _ in users]
