"""A log in PostgreSQL: several writers, a server that goes, crashes or refuses, migrations."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from log_cases import PostgresServer, known, numbered, postgres_server

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.events import open_log
from hstu_xd.serving.events.event_log import Conflict, Event, EventLog, Keyed, LogError


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


def test_many_writers_lose_nothing_and_keep_their_order(server: PostgresServer) -> None:
    """Each adds to the same users what it has judged by their versions, as workers do."""
    url, writers, each = server.database(), 4, 25
    users = ["ann", "bob", "eve"]
    conflicts = [0] * writers

    def write(writer: int) -> None:
        log = open_log.open_log(url)
        for number in range(each):
            while True:
                some = dict(zip(users, log.read(users, 1)))
                events = [
                    Event(user, f"{writer} {number}", len(seen.events) and seen.events[-1][2] + 1)
                    for user, seen in some.items()
                ]
                # In any order of the users: nobody waits for who waits for him.
                events = events[writer % 3 :] + events[: writer % 3]
                try:
                    log.add(events, versions={u: seen.version for u, seen in some.items()})
                    break
                except Conflict:
                    conflicts[writer] += 1
        log.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(conflicts)
    log = open_log.open_log(url)
    for found in log.read(users):
        assert [event.timestamp for event in found.events] == list(range(writers * each))
        assert len({event.item for event in found.events}) == writers * each
    log.close()


def test_a_server_that_goes_away_is_found_again(server: PostgresServer) -> None:
    log = open_log.open_log(server.database())
    log.add(numbered(3))
    server.stop()
    for _ in range(2):
        with pytest.raises(LogError, match=r"the event log: connection.*failed"):
            log.read(["ann"])
        with pytest.raises(LogError):
            log.add(numbered(1))
        assert log.fails
    server.start()
    _wait_for(log)
    assert len(known(log).events) == 3
    # A restart between two calls is not even noticed by who reads.
    server.stop("fast")
    server.start()
    assert len(known(log).events) == 3
    log.add(numbered(1), versions={"ann": known(log).version})
    assert not log.fails
    log.close()


@pytest.mark.slow
def test_a_server_that_hangs_is_given_up(server: PostgresServer) -> None:
    log = open_log.open_log(server.database())
    log.add(numbered(3))
    server.pause(signal.SIGSTOP)
    try:
        for _ in range(2):
            with pytest.raises(LogError, match="timeout"):
                log.read(["ann"])
        with pytest.raises(LogError, match="timeout"):
            log.add(numbered(1))
    finally:
        server.pause(signal.SIGCONT)
    _wait_for(log)
    assert len(known(log).events) == 3
    log.close()


def _wait_for(log: EventLog) -> None:
    """Until a call finds the server."""
    from threading import Event as Sign

    for _ in range(100):
        try:
            log.read(["ann"])
            return
        except LogError:
            Sign().wait(0.1)
    raise AssertionError("the log did not come back")


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
    with monkeypatch.context() as broken:
        broken.setattr(psycopg.Connection, "execute", breaking)
        broken.setattr(type(log._connection), "_was_written", lambda *_: None)
        with pytest.raises(LogError, match="same id or Idempotency-Key"):
            log.add(numbered(2, "bob"))
    log.close()


@pytest.mark.parametrize("others_write", [False, True])
def test_a_server_that_crashes_gives_the_number_of_a_lost_transaction_to_another(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch, others_write: bool
) -> None:
    """That the number was committed then says nothing of what is lost."""
    import psycopg

    url = server.database()
    log, other = open_log.open_log(url), open_log.open_log(url)
    execute = psycopg.Connection.execute

    def crashing(connection: psycopg.Connection, query: str, *values: object) -> object:
        if query == "COMMIT":
            broken.undo()
            server.stop()
            server.start()
            if others_write:
                _wait_for(other)
                other.add(numbered(1, "eve"))
        return execute(connection, query, *values)

    with monkeypatch.context() as broken:
        broken.setattr(psycopg.Connection, "execute", crashing)
        with pytest.raises(LogError) as refused:
            log.add(numbered(2))
    # Where nobody has the number there is no doubt.
    assert others_write or "is not known" not in str(refused.value)
    assert known(log).events == []
    log.close()
    other.close()


def test_a_commit_that_rolls_back_is_told(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL answers so where something has failed, and calls it no error."""
    import psycopg

    log = open_log.open_log(server.database())
    execute = psycopg.Connection.execute

    def failing(connection: psycopg.Connection, query: str, *values: object) -> object:
        if query == "COMMIT":
            with pytest.raises(psycopg.errors.DivisionByZero):
                execute(connection, "SELECT 1 / 0")
        return execute(connection, query, *values)

    with monkeypatch.context() as broken:
        broken.setattr(psycopg.Connection, "execute", failing)
        with pytest.raises(LogError, match="COMMIT by ROLLBACK; nothing was taken"):
            log.add(numbered(2))
        assert log.fails
    assert known(log).events == []
    log.add(numbered(2))
    assert len(known(log).events) == 2
    log.close()


