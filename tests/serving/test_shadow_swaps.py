"""A shadow that comes and goes while the service answers: asked for by HTTP, seen by no client."""

import asyncio
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from log_cases import postgres_server
from other_models import OTHER, expected
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
    score,
    scores,
    serving,
)
from service_process import ServiceProcess, asked_all_the_while
from test_http_shadow import children
from test_http_workers import counts

from hstu_xd.serving.http import swaps as swaps_module

FAILED = 'outcome="failed"'
COMPARED = 'outcome="compared"'


@pytest.fixture
def client(tmp_path: Path, runs: Path) -> Iterator[Client]:
    with serving(tmp_path / "log", run=runs / "old", token=TOKEN) as client:
        ask(client, "POST", "/v1/events", {"events": events(6)})
        yield client


def begin(client: Client, name: str) -> Any:
    return ask(client, "POST", "/v1/models", {"run": name, "mode": "shadow"})


def end(client: Client) -> Any:
    return ask(client, "DELETE", "/v1/models/shadow")


def present(client: Client) -> tuple[str, str | None]:
    """Names of the runs that answer, in the open and in the shadow."""
    found = ask(client, "GET", "/v1/models").json()
    assert found["model"] == ask(client, "GET", "/healthz").json()["model"]
    shadow = found["shadow"]
    return found["model"].split()[0], None if shadow is None else shadow["model"].split()[0]


def asked(
    client: Client, outcome: str, count: int, path: str = "/v1/recommend", body: Any = None
) -> None:
    """Ask until so many answers have had an outcome; every one of them is given.

    Answers are dropped where the service has other work, so once is not enough.
    """
    deadline = time.monotonic() + 60
    while True:
        assert ask(client, "POST", path, body or recommend("ann", k=3)).status_code == 200
        lines = ask(client, "GET", "/metrics").text.splitlines()
        rows = [x for x in lines if x.startswith("hstu_xd_shadow_requests_total{") and outcome in x]
        if sum(float(row.split()[-1]) for row in rows) >= count:
            return
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)


def test_a_shadow_comes_and_goes_and_comes_again(client: Client) -> None:
    assert present(client) == ("old", None)
    answer = begin(client, "new")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["items_left"], found["items_new"]) == (0, 0)
    assert (found["shadow"].split()[0], found["model"].split()[0]) == ("new", "old")
    assert ask(client, "GET", "/v1/models").json() == {
        "model": found["model"],
        "shadow": {"model": found["shadow"], "state": "answering"},
    }
    text = ask(client, "GET", "/metrics").text
    assert f'hstu_xd_shadow_info{{name="{found["shadow"]}"}} 1.0' in text
    asked(client, COMPARED, 2)
    shadow = client.service.shadow
    assert shadow is not None
    gone = end(client)
    assert (gone.status_code, gone.json()) == (200, {"model": found["model"], "shadow": None})
    assert shadow._process.poll() is not None
    assert end(client).json() == gone.json()
    text = ask(client, "GET", "/metrics").text
    assert "hstu_xd_shadow_info" not in text
    # Its counts stay, and go on where it comes again.
    assert re.search(r'hstu_xd_shadow_requests_total\{.*outcome="compared"\} [2-9]', text)
    assert begin(client, "smaller").json()["items_left"] == 2
    assert present(client) == ("old", "smaller")
    end(client)
    assert begin(client, "new").status_code == 200
    asked(client, COMPARED, 4)


UNFIT = {
    "toys": "the shadow toys .* has no domain 'games', which old .* serves",
    "strange": "the shadow strange .* has none of the items that old .* has in domain",
    "nothing": "nothing: not a run folder",
    "broken": "not a readable checkpoint",
    "..": "run '..' is not the name of a folder",
}


def test_a_shadow_that_does_not_fit_is_refused_and_leaves_nothing(client: Client) -> None:
    for name, reason in UNFIT.items():
        answer = begin(client, name)
        assert answer.status_code == 400
        assert re.search(reason, answer.json()["error"]), answer.json()
        assert present(client) == ("old", None)
    assert begin(client, "new").status_code == 200


