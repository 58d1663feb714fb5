"""Faults of what workers share: nothing is lost or doubled, whoever asks is told, and it passes."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from log_cases import PostgresServer, postgres_server
from other_models import OTHER, expected
from service_client import DOMAINS, Client, event, events, right, serving
from store_cases import redis_server

pytest.importorskip("psycopg", reason="no psycopg here: faults of PostgreSQL are NOT covered")

from hstu_xd.errors import InputError
from hstu_xd.serving.events import postgres_connection
from hstu_xd.serving.http import failover, service


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture(autouse=True)
def probed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_PROBE_AFTER", 0.0)
    # A probe may wait for the log's own limit of 2 s.
    monkeypatch.setattr(service, "_PROBE_PATIENCE", 5.0)
    monkeypatch.setattr(failover, "_RETRY", 0.0)


def name_of(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]


@contextmanager
def read_only(server: PostgresServer, name: str) -> Iterator[None]:
    """As after a switch of servers: connections break, and new ones find what takes no writes."""
    server.run_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on", "postgres")
    server.run_sql(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
        "postgres",
    )
    yield
    server.run_sql(f"ALTER DATABASE {name} RESET default_transaction_read_only", "postgres")


@contextmanager
def full(server: PostgresServer, name: str) -> Iterator[None]:
    """What PostgreSQL says when a file cannot grow, of every table of the log."""
    server.run_sql(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
        "'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$",
        name,
    )
    for table in ("users", "events", "schema"):
        server.run_sql(
            f"CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON hstu_xd.{table} "
            "EXECUTE FUNCTION full_disk()",
            name,
        )
    yield
    server.run_sql("DROP FUNCTION full_disk() CASCADE", name)


@contextmanager
def slow(server: PostgresServer, name: str) -> Iterator[None]:
    """Somebody else holds all tables, so that every statement takes longer than it may."""
    import psycopg

    with psycopg.connect(server.url(name)) as connection:
        connection.execute("LOCK TABLE hstu_xd.users, hstu_xd.events, hstu_xd.schema")
        yield


@contextmanager
def later(server: PostgresServer, name: str) -> Iterator[None]:
    """A later version of hstu-xd has migrated the log while this one serves."""
    server.run_sql("UPDATE hstu_xd.schema SET version = 99", name)
    yield
    server.run_sql("UPDATE hstu_xd.schema SET version = 1", name)


def statuses(client: Client) -> list[int]:
    return [client.ask("GET", path).status_code for path in ("/livez", "/readyz", "/healthz")]


def wait_for_health(client: Client) -> None:
    deadline = time.monotonic() + 60
    while statuses(client) != [200, 200, 200]:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("fault", "reason", "reads"),
    [
        (read_only, "in a read-only transaction", True),
        (full, "No space left on device", True),
        (slow, "canceling statement due to statement timeout", False),
        (later, "of a later hstu-xd (schema 99, this one knows 1); serve with that one", True),
    ],
)
def test_a_log_that_fails_refuses_and_comes_back(
    tmp_path: Path,
    server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[PostgresServer, str], Any],
    reason: str,
    reads: bool,
) -> None:
    if fault is slow:
        monkeypatch.setattr(postgres_connection, "_PATIENCE", 1.0)
    log = server.database()
    wanted = {"events": [event(5) | {"id": "once"}]}
    with serving(tmp_path / "a", log=log) as client, serving(tmp_path / "b", log=log) as other:
        client.append(*events(5))
        assert statuses(client) == [200, 200, 200]
        with fault(server, name_of(log)):
            # The first one may only find that the connection is gone.
            for _ in range(2):
                answer = client.ask("POST", "/v1/events", wanted)
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) >= 1
            assert reason in answer.json()["error"]
            assert statuses(client) == [200, 503, 503]
            health = client.ask("GET", "/healthz").json()
            assert (health["status"], health["writes"]) == ("failing", "failing")
            if reads:
                assert right(client, 5)
            else:
                answer = client.ask("GET", "/v1/users/ann/history")
                assert (answer.status_code, reason in answer.json()["error"]) == (503, True)
        wait_for_health(client)
        assert right(client, 5)
        assert client.ask("POST", "/v1/events", wanted).json() == {"accepted": 1}
        wait_for_health(other)
        assert other.ask("POST", "/v1/events", wanted).json() == {"accepted": 0, "repeated": 1}
        assert right(client, 6)
        assert right(other, 6)


def test_a_log_of_another_version_is_not_served(tmp_path: Path, server: PostgresServer) -> None:
    log = server.database()
    with serving(tmp_path, log=log) as client:
        client.append(*events(2))
    refused = pytest.raises(InputError, match=r"later hstu-xd .*; serve with that one, or give")
    with later(server, name_of(log)), refused, serving(tmp_path, log=log):
        pass
    with serving(tmp_path, log=log) as client:
        assert right(client, 2)


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_two_runs_share_a_log_and_a_store(
    tmp_path: Path, server: PostgresServer, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each answers by its own model: it never takes the other's states for its own."""
    with ExitStack() as stack:
        states = {"store": "memory"}
        if store == "redis":
            states["store"] = f"unix://{stack.enter_context(redis_server(tmp_path))}"
        log = server.database()
        old, new = (
            stack.enter_context(serving(tmp_path, log=log, states=states, **model))
            for model in ({}, {"model": OTHER})
        )
        for number in range(8):
            writer = (old, new)[number % 2]
            assert writer.append(event(number)).json() == {"accepted": 1}
            known = events(number + 1)
            assert right(old, number + 1)
            assert new.score_all() == pytest.approx(expected(OTHER, known, DOMAINS[0]), abs=1e-5)
        assert len(new.history()) == 8
        versions = {client.ask("GET", "/healthz").headers["x-model"] for client in (old, new)}
        assert len(versions) == 2
    # Said once by each, not for every user of every request; and without their names.
    said = [line for line in caplog.messages if "another checkpoint" in line]
    assert len(said) == (2 if store == "redis" else 0)
    assert not any("ann" in line for line in said)


