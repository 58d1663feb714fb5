"""What watches a service is told: whether it lives, and whether requests are to be sent to it."""

import http.client
import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from log_cases import postgres_server
from service_client import Client, event, serving, write_run
from service_process import ServiceProcess

from hstu_xd.serving.events.event_log import LogError
from hstu_xd.serving.events.sqlite_log import SQLiteLog
from hstu_xd.serving.http import service

LIVE, NOT_LIVE = (200, {"live": True}), (503, {"live": False})
READY = (200, {"status": "ready"})


def asked(client: Client, path: str) -> tuple[int, Any]:
    answer = client.ask("GET", path)
    assert client.ask("HEAD", path).status_code == answer.status_code
    return answer.status_code, answer.json()


def test_a_service_is_ready_until_it_drains_and_lives_on(tmp_path: Path) -> None:
    with serving(tmp_path, token="s3cret") as client:
        assert (asked(client, "/livez"), asked(client, "/readyz")) == (LIVE, READY)
        client.service.draining = True
        assert asked(client, "/livez") == LIVE
        assert asked(client, "/readyz") == (503, {"status": "draining"})


def test_a_service_whose_thread_has_ended_does_not_live(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        client.service._batcher.stop()
        assert asked(client, "/livez") == NOT_LIVE
        assert asked(client, "/readyz") == (503, {"status": "failed"})


def test_a_service_that_cannot_write_lives_and_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_PROBE_AFTER", 0.0)

    def full(log: SQLiteLog) -> None:
        log.fails = True
        raise LogError("the disk is full")

    with serving(tmp_path) as client:
        with monkeypatch.context() as broken:
            broken.setattr(SQLiteLog, "probe", full)
            assert asked(client, "/readyz") == (503, {"status": "failing"})
            assert asked(client, "/livez") == LIVE
        assert asked(client, "/readyz") == READY


def status(process: ServiceProcess, path: str) -> int:
    try:
        return process.ask("GET", path)[0]
    except (OSError, http.client.HTTPException):
        return 0


def wait_for(process: ServiceProcess, path: str, wanted: int) -> None:
    deadline = time.monotonic() + 60
    while (found := status(process, path)) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_workers_are_ready_while_their_log_can_be_written(tmp_path: Path) -> None:
    with postgres_server() as server:
        options = ["--events", server.database(), "--workers", "2"]
        options += ["--log-level", "info", "--log-format", "json"]
        with ServiceProcess(write_run(tmp_path / "run"), *options) as process:
            assert (status(process, "/livez"), status(process, "/readyz")) == (200, 200)
            server.stop()
            wait_for(process, "/readyz", 503)
            assert status(process, "/livez") == 200
            server.start()
            wait_for(process, "/readyz", 200)

            # One request is whole late, and another one never.
            body = json.dumps({"events": [event(0)]}).encode()
            head = (
                b"POST /v1/events HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body)
            )
            address = ("127.0.0.1", process.port)
            with socket.create_connection(address) as late, socket.create_connection(address) as no:
                for connection in (late, no):
                    connection.sendall(head)
                    assert b" 100 " in connection.recv(1000)
                process.send(signal.SIGTERM)
                # A worker that has nothing to finish ends at once; the others refuse.
                wait_for(process, "/readyz", 503)
                wait_for(process, "/v1/domains", 503)
                wait_for(process, "/livez", 200)
                late.sendall(body)
                assert late.recv(1000).startswith(b"HTTP/1.1 200 ")
                code, said = process.end(signal.SIGCONT)
        assert code == 0, said
        assert "Traceback" not in said
        lines = [json.loads(line) for line in said.splitlines()]
        assert {line["worker"] for line in lines if "path" in line} <= {0, 1}
        taken = [line for line in lines if line.get("path") == "/v1/events"]
        assert [line["status"] for line in taken if line["method"] == "POST"].count(200) == 1
        with serving(tmp_path / "again", log=options[1]) as client:
            assert [row["timestamp"] for row in client.history()] == [0]
