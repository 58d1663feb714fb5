"""A log as Parquet and back, between SQLite and PostgreSQL: the same log, all of it or nothing."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from log_cases import PostgresServer, postgres_server

from hstu_xd.errors import InputError
from hstu_xd.serving.events import transfer
from hstu_xd.serving.events.event_log import Event, Keyed, LogError
from hstu_xd.serving.events.open_log import open_log
from hstu_xd.serving.events.transfer import TABLES, export_log, import_log

USERS = ["ann", "bob", "eve", "joe", "\u00e9", "Z", "nobody"]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture
def new_log(tmp_path: Path, server: PostgresServer) -> Callable[[str], str]:
    """Name an empty log of a kind."""
    names = iter(range(99))

    def new(kind: str) -> str:
        return server.database() if kind == "postgres" else str(tmp_path / f"log{next(names)}")

    return new


def fill(name: str) -> str:
    """Write what a log may have: users in turns, keys, what was removed and who was forgotten."""
    log = open_log(name)
    for number in range(4):
        # Of one time, in an order that is nobody's alphabet.
        rows = [Event(user, f"{7 * number % 5}", 10) for user in ("joe", "ann", "\u00e9", "Z")]
        log.add(rows, [Keyed(*rows[1][:1], f"event {number}", *rows[1][1:])])
    log.add([Event("bob", "1", 5)], [Keyed("bob", "k", "1", 5)])
    log.forget("bob")
    log.add([Event("eve", "1", 5), Event("eve", "2", 6)], [Keyed("eve", "k", "1", 5)])
    log.remove(Event("eve", "1", 5), hide=True)
    log.forget("nobody")
    log.close()
    return name


def seen(name: str) -> tuple[Any, ...]:
    """All that a service can see of a log."""
    log = open_log(name)
    keys = [("ann", f"event {number}") for number in range(5)] + [("bob", "k"), ("eve", "k")]
    found = log.read(USERS), log.events_of_keys(keys), log.users_from("", 99)
    log.close()
    return [(each[:3], list(each.events)) for each in found[0]], *found[1:]


@pytest.mark.parametrize("first", ["sqlite", "postgres"])
@pytest.mark.parametrize("second", ["sqlite", "postgres"])
def test_a_log_is_the_same_after_its_way(
    tmp_path: Path,
    new_log: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
) -> None:
    monkeypatch.setattr(transfer, "_ROWS", 3)
    source, target = fill(new_log(first)), new_log(second)
    counts = export_log(source, tmp_path / "out")
    assert counts == {"users": 7, "events": 17, "keys": 5, "hidden": 1}
    assert (tmp_path / "out").stat().st_mode & 0o77 == 0
    assert import_log(tmp_path / "out", target) == counts
    assert seen(target) == seen(source)
    export_log(target, tmp_path / "again")
    for table in TABLES:
        files = [tmp_path / folder / f"{table}.parquet" for folder in ("out", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()
    # It goes on: a key that came with it is known, and new events come after it.
    log = open_log(target)
    log.add([Event("ann", "9", 11)])
    assert log.read(["ann"], 1)[0].events == [Event("ann", "9", 11)]
    log.close()


def test_what_is_not_empty_is_left_alone(tmp_path: Path, new_log: Callable[[str], str]) -> None:
    export_log(fill(new_log("sqlite")), tmp_path / "out")
    for kind in ("sqlite", "postgres"):
        name = fill(new_log(kind))
        before = seen(name)
        with pytest.raises(InputError, match=r"has users already; import into an empty one"):
            import_log(tmp_path / "out", name)
        assert seen(name) == before


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_an_import_that_is_cut_short_leaves_nothing(
    tmp_path: Path, new_log: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    export_log(fill(new_log("sqlite")), tmp_path / "out")
    name, rows, count = new_log(kind), transfer._rows, 0

    def failing(batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return rows(batch)

    monkeypatch.setattr(transfer, "_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        import_log(tmp_path / "out", name)
    monkeypatch.undo()
    assert seen(name)[2] == []
    assert import_log(tmp_path / "out", name)["events"] == 17


def test_what_cannot_be_transferred_is_said(
    tmp_path: Path, new_log: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no event log here; name the --events"):
        export_log(str(tmp_path / "none"), tmp_path / "out")
    name = fill(new_log("sqlite"))
    owner = open_log(name)
    with pytest.raises(InputError, match="another process serves from this log"):
        export_log(name, tmp_path / "out")
    owner.close()
    export_log(name, tmp_path / "out")
    with pytest.raises(InputError, match="exists; add --force"):
        export_log(name, tmp_path / "out")
    export_log(name, tmp_path / "out", force=True)
    with pytest.raises(InputError, match="not an exported log"):
        import_log(tmp_path, new_log("sqlite"))
    facts = json.loads((tmp_path / "out" / "log.json").read_text())
    (tmp_path / "out" / "log.json").write_text(json.dumps(facts | {"format": 9}))
    with pytest.raises(InputError, match="format 9, 1 is needed; export the log with"):
        import_log(tmp_path / "out", new_log("sqlite"))
    (tmp_path / "out" / "log.json").write_text(json.dumps(facts))
    (tmp_path / "out" / "keys.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"keys.parquet: has changed since it was exported"):
        import_log(tmp_path / "out", new_log("sqlite"))


def test_what_a_database_says_is_said(tmp_path: Path, new_log: Callable[[str], str]) -> None:
    name = new_log("sqlite")
    log = open_log(name)
    log.add([Event("a\0b", "1", 5)])
    log.close()
    export_log(name, tmp_path / "out")
    target = new_log("postgres")
    with pytest.raises(InputError, match="PostgreSQL cannot keep it"):
        import_log(tmp_path / "out", target)
    assert seen(target)[2] == []
    with pytest.raises(LogError, match="the event log"):
        export_log("postgresql://nobody@/none?host=/nowhere", tmp_path / "other")


def test_the_commands(tmp_path: Path, new_log: Callable[[str], str], cli: Any) -> None:
    name, target = fill(new_log("sqlite")), new_log("postgres")
    done = cli("events", "export", name, "--out", tmp_path / "out")
    assert (done.code, done.out) == (
        0,
        f"{tmp_path / 'out'}: 7 users, 17 events, 5 keys, 1 hidden\n",
    )
    done = cli("events", "import", tmp_path / "out", target)
    assert (done.code, done.out) == (0, "imported 7 users, 17 events, 5 keys, 1 hidden\n")
    assert seen(target) == seen(name)
    assert cli("events", "import", tmp_path / "out", target).code == 2
