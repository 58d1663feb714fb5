"""Random events from many users while service and Redis are killed: nothing accepted is lost.

Nor does anything count twice of what is sent again.

HSTU_XD_SOAK sets the number of events; the whole soak is 200,000.
"""

import http.client
import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from service_client import ITEMS, MODEL, WINDOW, window_of, write_run
from service_process import ServiceProcess
from store_cases import redis_server

from hstu_xd.errors import HstuXdError

EVENTS = int(os.environ.get("HSTU_XD_SOAK", "1500"))
USERS = max(40, EVENTS // 40)
CLIENTS, KILLS, LARGEST = 4, 3 if EVENTS < 10_000 else 20, 24
PATIENCE = 120.0
# Share of the requests that are sent again after they were answered.
REPEATED = 0.2
Row = dict[str, Any]


class Writer(Thread):
    """Sends events of its own users and remembers which were taken."""

    def __init__(self, service: ServiceProcess, number: int, stop: Event) -> None:
        super().__init__(daemon=True)
        self._service, self._stop_sign = service, stop
        self._random = random.Random(number)
        self.known: dict[str, list[Row]] = {f"u{u}": [] for u in range(number, USERS, CLIENTS)}
        self.taken = self._sent = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while self.taken < EVENTS // CLIENTS and not self._stop_sign.is_set():
                self._send([self._draw() for _ in range(self._random.randint(1, LARGEST))])
                self._look()
        except BaseException as error:
            self.error = error

    def _draw(self) -> Row:
        user = self._random.choice(list(self.known))
        return {"user": user, "item": str(self._random.randint(1, ITEMS))}

    def _send(self, rows: list[Row]) -> None:
        last = {row["user"]: self._last(row["user"]) for row in rows}
        for row in rows:
            last[row["user"]] += self._random.randint(0, 5000)
            row["timestamp"] = last[row["user"]]
        self._sent += 1
        key = f"{self.name} {self._sent}"
        status, answer = self._ask("POST", "/v1/events", {"events": rows}, key)
        if status is None:
            # It died with the request under way: all of the events were taken, or none.
            present = self._present(rows[0]["user"])
            mine = [_event(row) for row in rows if row["user"] == rows[0]["user"]]
            known = [_event(row) for row in self.known[rows[0]["user"]]]
            assert present in (known, known + mine)
            status = 200 if present != known else 503
        assert status in (200, 503), answer
        if status == 200:
            self.taken += len(rows)
            for row in rows:
                self.known[row["user"]].append(row)
            if self._random.random() < REPEATED:
                status, answer = self._ask("POST", "/v1/events", {"events": rows}, key)
                if status == 200:
                    assert answer == {"accepted": 0, "repeated": len(rows)}

    def _look(self) -> None:
        user = self._random.choice(list(self.known))
        status, answer = self._ask(
            "POST", "/v1/recommend", {"user": user, "domains": ["books"], "k": 3}
        )
        assert status in (None, 200, 503), answer

    def _present(self, user: str) -> list[tuple[str, int]]:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            status, answer = self._ask("GET", f"/v1/users/{user}/history?limit=1000")
            if status == 200:
                return [_event(row) for row in answer["events"]]
            time.sleep(0.05)
        raise HstuXdError("the service did not come back")

    def _ask(
        self, method: str, path: str, body: Any = None, key: str | None = None
    ) -> tuple[int | None, Any]:
        headers = None if key is None else {"idempotency-key": key}
        try:
            return self._service.ask(method, path, body, headers)
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
            return None, None

    def _last(self, user: str) -> int:
        return self.known[user][-1]["timestamp"] if self.known[user] else 0


def _event(row: Row) -> tuple[str, int]:
    return row["item"], row["timestamp"]


def _vectors(histories: list[list[Row]], domain: int) -> torch.Tensor:
    """(B, K) user vectors by the full encoder, each on its window."""
    items, times = torch.zeros(2, len(histories), WINDOW, dtype=torch.int64)
    for row, known in enumerate(histories):
        window = window_of(known)
        items[row, : len(window)] = torch.tensor([int(e["item"]) for e in window])
        times[row, : len(window)] = torch.tensor([e["timestamp"] for e in window])
    with torch.inference_mode():
        return MODEL.encode(items, times, torch.full((len(histories),), domain))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_nothing_accepted_is_lost(tmp_path: Path, kind: str) -> None:
    options = ["--events", str(tmp_path / "events.sqlite"), "--when-store-fails", "rebuild"]
    with ExitStack() as redis, ExitStack() as stack:
        if kind == "redis":
            options += ["--store", f"unix://{redis.enter_context(redis_server(tmp_path))}"]
        service = stack.enter_context(ServiceProcess(write_run(tmp_path / "run"), *options))
        stop = Event()
        stack.callback(stop.set)
        writers = [Writer(service, number, stop) for number in range(CLIENTS)]
        for writer in writers:
            writer.start()
        for number in range(KILLS):
            goal = EVENTS * (number + 1) // (KILLS + 1)
            while sum(w.taken for w in writers) < goal and all(w.is_alive() for w in writers):
                time.sleep(0.01)
            if kind == "redis" and number % 2:
                redis.close()
                redis.enter_context(redis_server(tmp_path))
            else:
                service.end(signal.SIGKILL)
                service.start()
        for writer in writers:
            writer.join()
            assert writer.error is None, writer.error
        known = {user: rows for writer in writers for user, rows in writer.known.items() if rows}
        assert sum(map(len, known.values())) >= EVENTS // CLIENTS * CLIENTS
        for domain, name in enumerate(MODEL.catalog.domain_names):
            _compare(service, known, domain, name)


def _compare(service: ServiceProcess, known: dict[str, list[Row]], domain: int, name: str) -> None:
    items = MODEL.catalog.items_of(domain)
    with torch.inference_mode():
        expected = _vectors(list(known.values()), domain) @ MODEL.item_vectors(items).T
    tokens = [str(item) for item in items.tolist()]
    for user, scores in zip(known, expected.tolist()):
        status, answer = service.ask(
            "POST", "/v1/score", {"user": user, "domain": name, "items": tokens}
        )
        assert status == 200, answer
        assert answer["scores"] == pytest.approx(scores, abs=1e-5), user
