"""The log is the truth: states that are damaged, ahead, behind or gone are made from it again."""

import sqlite3
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from service_client import MODEL, WINDOW, event, events, recommend, right, serving
from store_cases import Unsteady, redis_server

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.serving import EncoderSession
from hstu_xd.serving.events.event_log import Event, LogError
from hstu_xd.serving.events.sqlite_log import SQLiteLog
from hstu_xd.serving.http import failover
from hstu_xd.serving.http.histories import Histories
from hstu_xd.serving.http.settings import StateSettings
from hstu_xd.serving.items import Items
from hstu_xd.serving.stores import MemoryStore, RedisStore, StoreError


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Unsteady:
    """What every service of the test keeps states in; tried again at every request."""
    store = Unsteady()
    monkeypatch.setattr(failover, "open_store", lambda name, ttl: store)
    monkeypatch.setattr(failover, "_RETRY", 0.0)
    return store


def test_states_are_found_again_without_rebuilding(tmp_path: Path, store: Unsteady) -> None:
    with serving(tmp_path) as client:
        client.append(*events(11))
    with serving(tmp_path) as client:
        assert right(client, 11)
        assert client.metric("hstu_xd_states_rebuilt_total") == 0
        assert client.ask("GET", "/healthz").json()["store"] == "ok"


@pytest.mark.parametrize("place", [0, 20, 40, -1])
def test_damaged_states_are_rebuilt(tmp_path: Path, store: Unsteady, place: int) -> None:
    with serving(tmp_path) as client:
        client.append(*events(11))
    value = bytearray(store._values["ann"])
    value[place] ^= 16
    store._values["ann"] = bytes(value)
    with serving(tmp_path) as client:
        assert right(client, 11)
        assert client.append(event(11)).status_code == 200
        assert right(client, 12)


def test_a_state_ahead_of_the_log_is_rebuilt(tmp_path: Path, store: Unsteady) -> None:
    """A service that was killed after it stored a state, and before it logged the event."""
    with serving(tmp_path) as client:
        client.append(*events(5))
    log = SQLiteLog(tmp_path / "events.sqlite")
    histories = Histories(log, MODEL.catalog, Items(MODEL.catalog))
    session = EncoderSession(
        MODEL, window=WINDOW, store=store, history=histories.all_of, versions=histories
    )
    session.append(["ann"], [3], [10**6])
    log.close()
    with serving(tmp_path) as client:
        assert right(client, 5)
        client.append(event(5))
        assert right(client, 6)


def test_a_state_behind_the_log_is_rebuilt(tmp_path: Path, store: Unsteady) -> None:
    """A store that came back with what it had earlier."""
    with serving(tmp_path) as client:
        client.append(*events(5))
        earlier = dict(store._values)
        client.append(*events(2, first=5))
        store._values = earlier
        assert right(client, 7)
        client.append(event(7))
        assert right(client, 8)


def test_a_forgotten_state_is_not_found_again(tmp_path: Path, store: Unsteady) -> None:
    with serving(tmp_path) as client:
        client.append(*events(5))
        kept = dict(store._values)
        store.gone = True
        assert client.ask("DELETE", "/v1/users/ann").json() == {"forgotten": True}
        store.gone, store._values = False, kept
        assert right(client, 0)
        client.append(event(0))
        assert right(client, 1)


def test_a_store_that_is_gone_refuses(tmp_path: Path, store: Unsteady) -> None:
    with serving(tmp_path) as client:
        client.append(*events(5))
        store.gone = True
        for answer in (client.append(event(5)), client.ask("POST", *_ask())):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "the store is gone" in answer.json()["error"]
        assert client.ask("GET", "/healthz").json()["store"] == "gone"
        store.gone = False
        assert right(client, 5)
        assert client.ask("GET", "/healthz").json()["store"] == "ok"


def test_a_store_that_is_gone_refuses_only_who_needs_it(tmp_path: Path, store: Unsteady) -> None:
    with serving(tmp_path, states={"store_every": 4}) as client:
        client.append(*events(5))
        store.gone = True
        # The state in memory is right, and it is not time to store it.
        for count in (5, 6, 7):
            assert client.append(event(count)).status_code == 200
            assert right(client, count + 1)
        assert client.append(event(8)).status_code == 503
        answer = client.ask("GET", "/healthz")
        assert (answer.status_code, answer.json()["store"]) == (503, "gone")
        store.gone = False
        assert right(client, 8)
        assert client.ask("GET", "/healthz").json()["store"] == "ok"
        assert client.append(event(8)).status_code == 200
    with serving(tmp_path) as client:
        assert right(client, 9)


