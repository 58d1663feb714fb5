"""Every route, and every kind of bad input: a clear error, and nothing has changed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service_client import (
    DOMAINS,
    ITEMS,
    MODEL,
    Client,
    event,
    events,
    recommend,
    score,
    scores,
    serving,
)

from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving import EncoderSession
from hstu_xd.serving.http.app import build_app
from hstu_xd.serving.http.settings import Limits


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with serving(tmp_path) as client:
        yield client


def test_events_are_answered_from_at_once(client: Client) -> None:
    for count in range(1, 14):  # the window slides
        answer = client.append(event(count - 1))
        assert (answer.status_code, answer.json()) == (200, {"accepted": 1})
        for domain in range(len(DOMAINS)):
            assert client.score_all(domain=domain) == pytest.approx(
                scores(events(count), domain), abs=1e-5
            )


def test_many_events_of_several_users_in_one_request(client: Client) -> None:
    rows = [row for pair in zip(events(12, "ann"), events(12, "bob", first=3)) for row in pair]
    assert client.append(*rows).json() == {"accepted": 24}
    assert client.score_all("ann", 1) == pytest.approx(scores(events(12), 1), abs=1e-5)
    assert client.score_all("bob", 2) == pytest.approx(scores(events(12, first=3), 2), abs=1e-5)


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_recommendations_are_the_best_of_each_domain(client: Client, exclude_seen: bool) -> None:
    client.append(*events(12))
    answer = client.ask(
        "POST", "/v1/recommend", recommend("ann", "games", "books", k=5, exclude_seen=exclude_seen)
    )
    assert answer.status_code == 200
    assert answer.json()["user"] == "ann"
    seen = {row["item"] for row in events(12)} if exclude_seen else set()
    found = answer.json()["recommendations"]
    assert [row["domain"] for row in found] == ["games", "books"]
    for row, domain in zip(found, (2, 0)):
        left = {k: v for k, v in scores(events(12), domain).items() if k not in seen}
        best = sorted(left, key=lambda item: -left[item])[:5]
        assert [each["item"] for each in row["items"]] == best
        assert [each["score"] for each in row["items"]] == pytest.approx(
            [left[item] for item in best], abs=1e-5
        )


def test_an_unknown_user_is_answered_from_the_initial_states(client: Client) -> None:
    assert client.score_all("nobody", 1) == pytest.approx(scores([], 1), abs=1e-5)
    assert client.history("nobody") == []
    assert client.ask("GET", "/v1/users").json() == {"users": []}
    assert client.ask("DELETE", "/v1/users/nobody").json() == {"forgotten": False}


def test_a_request_may_say_when(client: Client) -> None:
    client.append(*events(3))
    now = client.ask("POST", "/v1/score", score("ann", 0, ["1"])).json()
    same = client.ask("POST", "/v1/score", score("ann", 0, ["1"], timestamp=2000)).json()
    later = client.ask("POST", "/v1/score", score("ann", 0, ["1"], timestamp=10**9)).json()
    # The first request has committed events, so that the second one computes fewer rows.
    assert now["scores"] == pytest.approx(same["scores"], abs=1e-5)
    assert abs(now["scores"][0] - later["scores"][0]) > 1e-4


def test_domains_users_and_histories(client: Client) -> None:
    counts = [{"name": name, "items": ITEMS // len(DOMAINS)} for name in DOMAINS]
    assert client.ask("GET", "/v1/domains").json() == {"domains": counts}
    for user in ("bob", "ann", "anna", "a/b", "Ä"):
        client.append(*events(3, user))
    assert client.ask("GET", "/v1/users").json()["users"] == ["a/b", "ann", "anna", "bob", "Ä"]
    assert client.ask("GET", "/v1/users?prefix=an").json()["users"] == ["ann", "anna"]
    assert client.ask("GET", "/v1/users?limit=2").json()["users"] == ["a/b", "ann"]
    rows = [
        {"item": row["item"], "domain": DOMAINS[number * 7 % 3], "timestamp": number * 1000}
        for number, row in enumerate(events(3))
    ]
    for user in ("ann", "a%2Fb", "%C3%84"):
        assert client.history(user) == rows
    assert client.history(limit=2) == rows[1:]


def test_a_forgotten_user_starts_over(client: Client) -> None:
    client.append(*events(9), *events(2, "bob"))
    assert client.ask("DELETE", "/v1/users/ann").json() == {"forgotten": True}
    assert client.history() == []
    assert client.score_all() == pytest.approx(scores([], 0), abs=1e-5)
    client.append(event(0))
    assert client.score_all() == pytest.approx(scores(events(1), 0), abs=1e-5)
    assert len(client.history("bob")) == 2


def test_what_is_remembered_after_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        client.append(*events(11), *events(2, "bob"))
        client.ask("DELETE", "/v1/users/bob")
    with serving(tmp_path) as client:
        assert len(client.history()) == 11
        assert client.history("bob") == []
        assert client.score_all() == pytest.approx(scores(events(11), 0), abs=1e-5)


def test_users_who_are_dropped_from_memory_come_back(tmp_path: Path) -> None:
    with serving(tmp_path, states={"max_bytes": 40_000}) as client:
        names = [f"u{number}" for number in range(20)]
        for user in names:
            client.append(*events(9, user))
        for user in names:
            assert client.score_all(user) == pytest.approx(scores(events(9), 0), abs=1e-5)
        assert 0 < client.metric("hstu_xd_states_users") < 20
        assert client.metric("hstu_xd_states_bytes") <= 40_000
        assert client.metric("hstu_xd_states_rebuilt_total") >= 10


BAD_EVENTS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown item": ({"item": "B00X"}, "unknown item 'B00X'; take one of the 24 items"),
    "a time that goes back": ({"timestamp": 1}, "an event at 1 after one at 4000"),
    "not a number": ({"timestamp": float("nan")}, "timestamp is nan; a finite whole number"),
    "infinity": ({"timestamp": float("inf")}, "timestamp is inf; a finite whole number"),
    "a negative time": ({"timestamp": -1}, "timestamp is -1: .* greater than or equal to 0"),
    "too large a time": ({"timestamp": 2**53}, "timestamp is 9007199254740992: .*less than"),
    "far too large a time": ({"timestamp": 10**30}, "timestamp is 1000"),
    "half a second": ({"timestamp": 5000.5}, "timestamp is 5000.5"),
    "a time in words": ({"timestamp": "5000"}, "timestamp is '5000'"),
    "no user": ({"user": ""}, "user is ''"),
    "a user that is a number": ({"user": 7}, "user is 7"),
    "a user that is no text": ({"user": "\ud800"}, "user is "),
    "an endless user": ({"user": "u" * 300}, "user is 'uuu.*at most 256"),
    "an unknown field": ({"time": 3}, "time is 3"),
}


@pytest.mark.parametrize("case", BAD_EVENTS)
def test_a_bad_event_is_refused_with_all_of_its_request(client: Client, case: str) -> None:
    client.append(*events(3))
    changed, message = BAD_EVENTS[case]
    answer = client.append(event(4), event(5, "bob"), event(6) | changed)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert re.search(message, answer.json()["error"]), answer.text
    assert len(client.history()) == 3
    assert client.history("bob") == []
    assert client.score_all() == pytest.approx(scores(events(3), 0), abs=1e-5)


BAD_REQUESTS: dict[str, tuple[str, Any, str]] = {
    "no JSON": ("/v1/events", b"{x", "the body is not JSON"),
    "nothing": ("/v1/events", b"", "body"),
    "lists in lists": (
        "/v1/events",
        b'{"events":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "the body is nested too deeply; .* at most 3 levels",
    ),
    "objects in objects": (
        "/v1/score",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "the body is nested too deeply; .* at most 3 levels",
    ),
    "a level too much": ("/v1/events", {"events": [event(4) | {"item": ["1"]}]}, "item: .*string"),
    "no text": ("/v1/events", b'{"events": "\xff"}', "the body is not JSON: .*byte 0xff"),
    "no number": ("/v1/recommend", b'{"k": ' + b"1" * 5000 + b"}", "not JSON: .*digits"),
    "a list": ("/v1/events", [], "body"),
    "no events": ("/v1/events", {"events": []}, "events: .* at least 1"),
    "too many events": ("/v1/events", {"events": events(6)}, "events: .* at most 5"),
    "an unknown domain": (
        "/v1/recommend",
        recommend("ann", "boks"),
        "'boks'.*did you mean 'books'",
    ),
    "no domain": ("/v1/recommend", {"user": "ann", "domains": []}, "domains: .*at least 1"),
    "no items at all": ("/v1/recommend", recommend("ann", k=0), "k is 0"),
    "too many items": ("/v1/recommend", recommend("ann", k=8), "k is 8: .*less than or equal to 7"),
    "a time before the last event": (
        "/v1/recommend",
        recommend("ann", timestamp=1999),
        "timestamp 1999 is before the last event of user 'ann' at 2000",
    ),
    "no time": ("/v1/recommend", recommend("ann", timestamp=float("nan")), "timestamp is nan"),
    "an unknown item": ("/v1/score", score("ann", 0, ["1", "0"]), "unknown item '0'"),
    "an item elsewhere": ("/v1/score", score("ann", 0, ["2"]), "'2' is of domain 'films', not"),
    "a domain to score": ("/v1/score", score("ann", 0, ["1"]) | {"domain": "x"}, "domain 'x'"),
    "too many to score": ("/v1/score", score("ann", 0, ["1"] * 9), "items: .* at most 8"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused(tmp_path: Path, case: str) -> None:
    path, body, message = BAD_REQUESTS[case]
    with serving(tmp_path, limits=Limits(max_k=7, max_events=5, max_items=8)) as client:
        client.append(*events(3))
        answer = client.ask("POST", path, body)
        assert answer.status_code == 400
        assert re.search(message, answer.json()["error"]), answer.text
        assert client.score_all() == pytest.approx(scores(events(3), 0), abs=1e-5)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "prefix=" + "x" * 300])
def test_bad_queries_are_refused(client: Client, query: str) -> None:
    answer = client.ask("GET", f"/v1/users?{query}")
    assert answer.status_code == 400
    assert query.partition("=")[0] in answer.json()["error"]


def test_paths_and_methods_that_are_not_there(client: Client) -> None:
    assert client.ask("GET", "/v1/nothing").status_code == 404
    assert client.ask("GET", "/v1/events").status_code == 405
    assert list(client.ask("GET", "/v1/nothing").json()) == ["error"]


def test_a_large_body_is_refused_while_it_streams(tmp_path: Path) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while read < 10_000_000:
            read += 1000
            yield b" " * 1000

    with serving(tmp_path, limits=Limits(max_body=2000)) as client:
        whole = json.dumps({"events": events(3)}).encode()
        assert client.ask("POST", "/v1/events", whole.ljust(2000)).status_code == 200
        answer = client.ask("POST", "/v1/events", whole.ljust(2001))
        assert answer.status_code == 413
        assert "more than 2000 bytes" in answer.json()["error"]
        answer = client._loop.run_until_complete(
            client._client.post("/v1/events", content=endless())
        )
        assert answer.status_code == 413
        # What is thrown away so that the client can read the answer is bounded, too.
        assert read <= 2000 * 18


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path, token="s3cret") as client:
        for path in ("/v1/domains", "/v1/users", "/metrics", "/nope"):
            for header in ("", "Bearer", "Bearer s3cre", "Bearer s3cret ", "Basic s3cret"):
                answer = client.ask("GET", path, headers={"authorization": header})
                assert answer.status_code == 401, (path, header)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "bearer token" in answer.json()["error"]
        assert client.append(event(0)).status_code == 401
        lower = {"authorization": "bearer s3cret"}
        assert client.ask("GET", "/v1/domains", headers=lower).status_code == 200
        right = {"authorization": "Bearer s3cret"}
        assert client.ask("GET", "/v1/users", headers=right).json() == {"users": []}
        assert client.ask("GET", "/healthz").status_code == 200


def test_health_says_what_is_served(client: Client) -> None:
    health = client.ask("GET", "/healthz")
    assert health.status_code == 200
    assert health.json()["status"] == "ready"
    assert health.json()["store"] == "memory"
    assert health.json()["model"].startswith("tiny ")
    client.service.draining = True
    health = client.ask("GET", "/healthz")
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    refused = client.append(event(0))
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert "stopping" in refused.json()["error"]


def test_metrics_count_what_happened(client: Client) -> None:
    client.append(*events(3))
    client.append(event(0))
    client.score_all()
    name = "hstu_xd_requests_total"
    assert client.metric(f'{name}{{route="/v1/events",status="200"}}') == 1
    assert client.metric(f'{name}{{route="/v1/events",status="400"}}') == 1
    assert client.metric('hstu_xd_request_seconds_count{route="/v1/score"}') == 1
    assert client.metric("hstu_xd_batch_size_count") == 3
    assert client.metric("hstu_xd_states_users") == 1
    assert client.metric("hstu_xd_states_bytes") > 0
    assert client.metric("hstu_xd_queue_length") == 0
    assert client.metric("hstu_xd_log_bytes") > 0
    client.ask("GET", "/v1/users/somebody/history")
    text = client.ask("GET", "/metrics").text
    assert 'route="/v1/users/{user}/history"' in text
    assert "somebody" not in text


def test_a_client_that_goes_away_is_no_error_of_the_service(client: Client) -> None:
    scope = {"type": "http", "method": "POST", "path": "/v1/events", "headers": []}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    client._loop.run_until_complete(build_app(client.service)(scope, receive, send))
    assert sent == []
    text = client.ask("GET", "/metrics").text
    assert 'hstu_xd_requests_total{route="/v1/events",status="499"} 1.0' in text
    assert "hstu_xd_request_seconds_count" not in text


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> InteractionStore:
    path = tmp_path_factory.mktemp("prepared") / "store"
    synthesize(path, SynthOptions(users=12, domains=3, items_per_domain=8, mean_length=6))
    return InteractionStore.open(path)


def test_prepared_histories_come_before_the_log(tmp_path: Path, store: InteractionStore) -> None:
    model = CrossDomainHSTU(store.catalog, MODEL.settings).eval()
    names = [store.user_token(index) for index in range(store.num_users)]
    user, items, times = names[3], *(column.tolist() for column in store.history(3))
    new = store.catalog.token(1)

    def expected(session: EncoderSession) -> list[str]:
        (found,) = session.recommend([user], [0], 99)
        return [store.catalog.token(item) for item, _ in found]

    def found(client: Client) -> list[str]:
        body = {"user": user, "domains": [store.domain_names[0]], "k": 99}
        answer = client.ask("POST", "/v1/recommend", body).json()
        return [each["item"] for each in answer["recommendations"][0]["items"]]

    with serving(tmp_path, prepared=store, model=model) as client:
        session = EncoderSession(model, window=8, history=lambda _: (items, times))
        assert client.ask("GET", "/v1/users").json()["users"] == names
        assert [row["timestamp"] for row in client.history(user)] == times
        assert found(client) == expected(session)
        back = {"user": user, "item": new, "timestamp": times[-1] - 1}
        assert client.append(back).status_code == 400
        client.append(back | {"timestamp": times[-1] + 1}, back | {"user": "new"})
        session.append([user], [1], [times[-1] + 1])
        assert found(client) == expected(session)
        assert client.ask("GET", "/v1/users?prefix=n").json()["users"] == ["new"]
        assert client.ask("DELETE", f"/v1/users/{names[5]}").json() == {"forgotten": True}
        assert client.ask("DELETE", f"/v1/users/{names[5]}").json() == {"forgotten": False}
        assert client.history(names[5]) == []
    with serving(tmp_path, prepared=store, model=model) as client:
        assert found(client) == expected(session)
        assert client.history(names[5]) == []
        kept = [name for name in names if name != names[5]]
        assert client.ask("GET", "/v1/users").json()["users"] == sorted([*kept, "new"])
        assert client.ask("GET", "/v1/users?limit=6").json()["users"] == sorted([*kept, "new"])[:6]
    # Without the prepared store a service knows what it has taken itself; who is forgotten then
    # stays so with the store.
    with serving(tmp_path, model=model) as client:
        assert len(client.history(user)) == 1
        assert client.ask("DELETE", f"/v1/users/{user}").json() == {"forgotten": True}
    with serving(tmp_path, prepared=store, model=model) as client:
        assert client.history(user) == []


def test_a_forgotten_user_hides_nobody_else(tmp_path: Path, store: InteractionStore) -> None:
    model = CrossDomainHSTU(store.catalog, MODEL.settings).eval()
    names = [store.user_token(index) for index in range(store.num_users)]
    with serving(tmp_path, prepared=store, model=model) as client:
        item = store.catalog.token(1)
        client.append(*[event(0, f"z{number}") | {"item": item} for number in range(5)])
        client.ask("DELETE", f"/v1/users/{names[0]}")
        assert client.ask("GET", "/v1/users?limit=3").json()["users"] == names[1:4]


def test_health_tells_of_a_thread_that_has_ended(client: Client) -> None:
    client.service._batcher.stop()
    health = client.ask("GET", "/healthz")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
