"""A service without its HTTP: a trained run, its events and the thread that answers.

It counts what Prometheus reads at /metrics.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.events.open_log import open_log
from hstu_xd.serving.http.batch_handler import BatchHandler
from hstu_xd.serving.http.batching import Batcher, Step
from hstu_xd.serving.http.engine import Engine, Session
from hstu_xd.serving.http.failover import FailoverSession
from hstu_xd.serving.http.jobs import Job, Probe, cost_of
from hstu_xd.serving.http.live_model import Changes, LiveModel, load_engine
from hstu_xd.serving.http.metrics import Metrics
from hstu_xd.serving.http.settings import ServiceSettings, default_threads
from hstu_xd.serving.http.shadow import Shadow

if TYPE_CHECKING:
    from hstu_xd.serving.http.tracing import Tracing

_log = logging.getLogger(__name__)

# Seconds after a write until whoever asks for the health lets one be tried, and how long he waits.
_PROBE_AFTER, _PROBE_PATIENCE = 2.0, 0.5


@dataclass(frozen=True)
class Handled:
    """How a request was handled.

    Attributes:
        by: name of the model.
        steps: what it waited for, one after the other.
    """

    by: str
    steps: Sequence[Step] = ()


# How the request of this task was handled.
_NOT_YET = Handled("")
_HANDLED: ContextVar[Handled] = ContextVar("handled", default=_NOT_YET)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that may take the place of the one that answers.

    Attributes:
        model: the new one.
        run: its folder, links resolved.
        session: of it, over the service's store of states.
        changes: what it brings with it.
    """

    model: LiveModel
    run: Path
    session: Session
    changes: Changes