def test_what_a_transaction_left_behind_is_not_seen(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a write that was refused are in the connection's sight until it is rolled back."""
    import psycopg

    log = open_log.open_log(server.database())
    log.add(numbered(1))
    execute = psycopg.Connection.execute

    def unable(connection: psycopg.Connection, query: str, *values: object) -> object:
        if query == "ROLLBACK":
            raise psycopg.OperationalError("no memory")
        return execute(connection, query, *values)

    with monkeypatch.context() as broken:
        broken.setattr(psycopg.Connection, "execute", unable)
        with pytest.raises(Conflict):
            log.add(numbered(2), [Keyed("ann", "k", "1", 1)], {"ann": b"another"})
    assert log.events_of_keys([("ann", "k")]) == {}
    assert len(known(log).events) == 1
    log.close()


def test_a_database_that_cannot_be_written_to(server: PostgresServer) -> None:
    url = server.database()
    name = url.partition("?")[0].rpartition("/")[2]
    log = open_log.open_log(url)
    log.add(numbered(3))
    server.run_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on", "postgres")
    log.close()
    log = open_log.open_log(url)
    assert len(known(log).events) == 3
    for write in (lambda: log.add(numbered(1)), log.probe, lambda: log.forget("ann")):
        with pytest.raises(LogError, match="in a read-only transaction"):
            write()
        assert log.fails
    server.run_sql(f"ALTER DATABASE {name} RESET default_transaction_read_only", "postgres")
    log.close()
    log = open_log.open_log(url)
    log.probe()
    assert log.num_bytes() > 0
    log.close()


def test_what_is_accepted_is_on_disk(server: PostgresServer) -> None:
    """Whatever the database is set to; what is stronger than needed stays."""
    url = server.database()
    for chosen, used in (("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")):
        name = url.partition("?")[0].rpartition("/")[2]
        server.run_sql(f"ALTER DATABASE {name} SET synchronous_commit = {chosen}", "postgres")
        log = open_log.open_log(url)
        assert log._connection.read("SHOW synchronous_commit") == [(used,)]
        log.close()


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ("SELECT 1 / 0", "division by zero"),
        ("SELECT pg_terminate_backend(pg_backend_pid())", "terminating connection"),
    ],
)
def test_a_migration_that_was_cut_short_goes_on(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch, cut: str, said: str
) -> None:
    from hstu_xd.serving.events import postgres_log

    url, (first, *_) = server.database(), postgres_log.MIGRATIONS
    with monkeypatch.context() as broken:
        broken.setattr(postgres_log, "MIGRATIONS", (f"{first} {cut};",))
        with pytest.raises(HstuXdError, match=said):
            open_log.open_log(url)
    # Several that start at once: one of them migrates.
    failed: list[Exception] = []

    def start() -> None:
        try:
            open_log.open_log(url).close()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    log = open_log.open_log(url)
    log.add(numbered(1))
    log.close()
    with monkeypatch.context() as later:
        # It takes longer than a statement of a request may.
        second = "CREATE TABLE hstu_xd.later (x int); SELECT pg_sleep(2.2);"
        later.setattr(postgres_log, "MIGRATIONS", (first, second))
        log = open_log.open_log(url)
        assert len(known(log).events) == 1
        log.close()
    with pytest.raises(InputError, match="of a later hstu-xd"):
        open_log.open_log(url)


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_a_writer_that_waited_for_a_migration_sees_its_schema(
    server: PostgresServer, isolation: str
) -> None:
    """Whatever it writes, and whatever transactions of the database see by default."""
    import psycopg

    from hstu_xd.serving.events import postgres_log

    url = server.database()
    name = url.partition("@/")[2].partition("?")[0]
    server.run_sql(f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'", name)
    log = open_log.open_log(url)
    log.add(numbered(2))
    before = known(log)
    writes = (
        lambda: log.add(numbered(1)),
        lambda: log.add(numbered(1), versions={"ann": before.version}),
        lambda: log.remove(Event("ann", "0", 0), hide=True),
        lambda: log.forget("ann"),
        log.probe,
    )
    for write in writes:
        said: list[str] = []

        def attempt(write: Callable[[], object] = write, said: list[str] = said) -> None:
            with pytest.raises(LogError) as told:
                write()
            said.append(str(told.value))

        with psycopg.connect(url) as migrating:
            migrating.execute("SELECT pg_advisory_xact_lock(%s)", (postgres_log._LOCK,))
            waiting = threading.Thread(target=attempt)
            waiting.start()
            query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            deadline = time.monotonic() + 60
            while not migrating.execute(query).fetchall()[0][0]:
                assert time.monotonic() < deadline
            migrating.execute("UPDATE hstu_xd.schema SET version = version + 1")
        waiting.join()
        assert "of a later hstu-xd (schema 2, this one knows 1); serve with that one" in said[0]
        server.run_sql("UPDATE hstu_xd.schema SET version = 1", name)
    assert known(log) == before
    log.add(numbered(1), versions={"ann": before.version})
    log.close()


def test_what_postgres_cannot_keep_is_said(server: PostgresServer) -> None:
    log = open_log.open_log(server.database())
    for ask in (lambda: log.read(["a\0b"]), lambda: log.add([Event("ann", "a\0b", 1)])):
        with pytest.raises(InputError, match="PostgreSQL cannot keep it"):
            ask()
    assert not log.fails
    log.add(numbered(1))
    log.close()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:s3/cret@host/db",
        "postgresql://ann:s3c@ret@host/db",
        "postgresql://ann:s3cret@host:port/db",
        "postgresql://host/db?passwd=s3cret",
        "postgresql://ann:s3cret@[host/db",
        "mysql://ann:s3cret@host/db",
    ],
)
def test_a_bad_url_is_told_without_its_password(url: str) -> None:
    pytest.importorskip("psycopg", reason="no psycopg here: logs in PostgreSQL are NOT covered")
    with pytest.raises(InputError, match="postgresql://") as told:
        open_log.open_log(url)
    assert "s3" not in str(told.value)
    assert told.value.__cause__ is None
    assert open_log.shown_log("postgresql://ann:s3cret@host/db") == "PostgreSQL"


def test_a_server_that_is_not_there_is_told_without_the_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="no psycopg here: logs in PostgreSQL are NOT covered")
    with pytest.raises(LogError, match="connection") as told:
        open_log.open_log(f"postgresql://ann:s3cret@/db?host={tmp_path}")
    assert "s3cret" not in str(told.value)
    assert not isinstance(told.value, InputError)


def test_psycopg_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "hstu_xd.serving.events.postgres_log", None)
    with pytest.raises(HstuXdError, match=r"psycopg is not installed; pip install"):
        open_log.open_log("postgresql://host/db")
