"""``hstu-xd serve`` as a real process, asked over a real connection."""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_PATIENCE = 120.0
# However slow the machine is, nobody has waited too long; options given later win.
_PATIENT = ["--max-delay", "60000"]


class ServiceProcess:
    """A running service; it can be ended at any moment and started again on the same port.

    Args:
        run: run folder.
        options: of the command.
        token: that the service asks for and clients send, unless they send headers of their own.
    """

    def __init__(self, run: Path, *options: str, token: str | None = None) -> None:
        self._command = [sys.executable, "-m", "hstu_xd", "serve", str(run)]
        self._command += [*_PATIENT, *options]
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.headers = {}
        if token is not None:
            self._environment["HSTU_XD_TOKEN"] = token
            self.headers["authorization"] = f"Bearer {token}"
        self.port = 0
        self.start()

    def __enter__(self) -> "ServiceProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # A file: nobody reads a pipe meanwhile, and a service that says much would wait for it.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the process has ended
        self._process = subprocess.Popen(
            [*self._command, "--port", str(self.port)],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("serving "), line + self.end()[1]
        self.port = int(line.rpartition(":")[2])

    def workers(self) -> list[int]:
        """Process ids of the workers, which are the children that lead a session of their own."""
        found = subprocess.run(
            ["ps", "-o", "pid=,sid=,stat=", "--ppid", str(self._process.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        rows = [line.split() for line in found.stdout.splitlines()]
        return [int(pid) for pid, session, state in rows if pid == session and state[0] != "Z"]

    def kill_worker(self, worker: int) -> None:
        """Kill a worker, and wait until another one is started in its place."""
        before = self.workers()
        os.kill(worker, signal.SIGKILL)
        self.wait_for_workers(len(before), without=worker)

    def wait_for_workers(self, count: int, without: int | None = None) -> list[int]:
        """Wait until there are so many workers, of which one is none any more; return them."""
        deadline = time.monotonic() + _PATIENCE
        while len(found := self.workers()) < count or without in found:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return found

    def resident_bytes(self) -> int:
        """Bytes of memory that it has now."""
        (pages,) = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1:2]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def send(self, which: signal.Signals) -> None:
        self._process.send_signal(which)

    def end(self, which: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Exit status, and what was said on stderr."""
        if self._process.poll() is None:
            self.send(which)
        self._process.communicate(timeout=_PATIENCE)
        self._said.seek(0)
        return self._process.returncode, self._said.read()

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and content of the answer.

        Raises:
            OSError, http.client.HTTPException: the service ended meanwhile.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        try:
            text = None if body is None else json.dumps(body)
            sent = self.headers if headers is None else headers
            connection.request(method, path, text, {"content-type": "application/json"} | sent)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


@contextmanager
def asked_all_the_while(
    process: ServiceProcess, body: dict[str, Any], wanted: Sequence[Sequence[float]]
) -> Iterator[None]:
    """Ask for scores by several threads; every answer is one of those that are wanted."""
    stop, statuses, wrong = threading.Event(), set(), []

    def load() -> None:
        while not stop.is_set():
            status, answer = process.ask("POST", "/v1/score", body)
            statuses.add(status)
            found = answer.get("scores", [])
            if not any(found == pytest.approx(row, abs=1e-5) for row in wanted):
                wrong.append(answer)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert (statuses, wrong) == ({200}, [])
