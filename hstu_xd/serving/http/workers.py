"""Several processes that serve one run on one port: started, watched, started again, and drained.

They share the socket, the event log and nothing else: the kernel gives a connection to any of them,
and any of them takes any user. One that dies is started again; the others go on meanwhile.
"""

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import Any

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.events.open_log import is_postgres, open_log, shown_log
from hstu_xd.serving.http.settings import ServiceSettings

_log = logging.getLogger(__name__)

# Seconds between two looks at the workers, and until one that died is started again.
_LOOK, _AGAIN = 0.2, 1.0
# Seconds that a worker gets to end beyond what its requests get.
_ENDING = 5.0
# Neither threads nor connections survive a fork.
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Work:
    """What each worker does.

    Attributes:
        run: folder of the run.
        settings: of the service.
        allow_imports: whether the run may import modules of its own.
        log_level: of what is written to stderr.
    """

    run: Path
    settings: ServiceSettings
    allow_imports: bool
    log_level: str

    def share(self, count: int) -> "Work":
        """Return the work of each of several workers, which share the cores and the log.

        Raises:
            InputError: the log is a file, which one process owns.
            HstuXdError: the log cannot be opened.
        """
        settings = self.settings
        if not is_postgres(settings.events):
            raise InputError(
                f"--workers {count} with the log {shown_log(settings.events)}, which one process "
                "owns; give --events postgresql://HOST:PORT/DATABASE, or --workers 1"
            )
        # What is wrong with it is said once, and its schema is made before anybody needs it.
        open_log(settings.events).close()
        threads = settings.states.threads or max(1, (os.cpu_count() or 1) // count)
        return replace(
            self, settings=replace(settings, states=replace(settings.states, threads=threads))
        )


class Workers:
    """The processes, watched by the one that has started them.

    Args:
        work: of each.
        count: of processes.
        sock: that all of them listen on.
    """

    def __init__(self, work: Work, count: int, sock: socket.socket) -> None:
        self._work, self._sock = work, sock
        self._stopping = False
        self._processes: list[Any] = []
        self._ready: list[Event] = [_SPAWN.Event() for _ in range(count)]

    def run(self, announce: Callable[[], None]) -> None:
        """Serve until a signal comes, then let all workers finish what they have taken.

        Args:
            announce: told when all of them take requests.

        Raises:
            HstuXdError: a worker did not start.
        """
        for which in (signal.SIGTERM, signal.SIGINT):
            signal.signal(which, self._stop)
        try:
            self._processes = [self._start(number) for number in range(len(self._ready))]
            while not self._stopping and not all(ready.is_set() for ready in self._ready):
                if self._dead():
                    raise HstuXdError("a worker did not start; it says why above")
                time.sleep(_LOOK)
            if not self._stopping:
                announce()
            while not self._stopping:
                self._watch()
        finally:
            self._end()

    def _watch(self) -> None:
        """Wait a little for workers to die, and start those that did again."""
        wait([process.sentinel for process in self._processes], timeout=_LOOK)
        for number in self._dead():
            if self._stopping:
                return
            _log.warning(
                "worker %d ended with status %s; it is started again",
                number,
                self._processes[number].exitcode,
            )
            time.sleep(_AGAIN)
            self._processes[number] = self._start(number)

    def _dead(self) -> list[int]:
        return [n for n, process in enumerate(self._processes) if not process.is_alive()]

    def _start(self, number: int) -> Any:
        process = _SPAWN.Process(
            target=_serve, args=(self._work, self._sock, self._ready[number]), daemon=True
        )
        process.start()
        return process

    def _stop(self, which: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at once at the second one."""
        if self._stopping:
            self._terminate()
        self._stopping = True

    def _terminate(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.terminate()

    def _end(self) -> None:
        """Drain all workers at once; what does not end in time is killed."""
        self._terminate()
        until = time.monotonic() + self._work.settings.drain_seconds + _ENDING
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                _log.warning("a worker did not end in time; what was accepted is in the log")
                process.kill()
                process.join()


def _serve(work: Work, sock: socket.socket, ready: Event) -> None:
    """Be one of the workers."""
    from hstu_xd.serving.http import server
    from hstu_xd.serving.http.service import Served, Service

    # Ctrl-C in a terminal is for the process that watches: it tells the others.
    os.setsid()
    logging.basicConfig(level=work.log_level.upper(), format="hstu-xd: %(message)s")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        served = Served.from_run(work.run, work.settings, allow_imports=work.allow_imports)
        service = Service(served, work.settings)
    except HstuXdError as error:
        _log.error("%s", error)
        raise SystemExit(error.exit_code) from None
    server.serve(service, sock, ready.set)


def _end_with_parent() -> None:
    """Drain where the process that watches was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
