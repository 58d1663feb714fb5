"""``hstu-xd serve`` as a process: drained, killed, and told what it cannot do."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from service_client import events, scores, write_run
from service_process import ServiceProcess

from hstu_xd.cli import app
from hstu_xd.serving.events.event_log import Event
from hstu_xd.serving.events.sqlite_log import SQLiteLog


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


def logged(path: Path, user: str) -> list[Event]:
    log = SQLiteLog(path)
    (known,) = log.read([user])
    log.close()
    return list(known.events)


def test_a_service_drains_and_goes_on_where_it_stopped(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "events.sqlite"
    with ServiceProcess(run, "--events", str(log), token="s3cret") as service:
        assert service.ask("GET", "/v1/users", headers={})[0] == 401
        assert service.ask("GET", "/healthz")[1]["status"] == "ready"
        ten = {"events": events(10)}
        assert service.ask("POST", "/v1/events", ten) == (200, {"accepted": 10})
        status, answer = service.ask("POST", "/v1/events", "x" * 10_000_000)
        assert status == 413
        assert "more than 1048576 bytes" in answer["error"]
        # One request is accepted, and half of it is still to come.
        body = json.dumps({"events": events(1, first=10)}).encode()
        slow = socket.create_connection(("127.0.0.1", service.port))
        slow.sendall(
            b"POST /v1/events HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer s3cret\r\nexpect: 100-continue\r\n"
            + f"content-length: {len(body)}\r\n\r\n".encode()
        )
        assert b" 100 " in slow.recv(1000)
        slow.sendall(body[:9])
        service.send(signal.SIGTERM)
        status = 200
        while status == 200:
            status, health = service.ask("GET", "/healthz")
        assert (status, health["status"]) == (503, "draining")
        status, answer = service.ask("POST", "/v1/events", ten)
        assert status == 503
        assert "stopping" in answer["error"]
        slow.sendall(body[9:])
        answered = b""
        while not answered.endswith(b"}"):
            answered += slow.recv(1000)
        assert answered.startswith(b"HTTP/1.1 200 ")
        assert answered.endswith(b'{"accepted":1}')
        code, said = service.end()
    assert code == 0
    assert "serving without earlier histories" in said
    assert len(logged(log, "ann")) == 11
    assert [file.name for file in tmp_path.iterdir()] == ["events.sqlite"]


def test_no_client_fills_the_memory_or_holds_up_the_end(run: Path, tmp_path: Path) -> None:
    """Requests faster than answers, answers that nobody reads, and halves of requests."""
    flood = b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n" * 1000
    halves = (b"", b"GET /he", b"POST /v1/events HTTP/1.1\r\ncontent-type: application/json\r\n")
    with ServiceProcess(run, "--events", str(tmp_path / "log"), token="s3cret") as service:
        clients = [socket.create_connection(("127.0.0.1", service.port)) for _ in halves]
        for client, half in zip(clients, halves):
            client.sendall(half)
        before = service.resident_bytes()
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.setblocking(False)
            end = time.monotonic() + 3
            while time.monotonic() < end:
                try:
                    client.send(flood)
                except BlockingIOError:
                    time.sleep(0.001)
            assert service.resident_bytes() < before + (32 << 20)
            began = time.monotonic()
            code, said = service.end()
        assert time.monotonic() - began < 10
        assert code == 0
        assert "Traceback" not in said
        for client in clients:
            client.close()


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "events.sqlite"
    options = ["--events", str(log), "--store", f"sqlite:{tmp_path}/states.sqlite"]
    users = ["ann", "bob", "eve"]
    with ServiceProcess(run, *options) as service:

        def append(user: str) -> int:
            for number, event in enumerate(events(10_000, user)):
                try:
                    status, _ = service.ask("POST", "/v1/events", {"events": [event]})
                except (OSError, http.client.HTTPException):
                    return number
                assert status == 200
                if number == 40:
                    service.send(signal.SIGKILL)
            raise AssertionError("the service was not killed")

        with ThreadPoolExecutor() as pool:
            acknowledged = list(pool.map(append, users))
        assert service.end()[0] == -signal.SIGKILL
    assert min(acknowledged) > 0
    with ServiceProcess(run, *options) as service:
        for user, count in zip(users, acknowledged):
            known = service.ask("GET", f"/v1/users/{user}/history?limit=10000")[1]["events"]
            assert count <= len(known) <= count + 1
            wanted = scores(events(len(known), user), 1)
            body = {"user": user, "domain": "films", "items": list(wanted)}
            found = service.ask("POST", "/v1/score", body)[1]["scores"]
            assert found == pytest.approx(list(wanted.values()), abs=1e-5)
        assert service.end(signal.SIGINT)[0] == 0


def test_who_listens_to_everybody_without_a_token_is_warned(run: Path, tmp_path: Path) -> None:
    for host, token, warned in (
        ("0.0.0.0", None, True),
        ("0.0.0.0", "s3cret", False),
        ("localhost", None, False),
    ):
        options = ["--events", str(tmp_path / "log"), "--host", host, "--log-level", "info"]
        with ServiceProcess(run, *options, token=token) as service:
            assert service.ask("GET", "/v1/users/ann/history")[0] == 200
            code, said = service.end()
        assert code == 0
        assert ("whoever reaches 0.0.0.0 can read, change and delete" in said) == warned
        assert "127.0.0.1 GET /v1/users/{user}/history 200 " in said


def test_what_the_command_refuses(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    taken = socket.create_server(("127.0.0.1", 0))
    for options, message in (
        ([str(tmp_path)], "not a run folder"),
        ([str(run), "--store", "disk"], "store 'disk'"),
        ([str(run), "--store-ttl", "60"], "only Redis lets states expire"),
        ([str(run), "--store-every", "8"], "--store-every 8 has no effect on states in memory"),
        ([str(run), "--retrieval", "hnsw"], "hnsw"),
        ([str(run), "--token-file", str(empty)], "the token must be"),
        ([str(run), "--token-file", str(tmp_path / "none")], "give a file with the token"),
        ([str(run), "--data", str(tmp_path)], "no prepared store here"),
        ([str(run), "--data", str(tmp_path), "--no-data"], "drop one of them"),
        ([str(run), "--port", str(taken.getsockname()[1])], "give another --host or --port"),
        ([str(run), "--events", str(empty / "log")], "give --events a place to write to"),
        ([str(run), "--when-store-fails", "pray"], "pray"),
    ):
        # Of an option that is given twice the last one counts.
        assert app.run(["serve", "--port", "0", "--events", str(tmp_path / "e"), *options])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("hstu-xd: "), said
        assert message in said
    taken.close()


def test_a_package_that_is_missing_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hstu_xd.cli import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert app.run(["serve", str(run)]) == 1
    assert 'pip install "hstu-xd[serving]"' in capsys.readouterr().err


def test_nothing_of_it_is_imported_by_the_rest() -> None:
    program = (
        "import sys, hstu_xd, hstu_xd.serving; from hstu_xd.cli.app import run; run(['--version']);"
        "sys.exit(bool({'fastapi', 'starlette', 'uvicorn', 'prometheus_client'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
