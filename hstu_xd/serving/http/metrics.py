"""Counts of a service for Prometheus: of its one process, or summed over its workers.

Workers share a folder of prometheus_client, which the process that watches them makes: whichever of
them is asked answers for all, with what those that have died had counted.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

# Seconds and jobs.
_LATENCIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_RANKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
OUTCOMES = ("compared", "dropped", "overtaken", "failed")
# Counted where a client went away before its request was whole, as proxies do: no error of ours.
NOBODY_LEFT = 499

# What prometheus_client looks for when a process imports it.
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
# Of one log for all workers, and so no sum.
_SHARED = ("hstu_xd_log_bytes",)

# Present values by name: of what grows (``..._total``), and of what goes up and down.
Numbers = Callable[[], dict[str, tuple[str, float]]]


@contextmanager
def shared_counts() -> Iterator[None]:
    """Have all processes that are started meanwhile count together."""
    with TemporaryDirectory(prefix="hstu-xd-") as folder:
        os.environ[_FOLDER] = folder
        # It has been imported, and those that are forked do not import it again.
        values.ValueClass = values.get_value_class()
        try:
            yield
        finally:
            del os.environ[_FOLDER]
            values.ValueClass = values.get_value_class()


def forget_process(pid: int) -> None:
    """Drop what a process that has died had at present; what it had counted stays."""
    mark_process_dead(pid, os.environ[_FOLDER])


class Metrics:
    """Counts of one service, in a registry of its own.

    Args:
        numbers: present values.
        model: returns the name of the model that answers.
        shadow: returns the name of the one that answers in its shadow; None: there is none.
    """

    def __init__(
        self,
        numbers: Numbers,
        model: Callable[[], str],
        shadow: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Model(model, shadow))
        self._shared = None
        if _FOLDER in os.environ:
            self._shared = _SharedNumbers(numbers)
            MultiProcessCollector(self._registry)
        else:
            self._registry.register(_Numbers(numbers))
        registry = None if self._shared else self._registry
        self._requests = Counter(
            "hstu_xd_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "hstu_xd_request_seconds",
            "Time from a request's headers to its answer, without those refused with 503.",
            ["route"],
            buckets=_LATENCIES,
            registry=registry,
        )
        self._batches = Histogram(
            "hstu_xd_batch_size",
            "Requests that were handled together.",
            buckets=_SIZES,
            registry=registry,
        )
        self._shadows: _ShadowMetrics | None = None
        self._one = threading.Lock()

    def shadow(self, name: str) -> "ShadowCounts":
        """Return the counts of a run that answers in the shadow of this service's.

        They go on where it was in the shadow before: Prometheus takes no counter that falls.
        """
        with self._one:
            if self._shadows is None:
                self._shadows = _ShadowMetrics(None if self._shared else self._registry)
        return ShadowCounts(name, self._shadows)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, status).inc()
        if status not in (NOBODY_LEFT, 503):
            self._seconds.labels(route).observe(seconds)

    def batch(self, size: int) -> None:
        """Count a batch, and let other workers see the present values after it."""
        self._batches.observe(size)
        if self._shared is not None:
            self._shared.write()

    def text(self) -> bytes:
        """Write all counts in Prometheus's text format."""
        if self._shared is not None:
            self._shared.write()
        return generate_latest(self._registry)


class _ShadowMetrics:
    """What is counted of all runs that answer in the shadow, each by its name.

    Args:
        registry: None: other processes read them.
    """

    def __init__(self, registry: CollectorRegistry | None) -> None:
        def histogram(metric: str, about: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(metric, about, ["name"], buckets=buckets, registry=registry)

        self.requests = Counter(
            "hstu_xd_shadow_requests",
            "Answers that were compared, dropped as the service was busy, overtaken by an event of "
            "the user, or failed in the shadow.",
            ["name", "outcome"],
            registry=registry,
        )
        self.overlap = histogram(
            "hstu_xd_shadow_overlap",
            "Share of the items recommended of a domain that both models recommend.",
            [number / 10 for number in range(11)],
        )
        self.rank = histogram(
            "hstu_xd_shadow_first_rank",
            "Rank that the shadow gives the first item; one more than all where it has it not.",
            _RANKS,
        )
        self.seconds = histogram(
            "hstu_xd_shadow_seconds", "Time that the shadow took for an answer.", _LATENCIES
        )


class ShadowCounts:
    """How the answers of another run differ from those that were given.

    Args:
        name: of the other model.
        metrics: of all that were in the shadow.
    """

    def __init__(self, name: str, metrics: _ShadowMetrics) -> None:
        self._requests = {each: metrics.requests.labels(name, each) for each in OUTCOMES}
        self._overlap, self._rank = metrics.overlap.labels(name), metrics.rank.labels(name)
        self._seconds = metrics.seconds.labels(name)

    def ended(self, outcome: str) -> None:
        """Count an answer by what became of it, one of :data:`OUTCOMES`."""
        self._requests[outcome].inc()

    def compared(self, overlaps: Iterable[float], ranks: Iterable[int], seconds: float) -> None:
        """Count an answer that was compared."""
        self.ended("compared")
        self._seconds.observe(seconds)
        for overlap in overlaps:
            self._overlap.observe(overlap)
        for rank in ranks:
            self._rank.observe(rank)


class _Model:
    """The names of the model and of its shadow, read when somebody asks."""

    def __init__(self, name: Callable[[], str], shadow: Callable[[], str | None]) -> None:
        self._name, self._shadow = name, shadow

    def collect(self) -> Iterator[Any]:
        about = "The model that answers."
        yield InfoMetricFamily("hstu_xd_model", about, value={"name": self._name()})
        if (shadow := self._shadow()) is not None:
            about = "The model that answers in the shadow of the other one."
            yield InfoMetricFamily("hstu_xd_shadow", about, value={"name": shadow})


class _Numbers:
    """Values that are read when somebody asks."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Any]:
        for name, (about, value) in self._numbers().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, about, value=value)


class _SharedNumbers:
    """The same values where other processes read them."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted: dict[str, float] = {}
        self._one = threading.Lock()

    def write(self) -> None:
        """Write the present values; any thread may do it."""
        with self._one:
            self._write()

    def _write(self) -> None:
        for name, (about, value) in self._numbers().items():
            if name.endswith("_total"):
                if name not in self._counters:
                    self._counters[name] = Counter(name, about, registry=None)
                self._counters[name].inc(value - self._counted.get(name, 0.0))
                self._counted[name] = value
                continue
            if name not in self._gauges:
                mode = "livemax" if name in _SHARED else "livesum"
                self._gauges[name] = Gauge(name, about, registry=None, multiprocess_mode=mode)
            self._gauges[name].set(value)
