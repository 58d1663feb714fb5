"""Two workers under twice the load that they bear, while they, PostgreSQL and Redis are killed.

Nothing that was accepted is lost or counts twice, nothing that was refused is there, and every
answer is that of the full encoder on the events that the user had at the time.

HSTU_XD_SOAK sets a number of events, and it goes on until so many are accepted; the whole soak is
200,000:

    HSTU_XD_SOAK=200000 python -m pytest -n 0 -m slow tests/serving/test_workers_soak.py
"""

import json
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from log_cases import postgres_server
from service_client import DOMAINS, ITEMS, MODEL, WINDOW, scores, window_of, write_run
from service_process import ServiceProcess
from store_cases import redis_server

from hstu_xd.bench.http_load import Call, Load, Outcome
from hstu_xd.serving.events.event_log import Event
from hstu_xd.serving.events.open_log import open_log

EVENTS = int(os.environ.get("HSTU_XD_SOAK", "0"))
USERS, WORKERS, CONNECTIONS = 60, 2, 8
# Seconds in which capacity is measured; what is then offered, as a multiple of it.
MEASURED, OVERLOAD = 3.0, 2.0
# Shares of the calls that are events: new ones, and earlier ones that are sent again.
NEW, AGAIN = 0.45, 0.1
# Of how many of the latest events one is chosen to be sent again.
RECENT = 500
PATIENCE = 120.0


class Traffic:
    """Draws calls, and knows when each was drawn; an event's time and id are its number."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._events: list[dict[str, Any]] = []
        self.drawn: dict[int, float] = {}

    def draw(self) -> Call:
        chance = self._random.random()
        if chance < NEW or not self._events:
            number = len(self._events)
            item = str(self._random.randint(1, ITEMS))
            event = {"user": self._user(), "item": item, "timestamp": number, "id": str(number)}
            self._events.append(event)
            call = post(event)
        elif chance < NEW + AGAIN:
            call = post(self._random.choice(self._events[-RECENT:]))
        else:
            user = self._user()
            domain = domain_of(user)
            items = list(map(str, MODEL.catalog.items_of(domain).tolist()))
            body = {"user": user, "domain": DOMAINS[domain], "items": items}
            call = Call("/v1/score", body)
        self.drawn[id(call)] = time.perf_counter()
        return call

    def _user(self) -> str:
        return f"u{self._random.randrange(USERS)}"


def post(event: dict[str, Any]) -> Call:
    return Call("/v1/events", {"events": [event]})


def domain_of(user: str) -> int:
    """The one domain that a user is asked for."""
    return int(user[1:]) % len(DOMAINS)


@dataclass
class Fate:
    """What clients know of an event: when it was first said to be taken, whether it may be."""

    event: dict[str, Any]
    taken_at: float = float("inf")
    is_open: bool = False


def fates(traffic: Traffic, outcomes: Iterable[Outcome]) -> dict[int, Fate]:
    """What clients were told of every event, by its number."""
    found: dict[int, Fate] = {}
    for outcome in outcomes:
        if outcome.call.path != "/v1/events":
            continue
        assert outcome.call.body is not None
        (event,) = outcome.call.body["events"]
        fate = found.setdefault(event["timestamp"], Fate(event))
        if outcome.status == 200:
            at = traffic.drawn[id(outcome.call)] + outcome.seconds
            fate.taken_at = min(fate.taken_at, at)
        elif outcome.status == 0 or b"is not known" in outcome.answer:
            fate.is_open = True
        elif outcome.status == 400:
            # A later event was faster: that is how it always ends for this one.
            assert b": an event at" in outcome.answer, outcome.answer
        else:
            assert outcome.status == 503, (outcome.status, outcome.answer)
    return found


def accepted(known: dict[int, Fate]) -> int:
    """How many events clients were told of that they are taken."""
    return sum(fate.taken_at < float("inf") for fate in known.values())


def ask(process: ServiceProcess, call: Call) -> tuple[int, Any]:
    """Status and answer, asked again where the service is busy."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            status, answer = process.ask("POST", call.path, call.body)
        except OSError as error:
            status, answer = 503, error
        if status != 503:
            return status, answer
        assert time.monotonic() < deadline, answer
        time.sleep(0.1)


def wait_for_health(process: ServiceProcess) -> None:
    """Ask until a worker says that all is well: it finds out by a write, which takes a while."""
    deadline = time.monotonic() + PATIENCE
    while True:
        status, health = process.ask("GET", "/healthz")
        if (status, health["store"], health["writes"]) == (200, "ok", "ok"):
            return
        assert time.monotonic() < deadline, health
        time.sleep(0.1)


def check_log(process: ServiceProcess, log: str, known: dict[int, Fate]) -> dict[str, list[Event]]:
    """Compare the log with what clients were told; the events of every user, as they are logged."""
    for fate in known.values():
        if fate.is_open and fate.taken_at == float("inf"):
            # Who does not know sends it again with the same id, and is told.
            status, answer = ask(process, post(fate.event))
            if status == 200:
                assert answer["accepted"] + answer.get("repeated", 0) == 1
                fate.taken_at = time.perf_counter()
    opened = open_log(log)
    users = [f"u{number}" for number in range(USERS)]
    logged = {user: [*found.events] for user, found in zip(users, opened.read(users))}
    opened.close()
    taken: dict[str, list[Event]] = {user: [] for user in users}
    for _, fate in sorted(known.items()):
        if fate.taken_at < float("inf"):
            event = fate.event
            taken[event["user"]].append(Event(event["user"], event["item"], event["timestamp"]))
    there, told = (Counter(chain.from_iterable(rows.values())) for rows in (logged, taken))
    assert not told - there, f"{(told - there).total()} accepted events are lost"
    assert not there - told, f"{(there - told).total()} events are there twice or were refused"
    assert logged == taken
    return logged