def test_a_store_that_is_gone_is_asked_once_for_a_request_of_many_users(
    tmp_path: Path, store: Unsteady
) -> None:
    """Each time may take until a connection is given up."""
    with serving(tmp_path) as client:
        store.gone = True
        assert client.append(*[event(0, f"u{number}") for number in range(20)]).status_code == 503
        assert store.failures == 1
        store.gone = False
        assert right(client, 0, "u7")


def test_a_store_that_is_gone_is_done_without(tmp_path: Path, store: Unsteady) -> None:
    with serving(tmp_path, states={"when_store_fails": "rebuild"}) as client:
        client.append(*events(5))
        index = client.service._sessions.session.encoder.index
        store.gone = True
        for count in (5, 6):
            assert client.append(event(count)).status_code == 200
            assert client.ask("GET", "/healthz").json()["store"] == "gone"
            assert right(client, count + 1)
        # One of millions of items would take its time to build.
        assert client.service._sessions.session.encoder.index is index
        # What it kept meanwhile is behind.
        store.gone = False
        assert right(client, 7)
        assert client.ask("GET", "/healthz").json()["store"] == "ok"
        client.append(event(7))
        assert right(client, 8)
        assert client.metric("hstu_xd_states_rebuilt_total") >= 2
    with serving(tmp_path) as client:
        assert right(client, 8)


