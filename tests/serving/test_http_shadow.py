"""Another run that answers in the shadow: what is counted is true, and nobody waits for it."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
from log_cases import postgres_server
from other_models import OTHER, expected
from service_client import DOMAINS, Client, events, recommend, score, scores, serving
from service_process import ServiceProcess
from test_http_workers import counts

from hstu_xd.cli import app
from hstu_xd.errors import InputError
from hstu_xd.evaluation.protocol import RETRIEVAL
from hstu_xd.serving.events.event_log import Event, Logged
from hstu_xd.serving.http import shadow_process
from hstu_xd.serving.http.jobs import Found, Recommend, Score
from hstu_xd.serving.http.settings import LogSettings, ServiceSettings
from hstu_xd.serving.http.shadow import Asked, Shadow, Start

USERS = ["ann", "bob", "eve"]
K = 3


@contextmanager
def shadowed(folder: Path, runs: Path, name: str) -> Iterator[tuple[Client, Shadow]]:
    with serving(folder, run=runs / "old") as client:
        client.append(*[row for user in USERS for row in events(6, user)])
        shadow = Shadow(client.service, runs / name, allow_imports=False, log=LogSettings())
        client.service.shadow = shadow
        yield client, shadow


def outcomes(client: Client) -> dict[str, float]:
    pattern = r'^hstu_xd_shadow_requests_total\{.*outcome="(\w+)"\} (.*)$'
    text = client.ask("GET", "/metrics").text
    return {name: float(value) for name, value in re.findall(pattern, text, re.MULTILINE)}


def wait_for(client: Client, outcome: str, count: int) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while (found := outcomes(client))[outcome] < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def best(found: dict[str, float]) -> list[str]:
    return sorted(found, key=lambda item: -found[item])[:K]


def test_differences_are_those_of_the_models(tmp_path: Path, runs: Path) -> None:
    with shadowed(tmp_path, runs, "new") as (client, shadow):
        assert shadow.name.startswith("new ")
        overlaps: list[float] = []
        ranks: list[int] = []
        asked = 0
        for user in USERS:
            body = recommend(user, k=K, exclude_seen=False)
            assert client.ask("POST", "/v1/recommend", body).status_code == 200
            for domain, name in enumerate(DOMAINS):
                given = best(scores(events(6, user), domain))
                other = best(expected(OTHER, events(6, user), name))
                overlaps.append(len({*given} & {*other}) / K)
                ranks.append(other.index(given[0]) + 1 if given[0] in other else K + 1)
            asked += 1
            wait_for(client, "compared", asked)
            items = list(scores(events(6, user), 1))
            assert client.ask("POST", "/v1/score", score(user, 1, items)).status_code == 200
            (first, *_) = best(scores(events(6, user), 1))
            wanted = expected(OTHER, events(6, user), DOMAINS[1])
            ranks.append(1 + sum(value > wanted[first] for value in wanted.values()))
            asked += 1
            found = wait_for(client, "compared", asked)
        assert found == {"compared": asked, "dropped": 0, "overtaken": 0, "failed": 0}
        for metric, values in (("overlap", overlaps), ("first_rank", ranks)):
            name, label = f"hstu_xd_shadow_{metric}", f'{{name="{shadow.name}"}}'
            assert client.metric(f"{name}_count{label}") == len(values)
            assert client.metric(f"{name}_sum{label}") == pytest.approx(sum(values))
        assert 0 < sum(overlaps) < len(overlaps)
        assert client.metric(f'hstu_xd_shadow_seconds_count{{name="{shadow.name}"}}') == asked


def test_a_run_agrees_with_itself(tmp_path: Path, runs: Path) -> None:
    with shadowed(tmp_path, runs, "old") as (client, shadow):
        for number, user in enumerate([*USERS, "nobody"]):
            client.ask("POST", "/v1/recommend", recommend(user, DOMAINS[0], k=K))
            wait_for(client, "compared", number + 1)
        for metric in ("overlap", "first_rank"):
            name = f'hstu_xd_shadow_{metric}_sum{{name="{shadow.name}"}}'
            assert client.metric(name) == len(USERS) + 1


def test_nobody_waits_for_a_shadow_that_hangs_or_has_died(
    tmp_path: Path, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with shadowed(tmp_path, runs, "new") as (client, shadow):
        process = shadow._process
        process.send_signal(signal.SIGSTOP)
        for _ in range(30):
            assert client.ask("POST", "/v1/recommend", recommend("ann", k=K)).status_code == 200
        # One is with the shadow, some wait; there is no room for the others.
        found = outcomes(client)
        assert found["compared"] == 0
        assert found["dropped"] >= 30 - 17
        process.send_signal(signal.SIGKILL)
        wait_for(client, "failed", 2)
        assert caplog.text.count("has ended; the service goes on without it") == 1
        assert client.ask("POST", "/v1/recommend", recommend("ann", k=K)).status_code == 200
        assert client.ask("GET", "/healthz").status_code == 200


def test_what_has_changed_since_is_not_compared(tmp_path: Path, runs: Path) -> None:
    with shadowed(tmp_path, runs, "new") as (client, shadow):
        job = Recommend("ann", DOMAINS, None, K, None)
        asyncio.run(shadow.offer(job, Found([], b"an earlier version")))
        wait_for(client, "overtaken", 1)
        # What the shadow's catalogue does not have, or refuses, it has no answer for.
        (now,) = client.service._log.read(["ann"])
        asyncio.run(shadow.offer(Score("ann", "toys", None, ["1"]), Found([0.0], now.version)))
        assert wait_for(client, "failed", 1)["compared"] == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("toys", "the shadow toys .* has no domain 'games', which old .* serves; train with all"),
        (
            "strange",
            "the shadow strange .* has none of the items that old .* has in domain 'books'",
        ),
        ("nothing", "nothing: not a run folder"),
        ("broken", "broken.*: not a readable checkpoint"),
    ],
)
def test_a_shadow_that_does_not_fit_is_refused(
    tmp_path: Path, runs: Path, name: str, reason: str
) -> None:
    with serving(tmp_path, run=runs / "old") as client, pytest.raises(InputError, match=reason):
        Shadow(client.service, runs / name, allow_imports=False, log=LogSettings())


def test_the_command_refuses_a_shadow_that_does_not_fit(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--port", "0", "--events", str(tmp_path / "e"), "--shadow", str(runs / "toys")]
    assert app.run(["serve", str(runs / "old"), *options]) == 2
    said = capsys.readouterr().err
    assert "the shadow toys " in said
    assert "has no domain 'games'" in said


def test_a_shadow_keeps_nothing_of_users(runs: Path, tmp_path: Path) -> None:
    settings = ServiceSettings(tmp_path / "log")
    start = Start(
        *(runs / "new", settings, False, LogSettings(), RETRIEVAL, "old", DOMAINS),
        items={str(item): DOMAINS[0] for item in (1, 5, 999)},
        needs_data=False,
    )
    answerer = shadow_process.Answerer(start)
    assert answerer.changes.previous == "old"
    assert answerer.changes.items_left >= 1
    known = [Event(*row.values()) for row in events(6)]
    logged = Logged(b"one", False, frozenset(), known)
    found = answerer.compare(Asked(Recommend("ann", DOMAINS, None, K, None), [[]] * 3, logged))
    assert found is not None
    assert (found.overlaps, found.ranks) == ([], [])
    assert len(answerer._sessions.session) == 0
    assert not answerer._log.read(["ann"])[0].events
    needs = replace(start, needs_data=True)
    with pytest.raises(InputError, match="has no earlier histories, and the service has some"):
        shadow_process.Answerer(needs)


def test_whatever_is_wrong_with_a_shadow_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a swap: a client reads no stderr."""

    def fail(start: Start) -> None:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(shadow_process, "Answerer", fail)
    monkeypatch.setattr(shadow_process.os, "nice", lambda level: 0)
    monkeypatch.setattr(shadow_process.signal, "signal", lambda which, handler: None)
    monkeypatch.setattr(shadow_process.access_log, "set_up", lambda log: None)
    settings = ServiceSettings(tmp_path / "log")
    start = Start(
        *(tmp_path / "bad", settings, False, LogSettings(), RETRIEVAL, "old", DOMAINS, {}, False)
    )
    line, other = Pipe()
    line.send(start)
    shadow_process.run(os.dup(other.fileno()))
    with pytest.raises(
        InputError, match=r"bad cannot be loaded \(RuntimeError: no such layer\); res"
    ):
        raise line.recv()


