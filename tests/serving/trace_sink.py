"""A collector of OpenTelemetry under test: it takes spans over HTTP, and can be told to refuse."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_PATIENCE = 60.0


class Sink:
    """What a collector was sent."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.status = 200
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()

    def spans(self) -> list[tuple[dict[str, Any], Any]]:
        """Every span, with the attributes of the process that sent it."""
        found = []
        for body in [*self.bodies]:
            for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
                process = attributes(sent.resource)
                found += [(process, span) for some in sent.scope_spans for span in some.spans]
        return found

    def wait_for(self, count: int, name: str) -> list[tuple[dict[str, Any], Any]]:
        """Wait until it has so many spans of a name."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            found = [each for each in self.spans() if each[1].name == name]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"{len(found)} of {count} spans"
            time.sleep(0.05)


def attributes(of: Any) -> dict[str, Any]:
    """The attributes of a process or a span, as it was sent."""
    kinds = "string_value", "int_value"
    return {
        each.key: next(
            (getattr(each.value, kind) for kind in kinds if each.value.HasField(kind)), None
        )
        for each in of.attributes
    }


@contextmanager
def trace_sink() -> Iterator[Sink]:
    """A collector that listens."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            sink.paths.add(self.path)
            if sink.status == 200:
                sink.bodies.append(body)
            self.send_response(sink.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sink = Sink(server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield sink
    finally:
        server.shutdown()
        server.server_close()
