"""Several processes that serve one run on one port: started, watched, started again, and drained.

They share the socket, the event log and nothing else: the kernel gives a connection to any of them,
and any of them takes any user. One that dies is started again; the others go on meanwhile.
A new model comes to all of them or to none, see :mod:`hstu_xd.serving.http.worker_swaps`.

On Linux a worker is a fork of the process that watches, which has imported all that a worker needs:
it takes the time of loading the run, and memory for what it changes. That process therefore has no
threads of its own, computes nothing, and loads nothing of a run.
"""

import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import Any

from hstu_xd.cores import usable_cores
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.events.open_log import is_postgres, open_log, shown_log
from hstu_xd.serving.http import access_log, server
from hstu_xd.serving.http.live_model import load_engine
from hstu_xd.serving.http.metrics import forget_process, shared_counts
from hstu_xd.serving.http.service import Service
from hstu_xd.serving.http.settings import LogSettings, ServiceSettings
from hstu_xd.serving.http.shadow import Shadow
from hstu_xd.serving.http.worker_swaps import SwapLeader, WorkerSwaps

_log = logging.getLogger(__name__)

# Seconds between two looks at the workers, and from one start of a worker to the next at least.
_LOOK, _AGAIN = 0.2, 1.0
# Seconds that a worker gets to end beyond what its requests get.
_ENDING = 5.0
# Elsewhere libraries of the system do not survive a fork.
_PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Work:
    """What each worker does.

    Attributes:
        run: folder of the run.
        settings: of the service.
        allow_imports: whether the run may import modules of its own.
        log: what is written to stderr.
        shadow: run whose answers are compared with those of the workers; None: no run's.
        serves: the run that all workers serve at the moment; None: the one of the command.
    """

    run: Path
    settings: ServiceSettings
    allow_imports: bool
    log: LogSettings
    shadow: Path | None = None
    serves: Path | None = None

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
        threads = settings.states.threads or max(1, usable_cores() // count)
        return replace(
            self, settings=replace(settings, states=replace(settings.states, threads=threads))
        )


@dataclass
class _Worker:
    """A process, the line to it, and when it was started, by ``time.monotonic``."""

    ready: Event = field(default_factory=_PROCESSES.Event)
    process: Any = None
    line: Connection | None = None
    started: float = 0.0

    def tell(self, message: object) -> None:
        """Send a message; one that has died is noticed otherwise."""
        assert self.line is not None
        with suppress(OSError):
            self.line.send(message)


class Workers:
    """The processes, watched by the one that has started them.

    Args:
        work: of each.
        count: of processes.
        sock: that all of them listen on.
    """

    def __init__(self, work: Work, count: int, sock: socket.socket) -> None:
        self._work, self._sock = work, sock
        self._stopping = self._reload = False
        self._workers = [_Worker() for _ in range(count)]
        self._first = work.run.resolve()
        self._leader = SwapLeader(
            work.run,
            count,
            lambda number, message: self._workers[number].tell(message),
            work.shadow,
        )

    def run(self, announce: Callable[[], None]) -> None:
        """Serve until a signal comes, then let all workers finish what they have taken.

        Args:
            announce: told when all of them take requests.

        Raises:
            HstuXdError: a worker did not start.
        """
        for which in (signal.SIGTERM, signal.SIGINT):
            signal.signal(which, self._stop)
        signal.signal(signal.SIGHUP, self._ask_reload)
        # No worker looks through what all of them share, which would copy it.
        gc.collect()
        gc.freeze()
        with shared_counts():
            self._run(announce)

    def _run(self, announce: Callable[[], None]) -> None:
        try:
            for number in range(len(self._workers)):
                self._start(number)
            while not self._stopping and not all(w.ready.is_set() for w in self._workers):
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
        """Wait a little for workers to say something or to die, and start those that did again."""
        lines: dict[Any, int] = {w.line: number for number, w in enumerate(self._workers)}
        watched = [*lines, *(worker.process.sentinel for worker in self._workers)]
        for line in wait(watched, timeout=_LOOK):
            with suppress(EOFError, OSError):
                if isinstance(line, Connection):
                    self._leader.hear(lines[line], line.recv())
        if self._reload:
            self._reload = False
            self._leader.begin()
        self._leader.look()
        for number in self._dead():
            if self._stopping:
                return
            worker = self._workers[number]
            _log.warning(
                "worker %d ended with status %s; it is started again",
                number,
                worker.process.exitcode,
            )
            forget_process(worker.process.pid)
            self._leader.lose(number)
            # One that cannot live is not started without a pause.
            time.sleep(max(0.0, worker.started + _AGAIN - time.monotonic()))
            if not self._stopping:
                self._start(number)

    def _dead(self) -> list[int]:
        return [n for n, worker in enumerate(self._workers) if not worker.process.is_alive()]

    def _start(self, number: int) -> None:
        worker = self._workers[number]
        if worker.line is not None:
            worker.line.close()
        worker.line, other = _PROCESSES.Pipe()
        work = replace(self._work, serves=self._leader.run, shadow=self._leader.shadow)
        if work.serves != self._first:
            # The store that the command names is that of the run that it names.
            work = replace(work, settings=replace(work.settings, data=None))
        worker.process = _PROCESSES.Process(
            target=_serve, args=(work, number, self._sock, other, worker.ready), daemon=True
        )
        worker.started = time.monotonic()
        with _signals_held():
            worker.process.start()
        other.close()
        if self._stopping:
            # The signal came too early for it.
            worker.process.terminate()

    def _stop(self, which: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at once where Ctrl-C comes after it."""
        at_once = self._stopping and which == signal.SIGINT
        self._stopping = True
        self._tell_all(signal.SIGINT if at_once else signal.SIGTERM)

    def _ask_reload(self, which: int, frame: FrameType | None) -> None:
        """Serve what the folder of the command holds now."""
        self._reload = True

    def _tell_all(self, which: signal.Signals) -> None:
        """Send a signal to the workers that are alive."""
        for worker in self._workers:
            if worker.process is not None and worker.process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(worker.process.pid, which)

    def _end(self) -> None:
        """Drain all workers at once; what does not end in time is killed."""
        if not self._stopping:
            self._tell_all(signal.SIGTERM)
        until = time.monotonic() + self._work.settings.drain_seconds + _ENDING
        for process in [worker.process for worker in self._workers if worker.process is not None]:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                _log.warning("a worker did not end in time; what was accepted is in the log")
                process.kill()
                process.join()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Have signals wait, also those to a process that is started meanwhile, until it takes them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(work: Work, number: int, sock: socket.socket, line: Connection, ready: Event) -> None:
    """Be one of the workers."""
    for which in _SIGNALS:
        signal.signal(which, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # Ctrl-C in a terminal is for the process that watches: it tells the others.
    os.setsid()
    access_log.set_up(work.log, number)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run, imports = work.serves or work.run, work.allow_imports
    try:
        engine = load_engine(run, work.settings, allow_imports=imports)
        service = Service(engine, work.settings)
    except HstuXdError as error:
        _log.error("%s", error)
        raise SystemExit(error.exit_code) from None
    if work.shadow is not None:
        _follow(service, work, work.shadow, ready)
    swaps = WorkerSwaps(service, work.run, line, allow_imports=imports, log=work.log)
    server.serve(service, sock, swaps, ready.set, shared=True)


def _follow(service: Service, work: Work, run: Path, ready: Event) -> None:
    """Have a run answer in the shadow of this worker.

    Without it the service does not start; a worker that is started again goes without where it
    cannot be had any more.
    """
    try:
        service.shadow = Shadow(service, run, allow_imports=work.allow_imports, log=work.log)
    except HstuXdError as error:
        _log.error("%s", error)
        if not ready.is_set():
            raise SystemExit(error.exit_code) from None


def _end_with_parent() -> None:
    """Drain where the process that watches was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Its end of a pipe would tell nothing: workers that were forked later have it, too.
    while os.getppid() == parent.pid:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