def test_a_shadow_whose_process_does_not_start_is_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as short:
        short.setattr("hstu_xd.serving.http.shadow.subprocess.Popen", full)
        answer = begin(client, "new")
    assert answer.status_code == 400
    assert "no process can be started for the shadow new (Cannot allocate memory)" in answer.text
    assert present(client) == ("old", None)
    assert begin(client, "new").status_code == 200


def test_shadows_are_changed_with_a_token_only(tmp_path: Path, runs: Path) -> None:
    with serving(tmp_path / "other", run=runs / "old") as other:
        body = {"run": "new", "mode": "shadow"}
        for method, path, sent in (
            ("POST", "/v1/models", body),
            ("DELETE", "/v1/models/shadow", None),
        ):
            answer = other.ask(method, path, sent)
            assert answer.status_code == 403
            assert "start serve with --token-file" in answer.json()["error"]
        assert other.ask("GET", "/v1/models").json()["shadow"] is None


def test_only_one_shadow_and_only_one_change_at_a_time(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ask(client, "POST", "/v1/models", {"run": "new", "mode": "ghost"})
    assert (wrong.status_code, "mode is 'ghost'" in wrong.json()["error"]) == (400, True)
    make, reached, go_on = swaps_module.Shadow, threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        reached.set()
        assert go_on.wait(60)
        return make(*arguments, **options)

    monkeypatch.setattr(swaps_module, "Shadow", slow)

    async def at_once() -> list[Any]:
        path, body = "/v1/models", {"run": "new", "mode": "shadow"}
        first = asyncio.ensure_future(client._ask("POST", path, body, headers=HEADERS))
        await asyncio.to_thread(reached.wait, 60)
        others = [
            await client._ask("POST", path, {"run": "smaller", "mode": "shadow"}, headers=HEADERS),
            await client._ask("POST", path, {"run": "new"}, headers=HEADERS),
            await client._ask("DELETE", "/v1/models/shadow", headers=HEADERS),
        ]
        go_on.set()
        return [await first, *others]

    first, *others = client._loop.run_until_complete(at_once())
    assert first.status_code == 200
    for other in others:
        assert other.status_code == 409
        assert "another swap is under way; repeat it when" in other.json()["error"]
    second = begin(client, "smaller")
    assert second.status_code == 409
    error = "new is in the shadow; end it first with DELETE /v1/models/shadow"
    assert second.json() == {"error": error}
    assert present(client) == ("old", "new")


def test_a_shadow_becomes_the_model_by_a_swap(client: Client) -> None:
    assert begin(client, "new").status_code == 200
    shadow = client.service.shadow
    assert shadow is not None
    # Another model in the place of the one that answers leaves the shadow where it is.
    assert ask(client, "POST", "/v1/models", {"run": "shuffled"}).status_code == 200
    assert present(client) == ("shuffled", "new")
    asked(client, COMPARED, 1)
    assert ask(client, "POST", "/v1/models", {"run": "new", "mode": "answer"}).status_code == 200
    assert present(client) == ("new", None)
    assert shadow._process.poll() is not None
    wanted = expected(OTHER, events(6), "books")
    answer = ask(client, "POST", "/v1/score", score("ann", 0, list(wanted)))
    assert answer.json()["scores"] == pytest.approx(list(wanted.values()), abs=1e-5)
    assert begin(client, "old").status_code == 200


def test_a_shadow_that_fails_is_counted_and_seen_by_nobody(client: Client) -> None:
    """It has no item 1, which the model has; then its process dies."""
    assert begin(client, "smaller").status_code == 200
    unknown = score("ann", int(MODEL.catalog.item_domains[1]), "1")
    asked(client, FAILED, 1, "/v1/score", unknown)
    asked(client, COMPARED, 1)
    shadow = client.service.shadow
    assert shadow is not None
    shadow._process.kill()
    deadline = time.monotonic() + 60
    # Answers that it failed on before may be counted only now, so their number tells nothing.
    while ask(client, "GET", "/v1/models").json()["shadow"]["state"] != "ended":
        assert ask(client, "POST", "/v1/recommend", recommend("ann", k=3)).status_code == 200
        assert time.monotonic() < deadline
    assert ask(client, "GET", "/readyz").status_code == 200
    assert begin(client, "new").status_code == 409
    assert end(client).status_code == 200
    assert begin(client, "new").status_code == 200
    assert ask(client, "GET", "/v1/models").json()["shadow"]["state"] == "answering"


def test_shadows_come_and_go_under_load(client: Client) -> None:
    """Nobody is refused, and every answer is that of the model, whatever is in its shadow."""
    users = ["bob", "eve", "joe"]
    answers: list[tuple[str, int, list[float]]] = []
    items = list(scores([], 0))
    done = False

    async def read(user: str) -> None:
        number = 0
        while not done:
            body = {"events": [event(number, user) | {"id": str(number)}]}
            answer = await client._ask("POST", "/v1/events", body, headers=HEADERS)
            assert (answer.status_code, answer.json()) == (200, {"accepted": 1})
            body = score(user, 0, items)
            answer = await client._ask("POST", "/v1/score", body, headers=HEADERS)
            assert answer.status_code == 200, answer.text
            number += 1
            answers.append((user, number, answer.json()["scores"]))

    async def change() -> None:
        nonlocal done
        for name in ("new", "smaller"):
            body = {"run": name, "mode": "shadow"}
            answer = await client._ask("POST", "/v1/models", body, headers=HEADERS)
            assert answer.status_code == 200, answer.text
            seen = len(answers)
            while len(answers) < seen + 20:
                await asyncio.sleep(0.001)
            answer = await client._ask("DELETE", "/v1/models/shadow", headers=HEADERS)
            assert answer.json()["shadow"] is None, answer.text
        done = True

    async def everything() -> None:
        await asyncio.gather(change(), *map(read, users))

    client._loop.run_until_complete(everything())
    for user, count, found in answers[:: max(1, len(answers) // 60)]:
        wanted = list(scores(events(count, user), 0).values())
        assert found == pytest.approx(wanted, abs=1e-5), (user, count)


@pytest.mark.slow
def test_all_workers_take_a_shadow_and_let_it_go_under_load(tmp_path: Path, runs: Path) -> None:
    wanted = scores(events(5), 0)
    body = {"user": "ann", "domain": DOMAINS[0], "items": list(wanted)}
    with postgres_server() as server:
        options = ["--events", server.database(), "--workers", "2"]
        with ServiceProcess(runs / "old", *options, token=TOKEN) as process:
            assert process.ask("POST", "/v1/events", {"events": events(5)})[0] == 200

            def shadows() -> set[str | None]:
                """What any worker says of its shadow."""
                found = [process.ask("GET", "/v1/models")[1]["shadow"] for _ in range(12)]
                return {None if each is None else each["model"].split()[0] for each in found}

            with asked_all_the_while(process, body, [list(wanted.values())]):
                begin = {"run": "new", "mode": "shadow"}
                for _ in range(2):
                    assert shadows() == {None}
                    assert process.ask("POST", "/v1/models", begin)[0] == 200
                    assert shadows() == {"new"}
                    status, answer = process.ask("POST", "/v1/models", begin)
                    assert (status, "new is in the shadow" in answer["error"]) == (409, True)
                    assert process.ask("DELETE", "/v1/models/shadow")[0] == 200
                toys = {"run": "toys", "mode": "shadow"}
                assert process.ask("POST", "/v1/models", toys)[0] == 400
                assert shadows() == {None}
                assert process.ask("POST", "/v1/models", begin)[0] == 200
            # What is started again has the shadow, too.
            process.kill_worker(process.workers()[0])
            deadline = time.monotonic() + 60
            while not any(
                value
                for name, value in counts(process).items()
                if name.startswith("hstu_xd_shadow_requests") and "compared" in name
            ):
                assert process.ask("POST", "/v1/score", body)[0] == 200
                assert time.monotonic() < deadline
            assert shadows() == {"new"}
            assert process.ask("POST", "/v1/models", {"run": "new"})[0] == 200
            assert shadows() == {None}
            every = children(process._process.pid)
            assert not [pid for pid in every if os.getpriority(os.PRIO_PROCESS, pid) == 19]
            code, said = process.end()
        assert code == 0, said
        assert "Traceback" not in said
