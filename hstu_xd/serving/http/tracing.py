"""Spans of requests for OpenTelemetry, which a thread of its library sends to a collector.

A request's span is made once it is answered, from times that were noted meanwhile: nobody waits for
it. Spans that the collector does not take in time are dropped. No span has the name of a user or a
token: the route stands for the path. The variables of OpenTelemetry's SDK hold (OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_...).

Needs the extra ``otel``; where nobody asks for traces nothing imports this module.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hstu_xd.errors import InputError
from hstu_xd.serving.http.access_log import Answered
from hstu_xd.serving.http.batching import Step
from hstu_xd.version import __version__

_log = logging.getLogger(__name__)

# Seconds in which the last spans are sent when the service ends.
_ENDING = 1.0
# The headers by which a caller names the trace that a request belongs to.
_PARENT = (b"traceparent", b"tracestate")
# Where OpenTelemetry's library says, again and again, that it cannot send, or not fast enough.
_SENDS, _QUEUES = trace_exporter.__name__, "opentelemetry.sdk._shared_internal"


class Tracing:
    """Makes and sends the spans of one process.

    Args:
        url: that they are posted to, by OTLP over HTTP.

    Raises:
        InputError: a variable of OpenTelemetry has a value that its library does not take.
    """

    def __init__(self, url: str) -> None:
        named = Resource.create({"service.name": "hstu-xd", "service.version": __version__})
        self._provider = TracerProvider(
            resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        try:
            exporter = _Exporter(trace_exporter.OTLPSpanExporter(endpoint=url), url)
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        except ValueError as error:
            raise InputError(
                f"OpenTelemetry: {error}; mend the OTEL_EXPORTER_OTLP_... or OTEL_BSP_... variable"
            ) from error
        self._tracer = self._provider.get_tracer("hstu_xd.serving", __version__)
        self._propagator = TraceContextTextMapPropagator()
        # The library waits for what is being sent for as long as that takes.
        self._end = threading.Thread(target=self._provider.shutdown, daemon=True)
        self._end_by = 0.0

    def record(
        self,
        answered: Answered,
        began: float,
        steps: Sequence[Step],
        headers: Mapping[bytes, bytes],
    ) -> None:
        """Make the span of a request that is answered, and those of what it waited for.

        Args:
            answered: the request.
            began: when its headers were there, by ``time.perf_counter``.
            steps: what it waited for.
            headers: of the request, which may name the span of the caller.
        """
        now, ended = time.time_ns(), time.perf_counter()

        def at(moment: float) -> int:
            return now - round(1e9 * (ended - moment))

        carrier = {
            name.decode(): headers[name].decode("latin-1") for name in _PARENT if name in headers
        }
        span = self._tracer.start_span(
            f"{answered.method} {answered.path}",
            context=self._propagator.extract(carrier, Context()),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": answered.method,
                "http.route": answered.path,
                "http.response.status_code": answered.status,
                "hstu_xd.model": answered.version,
                "hstu_xd.request_id": answered.request_id,
            },
            start_time=at(began),
        )
        if span.is_recording():
            if answered.status >= 500:
                span.set_attribute("error.type", str(answered.status))
                span.set_status(Status(StatusCode.ERROR))
            inside = set_span_in_context(span, Context())
            for step in steps:
                child = self._tracer.start_span(step.name, inside, start_time=at(step.began))
                child.end(at(step.ended))
        span.end(now)

    def close(self) -> None:
        """Begin to send what is left; nothing is recorded any more."""
        if self._end.ident is None:
            self._end_by = time.monotonic() + _ENDING
            self._end.start()

    def wait(self) -> None:
        """Wait until it is sent, but not for long."""
        self._end.join(max(0.0, self._end_by - time.monotonic()))
        if self._end.is_alive():
            _log.warning("the last spans were not sent within %.0f s; they are dropped", _ENDING)


class _Exporter(SpanExporter):
    """Another exporter, which says once that spans do not arrive, and once that they do again.

    Args:
        exporter: sends them.
        url: where to.
    """

    def __init__(self, exporter: SpanExporter, url: str) -> None:
        self._exporter, self._url = exporter, url
        self._fails = self._is_slow = False
        self._heard = {name: _Heard() for name in (_SENDS, _QUEUES)}
        for name, heard in self._heard.items():
            logging.getLogger(name).addFilter(heard)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans."""
        try:
            result, reason = self._exporter.export(spans), self._heard[_SENDS].last
        except Exception as error:  # Earlier versions of the library raise what requests does.
            result, reason = SpanExportResult.FAILURE, str(error)
        fails = result is not SpanExportResult.SUCCESS
        if fails and not self._fails:
            _log.warning("spans do not reach %s: %s", self._url, reason)
        elif self._fails and not fails:
            _log.warning("spans reach %s again; those of meanwhile are dropped", self._url)
        elif self._heard[_QUEUES].last and not (fails or self._is_slow):
            self._is_slow = True
            _log.warning(
                "more spans come than %s takes, and some are dropped; set OTEL_TRACES_SAMPLER to "
                "parentbased_traceidratio and OTEL_TRACES_SAMPLER_ARG to a share of the requests",
                self._url,
            )
        self._fails = fails
        return result

    def shutdown(self) -> None:
        """Send nothing more."""
        self._exporter.shutdown()
        for name, heard in self._heard.items():
            logging.getLogger(name).removeFilter(heard)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Keep nothing back, as each call sends at once."""
        return self._exporter.force_flush(timeout_millis)


class _Heard(logging.Filter):
    """Keeps to itself what the library says.

    Attributes:
        last: what that was.
    """

    last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Take a line."""
        self.last = record.getMessage()
        return False