def test_a_store_that_hangs_holds_up_little(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = 0.0, 0.0

    class Hanging(MemoryStore):
        hangs = False

        def revisions(self, users: Any) -> Any:
            nonlocal now, waited
            if self.hangs:
                now, waited = now + 2, waited + 2
                raise StoreError("Redis: timeout")
            return super().revisions(users)

    store = Hanging()
    monkeypatch.setattr(failover, "open_store", lambda name, ttl: store)
    monkeypatch.setattr(failover, "time", SimpleNamespace(monotonic=lambda: now))
    settings = StateSettings(store="redis://", when_store_fails="rebuild")
    served = failover.FailoverSession(lambda store: EncoderSession(MODEL, store=store), settings)
    store.hangs = True
    while now < 1000:
        served.run(lambda session: session.query(["ann"], [0]))
        now += 0.1
    assert served.store_state == "gone"
    assert waited <= 50


def test_a_real_redis_is_killed_and_comes_back_empty(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    store = f"unix://{folder}/redis.sock"
    with ExitStack() as stack:
        with redis_server(folder):
            with serving(tmp_path / "a", states={"store": store}) as client:
                client.append(*events(5))
            refusing = stack.enter_context(serving(tmp_path / "a", states={"store": store}))
            assert right(refusing, 5)
            assert refusing.metric("hstu_xd_states_rebuilt_total") == 0
            states = {"store": store, "when_store_fails": "rebuild"}
            rebuilding = stack.enter_context(serving(tmp_path / "b", states=states))
            rebuilding.append(*events(5, "bob"))
        answer = refusing.append(event(5))
        assert answer.status_code == 503
        assert "Redis: " in answer.json()["error"]
        assert rebuilding.append(event(5, "bob")).status_code == 200
        assert right(rebuilding, 6, "bob")
        with redis_server(folder):
            assert right(refusing, 5)
            for client, user, count in ((refusing, "ann", 5), (rebuilding, "bob", 6)):
                assert client.append(event(count, user)).status_code == 200
                assert right(client, count + 1, user)


def test_redis_lets_states_expire_where_asked_to(tmp_path: Path) -> None:
    with redis_server(tmp_path) as socket:
        states = {"store": f"unix://{socket}", "ttl": 1000}
        with serving(tmp_path, states=states) as client:
            client.append(*events(5))
            kept = client.service._sessions._store
            assert isinstance(kept, RedisStore)
            (key,) = kept._client.keys()
            assert 0 < kept._client.ttl(key) <= 1000
            kept._client.flushall()
            assert right(client, 5)


def test_a_service_may_start_before_its_redis(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    states = {"store": f"unix://{folder}/redis.sock"}
    with pytest.raises(StoreError, match="Redis: "), serving(tmp_path / "a", states=states):
        pass
    states["when_store_fails"] = "rebuild"
    with serving(tmp_path / "a", states=states) as client:
        assert client.ask("GET", "/healthz").json()["store"] == "gone"
        assert client.append(*events(5)).status_code == 200
        assert right(client, 5)


def _ask() -> tuple[str, Any]:
    return "/v1/recommend", recommend("ann")


def test_a_full_disk_takes_nothing_and_loses_nothing(tmp_path: Path, store: Unsteady) -> None:
    with serving(tmp_path) as client:
        client.append(*events(5))
        connection = client.service._log._connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        answer = client.append(*events(900, first=5))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert "database or disk is full" in answer.json()["error"]
        assert right(client, 5)
        connection.execute("PRAGMA max_page_count = 100000")
        assert client.append(*events(2, first=5)).status_code == 200
        assert right(client, 7)
    with serving(tmp_path) as client:
        assert right(client, 7)


def test_a_disk_that_fails_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as client:
        client.append(*events(5))
        with monkeypatch.context() as broken:
            error = OSError(5, "Input/output error")
            broken.setattr(SQLiteLog, "_transaction", lambda log: (_ for _ in ()).throw(error))
            answer = client.append(event(5))
            assert answer.status_code == 503
            assert "Input/output error" in answer.json()["error"]
        assert right(client, 5)
        client.append(event(5))
        assert right(client, 6)


def test_what_a_log_takes_is_on_disk_when_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killing the process cannot show it: what was not synced is lost when the machine stops."""
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def observed(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", observed)
    log = SQLiteLog(tmp_path / "events.sqlite")
    log.add([Event("ann", "1", 1)])
    (connection,) = opened
    # FULL or more: in a write-ahead log, anything less leaves the last commits to the system.
    assert connection.execute("PRAGMA synchronous").fetchone()[0] >= 2
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    log.close()


def test_a_log_belongs_to_one_process(tmp_path: Path) -> None:
    log = SQLiteLog(tmp_path / "events.sqlite")
    with pytest.raises(InputError, match="another process serves from this log"):
        SQLiteLog(tmp_path / "events.sqlite")
    log.close()
    SQLiteLog(tmp_path / "events.sqlite").close()


def test_what_is_no_log_is_said(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    path.write_text("nothing of the kind" * 99)
    with pytest.raises(LogError, match=r"events\.sqlite: file is not a database"):
        SQLiteLog(path)
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(InputError, match="not an event log of this hstu-xd"):
        SQLiteLog(path)
    with pytest.raises(LogError, match="unable to open"):
        SQLiteLog(tmp_path / "none" / "events.sqlite")


def test_a_log_that_was_begun_and_not_finished_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(sqlite3.Connection):
        def execute(self, command: str, *values: Any) -> sqlite3.Cursor:
            if command.startswith("PRAGMA user_version ="):
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(command, *values)

    path = tmp_path / "events.sqlite"
    connection = Broken(path, isolation_level=None)
    with monkeypatch.context() as broken:
        broken.setattr(sqlite3, "connect", lambda *_, **__: connection)
        with pytest.raises(LogError, match="disk I/O error"):
            SQLiteLog(path)
    connection.close()
    log = SQLiteLog(path)
    log.add([Event("ann", "1", 1)])
    assert len(log.read(["ann"])[0].events) == 1
    log.close()


def test_forgotten_events_leave_the_file(tmp_path: Path) -> None:
    log = SQLiteLog(tmp_path / "events.sqlite")
    log.add([Event("ann", "confidential", number) for number in range(9)])
    log.forget("ann")
    # At once, not when the service ends.
    for file in tmp_path.iterdir():
        assert b"confidential" not in file.read_bytes()
    log.close()


def test_items_that_left_the_catalogue_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = SQLiteLog(tmp_path / "events.sqlite")
    log.add([Event("ann", "1", 1), Event("ann", "gone", 2), Event("ann", "2", 3)])
    histories = Histories(log, MODEL.catalog, Items(MODEL.catalog))
    for _ in range(2):
        assert histories.all_of("ann") == ([1, 2], [1, 3])
    assert caplog.text.count("no item 'gone'") == 1
    log.close()


def test_items_are_found_by_their_tokens() -> None:
    catalog = DomainCatalog(torch.tensor([0, 1, -1, 0]), ["books", "films"], ["x", "", "y"])
    items = Items(catalog)
    assert [items.find(token) for token in ("x", "y", "")] == [1, 3, None]
    assert [items.domain_of(item) for item in (1, 3)] == [1, 0]


@pytest.mark.parametrize("name", ["disk", "sqlite:", "redis:", "http://x"])
def test_an_unknown_kind_of_store_is_said(name: str) -> None:
    with pytest.raises(InputError, match="memory, sqlite:FILE or redis://"):
        failover.open_store(name)


def test_states_in_a_file(tmp_path: Path) -> None:
    states = {"store": f"sqlite:{tmp_path}/states.sqlite"}
    for count in (0, 5, 6):
        with serving(tmp_path, states=states) as client:
            assert right(client, count)
            assert client.metric("hstu_xd_states_rebuilt_total") == 0
            client.append(*events(5 if count == 0 else 1, first=count))
