"""Spans of requests: what they tell, of whom they do not, and that no answer waits for them."""

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from log_cases import postgres_server
from other_models import write_runs
from service_client import Client, Gate, event, events, recommend, serving, write_run
from service_process import ServiceProcess

from hstu_xd.cli import app
from hstu_xd.cli import serve as command
from hstu_xd.errors import InputError

pytest.importorskip(
    "opentelemetry.exporter.otlp.proto.http",
    reason="no OpenTelemetry exporter here: traces are NOT covered",
)

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from trace_sink import attributes, trace_sink

from hstu_xd.serving.http import tracing

URL = "http://collector:4318/v1/traces"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OTEL = "OTEL_EXPORTER_OTLP_ENDPOINT"


@contextmanager
def traced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[tuple[Client, list[ReadableSpan]]]:
    """A client, and the spans that were sent once its service has ended."""
    memory = InMemorySpanExporter()
    monkeypatch.setattr(tracing.trace_exporter, "OTLPSpanExporter", lambda endpoint: memory)
    spans: list[ReadableSpan] = []
    with serving(folder, traces=URL, **settings) as client:
        yield client, spans
    spans += memory.get_finished_spans()


def children(spans: list[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    found = [
        each for each in spans if each.parent and each.parent.span_id == parent.context.span_id
    ]
    return sorted(found, key=lambda each: each.start_time or 0)


def named(spans: list[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [each for each in spans if each.name == name]


def test_a_request_is_a_span_with_what_it_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"x-request-id": "r-1", "traceparent": f"00-{TRACE}-{CALLER}-01"}
    began = time.time_ns()
    with traced(tmp_path, monkeypatch) as (client, spans):
        body = {"events": events(3)}
        answer = client.ask("POST", "/v1/events", body, headers=headers)
        assert answer.status_code == 200
        assert client.ask("POST", "/v1/recommend", recommend("ann")).status_code == 200
        assert client.ask("GET", "/v1/users/ann/history").status_code == 200
        assert client.ask("DELETE", "/v1/users/ann").status_code == 200
    (taken,) = named(spans, "POST /v1/events")
    assert taken.kind == SpanKind.SERVER
    assert f"{taken.context.trace_id:032x}" == TRACE
    assert taken.parent is not None
    assert f"{taken.parent.span_id:016x}" == CALLER
    assert dict(taken.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/events",
        "http.response.status_code": 200,
        "hstu_xd.model": answer.headers["x-model"],
        "hstu_xd.request_id": "r-1",
    }
    wanted = {
        "POST /v1/events": ["queue", "log.read", "states", "log.write"],
        "POST /v1/recommend": ["queue", "log.read", "states"],
        "GET /v1/users/{user}/history": ["queue", "log.read"],
        "DELETE /v1/users/{user}": ["queue", "log.write", "states"],
    }
    for name, steps in wanted.items():
        (parent,) = named(spans, name)
        found = children(spans, parent)
        assert [each.name for each in found] == steps
        assert {each.context.trace_id for each in found} == {parent.context.trace_id}
        moments = [x for each in found for x in (each.start_time or 0, each.end_time or 0)]
        assert moments == sorted(moments)
        assert began < (parent.start_time or 0) <= moments[0]
        assert moments[-1] <= (parent.end_time or 0) <= time.time_ns()
    assert len(spans) == sum(1 + len(steps) for steps in wanted.values())
    assert taken.resource.attributes["service.name"] == "hstu-xd"
    assert not any("ann" in each.to_json() for each in spans)


def test_the_caller_says_whether_a_request_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced(tmp_path, monkeypatch) as (client, spans):
        for given in (f"00-{TRACE}-{CALLER}-00", f"00-{TRACE}-{CALLER}", "nonsense", "\u00e9"):
            headers = [(b"traceparent", given.encode()), (b"tracestate", b"\xff=")]
            assert client.ask("GET", "/v1/domains", headers=headers).status_code == 200
    # The first is not sampled; the others name no span, and each begins a trace.
    assert len({each.context.trace_id for each in spans}) == len(spans) == 3
    assert not any(each.parent for each in spans)


def test_what_is_refused_is_a_span_without_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    with traced(tmp_path, monkeypatch, token="s3cret") as (client, spans):
        bearer = {"authorization": "Bearer s3cret"}
        wrong = {"events": [event(0) | {"item": "ann-thing"}]}
        for method, path, body, headers, status in (
            ("GET", "/v1/users/ann/history?limit=ann", None, bearer, 400),
            ("POST", "/v1/events", wrong, bearer, 400),
            ("GET", "/ann", None, bearer, 404),
            ("GET", "/v1/users?prefix=ann", None, {"authorization": "Bearer s3cre"}, 401),
        ):
            answer = client.ask(method, path, body, headers=headers)
            assert answer.status_code == status
        client.service.draining = True
        assert client.ask("GET", "/v1/users", headers=bearer).status_code == 503
    requests = [each for each in spans if each.kind == SpanKind.SERVER]
    statuses = [each.attributes["http.response.status_code"] for each in requests]
    assert statuses == [400, 400, 404, 401, 503]
    assert [each.status.status_code for each in requests] == [StatusCode.UNSET] * 4 + [
        StatusCode.ERROR
    ]
    assert requests[-1].attributes["error.type"] == "503"
    assert requests[2].name == "GET other"
    assert requests[0].resource.attributes["service.name"] == "shop"
    assert requests[0].resource.attributes["deployment.environment"] == "test"
    text = "".join(each.to_json() for each in spans)
    assert "ann" not in text
    assert "s3cre" not in text


def test_requests_of_a_batch_each_have_what_it_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with traced(tmp_path, monkeypatch) as (client, spans):
        asked = [("POST", "/v1/events", {"events": events(1, user)}) for user in "abc"]
        assert [each.status_code for each in client.ask_all(asked, gate)] == [200] * 3
    found = [children(spans, each) for each in named(spans, "POST /v1/events")]
    writes = {(each[-1].start_time, each[-1].end_time) for each in found}
    assert [[each.name for each in some][-1] for some in found] == ["log.write"] * 3
    # One transaction: the same moments, but for what a reading of two clocks differs.
    starts = [start or 0 for start, _ in writes]
    assert max(starts) - min(starts) < 1e6


def test_nothing_of_fastapi_tells_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another tool has set a provider for the process, as opentelemetry-instrument does."""
    memory, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    with serving(tmp_path) as client:
        assert client.ask("GET", "/v1/users/ann/history").status_code == 200
    assert memory.get_finished_spans() == ()


class Collector(InMemorySpanExporter):
    """Takes spans, or fails as this version of the library does, or as earlier ones do."""

    answers = "taken"

    def export(self, spans: Any) -> SpanExportResult:
        if self.answers == "raised":
            raise ConnectionError("refused")
        if self.answers == "failed":
            logging.getLogger(tracing.trace_exporter.__name__).error("reason %s", 503)
            return SpanExportResult.FAILURE
        return super().export(spans)


def test_that_spans_do_not_arrive_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    inner = Collector()
    exporter = tracing._Exporter(inner, URL)
    for answers in ("taken", "failed", "failed", "raised", "taken", "taken", "raised", "failed"):
        inner.answers = answers
        exporter.export([])
    exporter.shutdown()
    assert [record.getMessage() for record in caplog.records] == [
        f"spans do not reach {URL}: reason 503",
        f"spans reach {URL} again; those of meanwhile are dropped",
        f"spans do not reach {URL}: refused",
    ]


def test_more_than_a_collector_takes_is_dropped_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")

    class Slow(InMemorySpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            time.sleep(0.1)
            return super().export(spans)

    memory = Slow()
    monkeypatch.setattr(tracing.trace_exporter, "OTLPSpanExporter", lambda endpoint: memory)
    with serving(tmp_path, traces=URL) as client:
        for _ in range(50):
            assert client.ask("GET", "/v1/domains").status_code == 200
    assert len(memory.get_finished_spans()) < 50
    assert caplog.text.count("more spans come than") == 1
    assert "OTEL_TRACES_SAMPLER" in caplog.text
    assert "Queue full" not in caplog.text


def test_workers_and_a_shadow_send_to_a_real_collector(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs")
    with trace_sink() as sink, postgres_server() as server:
        options = ["--events", server.database(), "--workers", "2", "--traces", sink.url]
        options += ["--shadow", str(runs / "new")]
        with ServiceProcess(runs / "old", *options, token="s3cret") as process:
            count = 40
            for number in range(count):
                # Each over a connection of its own: the kernel gives it to any worker.
                sent = {"events": [event(number, f"user-{number % 4}")]}
                assert process.ask("POST", "/v1/events", sent)[0] == 200
            answer = process.ask("POST", "/v1/recommend", recommend("user-1"))
            assert answer[0] == 200
            began = time.monotonic()
            code, said = process.end()
            assert time.monotonic() - began < 10
        found = sink.wait_for(count, "POST /v1/events")
        sink.wait_for(1, "POST /v1/recommend")
    assert code == 0
    assert "spans" not in said
    assert sink.paths == {"/v1/traces"}
    assert len(found) == count
    assert attributes(found[0][1])["http.response.status_code"] == 200
    assert {process["service.name"] for process, _ in found} == {"hstu-xd"}
    everything = b"".join(sink.bodies)
    assert b"user-1" not in everything
    assert b"s3cret" not in everything


@pytest.mark.parametrize("kind", ["closed", "hangs"])
def test_a_collector_that_is_gone_holds_up_nothing(tmp_path: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if kind == "closed":
            listener.close()
        options = ["--events", str(tmp_path / "log"), "--traces", f"http://127.0.0.1:{port}"]
        with ServiceProcess(write_run(tmp_path / "run"), *options) as process:
            for number in range(20):
                assert process.ask("POST", "/v1/events", {"events": [event(number)]})[0] == 200
            began = time.monotonic()
            code, said = process.end()
            assert time.monotonic() - began < 10
    assert code == 0
    assert "Traceback" not in said
    # Earlier versions of the library try a port that is closed once, and so it fails in time.
    (line,) = [line for line in said.splitlines() if "span" in line]
    late = "the last spans were not sent within 1 s; they are dropped"
    assert line.startswith(
        (f"hstu-xd: {late}", f"hstu-xd: spans do not reach http://127.0.0.1:{port}/")
    )


def test_the_option_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(url: str) -> str:
        code = app.run(["serve", str(tmp_path), "--traces", url])
        assert code == 2
        return capsys.readouterr().err

    assert "--traces is 'collector:4318'; http://HOST:4318 is needed" in refused("collector:4318")
    assert "--traces is 'http://c:port'; http://HOST" in refused("http://c:port")
    for secret in ("http://me:s3cret@collector:4318", "http://collector:4318/?key=s3cret"):
        said = refused(secret)
        assert "OTEL_EXPORTER_OTLP_HEADERS" in said
        assert "s3cret" not in said
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert "--traces with OTEL_SDK_DISABLED=true" in refused("http://collector:4318")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({OTEL: "http://c:4318"}, URL.replace("collector", "c")),
        ({OTEL: "http://c:4318/"}, URL.replace("collector", "c")),
        ({OTEL: "https://c/otlp"}, "https://c/otlp/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x", OTEL: "http://no"}, "http://c/x"),
        ({OTEL: "http://c", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({OTEL: "http://c", "OTEL_SDK_DISABLED": "true"}, None),
        ({OTEL: "http://c", "OTEL_TRACES_EXPORTER": "zipkin"}, "is 'zipkin'; serve has otlp"),
        ({OTEL: "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "is 'grpc'; serve has http/"),
        ({OTEL: "c:4317"}, f"{OTEL} is 'c:4317'; http://HOST:4318 is needed"),
        ({}, None),
    ],
)
def test_variables_of_opentelemetry_hold(
    given: dict[str, str],
    url: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = command._collector(None)
    if url is None or url.startswith("http"):
        assert (found, caplog.text) == (url, "")
    else:
        assert found is None
        assert "no traces: " in caplog.text
        assert url in caplog.text


@pytest.mark.parametrize("size", ["0", "1"])
def test_a_variable_that_the_library_does_not_take_is_said(
    tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", size)
    wrong = r"OpenTelemetry: max_\w+ must .*; mend the OTEL_EXPORTER_OTLP_... or OTEL_BSP_"
    with pytest.raises(InputError, match=wrong), serving(tmp_path, traces=URL):
        pass


def test_the_extra_is_named_where_it_is_missing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "hstu_xd.serving.http.tracing", None)
    assert app.run(["serve", str(tmp_path), "--traces", "http://collector:4318"]) == 1
    assert 'traces need pip install "hstu-xd[otel]"' in capsys.readouterr().err
    monkeypatch.setenv(OTEL, "http://collector:4318")
    assert command._collector(None) is None
    assert "no traces: OTEL_EXPORTER_OTLP_ENDPOINT: " in caplog.text
    assert 'pip install "hstu-xd[otel]"' in caplog.text


def test_nothing_is_loaded_where_nobody_asks_for_traces() -> None:
    program = (
        "import sys, hstu_xd.serving.http.server, hstu_xd.cli.serve as s; assert s._collector(None)"
        " is None; sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
