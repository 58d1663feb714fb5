"""Requests of many connections in one batch, and what happens to those that find it full."""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from service_client import (
    DOMAINS,
    PATIENT,
    Client,
    Gate,
    event,
    events,
    recommend,
    score,
    scores,
    serving,
)

from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Event
from hstu_xd.serving.http import batching
from hstu_xd.serving.http.arrivals import Append
from hstu_xd.serving.http.batching import Batcher, Busy, Ticket
from hstu_xd.serving.http.jobs import Recommend, cost_of
from hstu_xd.serving.http.middleware import HELD_FOR
from hstu_xd.serving.http.retrieval_engine import RetrievalSession
from hstu_xd.serving.http.service import Service
from hstu_xd.serving.http.settings import QueueSettings

USERS = [f"u{number}" for number in range(6)]


def fill(client: Client) -> None:
    for number, user in enumerate(USERS[:-1]):  # nothing is known of the last one
        client.append(*events(2 + 3 * number, user))


def requests() -> list[tuple[str, str, Any]]:
    """32 reads of different kinds; users and domains occur several times."""
    return [
        ("POST", "/v1/score", score(USERS[n % 6], n % 3, [str(1 + n % 3), str(4 + n % 3)]))
        if n % 4 == 0
        else ("POST", "/v1/recommend", recommend(USERS[n % 6], *DOMAINS[: 1 + n % 3], k=1 + n))
        for n in range(32)
    ]


def numbers(answer: Any) -> list[float]:
    """All scores of an answer, in order."""
    if "scores" in answer:
        return answer["scores"]
    rows = [row for domain in answer["recommendations"] for row in domain["items"]]
    return [row["score"] for row in rows]


def test_requests_of_one_batch_are_answered_as_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "alone", queue=replace(PATIENT, max_batch=1)) as client:
        fill(client)
        alone = [client.ask(*request).json() for request in requests()]
    with serving(tmp_path / "together") as client:
        fill(client)
        gate = Gate(monkeypatch)
        answers = client.ask_all(requests(), gate)
        assert gate.sizes == [1, 32]
    for found, wanted in zip(answers, alone):
        assert found.status_code == 200
        assert numbers(found.json()) == pytest.approx(numbers(wanted), abs=1e-5)
        names = [list(row) for row in found.json().get("recommendations", [])]
        assert names == [list(row) for row in wanted.get("recommendations", [])]


def test_events_of_one_batch_keep_their_order_and_a_bad_one_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path) as client:
        gate = Gate(monkeypatch)
        sent = [[event(n)] for n in range(5)]
        sent.insert(3, [event(9, "bob"), event(0)])  # a time that goes back
        sent.append([event(1, "bob")])
        bodies = [("POST", "/v1/events", {"events": rows}) for rows in sent]
        answers = client.ask_all(bodies, gate)
        assert gate.sizes == [1, 7]
        assert [a.status_code for a in answers] == [200, 200, 200, 400, 200, 200, 200]
        assert [row["timestamp"] for row in client.history()] == [0, 1000, 2000, 3000, 4000]
        assert [row["timestamp"] for row in client.history("bob")] == [1000]
        assert client.score_all() == pytest.approx(scores(events(5), 0), abs=1e-5)
        assert client.score_all("bob") == pytest.approx(scores([event(1)], 0), abs=1e-5)


def test_a_read_that_fails_by_itself_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = RetrievalSession._result

    def broken(session: RetrievalSession, asked: Any, *found: Any) -> Any:
        if asked.job.user == "u3":
            raise RuntimeError("out of luck")
        return answer(session, asked, *found)

    monkeypatch.setattr(RetrievalSession, "_result", broken)
    with serving(tmp_path) as client:
        fill(client)
        answers = client.ask_all(requests())
        for (_, _, body), found in zip(requests(), answers):
            assert found.status_code == (500 if body["user"] == "u3" else 200)
        assert "RuntimeError" in answers[3].json()["error"]
        assert "out of luck" in caplog.text


def test_a_full_queue_refuses_and_the_accepted_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, queue=replace(PATIENT, max_queue=4)) as client:
        gate = Gate(monkeypatch)
        sent = [("POST", "/v1/events", {"events": [event(n, f"u{n}")]}) for n in range(12)]
        answers = client.ask_all(sent, gate)
        accepted = [n for n, answer in enumerate(answers) if answer.status_code == 200]
        assert len(accepted) == 4
        for n, answer in enumerate(answers):
            if n not in accepted:
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) >= 1
                assert "busy" in answer.json()["error"]
        known = client.ask("GET", "/v1/users").json()["users"]
        assert known == sorted(f"u{n}" for n in accepted)
        assert client.append(event(0)).status_code == 200


