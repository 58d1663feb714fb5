"""Every log of events does the same, in a file and in PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from log_cases import PostgresServer, known, numbered, postgres_server

from hstu_xd.serving.events import open_log
from hstu_xd.serving.events.event_log import Conflict, Event, EventLog, Keyed, Logged


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The name of an empty log."""
    if request.param == "sqlite":
        return str(tmp_path / "events.sqlite")
    return request.getfixturevalue("server").database()


@pytest.fixture
def log(place: str) -> Iterator[EventLog]:
    opened = open_log.open_log(place)
    yield opened
    opened.close()


def test_events_are_found_again_in_order(place: str) -> None:
    log = open_log.open_log(place)
    # Of equal times and items, too: the order is that of the writes.
    written = [Event("ann", item, 7) for item in ("b", "a", "b", "c")]
    log.add(written[:3])
    log.add([*numbered(2, "bob"), written[3]])
    log.close()
    log = open_log.open_log(place)
    assert known(log).events == written
    assert known(log, last=2).events == written[2:]
    assert list(known(log, last=0).events) == []
    some = log.read(["bob", "nobody", "ann"])
    assert [len(each.events) for each in some] == [2, 0, 4]
    assert some[1] == Logged(b"", False, frozenset(), some[1].events)
    assert log.count(Event("ann", "b", 7)) == 2
    log.close()


def test_a_version_changes_with_every_write(log: EventLog) -> None:
    upcoming, versions = log.upcoming, {b""}
    log.add(numbered(1))
    assert known(log).version == upcoming
    versions.add(upcoming)
    for write in (
        lambda: log.add(numbered(1)),
        lambda: log.remove(Event("ann", "0", 0), hide=False),
        lambda: log.forget("ann"),
    ):
        write()
        assert known(log).version not in versions
        versions.add(known(log).version)
    before = known(log)
    log.add(numbered(3, "bob"))
    log.probe()
    assert known(log) == before


def test_who_judged_by_another_version_writes_nothing(log: EventLog) -> None:
    log.add(numbered(2))
    old = known(log).version
    log.add([Event("ann", "x", 9)], versions={"ann": old})
    for versions in ({"ann": old, "bob": b""}, {"ann": b"", "bob": b""}):
        with pytest.raises(Conflict):
            log.add([*numbered(1, "bob"), Event("ann", "y", 9)], versions=versions)
    assert not log.fails
    assert [event.item for event in known(log).events] == ["0", "1", "x"]
    assert known(log, "bob") == Logged(b"", False, frozenset(), known(log, "bob").events)
    log.add(numbered(1, "bob"), versions={"bob": b""})
    assert len(known(log, "bob").events) == 1


def test_keys_are_known_until_their_user_is_forgotten(log: EventLog) -> None:
    first, other = Keyed("ann", "k", "1", 1), Keyed("bob", "k", "2", 2)
    log.add([Event("ann", "1", 1), Event("bob", "2", 2)], [first, other])
    asked = [("ann", "k"), ("bob", "k"), ("ann", "new")]
    assert log.events_of_keys([]) == {}
    assert log.events_of_keys(asked) == {
        ("ann", "k"): Event("ann", "1", 1),
        ("bob", "k"): Event("bob", "2", 2),
    }
    with pytest.raises(Conflict):
        log.add([Event("ann", "1", 1)], [first])
    assert len(known(log).events) == 1
    log.remove(Event("ann", "1", 1), hide=False)
    assert log.events_of_keys(asked[:1]) == {("ann", "k"): Event("ann", "", 0)}
    log.forget("bob")
    assert ("bob", "k") not in log.events_of_keys(asked)


def test_events_and_users_are_removed(log: EventLog) -> None:
    log.add([Event("ann", "1", 1), Event("ann", "1", 1), Event("ann", "2", 1)])
    log.add(numbered(3, "bob"))
    assert log.remove(Event("ann", "1", 1), hide=True) == 2
    assert log.remove(Event("ann", "1", 1), hide=True) == 0
    assert known(log).events == [Event("ann", "2", 1)]
    assert known(log).hidden == {("1", 1)}
    assert not known(log).restarted
    log.forget("ann")
    assert known(log)[1:3] == (True, frozenset())
    assert list(known(log).events) == []
    log.add([Event("ann", "3", 3)])
    assert known(log).restarted
    assert len(known(log, "bob").events) == 3


def test_names_come_in_the_order_of_their_bytes(log: EventLog) -> None:
    names = ["", "B", "Z", "a", "a b", "a%", "b", "\u00e4", "\u4e00", "\U0001f600"]
    for name in reversed(names):
        log.add([Event(name, "1", 1), Event(name, "2", 2)])
    log.forget("b")
    names.remove("b")
    assert log.users_from("", 99) == names
    assert log.users_from("a", 3) == ["a", "a b", "a%"]
    assert log.users_from("a ", 1) == ["a b"]
    assert log.users_from("\U0001ffff", 9) == []


def test_text_is_kept_as_it_came(log: EventLog) -> None:
    item = "it''em\n\t\\ \"%s\" {} ; DROP TABLE \U0001f600"
    log.add([Event(item, item, 2**53 - 1)], [Keyed(item, item, item, 2**53 - 1)])
    assert known(log, item).events == [Event(item, item, 2**53 - 1)]
    assert log.events_of_keys([(item, item)]) == {(item, item): Event(item, item, 2**53 - 1)}