def test_a_rank_counts_from_one() -> None:
    assert shadow_process.overlap(["a", "b"], ["b", "c", "d"]) == pytest.approx(1 / 3)
    assert [shadow_process.rank(item, ["a", "b"]) for item in "abc"] == [1, 2, 3]
    given, other = [[0.1, 0.9, 0.2], [3.0, 2.0, 1.0]], [[0.5, 0.4, 0.4], [0.3, 0.2, 0.3]]
    assert shadow_process.ranks_of_scores(given, other) == [2, 1]
    assert shadow_process.ranks_of_scores([[1.0]], [[1.0]]) == []


def children(pid: int) -> set[int]:
    found = {
        int(pid)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    }
    return found.union(*map(children, found))


@pytest.mark.slow
def test_every_worker_has_a_shadow(tmp_path: Path, runs: Path) -> None:
    with postgres_server() as server:
        options = ["--events", server.database(), "--workers", "2", "--shadow", str(runs / "new")]
        with ServiceProcess(runs / "old", *options) as process:
            assert process.ask("POST", "/v1/events", {"events": events(6)})[0] == 200
            deadline, compared = time.monotonic() + 60, 0.0
            while compared < 3:
                body = recommend("ann", k=K)
                assert process.ask("POST", "/v1/recommend", body)[0] == 200
                compared = sum(
                    value
                    for name, value in counts(process).items()
                    if name.startswith("hstu_xd_shadow_requests") and "compared" in name
                )
                assert time.monotonic() < deadline
            every = children(process._process.pid)
            shadows = [pid for pid in every if os.getpriority(os.PRIO_PROCESS, pid) == 19]
            assert len(shadows) == 2
            code, said = process.end()
        assert code == 0, said
        assert "Traceback" not in said
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in shadows):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_shadow_that_is_closed_while_it_is_asked_ends_in_silence(
    tmp_path: Path, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with shadowed(tmp_path, runs, "new") as (client, shadow):
        shadow._process.send_signal(signal.SIGSTOP)
        for _ in range(3):
            assert client.ask("POST", "/v1/recommend", recommend("ann", k=K)).status_code == 200
        while shadow._waiting.qsize() > 2:
            time.sleep(0.01)
        client.service.follow(None)
        # Its thread has let go of the line, which nobody else has closed under it.
        assert (shadow._thread.is_alive(), shadow._line.closed) == (False, True)
        before = outcomes(client)
        # Those are dropped beside which another request is under way, and no other has an outcome.
        assert sum(before.values()) == before["dropped"]
        asyncio.run(shadow.offer(Recommend("ann", DOMAINS, None, K, None), Found([], b"")))
        assert outcomes(client) == before
    assert "shadow" not in caplog.text
