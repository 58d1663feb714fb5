"""Another model in place of the one that answers: at once, whole, and back again, under load."""

import asyncio
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from other_models import OTHER, expected, other_model, shuffled_catalog
from service_client import (
    DOMAINS,
    HEADERS,
    MODEL,
    TOKEN,
    Client,
    ask,
    event,
    events,
    recommend,
    scores,
    serving,
    write_run,
)

from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving.http.service import Service


@pytest.fixture
def client(tmp_path: Path, runs: Path) -> Iterator[Client]:
    with serving(tmp_path / "log", run=runs / "old", token=TOKEN) as client:
        yield client


def swap(client: Client, name: str) -> Any:
    return ask(client, "POST", "/v1/models", {"run": name})


def scored(client: Client, name: str, model: CrossDomainHSTU = MODEL) -> dict[str, float]:
    items = model.catalog.items_of(model.catalog.domain_index(name)).tolist()
    tokens = [model.catalog.token(item) for item in items]
    body = {"user": "ann", "domain": name, "items": tokens}
    answer = ask(client, "POST", "/v1/score", body)
    assert answer.status_code == 200, answer.text
    return dict(zip(tokens, answer.json()["scores"]))


def counted(client: Client) -> float:
    """States that were made anew."""
    lines = ask(client, "GET", "/metrics").text.splitlines()
    (found,) = [x for x in lines if x.startswith("hstu_xd_states_rebuilt_total ")]
    return float(found.split()[-1])


def test_another_model_answers_and_back(client: Client) -> None:
    ask(client, "POST", "/v1/events", {"events": events(5)})
    before = ask(client, "GET", "/healthz")
    old = before.json()["model"]
    assert before.headers["x-model"] == old
    answer = swap(client, "new")
    new = answer.json()["model"]
    assert answer.status_code == 200
    assert answer.json() == {"model": new, "previous": old, "items_left": 0, "items_new": 0}
    assert new.startswith("new ")
    assert scored(client, "books") == pytest.approx(expected(OTHER, events(5), "books"), abs=1e-5)
    # What has been counted does not fall with a new model: Prometheus takes no such counter.
    rebuilt = counted(client)
    ask(client, "POST", "/v1/events", {"events": events(8, first=5)})
    assert scored(client, "films") == pytest.approx(expected(OTHER, events(13), "films"), abs=1e-5)
    for path in ("/v1/domains", "/v1/users/ann/history", "/healthz", "/nowhere"):
        assert ask(client, "GET", path).headers["x-model"] == new
    assert f'hstu_xd_model_info{{name="{new}"}} 1.0' in ask(client, "GET", "/metrics").text
    assert swap(client, "old").json()["model"] == old
    assert counted(client) >= rebuilt > 0
    assert scored(client, "books") == pytest.approx(scores(events(13), 0), abs=1e-5)
    assert ask(client, "GET", "/healthz").json()["model"] == old