@pytest.mark.parametrize("late", [False, True], ids=["at the door", "when it was read"])
def test_who_asks_again_at_once_does_not_keep_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Thousands of refusals a second took the interpreter from the thread that answers."""
    with serving(tmp_path, queue=replace(PATIENT, max_queue=1)) as client:
        with monkeypatch.context() as full:
            full.setattr(Batcher, "full", True)
            if late:
                full.setattr(Service, "full", False)
            start = time.perf_counter()
            for _ in range(3):
                assert client.append(event(0)).status_code == 503
                # What asks nothing of that thread is told at once.
                assert client.ask("GET", "/v1/domains").status_code == 200
            assert time.perf_counter() - start >= 3 * HELD_FOR
        assert client.append(event(0)).status_code == 200


class Slow:
    """Handles nothing before it is told to."""

    def handle(self, tickets: Sequence[Ticket[int]]) -> None:
        for ticket in tickets:
            ticket.result = ticket.job

    def close(self) -> None:
        pass


def put(batcher: Batcher[Any], count: int) -> None:
    """Let jobs wait that nobody handles."""
    for _ in range(count):
        batcher._waiting.append(Ticket(0, done=asyncio.Future(), cost=1.0, since=0.0))
    batcher._waiting_cost += count


def test_jobs_are_refused_where_they_would_wait_too_long() -> None:
    async def waits(seconds_per_job: float, waiting: int) -> bool:
        batcher = Batcher(Slow, QueueSettings(max_delay=0.1))
        batcher._seconds_per_cost = seconds_per_job
        put(batcher, waiting)
        full = batcher.full
        if full:
            with pytest.raises(Busy, match="repeat the request later"):
                batcher.submit(1)
        else:
            assert await batcher.submit(1).done == 1
        batcher.stop()
        return not full

    assert asyncio.run(waits(0.010, 9))
    assert not asyncio.run(waits(0.010, 11))
    assert asyncio.run(waits(0.001, 99))


def test_one_slow_batch_turns_nobody_away(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: now))

    class Clocked(Slow):
        def handle(self, tickets: Sequence[Ticket[int]]) -> None:
            nonlocal now
            now += sum(ticket.job for ticket in tickets)
            super().handle(tickets)

    async def run() -> None:
        batcher = Batcher(Clocked, QueueSettings(max_delay=3.0))
        for seconds in (1, 1, 100, 1, 1):
            await batcher.submit(seconds).done
        put(batcher, 3)
        assert not batcher.full
        put(batcher, 1)
        assert batcher.full
        batcher.stop()

    asyncio.run(run())


class Clock:
    """Time that passes where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: self.now))


class Held(Slow):
    """Handles a batch when it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def handle(self, tickets: Sequence[Ticket[int]]) -> None:
        self.batches.append([ticket.job for ticket in tickets])
        self.reached.set()
        assert self.go.wait(60)
        super().handle(tickets)


def test_what_is_under_way_counts_by_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request of a thousand events delays what comes after it as a thousand requests do."""
    clock, held = Clock(monkeypatch), Held()

    async def run() -> None:
        batcher = Batcher(lambda: held, QueueSettings(max_delay=0.1), cost=float)
        batcher._seconds_per_cost = 0.001
        large = batcher.submit(1000).done
        await asyncio.to_thread(held.reached.wait, 60)
        assert batcher.delay == pytest.approx(1.0)
        with pytest.raises(Busy):
            batcher.submit(1)
        clock.now = 0.95
        assert batcher.delay == pytest.approx(0.05)
        small = batcher.submit(1).done
        # It takes longer than was to be expected, and nobody knows how much.
        clock.now = 1.2
        assert batcher.delay == pytest.approx(0.201)
        with pytest.raises(Busy):
            batcher.submit(1)
        held.go.set()
        assert await large == 1000
        with pytest.raises(Busy):  # it has waited too long
            await small
        batcher.stop()

    asyncio.run(run())
    assert held.batches == [[1000]]


def test_who_waits_too_long_is_told_while_the_thread_is_busy() -> None:
    """As where a database that is started again holds up a write: the others are told in time."""
    held = Held()

    async def run() -> None:
        batcher = Batcher(lambda: held, QueueSettings(max_delay=0.05))
        first = batcher.submit(1)
        await asyncio.to_thread(held.reached.wait, 60)
        second = batcher.submit(2)
        with pytest.raises(Busy, match="repeat the request later"):
            await asyncio.wait_for(second.done, 60)
        assert [step.name for step in second.steps] == ["queue"]
        assert (len(batcher), first.done.done()) == (0, False)
        held.go.set()
        assert await first.done == 1
        # Who was answered is not refused afterwards, and nothing is left of the count of costs.
        assert await batcher.submit(3).done == 3
        await asyncio.sleep(0.1)
        assert batcher._waiting_cost == 0
        batcher.stop()

    asyncio.run(run())
    assert held.batches == [[1], [3]]


