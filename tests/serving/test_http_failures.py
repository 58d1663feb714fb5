"""What a full disk, a full store and a store that is gone do, and what is told of them."""

import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from service_client import Client, event, events, right, serving
from store_cases import Unsteady

from hstu_xd.errors import InputError
from hstu_xd.serving.events.sqlite_log import SQLiteLog
from hstu_xd.serving.http import failover, service
from hstu_xd.serving.http.settings import StateSettings
from hstu_xd.serving.stores import MemoryStore, RedisStore, StoreError, Write


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Unsteady:
    """What every service of the test keeps states in; tried again at every request."""
    store = Unsteady()
    monkeypatch.setattr(failover, "open_store", lambda name, ttl: store)
    monkeypatch.setattr(failover, "_RETRY", 0.0)
    return store


def test_health_tells_whether_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_PROBE_AFTER", 0.0)

    def health(client: Client) -> tuple[int, str, str]:
        answer = client.ask("GET", "/healthz")
        return answer.status_code, answer.json()["status"], answer.json()["writes"]

    def full(_: SQLiteLog) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    with serving(tmp_path) as client:
        assert health(client) == (200, "ready", "ok")
        with monkeypatch.context() as broken:
            # Nobody has written since: the probe itself has to find out.
            broken.setattr(SQLiteLog, "_transaction", full)
            assert health(client) == (503, "failing", "failing")
            assert client.append(event(0)).status_code == 503
        assert health(client) == (200, "ready", "ok")
        assert right(client, 0)
        client.append(event(0))
        assert right(client, 1)


def test_health_tells_whether_the_store_refuses(
    tmp_path: Path, store: Unsteady, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_PROBE_AFTER", 0.0)
    with serving(tmp_path) as client:
        store.gone = True
        answer = client.ask("GET", "/healthz")
        assert (answer.status_code, answer.json()["store"]) == (503, "gone")
        store.gone = False
        answer = client.ask("GET", "/healthz")
        assert (answer.status_code, answer.json()["store"]) == (200, "ok")


class Full(MemoryStore):
    """A store that can be read and has no room, as Redis at its maxmemory."""

    full = False

    def put(self, writes: Any) -> Any:
        if self.full:
            raise StoreError("Redis: OOM command not allowed")
        return super().put(writes)


def test_a_full_store_does_not_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Full()
    monkeypatch.setattr(failover, "open_store", lambda name, ttl: store)
    monkeypatch.setattr(failover, "_RETRY", 0.0)
    with serving(tmp_path, states={"when_store_fails": "rebuild"}) as client:
        store.full = True
        for count in range(9):
            assert client.append(event(count)).status_code == 200
            assert right(client, count + 1)
        assert caplog.text.count("states are rebuilt in memory") == 1
        assert "store is back" not in caplog.text
        store.full = False
        assert right(client, 9)
        assert caplog.text.count("store is back") == 1
        assert client.ask("GET", "/healthz").json()["store"] == "ok"


def test_who_is_forgotten_while_the_store_is_gone_leaves_it_later(
    tmp_path: Path, store: Unsteady
) -> None:
    with serving(tmp_path) as client:
        client.append(*events(5), event(0, "bob"))
        store.gone = True
        assert client.ask("DELETE", "/v1/users/ann").json() == {"forgotten": True}
        store.gone = False
        assert "ann" in store._values
        assert right(client, 1, "bob")
        assert "ann" not in store._values
        assert right(client, 0)


class FakePipeline:
    """Fails as Redis does; by itself redis-py would add the command with all it carries."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def execute(self, *, raise_on_error: bool = True) -> list[Any]:
        from redis import ResponseError

        assert not raise_on_error
        return [ResponseError("OOM command not allowed when used memory > 'maxmemory'.")]


def test_an_error_of_redis_has_no_value_in_it() -> None:
    pytest.importorskip("redis", reason="no redis-py here: errors of Redis are NOT covered")
    pytest.importorskip("redis", reason="no redis-py here: errors of Redis are NOT covered")
    script = lambda *_, **__: None  # noqa: E731
    client = SimpleNamespace(
        pipeline=lambda transaction: FakePipeline(), register_script=lambda text: script
    )
    store = RedisStore(client)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"^Redis: OOM command not allowed when"):
        store.put([Write("ann", b"\x00" * 99, b"")])


@pytest.mark.parametrize(
    "name",
    [
        "redis://:s3cret@host:port/0",
        "redis://:s3cret#1@host:6379/0",
        "redis://:s3c/ret@host/0",
        "redis://host/0?passwd=s3cret",
        "redis://ann:s3cret@host:99999999/0",
        "unix://:s3cret@/socket?db=s3cret",
        "rediss//:s3cret@host",
        "http://ann:s3cret@host",
        "ann:s3cret@host",
        "s3cret@host",
    ],
)
def test_a_bad_address_is_told_without_its_password(name: str) -> None:
    pytest.importorskip("redis", reason="no redis-py here: addresses of Redis are NOT covered")
    pytest.importorskip("redis", reason="no redis-py here: addresses of Redis are NOT covered")
    with pytest.raises(InputError) as told:
        failover.open_store(name)
    text = str(told.value)
    assert "s3c" not in text
    assert "redis://" in text
    assert told.value.__cause__ is None
    if not name.startswith(("redis:", "unix:")):
        with pytest.raises(InputError) as told:
            StateSettings(store=name.replace("rediss", "r"), ttl=5)
        assert "s3c" not in str(told.value)