def test_workers_go_on_from_the_log_without_their_redis(
    tmp_path: Path, server: PostgresServer
) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    states = {"store": f"unix://{folder}/redis.sock", "when_store_fails": "rebuild"}
    log = server.database()

    def check(clients: list[Client], number: int) -> None:
        assert clients[number % 2].append(event(number)).json() == {"accepted": 1}
        for client in clients:
            assert right(client, number + 1)
            assert statuses(client) == [200, 200, 200]

    with ExitStack() as stack:
        clients = []
        with redis_server(folder):
            clients = [
                stack.enter_context(serving(tmp_path, log=log, states=states)) for _ in range(2)
            ]
            for number in range(4):
                check(clients, number)
        for number in range(4, 8):
            check(clients, number)
        assert clients[0].ask("GET", "/healthz").json()["store"] == "gone"
        with redis_server(folder):
            for number in range(8, 12):
                check(clients, number)
            assert clients[0].ask("GET", "/healthz").json()["store"] == "ok"


@pytest.mark.parametrize("ahead", [-7200, 0, 7200])
def test_the_clock_is_that_of_the_log(
    tmp_path: Path,
    server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ahead: int,
) -> None:
    """What one worker takes another one does not refuse, whatever their machines' clocks show."""
    now = time.time()
    clock = SimpleNamespace(
        time=lambda: time.time() + ahead, monotonic=time.monotonic, sleep=time.sleep
    )
    monkeypatch.setattr(postgres_connection, "time", clock)
    with serving(tmp_path, log=server.database()) as client:
        soon = client.append(event(0) | {"timestamp": int(now) + 1800})
        late = client.append(event(1) | {"timestamp": int(now) + 5400})
    assert (soon.status_code, late.status_code) == (200, 400)
    assert "is in the future" in late.json()["error"]
    said = [line for line in caplog.messages if "machine's clock" in line]
    which = {-7200: ["behind"], 0: [], 7200: ["ahead of"]}[ahead]
    assert said == [
        f"this machine's clock is 7200 s {word} that of PostgreSQL, which counts; mend it"
        for word in which
    ]