def test_the_small_ones_do_not_wait_for_a_large_one_that_came_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, held = Clock(monkeypatch), Held()

    async def run() -> None:
        batcher = Batcher(lambda: held, QueueSettings(max_delay=1.0), cost=float)
        jobs = [batcher.submit(1).done]
        await asyncio.to_thread(held.reached.wait, 60)
        jobs += [batcher.submit(job).done for job in (2, 3, 1000, 4)]
        clock.now = 0.001
        held.go.set()
        assert await asyncio.gather(*jobs) == [1, 2, 3, 1000, 4]
        batcher.stop()

    asyncio.run(run())
    assert held.batches[:3] == [[1], [2, 3], [1000]]


def test_nobody_waits_for_what_is_abandoned() -> None:
    held = Held()

    async def run() -> None:
        batcher = Batcher(lambda: held, QueueSettings())
        jobs = [batcher.submit(1).done]
        await asyncio.to_thread(held.reached.wait, 60)
        jobs.append(batcher.submit(2).done)
        assert not batcher.stop(within=0.01)
        batcher.abandon()
        for job in jobs:
            with pytest.raises(Busy, match="stopping"):
                await job
        held.go.set()
        assert batcher.stop()

    asyncio.run(run())
    assert held.batches == [[1]]


def test_costs_count_users_and_events() -> None:
    def append(*users: str) -> Append:
        return Append([Event(user, "1", 1) for user in users], [1] * len(users))

    one = cost_of(append("ann"))
    assert cost_of(append(*["ann"] * 1000)) > 50 * one
    assert cost_of(append(*map(str, range(1000)))) > 500 * one
    assert cost_of(Recommend("ann", [0], None, 5, True)) < cost_of(
        Recommend("ann", [0, 1], None, 5, True)
    )


def test_a_handler_that_raises_fails_its_batch_only(caplog: pytest.LogCaptureFixture) -> None:
    class Brittle(Slow):
        def handle(self, tickets: Sequence[Ticket[int]]) -> None:
            if tickets[0].job == 0:
                raise RuntimeError("out of luck")
            super().handle(tickets)

    async def run() -> None:
        batcher = Batcher(Brittle, QueueSettings())
        with pytest.raises(RuntimeError, match="out of luck"):
            await batcher.submit(0).done
        assert await batcher.submit(1).done == 1
        batcher.stop()

    asyncio.run(run())
    assert "a batch of 1 requests failed" in caplog.text


def test_what_cannot_be_counted_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    def count(size: int) -> None:
        raise ValueError("no such number")

    async def run() -> None:
        batcher = Batcher(Slow, QueueSettings(), on_batch=count)
        for job in range(3):
            assert await asyncio.wait_for(batcher.submit(job).done, 60) == job
        batcher.stop()

    asyncio.run(run())
    assert caplog.text.count("a batch of 1 requests could not be counted") == 3


def test_nobody_waits_for_a_thread_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda raised: None)

    class Deadly(Slow):
        def handle(self, tickets: Sequence[Ticket[int]]) -> None:
            raise KeyboardInterrupt

    async def run() -> None:
        batcher = Batcher(Deadly, QueueSettings(max_batch=1))
        waiting = [batcher.submit(job).done for job in range(3)]
        found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
        assert [type(each) for each in found] == [Busy] * 3
        while batcher.alive:
            await asyncio.sleep(0.001)
        with pytest.raises(Busy):
            batcher.submit(4)

    asyncio.run(run())


def test_what_waits_is_done_before_a_stop() -> None:
    async def run() -> list[int]:
        batcher = Batcher(Slow, QueueSettings(max_batch=2))
        waiting = [batcher.submit(job).done for job in range(9)]
        batcher.stop()
        with pytest.raises(Busy):
            batcher.submit(9)
        assert not batcher.alive
        return await asyncio.gather(*waiting)

    assert asyncio.run(run()) == list(range(9))


def test_a_handler_that_cannot_be_made_says_why() -> None:
    def broken() -> Any:
        raise InputError("no such thing")

    with pytest.raises(InputError, match="no such thing"):
        Batcher(broken, QueueSettings())


@pytest.mark.parametrize(
    "bad", [{"max_batch": 0}, {"max_queue": 0}, {"max_wait": -1.0}, {"max_delay": 0.0}]
)
def test_bounds_that_bound_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        QueueSettings(**bad)
