"""Trainings in processes of their own, which save and stop when this one is asked to, or ends.

They read from a pipe whose other end this process alone holds. When that is closed, which the
system does for a process that is killed, they save and stop.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import IO, TypeVar

from hstu_xd.cores import usable_cores
from hstu_xd.training.interruption import STOPS_WITH_STDIN, StopRequest, stop_requests

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def training_command(
    command: str,
    data: Path,
    folder: Path,
    name: str,
    files: Sequence[Path],
    bindings: Sequence[str],
    *,
    resume: bool,
) -> list[str]:
    """Write the command that trains a run, or continues it where it stopped.

    Args:
        command: that trains runs of the kind.
        data: what it is trained on.
        folder: the run folder.
        name: what tables call the run.
        files: gin files.
        bindings: gin bindings on top of them.
        resume: whether there is a run to continue.
    """
    line = [sys.executable, "-m", "hstu_xd", command, "--data", str(data), "--out", str(folder)]
    return [*line, "--name", name, *recipe_options(files, bindings), *["--resume"] * resume]


def recipe_options(files: Sequence[Path], bindings: Sequence[str]) -> list[str]:
    """Write a recipe as options of a command."""
    options = [word for file in files for word in ("--gin_config_file", str(file))]
    return options + [word for each in bindings for word in ("--gin_bindings", each)]


def tracker_options(trackers: Sequence[str]) -> list[str]:
    """Write trackers as options of a command."""
    return [word for name in trackers for word in ("--tracker", name)]


# Seconds between two looks at a training that may be stopped.
_PAUSE = 0.5


class Trainings:
    """Runs trainings, some at a time; made by :func:`trainings`.

    Args:
        pool: a thread for each training that runs.
        request: whether this process was asked to stop.
        stdin: what the trainings read from.
        environment: what they see.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        request: StopRequest,
        stdin: IO[bytes],
        environment: dict[str, str],
    ) -> None:
        self._pool, self._request = pool, request
        self._stdin, self._environment = stdin, environment

    @property
    def stopped_by(self) -> int:
        """Number of the signal that asked to stop; 0: none did."""
        return self._request.signal

    def each(
        self, work: Callable[[_Item], _Result], items: Iterable[_Item]
    ) -> Iterator[tuple[_Item, _Result]]:
        """Do a piece of work for every item, and yield its result as it ends.

        What has not begun when this process is asked to stop does not begin any more.
        """

        def begin(item: _Item) -> list[_Result]:
            return [] if self.stopped_by else [work(item)]

        futures = {self._pool.submit(begin, item): item for item in items}
        for future in as_completed(futures):
            for result in future.result():
                yield futures[future], result

    def run(
        self,
        command: Sequence[str],
        should_stop: Callable[[], bool] = lambda: False,
        announce: Callable[[str], object] = lambda line: None,
    ) -> str:
        """Run a training to its end.

        Args:
            command: that trains.
            should_stop: asked again and again while it runs; True: the training is told to save and
                to stop.
            announce: called with every line about an epoch as it comes, in a thread of its own.

        Returns:
            The last line of what it said of an error; empty when it went well.
        """
        reading, writing = os.pipe()
        process = subprocess.Popen(
            command,
            env=self._environment,
            stdin=self._stdin,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(writing)
        told = Thread(target=_pass_on, args=(reading, announce))
        told.start()
        while True:
            try:
                _, said = process.communicate(timeout=_PAUSE)
                break
            except subprocess.TimeoutExpired:
                if should_stop():
                    process.send_signal(signal.SIGTERM)
                    _, said = process.communicate()
                    break
        told.join()
        lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
        return lines[-1] if process.returncode else ""


def _pass_on(reading: int, announce: Callable[[str], object]) -> None:
    """Read what a training prints to its end, and pass on what it says of epochs."""
    with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("epoch "):
                announce(line.rstrip())


def threads_of_each(jobs: int) -> str:
    """Return OMP_NUM_THREADS of each of so many trainings: as set, or its share of the cores."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // jobs))


@contextmanager
def trainings(jobs: int) -> Iterator[Trainings]:
    """Be ready to run so many trainings at a time; they share the processor's cores.

    When the block ends, however it does, trainings that still run save and stop.
    """
    environment = os.environ | {"OMP_NUM_THREADS": threads_of_each(jobs), STOPS_WITH_STDIN: "1"}
    request = StopRequest()
    theirs, ours = os.pipe()
    # The pool waits last: whatever ends the block ends the trainings first.
    with (
        ThreadPoolExecutor(jobs) as pool,
        os.fdopen(theirs, "rb") as stdin,
        os.fdopen(ours, "wb") as held,
        stop_requests(request, told=held.close),
    ):
        yield Trainings(pool, request, stdin, environment)