def prefixes(events: list[Event], domain: int) -> torch.Tensor:
    """Scores of a domain's items after none, one, ... and all of the events: (n + 1, items)."""
    rows = [{"item": event.item, "timestamp": event.timestamp} for event in events]
    items, times = (torch.zeros(len(rows), WINDOW, dtype=torch.int64) for _ in range(2))
    for number in range(len(rows)):
        window = window_of(rows[: number + 1])
        items[number, : len(window)] = torch.tensor([int(row["item"]) for row in window])
        times[number, : len(window)] = torch.tensor([row["timestamp"] for row in window])
    vectors = MODEL.item_vectors(MODEL.catalog.items_of(domain))
    nobody = torch.tensor([list(scores([], domain).values())])
    if not rows:
        return nobody
    found = MODEL.encode(items, times, torch.full((len(rows),), domain)) @ vectors.T
    return torch.cat([nobody, found])


def check_answers(
    traffic: Traffic,
    outcomes: Iterable[Outcome],
    logged: dict[str, list[Event]],
    known: dict[int, Fate],
) -> tuple[int, float]:
    """Compare every answer with those after any number of events that it may have known.

    It knows at least those that were accepted before it was asked.

    Returns:
        How many were compared, and the largest difference.
    """
    answers: dict[str, list[tuple[float, list[float]]]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.call.path == "/v1/score" and outcome.status == 200:
            assert outcome.call.body is not None
            given = json.loads(outcome.answer)["scores"]
            answers[outcome.call.body["user"]].append((traffic.drawn[id(outcome.call)], given))
        elif outcome.call.path == "/v1/score":
            assert outcome.status in (0, 503), (outcome.status, outcome.answer)
    worst = 0.0
    for user, asked in answers.items():
        events = logged[user]
        with torch.inference_mode():
            right = prefixes(events, domain_of(user))
        taken = [known[event.timestamp].taken_at for event in events]
        for at, given in asked:
            least = max((n + 1 for n, when in enumerate(taken) if when < at), default=0)
            error = (right[least:] - torch.tensor(given)).abs().amax(1).min().item()
            assert error <= 1e-5, f"{user} after {least} events or more: {error}"
            worst = max(worst, error)
    return sum(map(len, answers.values())), worst


def disturb(faults: list[Callable[[], None]], seconds: float) -> None:
    """Let one thing happen after the other, at even distances."""
    start = time.monotonic()
    for number, fault in enumerate(faults, 1):
        time.sleep(max(0.0, start + seconds * number / (len(faults) + 1) - time.monotonic()))
        fault()


@pytest.mark.parametrize(
    ("seconds", "kills", "restarts", "events"),
    [(6.0, 1, 1, 0), pytest.param(60.0, 10, 3, EVENTS, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_workers_and_servers_are_killed_under_load(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    kills: int,
    restarts: int,
    events: int,
) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(postgres_server())
        redis = stack.enter_context(ExitStack())
        store = f"unix://{redis.enter_context(redis_server(tmp_path))}"
        log, run = server.database(), write_run(tmp_path / "run")
        options = ["--events", log, "--store", store, "--when-store-fails", "rebuild"]
        options += ["--workers", str(WORKERS), "--max-delay", "100"]
        process = stack.enter_context(ServiceProcess(run, *options))

        def restart_postgres() -> None:
            server.stop()
            server.start()

        def restart_redis() -> None:
            redis.close()
            redis.enter_context(redis_server(tmp_path))

        def kill() -> None:
            process.kill_worker(random.choice(process.wait_for_workers(WORKERS)))

        faults = [kill] * kills
        step = kills // restarts
        for number in reversed(range(restarts)):
            faults[number * step : number * step] = [restart_redis]
            faults[number * step + 2 : number * step + 2] = [restart_postgres]
        traffic, load = Traffic(), Load(process.port)
        calm = load.closed(traffic.draw, seconds=MEASURED, connections=CONNECTIONS)
        rate = OVERLOAD * sum(each.status == 200 for each in calm) / MEASURED
        known, rounds, loaded = fates(traffic, calm), 0, list[Outcome]()
        while not rounds or accepted(known) < events:
            rounds += 1
            with ThreadPoolExecutor(1) as pool:
                options = {"rate": rate, "seconds": seconds, "seed": rounds}
                ended = pool.submit(load.open, traffic.draw, **options)
                disturb(faults, seconds)
                loaded += ended.result()
            known = fates(traffic, [*calm, *loaded])
        outcomes = [*calm, *loaded]
        logged = check_log(process, log, known)
        compared, worst = check_answers(traffic, outcomes, logged, known)
        assert compared
        wait_for_health(process)
        code, said = process.end(signal.SIGTERM)
    assert code == 0, said
    assert "Traceback" not in said
    assert said.count("ended with status -9; it is started again") == kills * rounds
    statuses = Counter(each.status for each in loaded)
    taken = [each.seconds * 1e3 for each in loaded if each.status == 200]
    middle, late = np.percentile(taken, [50, 99])
    with capsys.disabled():
        print(
            f"\n{rate / OVERLOAD:.0f} requests/s are borne, {rate:.0f}/s were offered for "
            f"{rounds} x {seconds:.0f} s, with {rounds * kills} kills and {rounds * restarts} "
            f"restarts of each server: {dict(sorted(statuses.items()))}; "
            f"{sum(map(len, logged.values()))} events, 0 lost, 0 doubled; {compared} answers, off "
            f"by {worst:.1e} at most; p50 {middle:.1f} ms, p99 {late:.1f} ms, "
            f"{late / middle:.1f} times as long"
        )
