"""Writes that come again, go wrong in part, or were wrong: counted once, named, taken back."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from service_client import MODEL, Client, event, events, recommend, right, serving

from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving.events.event_log import Event
from hstu_xd.serving.events.sqlite_log import SQLiteLog
from hstu_xd.serving.http.settings import WriteSettings


def post(client: Client, *rows: dict[str, Any], key: str | None = None, **more: Any) -> Any:
    """The answer to a request that is taken."""
    headers = {} if key is None else {"idempotency-key": key}
    answer = client.ask("POST", "/v1/events", {"events": rows} | more, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_a_request_with_a_key_counts_once(tmp_path: Path, store: str) -> None:
    states = {"store": store if store == "memory" else f"sqlite:{tmp_path}/states.sqlite"}
    for start in range(2):
        with serving(tmp_path, states=states) as client:
            first = post(client, *events(5), *events(3, "bob"), key="order 1")
            assert first == ({"accepted": 0, "repeated": 8} if start else {"accepted": 8})
            again = post(client, *events(5), *events(3, "bob"), key="order 1")
            assert again == {"accepted": 0, "repeated": 8}
            assert right(client, 5)
            assert right(client, 3, "bob")
            assert client.append(*events(5)).status_code == 400  # without a key it is another one
    with serving(tmp_path, states=states) as client:
        post(client, event(5), key="order 2")
        assert right(client, 6)


def test_an_event_with_an_id_counts_once_wherever_it_comes(client: Client) -> None:
    rows = [row | {"id": str(number)} for number, row in enumerate(events(5))]
    assert post(client, *rows[:3]) == {"accepted": 3}
    # A consumer that goes back a little; the id of another user is another one.
    assert post(client, *rows[1:], event(0, "bob") | {"id": "1"}) == {"accepted": 3, "repeated": 2}
    assert post(client, rows[4], rows[4], rows[4], key="k") == {"accepted": 0, "repeated": 3}
    assert right(client, 5)
    answer = client.append(rows[4] | {"item": "1"})
    assert answer.status_code == 400
    assert "came before with item '5' at 4000, now with '1'" in answer.json()["error"]


def test_repeats_in_one_batch_are_noticed(client: Client) -> None:
    body = {"events": [event(0) | {"id": "a"}]}
    answers = client.ask_all([("POST", "/v1/events", body)] * 9)
    assert sorted(answer.json()["accepted"] for answer in answers) == [0] * 8 + [1]
    assert right(client, 1)


def test_the_same_event_again_is_another_one_or_dropped(tmp_path: Path) -> None:
    with serving(tmp_path / "keep") as client:
        assert post(client, event(0), event(0)) == {"accepted": 2}
        assert post(client, event(0)) == {"accepted": 1}
        assert len(client.history()) == 3
    with serving(tmp_path / "drop", writes=WriteSettings(repeats="drop")) as client:
        assert post(client, event(0), event(0)) == {"accepted": 1, "repeated": 1}
        assert post(client, *events(5)) == {"accepted": 4, "repeated": 1}
        assert post(client, *events(5)) == {"accepted": 0, "repeated": 5}
        # What is late and new is refused all the same.
        late = event(1) | {"item": "24"}
        assert client.append(late).status_code == 400
        assert right(client, 5)


def test_the_others_are_taken_where_asked(client: Client) -> None:
    post(client, event(5))
    rows = [event(0, "bob"), event(1), event(1, "bob"), event(2, "bob") | {"item": "nosuch"}]
    answer = client.append(*rows)
    assert answer.status_code == 400
    assert "events.1: user 'ann': an event at 1000 after one at 5000" in answer.json()["error"]
    assert "events.3: unknown item 'nosuch'" in answer.json()["error"]
    assert client.history("bob") == []
    taken = post(client, *rows, partial=True)
    assert taken["accepted"] == 2
    assert [each["index"] for each in taken["refused"]] == [1, 3]
    assert "unknown item 'nosuch'" in taken["refused"][1]["error"]
    assert right(client, 2, "bob")
    many = client.append(*[event(1) for _ in range(10)])
    assert many.json()["error"].endswith("; and 7 more")


def test_unknown_items_are_skipped_where_asked(tmp_path: Path) -> None:
    with serving(tmp_path, writes=WriteSettings(unknown_items="skip")) as client:
        new = event(2) | {"item": "new"}
        taken = post(client, event(0), event(1), new)
        assert taken["accepted"] == 2
        assert [each["index"] for each in taken["refused"]] == [2]
        assert right(client, 2)
        # Anything else refuses as ever.
        assert client.append(event(2), new, event(0)).status_code == 400
        assert right(client, 2)


@pytest.mark.parametrize(
    ("ahead", "mend"),
    [
        (7200, "mend the clock or the time zone"),
        (10**9, "mend the clock or the time zone"),
        (None, "divide it by 1000"),
    ],
    ids=["a time zone", "far", "milliseconds"],
)
def test_a_time_in_the_future_is_refused(client: Client, ahead: int | None, mend: str) -> None:
    now = int(time.time())
    timestamp = now * 1000 if ahead is None else now + ahead
    answer = client.append(event(0, "bob"), event(0) | {"timestamp": timestamp})
    assert answer.status_code == 400
    told = answer.json()["error"]
    assert told.startswith(
        f"events.1: timestamp {timestamp} is in the future: times are in seconds"
    )
    assert mend in told
    assert "--max-clock-skew" in told
    assert client.history("bob") == []
    assert post(client, event(0) | {"timestamp": now + 600}) == {"accepted": 1}


def test_a_request_in_milliseconds_is_refused(client: Client) -> None:
    post(client, event(0))
    body = recommend("ann", timestamp=int(time.time() * 1000))
    answer = client.ask("POST", "/v1/recommend", body)
    assert answer.status_code == 400
    assert "divide it by 1000" in answer.json()["error"]
    assert client.ask("POST", "/v1/recommend", recommend("ann", timestamp=2 * 10**9)).is_success


def test_the_clock_may_be_let_go(tmp_path: Path) -> None:
    with serving(tmp_path, writes=WriteSettings(max_clock_skew=1e13)) as client:
        assert post(client, event(0) | {"timestamp": 10**13}) == {"accepted": 1}


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_one_event_is_removed(tmp_path: Path, store: str) -> None:
    states = {"store": store if store == "memory" else f"sqlite:{tmp_path}/states.sqlite"}
    wrong = event(0) | {"timestamp": int(time.time()), "id": "wrong"}
    with serving(tmp_path, states=states) as client:
        post(client, *events(4), wrong)
        assert client.append(event(4)).status_code == 400
        name = {key: wrong[key] for key in ("user", "item", "timestamp")}
        assert client.ask("POST", "/v1/events/remove", name).json() == {"removed": 1}
        assert client.ask("POST", "/v1/events/remove", name).json() == {"removed": 0}
        assert right(client, 4)
        # It does not come back by being sent again.
        assert post(client, wrong) == {"accepted": 0, "repeated": 1}
        assert post(client, event(4)) == {"accepted": 1}
        assert right(client, 5)
    with serving(tmp_path, states=states) as client:
        assert right(client, 5)


@pytest.fixture
def client(tmp_path: Path) -> Any:
    with serving(tmp_path) as client:
        yield client


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> InteractionStore:
    path = tmp_path_factory.mktemp("prepared") / "store"
    synthesize(path, SynthOptions(users=12, domains=3, items_per_domain=8, mean_length=6))
    return InteractionStore.open(path)


def test_what_was_trained_on_counts_once(tmp_path: Path, store: InteractionStore) -> None:
    """The log goes on after a training on what the service has taken."""
    model = CrossDomainHSTU(store.catalog, MODEL.settings).eval()
    user, (items, times) = store.user_token(3), store.history(3)
    rows = [
        {"user": user, "item": store.catalog.token(item), "timestamp": time}
        for item, time in zip(items.tolist(), times.tolist())
    ]
    log = SQLiteLog(tmp_path / "events.sqlite")
    log.add([Event(**row) for row in rows[-2:]])
    log.close()
    body = {"user": user, "domains": [store.domain_names[0]], "k": 8}
    with serving(tmp_path / "clean", prepared=store, model=model) as client:
        clean = client.ask("POST", "/v1/recommend", body).json()
    with serving(tmp_path, prepared=store, model=model) as client:
        assert [row["timestamp"] for row in client.history(user)] == times.tolist()
        assert client.ask("POST", "/v1/recommend", body).json() == clean
        # Nor do they count when they are sent again, late or not.
        assert post(client, *rows) == {"accepted": 0, "repeated": len(rows)}
        new = rows[-1] | {"timestamp": rows[-1]["timestamp"] + 1}
        assert post(client, rows[-1], new) == {"accepted": 1, "repeated": 1}
        assert len(client.history(user)) == len(rows) + 1


def test_a_prepared_event_is_removed(tmp_path: Path, store: InteractionStore) -> None:
    """A wrong event that training has taken along does not stay for ever either."""
    model = CrossDomainHSTU(store.catalog, MODEL.settings).eval()
    user, (items, times) = store.user_token(3), store.history(3)
    last = {"user": user, "item": store.catalog.token(int(items[-1])), "timestamp": int(times[-1])}
    for _ in range(2):
        with serving(tmp_path, prepared=store, model=model) as client:
            client.ask("POST", "/v1/events/remove", last)
            assert [row["timestamp"] for row in client.history(user)] == times.tolist()[:-1]
    with serving(tmp_path, prepared=store, model=model) as client:
        between = last | {"timestamp": int(times[-2])}
        assert post(client, between) == {"accepted": 1}
        assert client.ask("DELETE", f"/v1/users/{user}").json() == {"forgotten": True}
        assert client.history(user) == []


def test_a_log_of_before_takes_keys(tmp_path: Path) -> None:
    log = SQLiteLog(tmp_path / "events.sqlite")
    log.add([Event("ann", row["item"], row["timestamp"]) for row in events(3)])
    for table in ("keys", "hidden"):
        log._connection.execute(f"DROP TABLE {table}")
    log.close()
    with serving(tmp_path) as client:
        assert post(client, event(3), key="k") == {"accepted": 1}
        assert post(client, event(3), key="k") == {"accepted": 0, "repeated": 1}
        assert right(client, 4)


def test_nothing_of_a_forgotten_user_is_left_in_any_file(tmp_path: Path) -> None:
    name = "the-one-who-wants-to-be-forgotten"
    states = {"store": f"sqlite:{tmp_path}/states.sqlite"}
    with serving(tmp_path, states=states) as client:
        for number in range(9):
            post(client, event(number, name) | {"id": f"receipt {number}"})
            post(client, *events(1, f"u{number}"))
        client.score_all(name)
        assert any(name.encode() in file.read_bytes() for file in tmp_path.iterdir())
        with closing(sqlite3.connect(tmp_path / "states.sqlite")) as connection:
            query = "SELECT value FROM states WHERE user = ?"
            ((value,),) = connection.execute(query, (name,)).fetchall()
        assert client.ask("DELETE", f"/v1/users/{name}").json() == {"forgotten": True}
        # While it runs; of the name the note is left, without which a new training would bring back
        # what was forgotten.
        for file in tmp_path.iterdir():
            content = file.read_bytes()
            assert b"receipt 8" not in content
            assert value[100:140] not in content
            if not file.name.startswith("events"):
                assert name.encode() not in content, file
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.sqlite", "states.sqlite"]


def test_files_are_read_by_nobody_else(tmp_path: Path) -> None:
    states = {"store": f"sqlite:{tmp_path}/states.sqlite"}
    with serving(tmp_path, states=states) as client:
        post(client, event(0))
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    for file in tmp_path.iterdir():
        file.chmod(0o664)
    with serving(tmp_path, states=states) as client:
        post(client, event(1))
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}
