"""Services whose log is in PostgreSQL: one whose server comes and goes, and two that share it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from log_cases import PostgresServer, postgres_server
from service_client import Client, event, events, right, serving, write_run
from service_process import ServiceProcess
from store_cases import redis_server

from hstu_xd.serving.http import service


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


def test_a_service_goes_on_where_it_stopped(tmp_path: Path, server: PostgresServer) -> None:
    log = server.database()
    with serving(tmp_path, log=log) as client:
        assert client.append(*events(5), *events(3, "bob")).json() == {"accepted": 8}
        assert client.ask("GET", "/v1/users").json() == {"users": ["ann", "bob"]}
        again = {"events": [event(5) | {"id": "a"}]}
        assert client.ask("POST", "/v1/events", again).json() == {"accepted": 1}
        assert right(client, 6)
        assert right(client, 3, "bob")
    with serving(tmp_path, log=log) as client:
        repeated = {"accepted": 0, "repeated": 1}
        assert client.ask("POST", "/v1/events", again).json() == repeated
        assert right(client, 6)
        assert client.append(*events(2, first=6)).status_code == 200
        assert right(client, 8)
        assert client.ask("DELETE", "/v1/users/ann").json() == {"forgotten": True}
        assert right(client, 0)
        gone = event(2, "bob")
        assert client.ask("POST", "/v1/events/remove", gone).json() == {"removed": 1}
        assert right(client, 2, "bob")
        nul = {"events": [event(0, "a\0b")]}
        assert client.ask("POST", "/v1/events", nul).status_code == 400


def test_a_server_that_is_gone_refuses_and_loses_nothing(
    tmp_path: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_PROBE_AFTER", 0.0)

    def health(client: Client) -> tuple[int, str, str]:
        answer = client.ask("GET", "/healthz")
        return answer.status_code, answer.json()["status"], answer.json()["writes"]

    with serving(tmp_path, log=server.database()) as client:
        client.append(*events(5))
        assert health(client) == (200, "ready", "ok")
        assert client.metric("hstu_xd_log_bytes") > 0
        server.stop()
        for _ in range(2):
            answer = client.append(event(5))
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "the event log: connection" in answer.json()["error"]
            assert health(client) == (503, "failing", "failing")
        server.start()
        # Asked as often as it goes: a hundred answers may take less than the log's pause of half a
        # second before it tries to connect again.
        deadline = time.monotonic() + 60
        while health(client)[0] != 200:
            assert client.ask("GET", "/v1/users").status_code in (200, 503)
            assert time.monotonic() < deadline
        assert right(client, 5)
        assert client.append(event(5)).status_code == 200
        assert right(client, 6)


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_any_of_two_takes_any_user(tmp_path: Path, server: PostgresServer, store: str) -> None:
    with ExitStack() as stack:
        states = {"store": "memory"}
        if store == "redis":
            states["store"] = f"unix://{stack.enter_context(redis_server(tmp_path))}"
        log = server.database()
        first, second = (
            stack.enter_context(serving(tmp_path, log=log, states=states)) for _ in range(2)
        )
        for number in range(12):
            writer, other = (first, second) if number % 3 else (second, first)
            assert writer.append(event(number)).status_code == 200
            if number % 2:
                assert right(other, number + 1)
                assert right(writer, number + 1)
        back = event(3)
        for client in (first, second):
            assert "after one at 11000" in client.append(back).json()["error"]
        keyed = {"events": [event(12) | {"id": "k"}]}
        assert first.ask("POST", "/v1/events", keyed).json() == {"accepted": 1}
        assert second.ask("POST", "/v1/events", keyed).json() == {"accepted": 0, "repeated": 1}
        assert right(second, 13)
        assert first.ask("DELETE", "/v1/users/ann").json() == {"forgotten": True}
        assert right(second, 0)
        assert second.append(event(0)).status_code == 200
        assert right(first, 1)


def test_the_command_takes_a_url(tmp_path: Path, server: PostgresServer) -> None:
    options = ["--events", server.database().replace("postgres@", "postgres:s3cret@")]
    with ServiceProcess(write_run(tmp_path / "run"), *options) as process:
        assert process.ask("POST", "/v1/events", {"events": events(3)})[0] == 200
        code, said = process.end()
    assert code == 0
    assert "s3cret" not in said
    assert not (tmp_path / "run" / "serving").exists()
