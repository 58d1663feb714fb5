"""A service of a ranking run answers as evaluation does, wherever the events came from."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from log_cases import postgres_server
from ranking_runs import DAY, KINDS, START, asked_of, make_runs, users_of
from service_client import Client, serving, write_run
from service_process import ServiceProcess

from hstu_xd.errors import InputError
from hstu_xd.ranking.run import load_ranker
from hstu_xd.serving.events.event_log import Event, LogError
from hstu_xd.serving.events.sqlite_log import SQLiteLog
from hstu_xd.serving.http.settings import Limits, LogSettings
from hstu_xd.serving.http.shadow import Shadow
from hstu_xd.serving.ranking_session import RankingSession, RankRequest

Cli = Callable[..., Any]
NAMES = ["i3", "i9", "i20", "i31"]
NOW, GOAL = START + 100 * DAY, "deal=true"
HEADERS = {"authorization": "Bearer t"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("ranked"))


@pytest.fixture
def client(folder: Path, tmp_path: Path) -> Iterator[Client]:
    with serving(tmp_path / "log", run=folder / "hard") as client:
        yield client


@pytest.fixture
def session(folder: Path) -> RankingSession:
    return RankingSession.open(folder / "hard")


def row(item: str, timestamp: int, user: str = "u1", **more: Any) -> dict[str, Any]:
    return {"user": user, "item": item, "timestamp": timestamp} | more


def ranked(client: Client, request: RankRequest) -> list[float]:
    body = {"user": request.user, "candidates": [*request.candidates], "goal": request.goal}
    body |= {"timestamp": request.timestamp}
    answer = client.ask("POST", "/v1/rank", body)
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["goals"]
    assert (answer.json()["user"], found["goal"]) == (request.user, request.goal)
    return found["scores"]


def refused(client: Client, path: str, body: Any) -> tuple[int, str]:
    answer = client.ask("POST", path, body)
    return answer.status_code, answer.json()["error"]


ASK = RankRequest("u1", NAMES, GOAL)
NOBODY = RankRequest("nobody", NAMES, GOAL)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_evaluation(folder: Path, tmp_path: Path, kind: str) -> None:
    trained = load_ranker(folder / kind)
    chosen, requests = asked_of(trained)
    with serving(tmp_path, run=folder / kind) as client:
        found = [score for request in requests for score in ranked(client, request)]
    wanted = trained.task.scores(trained.model, chosen)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_ranking_run_has_a_shadow_of_its_kind(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", run=folder / "hard") as client:
        shadow = Shadow(client.service, folder / "hard", allow_imports=False, log=LogSettings())
        client.service.shadow = shadow
        assert len(ranked(client, ASK)) == len(NAMES)
        deadline = time.monotonic() + 60
        while 'outcome="compared"} 1.0' not in (text := client.ask("GET", "/metrics").text):
            assert time.monotonic() < deadline, text
            time.sleep(0.01)
        assert f'hstu_xd_shadow_first_rank_sum{{name="{shadow.name}"}} 1.0' in text
        with pytest.raises(InputError, match="is a retrieval run, and a ranking run is served"):
            Shadow(
                client.service,
                write_run(tmp_path / "run"),
                allow_imports=False,
                log=LogSettings(),
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_that_came_over_http_counts_as_a_prepared_one(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    """Without earlier histories, each event sent; some users are asked for in between."""
    trained = load_ranker(folder / kind)
    store = trained.task.store
    log = [
        row(store.catalog.token(int(item)), int(time), name)
        for number, name in enumerate(users_of(store))
        for item, time in zip(*store.history(number), strict=True)
    ]
    log.sort(key=lambda each: each["timestamp"])
    chosen, requests = asked_of(trained)
    wanted = trained.task.scores(trained.model, chosen)
    with serving(tmp_path, run=folder / kind, use_data=False) as client:
        for first in range(0, len(log), 100):
            assert client.append(*log[first : first + 100]).status_code == 200
            for user in ("u1", "u2"):
                ranked(client, RankRequest(user, NAMES, GOAL))
        found = [score for request in requests for score in ranked(client, request)]
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    with serving(tmp_path, run=folder / kind, use_data=False) as again:
        found = [score for request in requests for score in ranked(again, request)]
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_events_are_read_after_their_time_and_survive_a_restart(
    folder: Path, tmp_path: Path, session: RankingSession
) -> None:
    new = [("u1", "i5", NOW), ("u1", "i3", NOW), ("fresh", "i9", NOW)]
    asked = [RankRequest(u, NAMES, GOAL, t) for u in ("u1", "fresh") for t in (NOW, NOW + 1)]
    before = session.rank(asked)
    session.append(*zip(*new, strict=True))
    wanted = session.rank(asked)
    assert wanted[0] == pytest.approx(before[0])
    assert wanted[1] != pytest.approx(before[1])
    with serving(tmp_path, run=folder / "hard") as client:
        np.testing.assert_allclose([ranked(client, r) for r in asked], before, atol=1e-6)
        answer = client.append(*[row(item, time, user) for user, item, time in new])
        assert answer.json() == {"accepted": 3}
        np.testing.assert_allclose([ranked(client, r) for r in asked], wanted, atol=1e-6)
        assert [each["item"] for each in client.history("fresh")] == ["i9"]
    with serving(tmp_path, run=folder / "hard") as client:
        np.testing.assert_allclose([ranked(client, r) for r in asked], wanted, atol=1e-6)
        answers = client.ask_all(
            [
                (
                    "POST",
                    "/v1/rank",
                    {"user": r.user, "candidates": NAMES, "timestamp": r.timestamp},
                )
                for r in asked
            ]
        )
        together = [answer.json()["goals"] for answer in answers]
        goals = [each["goal"] for each in together[0]]
        assert sorted(goals) == sorted(session.goals)
        found = [each[goals.index(GOAL)]["scores"] for each in together]
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_command_line_gives_the_same_scores(folder: Path, client: Client, cli: Cli) -> None:
    command = ("score", folder / "hard", "--user", "u2", "--items", ",".join(NAMES))
    said = cli(*command, "--goal", GOAL, "--json")
    found = {each["item"]: each["score"] for each in json.loads(said.out)["items"]}
    wanted = dict(zip(NAMES, ranked(client, RankRequest("u2", NAMES, GOAL)), strict=True))
    assert found == pytest.approx(wanted, abs=1e-6)


def test_an_unknown_user_has_no_history(client: Client, session: RankingSession) -> None:
    assert ranked(client, NOBODY) == pytest.approx(session.rank([NOBODY])[0], abs=1e-6)
    assert client.metric("hstu_xd_states_users") == 0
    assert client.metric("hstu_xd_states_rebuilt_total") == 0
    ranked(client, ASK)
    assert client.metric("hstu_xd_states_users") == 1
    assert client.metric("hstu_xd_states_rebuilt_total") == 1
    assert client.metric("hstu_xd_states_bytes") > 0
    health = client.ask("GET", "/healthz").json()
    assert (health["status"], health["store"]) == ("ready", "memory")
    assert health["model"].startswith("hard ")


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"goal": "deal=tru"}, 400, "unknown goal 'deal=tru'; the model has deal="),
        ({"candidates": ["i3", "x"]}, 400, "unknown item 'x'; take one of the 40 items"),
        ({"candidates": []}, 400, "candidates"),
        ({"candidates": ["i3"] * 6}, 400, "at most 5 items"),
        ({"timestamp": 10**15}, 400, "timestamp 1000000000000000 is in the future: times are in"),
        ({"timestamp": -1}, 400, "timestamp is -1"),
        ({"goals": ["deal=true"]}, 400, "goals"),
    ],
)
def test_bad_requests_are_named(
    folder: Path, tmp_path: Path, change: dict[str, Any], status: int, message: str
) -> None:
    body = {"user": "u1", "candidates": NAMES, "goal": GOAL} | change
    with serving(tmp_path, run=folder / "hard", limits=Limits(max_items=5)) as client:
        found, said = refused(client, "/v1/rank", body)
        assert (found, message in said) == (status, True), said
        ranked(client, ASK)


def test_one_bad_request_does_not_hurt_others_of_its_batch(client: Client) -> None:
    wanted = ranked(client, ASK)
    good = ("POST", "/v1/rank", {"user": "u1", "candidates": NAMES, "goal": GOAL})
    bad = ("POST", "/v1/rank", {"user": "u1", "candidates": ["x"], "goal": GOAL})
    first, second, third = client.ask_all([good, bad, good])
    assert second.status_code == 400
    for answer in (first, third):
        assert answer.json()["goals"][0]["scores"] == pytest.approx(wanted, abs=1e-6)


def test_each_kind_of_run_says_what_it_answers(client: Client, tmp_path: Path) -> None:
    for path in ("/v1/recommend", "/v1/score"):
        status, said = refused(client, path, {"user": "u1", "domains": ["d0"]})
        assert (status, "is a ranking run; ask POST /v1/rank" in said) == (404, True)
    with serving(tmp_path / "other") as other:
        status, said = refused(other, "/v1/rank", {"user": "u1", "candidates": NAMES})
        assert status == 404
        assert "is a retrieval run; ask POST /v1/recommend or /v1/score, or serve a run" in said


def test_forgotten_and_removed_events_are_not_read(client: Client, session: RankingSession) -> None:
    before, nobody = ranked(client, ASK), ranked(client, NOBODY)
    client.append(row("i3", NOW), row("i5", NOW + 1))
    after = ranked(client, ASK)
    assert after != pytest.approx(before)
    assert client.ask("POST", "/v1/events/remove", row("i5", NOW + 1)).json() == {"removed": 1}
    session.append(["u1"], ["i3"], [NOW])
    assert ranked(client, ASK) == pytest.approx(session.rank([ASK])[0], abs=1e-6)
    assert client.ask("DELETE", "/v1/users/u1").json() == {"forgotten": True}
    assert ranked(client, ASK) == pytest.approx(nobody, abs=1e-6)
    for user in ("u1", "nobody"):
        client.append(row("i3", NOW, user), row("i9", NOW, user))
    assert ranked(client, ASK) == pytest.approx(ranked(client, NOBODY), abs=1e-6)
    assert ranked(client, ASK) != pytest.approx(nobody)


def test_events_out_of_order_are_refused(client: Client) -> None:
    client.append(row("i3", NOW))
    before = ranked(client, ASK)
    status, said = refused(
        client, "/v1/events", {"events": [row("i5", NOW + 5), row("i5", NOW - 1)]}
    )
    assert (status, "append events in order of time" in said) == (400, True)
    assert ranked(client, ASK) == pytest.approx(before)
    # The same second is in order, and so is one request that has them in order.
    assert client.append(row("i5", NOW)).json() == {"accepted": 1}


def test_an_event_that_is_sent_again_counts_once(client: Client) -> None:
    event = row("i3", NOW, id="order-1")
    assert client.append(event).json() == {"accepted": 1}
    once = ranked(client, ASK)
    assert client.append(event).json() == {"accepted": 0, "repeated": 1}
    assert ranked(client, ASK) == pytest.approx(once)


def test_histories_that_leave_memory_come_back(folder: Path, tmp_path: Path) -> None:
    users = [f"u{number}" for number in range(6)]
    asked = [RankRequest(user, NAMES, GOAL) for user in users]
    session = RankingSession.open(folder / "hard")
    events = [(user, item, NOW + n) for n, item in enumerate(NAMES) for user in users]
    session.append(*zip(*events, strict=True))
    wanted = session.rank(asked)
    with serving(tmp_path, run=folder / "hard", states={"max_bytes": 4000}) as client:
        for user, item, time in events:
            client.append(row(item, time, user))
            ranked(client, RankRequest(user, NAMES, GOAL))
        assert client.metric("hstu_xd_states_users") < len(users)
        np.testing.assert_allclose([ranked(client, each) for each in asked], wanted, atol=1e-6)


def test_what_the_log_did_not_take_is_not_read(
    client: Client, session: RankingSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ranked(client, ASK)

    def full(*_: Any) -> None:
        raise LogError("database or disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(SQLiteLog, "add", full)
        assert client.append(row("i3", NOW)).status_code == 503
    assert ranked(client, ASK) == pytest.approx(before)
    # Another process writes: whose state is of the version before makes it anew.
    client.service._log.add([Event("u1", "i3", NOW)])
    session.append(["u1"], ["i3"], [NOW])
    assert ranked(client, ASK) == pytest.approx(session.rank([ASK])[0], abs=1e-6)


def test_two_services_that_share_a_log_answer_alike(folder: Path, tmp_path: Path) -> None:
    session = RankingSession.open(folder / "hard")
    with postgres_server() as server, ExitStack() as stack:
        log = server.database()
        one, two = (
            stack.enter_context(serving(tmp_path / name, run=folder / "hard", log=log))
            for name in ("one", "two")
        )
        for number, item in enumerate(NAMES * 2):
            writer, reader = (one, two) if number % 2 else (two, one)
            assert writer.append(row(item, NOW + number)).json() == {"accepted": 1}
            session.append(["u1"], [item], [NOW + number])
            (wanted,) = session.rank([ASK])
            assert ranked(reader, ASK) == pytest.approx(wanted, abs=1e-6)
            assert ranked(writer, ASK) == pytest.approx(wanted, abs=1e-6)
        one.ask("DELETE", "/v1/users/u1")
        assert ranked(two, ASK) == pytest.approx(ranked(two, NOBODY), abs=1e-6)


def test_a_run_takes_the_place_of_another_of_its_kind(folder: Path, tmp_path: Path) -> None:
    def ask(client: Client, path: str, body: Any) -> Any:
        return client.ask("POST", path, body, headers=HEADERS)

    def scores(client: Client) -> list[float]:
        body = {"user": "u1", "candidates": NAMES, "goal": GOAL}
        return ask(client, "/v1/rank", body).json()["goals"][0]["scores"]

    wanted = {}
    for name in ("hard", "recent"):
        session = RankingSession.open(folder / name)
        session.append(["u1"], ["i3"], [NOW])
        wanted[name] = session.rank([ASK])[0]
    write_run(folder / "retrieval")
    with serving(tmp_path / "log", run=folder / "hard", token="t") as client:
        ask(client, "/v1/events", {"events": [row("i3", NOW)]})
        assert scores(client) == pytest.approx(wanted["hard"], abs=1e-6)
        changed = ask(client, "/v1/models", {"run": "recent"})
        assert changed.status_code == 200, changed.text
        assert changed.json()["model"].startswith("recent ")
        assert scores(client) == pytest.approx(wanted["recent"], abs=1e-6)
        other = ask(client, "/v1/models", {"run": "retrieval"})
        assert (other.status_code, "is a retrieval run, and recent" in other.text) == (400, True)
        goals = ask(client, "/v1/models", {"run": "one_goal"})
        assert (goals.status_code, "one_goal" in goals.text) == (400, True)
        assert "has no goal 'deal=" in goals.json()["error"]
        assert scores(client) == pytest.approx(wanted["recent"], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": {"store": "sqlite:states"}}, "--store sqlite:states with hard, a ranking run"),
        ({"states": {"retrieval": "approximate"}}, "--retrieval approximate with hard, a ranking"),
        ({"use_data": False, "verify_data": True}, "--verify with --no-data; drop one of them"),
    ],
)
def test_options_that_a_ranking_run_has_no_use_for(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with (
        pytest.raises(InputError, match=message),
        serving(tmp_path, run=folder / "hard", **options),
    ):
        pass


def test_the_command_serves_a_ranking_run(folder: Path, tmp_path: Path) -> None:
    log = str(tmp_path / "events.sqlite")
    body = {"user": "u1", "candidates": NAMES, "goal": GOAL}
    session = RankingSession.open(folder / "hard")
    session.append(["u1"], ["i3"], [NOW])
    with ServiceProcess(folder / "hard", "--events", log) as service:
        sent = {"events": [row("i3", NOW)]}
        assert service.ask("POST", "/v1/events", sent) == (200, {"accepted": 1})
        status, answer = service.ask("POST", "/v1/rank", body)
        assert status == 200
        found = answer["goals"][0]["scores"]
        assert found == pytest.approx(session.rank([ASK])[0], abs=1e-6)
        assert service.end()[0] == 0
