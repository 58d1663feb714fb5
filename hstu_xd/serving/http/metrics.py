"""What Prometheus reads at /metrics."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

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
