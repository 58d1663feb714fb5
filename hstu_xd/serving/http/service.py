"""A service without its HTTP: a trained run, its events and the thread that answers."""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving.codec import fingerprint
from hstu_xd.serving.http.arrivals import Arrivals
from hstu_xd.serving.http.batch_handler import Engine
from hstu_xd.serving.http.batching import Batcher
from hstu_xd.serving.http.event_log import EventLog
from hstu_xd.serving.http.failover import Sessions
from hstu_xd.serving.http.histories import Histories, Items
from hstu_xd.serving.http.metrics import Metrics
from hstu_xd.serving.http.settings import ServiceSettings, default_threads
from hstu_xd.serving.http.work_items import Job, Probe, cost_of
from hstu_xd.serving.requests import Request
from hstu_xd.serving.retrieval import ItemIndex
from hstu_xd.serving.session import EncoderSession
from hstu_xd.serving.stores import StateStore
from hstu_xd.training.run import load, open_data, read_run

_log = logging.getLogger(__name__)

# Seconds after a write until whoever asks for the health lets one be tried, and how long he waits.
_PROBE_AFTER, _PROBE_PATIENCE = 2.0, 0.5


@dataclass(frozen=True, eq=False)
class Served:
    """What is served.

    Attributes:
        name: of the run.
        model: trained, on the CPU.
        window: longest history that is read, in events.
        prepared: earlier histories, if any.
    """

    name: str
    model: CrossDomainHSTU
    window: int
    prepared: InteractionStore | None

    @classmethod
    def of(cls, run: Path, settings: ServiceSettings) -> "Served":
        """What a run folder holds.

        Raises:
            InputError: not a run folder, or a store of other data.
        """
        model, facts = load(run), read_run(run)
        window = min(facts["max_sequence_length"], model.settings.norm_length)
        return cls(run.resolve().name, model, window, _prepared(run, settings))


class Service:
    """Jobs in, results out; owns the thread, and through it session, store and log.

    Args:
        served: the model and what is known of users.
        settings: of the command.

    Attributes:
        active: requests that are under way.
        draining: no further request is taken.

    Raises:
        InputError: the log belongs to another process or is none, or an unknown kind of store.
        HstuXdError: log or store cannot be opened.
    """

    def __init__(self, served: Served, settings: ServiceSettings) -> None:
        self.settings, self.catalog = settings, served.model.catalog
        self.items = Items(self.catalog)
        self.active, self.draining = 0, False
        self.metrics = Metrics(self._numbers)
        version = fingerprint(served.model, served.window, torch.float32).hex()
        self.model_name = f"{served.name} {version[:12]}"
        self._served = served
        self._batcher: Batcher[Job] = Batcher(
            self._open, settings.queue, self.metrics.batch, cost_of
        )

    @property
    def full(self) -> bool:
        """Whether a job would be refused now."""
        return self._batcher.full

    @property
    def status(self) -> str:
        """ "ready", "draining", "failing" to write, or "failed" where the thread has ended."""
        if self.draining:
            return "draining"
        if not self._batcher.alive:
            return "failed"
        return "failing" if self._log.fails or self._sessions.refuses else "ready"

    @property
    def store_state(self) -> str:
        """Of the state store: "memory", "ok" or "gone"."""
        return self._sessions.store_state

    @property
    def writes_state(self) -> str:
        """Of the event log: "ok" or "failing"."""
        return "failing" if self._log.fails else "ok"

    async def check_writes(self) -> None:
        """Try a write where the last one is some time ago; it is not waited for long."""
        last, now = self._log.written_at, time.monotonic()
        if self.draining or self.full or (last is not None and now - last < _PROBE_AFTER):
            return
        with suppress(HstuXdError, asyncio.TimeoutError):
            await asyncio.wait_for(self.run(Probe()), _PROBE_PATIENCE)

    async def run(self, job: Job) -> Any:
        """The result of a job.

        Raises:
            Busy: too much is waiting.
            InputError: the job is wrong; nothing has changed.
            HstuXdError: log or store failed; nothing has changed.
        """
        return await self._batcher.submit(job)

    def stop(self, within: float | None = None) -> bool:
        """Finish what waits; close store and log.

        Args:
            within: seconds that it may take; None: as long as it takes.

        Returns:
            Whether all of it was done in time.
        """
        return self._batcher.stop(within)

    def abandon(self) -> None:
        """Refuse what waits, and wait for nothing that is under way."""
        self._batcher.abandon()

    def _open(self) -> Engine:
        states, served = self.settings.states, self._served
        torch.set_num_threads(states.threads or default_threads())
        self._log = log = EventLog(self.settings.events)
        self._histories = histories = Histories(log, self.catalog, self.items, served.prepared)

        # Of all sessions: one of millions of items takes its time to build.
        index = ItemIndex(served.model, states.retrieval)

        def session(store: StateStore | None) -> EncoderSession:
            return EncoderSession(
                served.model,
                window=served.window,
                max_bytes=states.max_bytes,
                history=histories.all_of,
                store=store,
                versions=histories,
                retrieval=index,
            )

        try:
            self._sessions = Sessions(session, states)
            self._warm_up()
        except Exception:
            log.close()
            raise
        arrivals = Arrivals(histories, log, self.items, self.settings.writes)
        return Engine(self._sessions, histories, log, self.items, arrivals)

    def _warm_up(self) -> None:
        """Answer nobody once: the first call takes longer than those that follow."""
        nobody, domains = "", range(self.catalog.num_domains)
        self._sessions.run(lambda session: session.answer([Request(nobody, domains)]))
        self._sessions.forget(nobody)

    def _numbers(self) -> dict[str, tuple[str, float]]:
        session = self._sessions.session
        return {
            "hstu_xd_queue_length": ("Requests that wait.", len(self._batcher)),
            "hstu_xd_active_requests": ("Requests under way.", self.active),
            "hstu_xd_states_bytes": ("Bytes of all states in memory.", session.num_bytes),
            "hstu_xd_states_users": ("Users whose states are in memory.", len(session)),
            "hstu_xd_states_rebuilt_total": ("States made anew.", self._histories.rebuilt),
            "hstu_xd_log_bytes": ("Bytes of the event log.", self._log.num_bytes()),
        }


def _prepared(run: Path, settings: ServiceSettings) -> InteractionStore | None:
    if not settings.use_data:
        if settings.data is not None:
            raise InputError(f"--data {settings.data} with --no-data; drop one of them")
        return None
    if settings.data is not None:
        return open_data(run, settings.data)
    try:
        return open_data(run)
    except HstuXdError as error:
        _log.warning("serving without earlier histories: %s", error)
        return None
