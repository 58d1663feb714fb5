"""Another model in place of the one that answers: at once, whole, and back again, under load."""

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from log_cases import postgres_server
from service_client import (
    DOMAINS,
    MODEL,
    WINDOW,
    Client,
    event,
    events,
    recommend,
    scores,
    serving,
    write_run,
)
from service_process import ServiceProcess

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving import EncoderSession
from hstu_xd.serving.http.live_model import Changes
from hstu_xd.serving.http.service import Service
from hstu_xd.serving.http.swaps import SwapRefused
from hstu_xd.serving.http.worker_swaps import SwapLeader

TOKEN = "sesame"
HEADERS = {"authorization": f"Bearer {TOKEN}"}


def other_model(catalog: DomainCatalog = MODEL.catalog) -> CrossDomainHSTU:
    """Other weights, over the same items or others."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        model = CrossDomainHSTU(catalog, MODEL.settings, dropout_rate=0.0).float().eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


OTHER = other_model()


def shuffled_catalog(without: Sequence[int] = ()) -> DomainCatalog:
    """The items of the tiny catalogue under other ids, domains in another order, some left out."""
    tokens = [n for n in reversed(range(1, MODEL.catalog.num_items + 1)) if n not in without]
    names = ["games", "books", "films"]
    domains = [names.index(DOMAINS[int(MODEL.catalog.item_domains[n])]) for n in tokens]
    return DomainCatalog(torch.tensor([0, *domains]), names, [str(n) for n in tokens])


def expected(model: CrossDomainHSTU, rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Scores of all items of a domain by a model, for who has these events."""
    catalog = model.catalog
    ids = {catalog.token(item): item for item in catalog.domain_items.tolist()}
    known = [row for row in rows if row["item"] in ids]
    session = EncoderSession(model, window=WINDOW)
    session.append(
        ["ann"] * len(known), [ids[r["item"]] for r in known], [r["timestamp"] for r in known]
    )
    domain = catalog.domain_index(name)
    items = catalog.items_of(domain)
    (found,) = session.score(["ann"], items.unsqueeze(0), [domain])
    return {catalog.token(i): score for i, score in zip(items.tolist(), found.tolist())}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders side by side: of the model, of another one, and of some that do not fit."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "old")
    write_run(folder / "new", OTHER)
    write_run(folder / "shuffled", other_model(shuffled_catalog()))
    write_run(folder / "smaller", other_model(shuffled_catalog([1, 5])))
    names = ["books", "films", "toys"]
    write_run(folder / "toys", other_model(DomainCatalog(MODEL.catalog.item_domains, names)))
    tokens = [f"x{number}" for number in range(MODEL.catalog.num_items)]
    strange = DomainCatalog(MODEL.catalog.item_domains, DOMAINS, tokens)
    write_run(folder / "strange", other_model(strange))
    (write_run(folder / "broken") / "model.pt").write_bytes(b"nothing")
    for file in (folder / "broken").glob("*.safetensors"):
        file.write_bytes(b"nothing")
    return folder


@pytest.fixture
def client(tmp_path: Path, runs: Path) -> Iterator[Client]:
    with serving(tmp_path / "log", run=runs / "old", token=TOKEN) as client:
        yield client


def ask(client: Client, method: str, path: str, body: Any = None) -> Any:
    return client.ask(method, path, body, headers=HEADERS)


def swap(client: Client, name: str) -> Any:
    return ask(client, "POST", "/v1/models", {"run": name})


def scored(client: Client, name: str, model: CrossDomainHSTU = MODEL) -> dict[str, float]:
    items = model.catalog.items_of(model.catalog.domain_index(name)).tolist()
    tokens = [model.catalog.token(item) for item in items]
    body = {"user": "ann", "domain": name, "items": tokens}
    answer = ask(client, "POST", "/v1/score", body)
    assert answer.status_code == 200, answer.text
    return dict(zip(tokens, answer.json()["scores"]))


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
    ask(client, "POST", "/v1/events", {"events": events(8, first=5)})
    assert scored(client, "films") == pytest.approx(expected(OTHER, events(13), "films"), abs=1e-5)
    for path in ("/v1/domains", "/v1/users/ann/history", "/healthz", "/nowhere"):
        assert ask(client, "GET", path).headers["x-model"] == new
    assert f'hstu_xd_model_info{{name="{new}"}} 1.0' in ask(client, "GET", "/metrics").text
    assert swap(client, "old").json()["model"] == old
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


def led(tmp_path: Path) -> tuple[SwapLeader, list[list[Any]]]:
    heard: list[list[Any]] = [[], []]
    return SwapLeader(tmp_path, 2, lambda number, message: heard[number].append(message)), heard


