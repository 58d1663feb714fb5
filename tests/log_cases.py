"""Logs of events under test, and a real PostgreSQL for the tests that need one."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest

from hstu_xd.serving.events.event_log import Event, EventLog, Logged

_DATABASES = count()


class PostgresServer:
    """A real server of a folder of its own, reached over a socket in it.

    Its programs refuse to run as root: they run as the user that the system's package has made.
    """

    def __init__(self) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        found = shutil.which("postgres") or (programs[-1] if programs else None)
        missing = [] if find_spec("psycopg") else ["psycopg"]
        self._user: str | None = None
        if os.geteuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            self._user = "postgres" if "postgres" in names else None
            missing += [] if self._user and shutil.which("runuser") else ["user postgres"]
        if found is None or missing:
            missing += [] if found else ["postgres"]
            pytest.skip(f"no {' and no '.join(missing)} here: logs in PostgreSQL are NOT covered")
        self._programs = Path(found).parent
        # pytest's own folders are closed to other users.
        self.folder = Path(tempfile.mkdtemp(prefix="hstu-xd-"))
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        self._data = self.folder / "data"
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", "postgres", "--no-sync")

    def start(self) -> None:
        options = f"-c listen_addresses='' -k {self.folder} -c shared_buffers=16MB"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self._data), "-w", "-l", log, "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it; "immediate" is how it ends when it is killed."""
        self._run("pg_ctl", "-D", str(self._data), "-w", "-m", mode, "stop")

    def pause(self, which: int) -> None:
        """Send a signal to all of its processes, so that they stop or go on."""
        parent = int((self._data / "postmaster.pid").read_text().split()[0])
        children = subprocess.run(
            ["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False
        )
        for process in [parent, *map(int, children.stdout.split())]:
            os.kill(process, which)

    def database(self) -> str:
        """The URL of a new database."""
        name = f"test{next(_DATABASES)}"
        self.run_sql(f"CREATE DATABASE {name}", "postgres")
        return self.url(name)

    def url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def run_sql(self, command: str, database: str) -> None:
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(command)

    def ask_sql(self, query: str, url: str) -> list[tuple]:
        import psycopg

        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(query).fetchall()

    def remove(self) -> None:
        if (self._data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        if self._user is not None:
            command = ["runuser", "-u", self._user, "--", *command]
        done = subprocess.run(
            command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
        )
        assert done.returncode == 0, done.stderr.decode()


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A server that runs, and is removed in the end."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


def known(log: EventLog, user: str = "ann", last: int | None = None) -> Logged:
    (found,) = log.read([user], last)
    return found


def numbered(count: int, user: str = "ann") -> list[Event]:
    return [Event(user, str(number), number) for number in range(count)]
