"""``serve --workers``: any takes any user, any may be killed, and all end with their parent."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from log_cases import PostgresServer, postgres_server
from service_client import events, scores, write_run
from service_process import ServiceProcess

from hstu_xd.cli import app
from hstu_xd.serving.events.open_log import open_log

WORKERS = 2


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


class Writer(threading.Thread):
    """Sends a user's events in order, each until it is taken."""

    def __init__(self, process: ServiceProcess, user: str, count: int) -> None:
        super().__init__(daemon=True)
        self._process, self._user, self._rows = process, user, events(count, user)
        self.refused = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for number, row in enumerate(self._rows):
                self._send(row | {"id": str(number)})
        except BaseException as error:
            self.error = error

    def _send(self, row: dict) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                status, answer = self._process.ask("POST", "/v1/events", {"events": [row]})
            except (OSError, http.client.HTTPException):
                status, answer = 503, None
            if status == 200:
                return
            assert status == 503, answer
            self.refused += 1
            time.sleep(0.02)
        raise AssertionError("nobody takes the event")


def counts(process: ServiceProcess) -> dict[str, float]:
    """What /metrics says, by name and labels."""
    with urlopen(Request(f"{process.url}metrics", headers=process.headers)) as answer:
        lines = answer.read().decode().splitlines()
    rows = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


def test_whichever_worker_is_asked_counts_for_all(run: Path, server: PostgresServer) -> None:
    with ServiceProcess(run, "--events", server.database(), "--workers", "2") as process:
        users = [f"u{number}" for number in range(20)]
        for user in users:
            # Each over a connection of its own: the kernel gives it to any worker.
            assert process.ask("POST", "/v1/events", {"events": events(3, user)})[0] == 200
            assert process.ask("GET", f"/v1/users/{user}/history")[0] == 200
        names = [
            f'hstu_xd_requests_total{{route="{route}",status="200"}}'
            for route in ("/v1/events", "/v1/users/{user}/history")
        ]
        # A worker counts a request when its answer is on the way already.
        deadline = time.monotonic() + 60
        while [counts(process)[name] for name in names] != 2 * [len(users)]:
            assert time.monotonic() < deadline
        for _ in range(6):
            found = counts(process)
            assert [found[name] for name in names] == 2 * [len(users)]
            assert found["hstu_xd_states_users"] == len(users)
            assert found["hstu_xd_states_bytes"] > 0
        os.kill(process.workers()[0], signal.SIGKILL)
        os.kill(process.workers()[-1], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError, http.client.HTTPException):
                found = counts(process)
                if found["hstu_xd_states_users"] == 0:
                    break
            time.sleep(0.1)
        # What is counted stays; what the dead had in memory is gone.
        name = 'hstu_xd_requests_total{route="/v1/events",status="200"}'
        assert (found[name], found["hstu_xd_states_users"]) == (len(users), 0)
        assert process.end()[0] == 0


def test_a_line_of_the_log_names_its_worker_also_of_one_that_was_started_again(
    run: Path, server: PostgresServer
) -> None:
    options = ["--log-level", "info", "--log-format", "json", "--workers", "2"]
    with ServiceProcess(run, "--events", server.database(), *options) as process:
        for victim in process.workers():
            process.kill_worker(victim)
        asked, deadline = 0, time.monotonic() + 60
        while time.monotonic() < deadline and asked < 20:
            with suppress(OSError, http.client.HTTPException):
                assert process.ask("GET", "/v1/domains")[0] == 200
                asked += 1
        code, said = process.end()
    assert code == 0
    lines = [json.loads(line) for line in said.splitlines()]
    answered = [line for line in lines if line.get("path") == "/v1/domains"]
    assert len(answered) == 20
    assert {line["worker"] for line in answered} <= {0, 1}
    ended = [line for line in lines if "it is started again" in line.get("message", "")]
    assert len(ended) == 2
    assert not any("worker" in line for line in ended)


@pytest.mark.slow
def test_workers_are_killed_and_nothing_is_lost_or_doubled(
    run: Path, tmp_path: Path, server: PostgresServer
) -> None:
    log, count, users = server.database(), 60, ["ann", "bob", "eve", "joe"]
    with ServiceProcess(run, "--events", log, "--workers", str(WORKERS)) as process:
        assert len(process.workers()) == WORKERS
        writers = [Writer(process, user, count) for user in users]
        for writer in writers:
            writer.start()
        for victim in range(2):
            time.sleep(0.3)
            process.kill_worker(process.workers()[victim % WORKERS])
        for writer in writers:
            writer.join()
            assert writer.error is None, writer.error
        wanted = scores(events(count), 0)
        for user in users:
            # Several connections: whichever worker answers, it answers the same.
            for _ in range(4):
                path = f"/v1/users/{user}/history?limit=1000"
                status, answer = process.ask("GET", path)
                assert status == 200
                times = [row["timestamp"] for row in answer["events"]]
                assert times == [1000 * number for number in range(count)]
                body = {"user": user, "domain": "books", "items": list(wanted)}
                status, answer = process.ask("POST", "/v1/score", body)
                assert status == 200
                assert answer["scores"] == pytest.approx(list(wanted.values()), abs=1e-5)
        counted = counts(process)
        # What a worker answers or counts in the moment it is killed, its client asks for again.
        taken = counted['hstu_xd_requests_total{route="/v1/events",status="200"}']
        assert abs(taken - count * len(users)) <= 2 * len(users)
        began = time.monotonic()
        code, said = process.end()
        assert time.monotonic() - began < 10
    assert code == 0, said
    assert "ended with status -9; it is started again" in said
    assert "Traceback" not in said


def test_workers_end_with_the_process_that_watches_them(run: Path, server: PostgresServer) -> None:
    with ServiceProcess(run, "--events", server.database(), "--workers", "2") as process:
        found = process.workers()
        process.end(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in found):
        time.sleep(0.05)
    assert len(found) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


def test_a_signal_to_all_processes_at_once_lets_them_finish(
    run: Path, server: PostgresServer
) -> None:
    """As systemd sends it; a worker gets it from the process that watches, too."""
    log = server.database()
    body = json.dumps({"events": events(1)}).encode()
    head = f"POST /v1/events HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\n\r\n"
    with ServiceProcess(run, "--events", log, "--workers", str(WORKERS)) as process:
        with socket.create_connection(("127.0.0.1", process.port), timeout=60) as client:
            client.sendall(head.encode() + body[:5])
            deadline = time.monotonic() + 60
            # The one that asks is another one.
            while counts(process)["hstu_xd_active_requests"] < 2:
                assert time.monotonic() < deadline
            began = time.monotonic()
            for worker in process.workers():
                os.kill(worker, signal.SIGTERM)
            process.send(signal.SIGTERM)
            time.sleep(0.5)
            client.sendall(body[5:])
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        code, said = process.end()
        assert time.monotonic() - began < 10
    assert (code, "Traceback" in said, "again" in said) == (0, False, False), said
    opened = open_log(log)
    assert len(opened.read(["ann"])[0].events) == 1
    opened.close()


def test_workers_need_a_log_that_they_can_share(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["serve", str(run), "--workers", "2", "--events", str(tmp_path / "e")]) == 2
    said = capsys.readouterr().err
    assert "which one process owns; give --events postgresql://" in said


def test_a_worker_that_cannot_start_stops_the_command(
    run: Path, server: PostgresServer, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--events", server.database(), "--workers", "2", "--port", "0", "--store", "disk"]
    assert app.run(["serve", str(run), *options]) == 1
    assert "a worker did not start; it says why above" in capsys.readouterr().err
