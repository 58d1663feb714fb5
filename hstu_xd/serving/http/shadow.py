"""A second run that answers the same requests unseen, and how its answers differ.

It has a process of its own, of the lowest priority, which is asked once a reply is on its way: no
answer waits for it or fails with it. What the service costs is one more read of the log for an
answer that is compared; while requests wait, none is.
"""

import asyncio
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.events.event_log import Logged
from hstu_xd.serving.http.jobs import Found, Job, Question, ReadLogged
from hstu_xd.serving.http.live_model import Changes, LiveModel
from hstu_xd.serving.http.metrics import Metrics
from hstu_xd.serving.http.settings import LogSettings, ServiceSettings, StateSettings

_log = logging.getLogger(__name__)

# Answers that wait to be compared; more are dropped.
_WAITING = 16
# Seconds that the shadow may take to end.
_ENDING = 1.0


@dataclass(frozen=True)
class Start:
    """To the shadow: what it serves.

    Attributes:
        run: folder.
        settings: of the service, with states in memory and the store of the run.
        allow_imports: whether the run may import modules of its own.
        log: what is written to stderr.
        kind: of run that it must be, RETRIEVAL or RANKING.
        model: name of the model that answers.
        domains: that it must have.
        items: of the model that answers, and the domain of each.
        needs_data: whether the service knows earlier histories.
    """

    run: Path
    settings: ServiceSettings
    allow_imports: bool
    log: LogSettings
    kind: str
    model: str
    domains: Sequence[str]
    items: Mapping[str, str]
    needs_data: bool


@dataclass(frozen=True)
class Asked:
    """To the shadow: an answer that was given, and what the log has of the user."""

    job: Question
    rows: list
    logged: Logged


@dataclass(frozen=True)
class Compared:
    """From the shadow.

    Attributes:
        overlaps: of a :class:`Recommend`, for each domain the share of items that both have.
        ranks: for each domain or goal, the shadow's rank of the first item.
        seconds: that it took.
    """

    overlaps: Sequence[float]
    ranks: Sequence[int]
    seconds: float


class Answering(Protocol):
    """What a shadow needs of the service, which is :class:`hstu_xd.serving.http.service.Service`.

    Attributes:
        settings: of the service.
        model: that answers now.
        metrics: where it is counted.
    """

    settings: ServiceSettings
    model: LiveModel
    metrics: Metrics

    @property
    def idle(self) -> bool:
        """Return whether no job waits."""
        ...

    async def run(self, job: Job) -> Any:
        """Return the result of a job."""
        ...


class Shadow:
    """The other run, seen from the service.

    Args:
        service: whose answers are compared.
        run: folder of the other run.
        allow_imports: whether it may import modules of its own.
        log: what its process writes to stderr.

    Attributes:
        run: folder of the other run, links resolved.
        name: of the other model.
        changes: what it would bring with it in the place of the one that answers.

    Raises:
        InputError: it cannot be loaded or does not fit, or the system starts no process for it.
    """

    def __init__(
        self, service: Answering, run: Path, *, allow_imports: bool, log: LogSettings
    ) -> None:
        self._service = service
        self.run = run.resolve()
        self._closed = self._has_ended = False
        self._line, other = Pipe()
        # A worker may have no children of multiprocessing's own kind.
        program = f"from hstu_xd.serving.http.shadow_process import run; run({other.fileno()})"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=[other.fileno()], start_new_session=True
            )
        except OSError as error:
            self._line.close()
            raise InputError(
                f"no process can be started for the shadow {run.name} ({error.strerror}); free "
                "memory or processes on this machine, and name it again"
            ) from error
        finally:
            other.close()
        settings = service.settings
        states = StateSettings(
            max_bytes=settings.states.max_bytes, retrieval=settings.states.retrieval
        )
        settings = replace(settings, data=None, token=None, states=states)
        model = service.model
        start = Start(
            *(run, settings, allow_imports, log, model.engine.kind),
            *(model.name, model.catalog.domain_names, model.items.domains_by_token()),
            needs_data=model.engine.prepared is not None,
        )
        try:
            self.changes = _begin(self._line, start)
        except BaseException:
            self._end_process()
            self._line.close()
            raise
        self.name = self.changes.model
        self._counts = service.metrics.shadow(self.name)
        self._waiting: queue.Queue[tuple[Question, Found] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="hstu-xd shadow", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """Return "answering", or "ended" where its process has; its answers count as failed."""
        return "ended" if self._has_ended else "answering"

    async def offer(self, job: Question, found: Found) -> None:
        """Take an answer to compare, unless too many wait or it is closed."""
        if self._closed:
            return
        try:
            self._waiting.put_nowait((job, found))
        except queue.Full:
            self._counts.ended("dropped")

    def close(self) -> None:
        """End the process; what waits is dropped."""
        self._closed = True
        self._end_process()
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(_ENDING)

    def _end_process(self) -> None:
        """Kill it: it has nothing to lose, and who reads its line is told by its end."""
        self._process.kill()
        self._process.wait()

    def _run(self) -> None:
        """Compare answers, one at a time.

        The line is closed here, where it is read: the number of one that is closed meanwhile may
        be that of a client's connection by then.
        """
        loop = asyncio.new_event_loop()
        try:
            self._compare_all(loop)
        finally:
            loop.close()
            self._line.close()

    def _compare_all(self, loop: asyncio.AbstractEventLoop) -> None:
        while (waiting := self._waiting.get()) is not None and not self._closed:
            job, found = waiting
            if not self._service.idle:
                self._counts.ended("dropped")
                continue
            try:
                logged: Logged = loop.run_until_complete(self._service.run(ReadLogged(job.user)))
            except HstuXdError:
                self._counts.ended("dropped")
                continue
            if logged.version != found.version:
                self._counts.ended("overtaken")
                continue
            said = self._ask(Asked(job, found.rows, logged))
            if self._closed:
                return
            if said is None:
                self._counts.ended("failed")
            else:
                self._counts.compared(said.overlaps, said.ranks, said.seconds)

    def _ask(self, asked: Asked) -> Compared | None:
        """Return how the answers differ; None where the shadow has none."""
        try:
            self._line.send(asked)
            return self._line.recv()
        except (EOFError, OSError):
            if not self._closed and not self._has_ended:
                _log.warning("the shadow %s has ended; the service goes on without it", self.name)
            self._has_ended = True
            return None


def _begin(line: Connection, start: Start) -> Changes:
    """Return what the shadow's model would bring with it, once it is loaded.

    Raises:
        InputError: it is not.
    """
    try:
        line.send(start)
        said = line.recv()
    except (EOFError, OSError):
        said = InputError(f"the shadow {start.run.name} cannot be loaded; it says why above")
    if isinstance(said, HstuXdError):
        raise said
    return said
