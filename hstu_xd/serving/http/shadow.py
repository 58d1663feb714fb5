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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.events.event_log import Logged
from hstu_xd.serving.http.jobs import Found, Job, Question, ReadLogged
from hstu_xd.serving.http.live_model import LiveModel
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
        domains: that it must have.
        needs_data: whether the service knows earlier histories.
    """

    run: Path
    settings: ServiceSettings
    allow_imports: bool
    log: LogSettings
    kind: str
    domains: Sequence[str]
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
        name: of the other model.

    Raises:
        InputError: it cannot be loaded, or does not fit.
    """

    def __init__(
        self, service: Answering, run: Path, *, allow_imports: bool, log: LogSettings
    ) -> None:
        self._service = service
        self._closed = False
        self._line, other = Pipe()
        # A worker may have no children of multiprocessing's own kind.
        program = f"from hstu_xd.serving.http.shadow_process import run; run({other.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], pass_fds=[other.fileno()], start_new_session=True
        )
        other.close()
        settings = service.settings
        states = StateSettings(
            max_bytes=settings.states.max_bytes, retrieval=settings.states.retrieval
        )
        settings = replace(settings, data=None, token=None, states=states)
        model = service.model
        start = Start(
            *(run, settings, allow_imports, log, model.engine.kind, model.catalog.domain_names),
            needs_data=model.engine.prepared is not None,
        )
        try:
            self.name = _begin(self._line, start)
        except HstuXdError:
            self.close()
            raise
        self._counts = service.metrics.shadow(self.name)
        self._waiting: queue.Queue[tuple[Question, Found]] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="hstu-xd shadow", daemon=True)
        self._thread.start()

    async def offer(self, job: Question, found: Found) -> None:
        """Take an answer to compare, unless too many wait."""
        try:
            self._waiting.put_nowait((job, found))
        except queue.Full:
            self._counts.ended("dropped")

    def close(self) -> None:
        """End the process; what waits is dropped."""
        self._closed = True
        self._line.close()
        try:
            self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _run(self) -> None:
        """Compare answers, one at a time."""
        loop = asyncio.new_event_loop()
        while True:
            job, found = self._waiting.get()
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
            if not self._closed:
                _log.warning("the shadow %s has ended; the service goes on without it", self.name)
            self._closed = True
            return None
        except TypeError:
            # A line that is closed while it is read has no handle any more.
            if not self._closed:
                raise
            return None


def _begin(line: Connection, start: Start) -> str:
    """Return the name of the shadow's model once it is loaded.

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
