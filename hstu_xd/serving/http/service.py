"""A service without its HTTP: a trained run, its events and the thread that answers.

It counts what Prometheus reads at /metrics.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.objective import Scorer
from hstu_xd.serving.codec import fingerprint
from hstu_xd.serving.events.open_log import open_log
from hstu_xd.serving.http.arrivals import Arrivals
from hstu_xd.serving.http.batch_handler import BatchHandler, Job, Probe, cost_of
from hstu_xd.serving.http.batching import Batcher
from hstu_xd.serving.http.failover import FailoverSession
from hstu_xd.serving.http.histories import Histories, Items
from hstu_xd.serving.http.settings import ServiceSettings, default_threads
from hstu_xd.serving.requests import Request
from hstu_xd.serving.retrieval import ItemIndex
from hstu_xd.serving.session import EncoderSession
from hstu_xd.serving.stores import StateStore
from hstu_xd.training.run import load_trained
from hstu_xd.training.run_facts import open_data, read_run

# Seconds and jobs.
_LATENCIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
# Counted where a client went away before its request was whole, as proxies do: no error of ours.
NOBODY_LEFT = 499


class Metrics:
    """Counts of one service, in a registry of its own.

    Args:
        numbers: present values by name, of what grows (``..._total``) and what goes up and down.
    """

    def __init__(self, numbers: Callable[[], dict[str, tuple[str, float]]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Numbers(numbers))
        self._requests = Counter(
            "hstu_xd_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "hstu_xd_request_seconds",
            "Time from a request's headers to its answer, without those refused with 503.",
            ["route"],
            buckets=_LATENCIES,
            registry=self._registry,
        )
        self._batches = Histogram(
            "hstu_xd_batch_size",
            "Requests that were handled together.",
            buckets=_SIZES,
            registry=self._registry,
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, status).inc()
        if status not in (NOBODY_LEFT, 503):
            self._seconds.labels(route).observe(seconds)

    def batch(self, size: int) -> None:
        """Count a batch."""
        self._batches.observe(size)

    def text(self) -> bytes:
        """Write all counts in Prometheus's text format."""
        return generate_latest(self._registry)


class _Numbers:
    """Values that are read when somebody asks."""

    def __init__(self, numbers: Callable[[], dict[str, tuple[str, float]]]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Any]:
        for name, (about, value) in self._numbers().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, about, value=value)


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
        scorer: what ranks items; None: dot products.
        exclude_seen: whether items of a user's history are left out, unless a request says.
    """

    name: str
    model: CrossDomainHSTU
    window: int
    prepared: InteractionStore | None
    scorer: Scorer | None = None
    exclude_seen: bool = True

    @classmethod
    def from_run(
        cls, run: Path, settings: ServiceSettings, *, allow_imports: bool = False
    ) -> "Served":
        """Load what a run folder holds.

        Raises:
            InputError: not a run folder, modules that it may not import, or a store that is damaged
                or of other data.
        """
        trained = load_trained(run, allow_imports=allow_imports)
        model = trained.model
        return cls(
            run.resolve().name,
            model,
            model.window,
            _prepared(run, settings),
            trained.scorer,
            trained.protocol.exclude_seen,
        )


class Service:
    """Jobs in, results out; owns the thread, and through it session, store and log.

    Args:
        served: the model and what is known of users.
        settings: of the command.

    Attributes:
        exclude_seen: whether recommendations leave out what a user has met, unless a request says.
        active: requests that are under way.
        draining: no further request is taken.

    Raises:
        InputError: the log belongs to another process or is none, or an unknown kind of store.
        HstuXdError: log or store cannot be opened.
    """

    def __init__(self, served: Served, settings: ServiceSettings) -> None:
        self.settings, self.catalog = settings, served.model.catalog
        self.exclude_seen = served.exclude_seen
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
        """Return whether a job would be refused now."""
        return self._batcher.full

    @property
    def status(self) -> str:
        """Return "ready", "draining", "failing" to write, or "failed" if the thread has ended."""
        if self.draining:
            return "draining"
        if not self._batcher.alive:
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

    def _open(self) -> BatchHandler:
        states, served = self.settings.states, self._served
        torch.set_num_threads(states.threads or default_threads())
        self._log = log = open_log(self.settings.events)
        self._histories = histories = Histories(log, self.catalog, self.items, served.prepared)

        # All sessions share one index: of millions of items it takes long to build.
        index = ItemIndex(served.model, states.retrieval, served.scorer)

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
            self._sessions = FailoverSession(session, states)
            self._warm_up()
        except Exception:
            log.close()
            raise
        arrivals = Arrivals(histories, log, self.items, self.settings.writes)
        return BatchHandler(self._sessions, histories, log, self.items, arrivals)

    def _warm_up(self) -> None:
        """Answer an unknown user once, because the first call takes longer than later ones."""
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
        if settings.verify_data:
            raise InputError("--verify with --no-data; drop one of them")
        return None
    if settings.data is not None:
        return open_data(run, settings.data, verify=settings.verify_data)
    own = Path(read_run(run)["data"])
    if not settings.verify_data and _is_absent(own):
        _log.warning("serving without earlier histories: %s is not there; pass --data STORE", own)
        return None
    try:
        return open_data(run, verify=settings.verify_data)
    except InputError as error:
        raise InputError(f"{error}; or start without earlier histories: --no-data") from error


def _is_absent(folder: Path) -> bool:
    """Return whether nothing is there; what may not be looked at is not taken for that."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