def test_items_and_domains_are_those_of_the_model_that_answers(client: Client) -> None:
    """Ids and the order of domains differ, and two items leave."""
    rows = [event(0) | {"item": "1"}, *events(9, first=1)]
    ask(client, "POST", "/v1/events", {"events": rows})
    names = [row["item"] for row in rows]
    shuffled = other_model(shuffled_catalog())
    assert swap(client, "shuffled").json()["items_left"] == 0
    for name in DOMAINS:
        assert scored(client, name) == pytest.approx(expected(shuffled, rows, name), abs=1e-5)
    history = ask(client, "GET", "/v1/users/ann/history").json()["events"]
    assert [row["item"] for row in history] == names
    wanted = [DOMAINS[int(MODEL.catalog.item_domains[int(item)])] for item in names]
    assert [row["domain"] for row in history] == wanted
    found = ask(client, "POST", "/v1/recommend", recommend("ann", "games", k=99))
    (row,) = found.json()["recommendations"]
    assert {each["item"] for each in row["items"]} <= expected(shuffled, rows, "games").keys()

    smaller = other_model(shuffled_catalog([1, 5]))
    assert swap(client, "smaller").json()["items_left"] == 2
    history = ask(client, "GET", "/v1/users/ann/history").json()["events"]
    assert [row["item"] for row in history] == [n for n in names if n not in ("1", "5")]
    for name in DOMAINS:
        found = scored(client, name, smaller)
        assert found == pytest.approx(expected(smaller, rows, name), abs=1e-5)
    gone = ask(client, "POST", "/v1/events", {"events": [event(20) | {"item": "5"}]})
    assert (gone.status_code, "unknown item '5'" in gone.json()["error"]) == (400, True)
    assert gone.headers["x-model"].startswith("smaller ")
    assert swap(client, "old").json()["items_new"] == 2
    assert scored(client, "books") == pytest.approx(scores(rows, 0), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("toys", "toys .* has no domain 'games', which old .* serves; train with all of its"),
        ("strange", "has none of the items that old .* has in domain 'books'; serve a run of the"),
        ("nothing", "nothing: not a run folder"),
        ("broken", "broken"),
        ("..", "run '..' is not the name of a folder; name one beside the run that serve"),
        ("a/b", "run 'a/b' is not the name of a folder"),
        ("a\0b", "is not the name of a folder"),
        ("", "run is '': "),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(
    client: Client, name: str, reason: str
) -> None:
    ask(client, "POST", "/v1/events", {"events": events(5)})
    answer = swap(client, name)
    assert answer.status_code == 400
    assert re.search(reason, answer.json()["error"]), answer.json()
    assert answer.headers["x-model"].startswith("old ")
    assert scored(client, "books") == pytest.approx(scores(events(5), 0), abs=1e-5)


def test_models_are_changed_with_a_token_only(tmp_path: Path, runs: Path, client: Client) -> None:
    with serving(tmp_path / "other", run=runs / "old") as other:
        answer = other.ask("POST", "/v1/models", {"run": "new"})
        assert answer.status_code == 403
        assert "start serve with --token-file" in answer.json()["error"]
        assert other.ask("GET", "/healthz").json()["model"].startswith("old ")
    assert client.ask("POST", "/v1/models", {"run": "new"}).status_code == 401


def test_two_swaps_at_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    load, reached, go_on = Service.load, threading.Event(), threading.Event()

    def slow(service: Service, run: Path, **options: Any) -> Any:
        reached.set()
        assert go_on.wait(60)
        return load(service, run, **options)

    monkeypatch.setattr(Service, "load", slow)

    async def both() -> list[Any]:
        post = {"headers": HEADERS}
        first = asyncio.ensure_future(client._ask("POST", "/v1/models", {"run": "new"}, **post))
        await asyncio.to_thread(reached.wait, 60)
        second = await client._ask("POST", "/v1/models", {"run": "shuffled"}, **post)
        go_on.set()
        return [await first, second]

    first, second = client._loop.run_until_complete(both())
    assert (first.status_code, second.status_code) == (200, 409)
    assert "another swap is under way; repeat it when" in second.json()["error"]
    assert ask(client, "GET", "/healthz").json()["model"] == first.json()["model"]
    assert swap(client, "shuffled").status_code == 200


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_ten_swaps_under_load(tmp_path: Path, runs: Path, store: str) -> None:
    """Nobody is refused, and every answer is that of one model, the one that it names."""
    states = {"store": "memory" if store == "memory" else f"sqlite:{tmp_path / 'states'}"}
    models = {"old": MODEL, "new": OTHER}
    users = ["ann", "bob", "eve"]
    answers: list[tuple[str, str, int, list[float]]] = []
    with serving(tmp_path / "log", run=runs / "old", token=TOKEN, states=states) as client:
        done = False

        async def read(user: str) -> None:
            """Write an event, then ask for the scores of all items, over and over."""
            items = list(map(str, MODEL.catalog.items_of(0).tolist()))
            for number in range(10_000):
                if done:
                    return
                body = {"events": [event(number, user) | {"id": str(number)}]}
                answer = await client._ask("POST", "/v1/events", body, headers=HEADERS)
                assert (answer.status_code, answer.json()) == (200, {"accepted": 1})
                body = {"user": user, "domain": DOMAINS[0], "items": items}
                answer = await client._ask("POST", "/v1/score", body, headers=HEADERS)
                assert answer.status_code == 200, answer.text
                name = answer.headers["x-model"].split()[0]
                answers.append((user, name, number + 1, answer.json()["scores"]))

        async def swaps() -> None:
            nonlocal done
            for number in range(10):
                name = ("new", "old")[number % 2]
                answer = await client._ask("POST", "/v1/models", {"run": name}, headers=HEADERS)
                assert answer.status_code == 200, answer.text
                seen = len(answers)
                while len(answers) < seen + 10:
                    await asyncio.sleep(0.001)
                # Whoever asks after the swap is answered by the new model.
                assert {each[1] for each in answers[seen + len(users) :]} == {name}
            done = True

        async def everything() -> None:
            await asyncio.gather(swaps(), *map(read, users))

        client._loop.run_until_complete(everything())
    assert {name for _, name, _, _ in answers} == {"old", "new"}
    for user, name, count, found in answers[:: max(1, len(answers) // 60)]:
        wanted = expected(models[name], events(count, user), DOMAINS[0])
        assert found == pytest.approx(list(wanted.values()), abs=1e-5), (user, name, count)


def test_events_that_the_new_store_has_count_once(tmp_path: Path) -> None:
    """As after a night: the new run is trained on the old log and on what the service has taken."""
    data = tmp_path / "data"
    synthesize(data, SynthOptions(users=12, domains=3, items_per_domain=8, mean_length=6))
    store = InteractionStore.open(data)
    model = CrossDomainHSTU(store.catalog, MODEL.settings, dropout_rate=0.0).float().eval()
    write_run(tmp_path / "first", model, store)
    user = store.user_token(3)
    items, times = (column.tolist() for column in store.history(3))
    logged = [
        {"user": user, "item": store.catalog.token(item), "timestamp": timestamp}
        for item, timestamp in zip(items, times)
    ]
    # The service has taken a user's events itself, and the store of the next run has them, too.
    write_run(tmp_path / "next", model, store)
    empty = write_run(tmp_path / "before", model)
    with serving(tmp_path / "log", run=empty, token=TOKEN) as client:
        answer = ask(client, "POST", "/v1/events", {"events": logged})
        assert answer.json() == {"accepted": len(logged)}
        assert swap(client, "next").status_code == 200
        path = f"/v1/users/{user}/history"
        history = ask(client, "GET", path).json()["events"]
        assert [row["timestamp"] for row in history] == times
        more = logged[-1] | {"timestamp": times[-1] + 1}
        assert ask(client, "POST", "/v1/events", {"events": [more]}).json() == {"accepted": 1}
        assert len(ask(client, "GET", path).json()["events"]) == len(times) + 1
        # Histories that are served now do not silently go.
        lost = swap(client, "before")
        assert lost.status_code == 400
        assert "no-data" in lost.json()["error"]