def test_a_leader_has_all_workers_take_a_model_or_none(tmp_path: Path) -> None:
    from hstu_xd.serving.http.worker_swaps import _Ask, _Done, _Load, _Take

    changes = Changes("b 1", "a 1", 0, 0)
    leader, heard = led(tmp_path)
    leader.hear(0, _Ask(tmp_path / "b"))
    assert heard[0] == heard[1] == [_Load(1, tmp_path / "b")]
    leader.hear(1, _Ask(tmp_path / "c"))
    assert isinstance(heard[1][-1].error, SwapRefused)
    leader.hear(0, _Done(1, changes))
    assert leader.run == tmp_path
    leader.hear(1, _Done(1, changes))
    assert leader.run == tmp_path / "b"
    assert heard[0][-1] == heard[1][-1] == _Take(1)
    # One that dies now starts with the new model; the other one is still to say that it has it.
    leader.lose(1)
    leader.hear(0, _Done(1))
    assert heard[0][-1] == _Done(1, changes)

    leader.begin(tmp_path / "c", 1)
    leader.hear(0, _Done(2, changes))
    leader.lose(0)
    assert heard[1][-1].error.args[0].startswith("a worker has ended meanwhile; the model stays")
    assert heard[1][-2] == _Take(2, forget=True)
    assert leader.run == tmp_path / "b"
    leader.hear(1, _Done(2, changes))  # What it was doing is no longer asked for.

    leader.begin(tmp_path / "d", 0)
    leader.hear(1, _Done(3, error=InputError("no")))
    assert heard[0][-1].error.args == ("no",)
    leader.begin(tmp_path / "e", 0)
    leader.hear(0, _Done(4, changes))
    leader.hear(1, _Done(4, Changes("b 2", "a 1", 0, 0)))
    assert "the run has changed while workers loaded it" in heard[0][-1].error.args[0]
    assert leader.run == tmp_path / "b"


def test_a_leader_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu_xd.serving.http import worker_swaps

    monkeypatch.setattr(worker_swaps, "_LOADING", 0.0)
    leader, heard = led(tmp_path)
    leader.begin(tmp_path, 0)
    time.sleep(0.01)
    leader.look()
    assert "not all workers have loaded it within" in heard[0][-1].error.args[0]


def wait_for_model(process: ServiceProcess, name: str) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        model = process.ask("GET", "/healthz")[1]["model"]
        if model.startswith(f"{name} "):
            return model
        time.sleep(0.05)
    raise AssertionError(f"{name} does not come")


def test_sighup_serves_what_a_link_names_now(tmp_path: Path, runs: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(runs / "old")
    options = ["--events", str(tmp_path / "events"), "--max-delay", "60000"]
    with ServiceProcess(link, *options) as process:
        assert process.ask("POST", "/v1/events", {"events": events(5)})[0] == 200
        wait_for_model(process, "old")
        link.unlink()
        link.symlink_to(runs / "new")
        process.send(signal.SIGHUP)
        wait_for_model(process, "new")
        wanted = expected(OTHER, events(5), "books")
        body = {"user": "ann", "domain": "books", "items": list(wanted)}
        assert process.ask("POST", "/v1/score", body)[1]["scores"] == pytest.approx(
            list(wanted.values()), abs=1e-5
        )
        link.unlink()
        link.symlink_to(runs / "toys")
        process.send(signal.SIGHUP)
        time.sleep(1.0)
        wait_for_model(process, "new")
        code, said = process.end()
    assert code == 0
    assert "has no domain 'games'" in said
    assert "; the model before goes on" in said


@pytest.mark.slow
def test_workers_swap_together_under_load(tmp_path: Path, runs: Path) -> None:
    """Ten swaps, a worker killed after one: all answer by the run that was named last."""
    from test_http_workers import workers_of

    with postgres_server() as server:
        options = ["--events", server.database(), "--workers", "2", "--max-delay", "60000"]
        with ServiceProcess(runs / "old", *options, token=TOKEN) as process:
            assert process.ask("POST", "/v1/events", {"events": events(5)})[0] == 200
            wanted = {
                "old": list(scores(events(5), 0).values()),
                "new": list(expected(OTHER, events(5), "books").values()),
            }
            items = [str(item) for item in MODEL.catalog.items_of(0).tolist()]
            body = {"user": "ann", "domain": "books", "items": items}
            stop, statuses, wrong = threading.Event(), set(), []

            def load() -> None:
                while not stop.is_set():
                    status, answer = process.ask("POST", "/v1/score", body)
                    statuses.add(status)
                    found = answer.get("scores", [])
                    if not any(found == pytest.approx(row, abs=1e-5) for row in wanted.values()):
                        wrong.append(answer)

            threads = [threading.Thread(target=load) for _ in range(3)]
            for thread in threads:
                thread.start()
            try:
                for number in range(10):
                    name = ("new", "old")[number % 2]
                    status, answer = process.ask("POST", "/v1/models", {"run": name})
                    assert (status, answer.get("model", "").split()[:1]) == (200, [name]), answer
                    for _ in range(6):  # Whichever worker answers.
                        status, answer = process.ask("POST", "/v1/score", body)
                        assert answer["scores"] == pytest.approx(wanted[name], abs=1e-5)
                assert process.ask("POST", "/v1/models", {"run": "toys"})[0] == 400
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            assert (statuses, wrong) == ({200}, [])
            assert process.ask("POST", "/v1/models", {"run": "new"})[0] == 200
            os.kill(workers_of(process)[0], signal.SIGKILL)
            deadline = time.monotonic() + 60
            while len(workers_of(process)) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(5)
            for _ in range(8):
                assert process.ask("POST", "/v1/score", body)[1]["scores"] == pytest.approx(
                    wanted["new"], abs=1e-5
                )
            code, said = process.end()
        assert code == 0, said
        assert "Traceback" not in said