class Service:
    """Jobs in, results out; owns the thread, and through it session, store and log.

    Args:
        engine: the model and what is known of users.
        settings: of the command.

    Attributes:
        model: that answers now.
        active: requests that are under way.
        draining: no further request is taken.
        shadow: compares answers with those of another run; None: there is none.
        tracing: sends spans of requests; None: there are none.

    Raises:
        InputError: the log belongs to another process or is none, or an unknown kind of store.
        HstuXdError: log or store cannot be opened.
    """

    def __init__(self, engine: Engine, settings: ServiceSettings) -> None:
        self.settings = settings
        self.active, self.draining = 0, False
        self.shadow: Shadow | None = None
        self.tracing = _tracing(settings.traces)
        self.metrics = Metrics(self._numbers, lambda: self.model.name, self._shadow_name)
        self._batcher: Batcher[Job] = Batcher(
            lambda: self._open(engine), settings.queue, self.metrics.batch, cost_of
        )

    @property
    def handled(self) -> Handled:
        """Return how the request of this task was handled."""
        return _HANDLED.get()

    def present(self) -> LiveModel:
        """Return the model that answers now, as the one that handles this task's request."""
        model = self.model
        _HANDLED.set(Handled(model.name))
        return model

    @property
    def full(self) -> bool:
        """Return whether a job would be refused now."""
        return self._batcher.full

    @property
    def idle(self) -> bool:
        """Return whether no job waits."""
        return not len(self._batcher)

    @property
    def live(self) -> bool:
        """Return whether the thread that answers runs; where it has ended only a restart helps."""
        return self._batcher.alive

    @property
    def status(self) -> str:
        """Return "ready", "draining", "failing" to write, or "failed" if the thread has ended."""
        if self.draining:
            return "draining"
        if not self.live:
            return "failed"
        return "failing" if self._log.fails or self._sessions.refuses else "ready"

    @property
    def store_state(self) -> str:
        """Return how the state store is: "memory", "ok" or "gone"."""
        return self._sessions.store_state

    @property
    def writes_state(self) -> str:
        """Return how the event log is: "ok" or "failing"."""
        return "failing" if self._log.fails else "ok"

    async def check_writes(self) -> None:
        """Try a write where the last one is some time ago; it is not waited for long."""
        last, now = self._log.written_at, time.monotonic()
        if self.draining or self.full or (last is not None and now - last < _PROBE_AFTER):
            return
        with suppress(HstuXdError, asyncio.TimeoutError):
            await asyncio.wait_for(self.run(Probe()), _PROBE_PATIENCE)

    async def run(self, job: Job) -> Any:
        """Return the result of a job.

        Raises:
            Busy: too much is waiting.
            InputError: the job is wrong; nothing has changed.
            HstuXdError: log or store failed; nothing has changed.
        """
        ticket = self._batcher.submit(job)
        try:
            return await ticket.done
        finally:
            _HANDLED.set(Handled(ticket.by or self.handled.by, ticket.steps))

    def load(self, run: Path, *, allow_imports: bool = False) -> Loaded:
        """Load a run beside the model that answers, and check that it can take its place.

        Takes a while; any thread may do it.

        Raises:
            InputError: it cannot be loaded, or does not fit.
        """
        old = self.model
        try:
            engine = load_engine(
                run, self.settings, allow_imports=allow_imports, replaces=old.engine
            )
            model = LiveModel(engine, self._log, self.settings, old.histories.rebuilds)
            changes = model.changes_from(old)
            engine.warm_up()
            return Loaded(model, run.resolve(), model.session(self._sessions.store), changes)
        except InputError:
            raise
        except Exception as error:
            # Whatever is wrong with it, the old model goes on.
            _log.warning("%s cannot be loaded", run, exc_info=not isinstance(error, HstuXdError))
            raise InputError(
                f"{run.name} cannot be loaded ({type(error).__name__}: {error}); restore it, or "
                "name another run"
            ) from error

    def take(self, loaded: Loaded) -> None:
        """Let a loaded model answer everything that comes from now on; any thread may call it.

        Where it was in the shadow until now, nothing is left to compare, and the shadow ends.
        """
        self._handler.replace(loaded.model, loaded.session)
        self.model = loaded.model
        _log.info("%s answers in place of %s", loaded.changes.model, loaded.changes.previous)
        if self.shadow is not None and self.shadow.run == loaded.run:
            self.follow(None)

    def follow(self, shadow: Shadow | None) -> None:
        """Let a shadow answer what comes from now on, or none; the one before ends."""
        before, self.shadow = self.shadow, shadow
        if before is not None:
            before.close()

    def stop(self, within: float | None = None) -> bool:
        """Finish what waits; close store and log.

        Args:
            within: seconds that it may take; None: as long as it takes.

        Returns:
            Whether all of it was done in time.
        """
        if self.tracing is not None:
            self.tracing.close()
        if self.shadow is not None:
            self.shadow.close()
        is_done = self._batcher.stop(within)
        if self.tracing is not None:
            self.tracing.wait()
        return is_done

    def abandon(self) -> None:
        """Refuse what waits, and wait for nothing that is under way."""
        self._batcher.abandon()

    def _open(self, engine: Engine) -> BatchHandler:
        states = self.settings.states
        torch.set_num_threads(states.threads or default_threads())
        self._log = log = open_log(self.settings.events)
        try:
            self.model = LiveModel(engine, log, self.settings)
            self._sessions = FailoverSession(self.model.session, states)
            engine.warm_up()
        except Exception:
            log.close()
            raise
        self._handler = BatchHandler(self._sessions, log, self.model)
        return self._handler

    def _shadow_name(self) -> str | None:
        shadow = self.shadow
        return None if shadow is None else shadow.name

    def _numbers(self) -> dict[str, tuple[str, float]]:
        session = self._sessions.session
        return {
            "hstu_xd_queue_length": ("Requests that wait.", len(self._batcher)),
            "hstu_xd_active_requests": ("Requests under way.", self.active),
            "hstu_xd_states_bytes": ("Bytes of all states in memory.", session.num_bytes),
            "hstu_xd_states_users": ("Users whose states are in memory.", len(session)),
            "hstu_xd_states_rebuilt_total": (
                "Histories read to make states anew, or to add what they lack.",
                self.model.histories.rebuilds.count,
            ),
            "hstu_xd_log_bytes": ("Bytes of the event log.", self._log.num_bytes()),
        }


def _tracing(url: str | None) -> "Tracing | None":
    if url is None:
        return None
    # Without traces nothing of OpenTelemetry is loaded.
    from hstu_xd.serving.http.tracing import Tracing

    return Tracing(url)
