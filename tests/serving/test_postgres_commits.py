"""A server that is gone in the middle of a commit: what was written counts once, or is refused."""

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from log_cases import PostgresServer, postgres_server
from test_event_logs import known, numbered

from hstu_xd.serving.events import open_log
from hstu_xd.serving.events.event_log import LogError


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.mark.parametrize(("happens", "counts"), [("committed", True), ("rolled back", False)])
def test_a_connection_that_breaks_while_it_commits(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch, happens: str, counts: bool
) -> None:
    """The server says afterwards what became of the transaction: it counts once, or is refused."""
    import psycopg

    log = open_log.open_log(server.database())
    execute = psycopg.Connection.execute

    def breaking(connection: psycopg.Connection, query: str, *values: object) -> object:
        if query != "COMMIT":
            return execute(connection, query, *values)
        if counts:
            execute(connection, query)
        connection.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    with monkeypatch.context() as broken:
        broken.setattr(psycopg.Connection, "execute", breaking)
        if counts:
            log.add(numbered(2))
        else:
            with pytest.raises(LogError, match="closed the connection"):
                log.add(numbered(2))
    assert len(known(log).events) == (2 if counts else 0)
    log.close()


def test_nobody_waits_long_for_a_server_that_is_gone_while_it_commits(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    from hstu_xd.serving.events import postgres_connection

    log = open_log.open_log(server.database(), recovery=0.25)
    execute = psycopg.Connection.execute
    waited: list[float] = []
    asked: list[float] = []

    def breaking(connection: psycopg.Connection, query: str, *values: object) -> object:
        if query != "COMMIT":
            return execute(connection, query, *values)
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    def gone(*_: object) -> None:
        asked.append(sum(waited))
        raise psycopg.OperationalError("connection refused")

    clock = SimpleNamespace(time=time.time, monotonic=lambda: sum(waited), sleep=waited.append)
    with monkeypatch.context() as broken:
        broken.setattr(psycopg.Connection, "execute", breaking)
        broken.setattr(type(log._connection), "_open", gone)
        broken.setattr(postgres_connection, "time", clock)
        with pytest.raises(LogError, match="same id or Idempotency-Key"):
            log.add(numbered(2, "bob"))
    assert asked == pytest.approx([0.0, 0.1, 0.2, 0.25])
    log.close()
